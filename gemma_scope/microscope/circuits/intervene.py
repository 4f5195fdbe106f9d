"""Latents changed inside the model: steer, clamp, ablate, project out.

  add      f'_i = f_i + s m_i     clamp  f'_i = s m_i     ablate  f'_i = 0
           y' = y + sum_i (f'_i - f_i) W_dec[i]
  project_out  y' = y - (projection of y onto the span of the W_dec[i])

y is the model's activation at the SAE's target and m_i the latent's largest
value on the indexed text, so that a strength s has the same scale for every
latent. The reconstruction error is kept: an edit that changes no latent returns
its input. Tokens that no SAE was trained on (BOS, padding) are not edited.

A latent is encoded before its change is written, so its value never depends on
its own change. In an SAE over several layers, the latents of later layers are
encoded from the changed activations.

A crosscoder's reconstruction of the residual stream at a later layer includes
what its latents wrote at earlier layers. Its changes are therefore written only
at the latent's own layer, and the model carries them on. The changes of all
other SAEs are written at every layer that the latent writes to.

Each row of a batch has its own changes, so that a dose-response curve, or the
ablation of each of many latents, takes one pass. The control of a change adds a
vector of equal norm at the same tokens, along another latent's decoder; for
project_out, it projects out another latent's decoder.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import release, sites
from gemma_scope import sae as sae_lib
from gemma_scope.activations import outliers
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import hooks, splice
from gemma_scope.sae import released

KINDS = ('none', 'add', 'clamp', 'ablate', 'project_out')
_NONE, _ADD, _CLAMP, _ABLATE, _PROJECT = range(len(KINDS))
STRONGEST = 1e4


@dataclasses.dataclass(frozen=True)
class Change:
  """A change of one latent.

  Attributes:
    feature: the latent, counted over all layers, layer-major.
    kind: one of `KINDS`.
    strength: for add and clamp, in units of the latent's largest value.
  """

  feature: int
  kind: str = 'ablate'
  strength: float = 1.0


class Rows(NamedTuple):
  """The changes of each row of a batch as arrays; at most K per row."""

  feature_BK: np.ndarray
  kind_BK: np.ndarray
  value_BK: np.ndarray  # for add and clamp, in units of the activation
  writer_BK: np.ndarray  # the latent whose decoder is written (controls)
  gain_BK: np.ndarray  # scales that decoder to equal norm

  @property
  def projects(self) -> bool:
    """Whether any change is project_out."""
    return bool((np.asarray(self.kind_BK) == _PROJECT).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """An SAE in its model.

  Attributes:
    gemma, lm_params: the model.
    params: the SAE's parameters, on the devices.
    place: the sites that the SAE reads and writes.
    max_F: each latent's largest value, layer-major; 0 if it never fired.
    special: ids of tokens that are not edited.
    norm_bounds: the card's outlier rule (`activations.outliers`). Outlier
      tokens are left out of readings and attributions, and are not changed.
  """

  gemma: lm.Gemma
  lm_params: lm.Params
  params: Mapping[str, jax.Array]
  place: sites.Wiring
  max_F: np.ndarray
  special: tuple[int, ...] = (0, 1, 2)
  norm_bounds: outliers.Bounds = dataclasses.field(default_factory=dict)

  @property
  def width(self) -> int:
    """Number of latents, summed over layers."""
    return self.params['b_enc'].size

  @property
  def carried(self) -> bool:
    """Whether later layers reconstruct what a latent wrote earlier."""
    return carried(self.place)


def carried(place: sites.Wiring) -> bool:
  """Whether the SAE is a crosscoder of the residual stream."""
  return place.type == 'crosscoder' and place.kind.startswith('resid')


def subject(
  model: tuple[lm.Gemma, lm.Params],
  sae: release.Released,
  max_F: np.ndarray,
  special: Collection[int] = (0, 1, 2),
  mesh: Mesh | None = None,
) -> Subject:
  """Puts a released SAE on the devices, beside its model.

  Args:
    model: the language model and its parameters.
    sae: the SAE.
    max_F: the largest activation of each latent, from the SAE's index.
    special: tokens that the SAE does not apply to.
    mesh: the devices; None for one.

  Raises:
    ValueError: the SAE is a TopK SAE over several layers, whose active latents
      are unknown until all layers are read; or `max_F` is of another SAE.
  """
  place, params = sae.wiring, sae.load()
  if place.several and 'k' in params:
    raise ValueError(
      'A TopK SAE over several layers cannot be edited inside a forward pass: '
      'its active latents depend on all layers, but the edit of an early layer '
      'comes before later layers are read. Use a threshold (BatchTopK).'
    )
  if len(max_F) != params['b_enc'].size:
    raise ValueError(
      f'max_F has {len(max_F):,} latents, but the SAE has '
      f'{params["b_enc"].size:,}.'
    )
  return Subject(
    *model,
    params=released.put(params, mesh),
    place=place,
    max_F=np.asarray(max_F, np.float32),
    special=tuple(sorted(map(int, special))),
    norm_bounds=outliers.norm_bounds(sae.card),
  )


def counted(
  subject: Subject, tokens_PT: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The tokens that the SAE applies to, and the outlier tokens.

  Returns:
    Two bool [P, T]: neither special nor an outlier; an outlier.
  """
  usual_PT = ~np.isin(tokens_PT, subject.special)
  bounds = subject.norm_bounds
  if not bounds:
    return usual_PT, np.zeros_like(usual_PT)
  taps = splice.taps(
    subject.gemma, subject.lm_params, tokens_PT, tuple(sorted(bounds))
  )
  outlier_PT = usual_PT & np.asarray(outliers.is_outlier(taps, bounds))
  return usual_PT & ~outlier_PT, outlier_PT


def rows(subject: Subject, changes: Sequence[Sequence[Change]]) -> Rows:
  """The changes of each row as arrays, padded to the same number per row.

  Raises:
    ValueError: the kind or latent is unknown, a row names a latent twice, the
      strength is out of range, or a strength is given for a latent that never
      fired.
  """
  row_length = max([1, *map(len, changes)])
  shape = len(changes), row_length
  feature_BK, kind_BK = (np.zeros(shape, np.int32) for _ in range(2))
  value_BK = np.zeros(shape, np.float32)
  for b, row in enumerate(changes):
    features = [change.feature for change in row]
    if len(set(features)) < len(features):
      repeated = next(i for i in features if features.count(i) > 1)
      raise ValueError(f'Latent {repeated} is changed twice; give one change.')
    for k, change in enumerate(row):
      _check(subject, change)
      feature_BK[b, k] = change.feature
      kind_BK[b, k] = KINDS.index(change.kind)
      value_BK[b, k] = change.strength * subject.max_F[change.feature]
  return Rows(
    feature_BK, kind_BK, value_BK, feature_BK.copy(), np.ones(shape, np.float32)
  )


def _check(subject: Subject, change: Change) -> None:
  if change.kind not in KINDS:
    raise ValueError(
      f'There is no change {str(change.kind)[:40]!r}; the kinds are '
      f'{", ".join(KINDS)}.'
    )
  if not 0 <= change.feature < subject.width:
    raise ValueError(
      f'There is no latent {change.feature}: the SAE has {subject.width:,}.'
    )
  if not abs(change.strength) <= STRONGEST:
    raise ValueError(
      f'The strength must be between -{STRONGEST:g} and {STRONGEST:g}; found '
      f'{change.strength}.'
    )
  if change.kind in ('add', 'clamp') and not subject.max_F[change.feature]:
    raise ValueError(
      f'Latent {change.feature} never fired on the indexed text, so a strength '
      'has no unit; ablate it or project it out.'
    )


def control(subject: Subject, edit_rows: Rows, seed: int = 0) -> Rows:
  """Control changes: equal norms, along the decoders of other latents.

  The other latents are drawn from those of the same layer that fired, without
  replacement within a row, and never from the latents that the row changes.

  Raises:
    ValueError: a layer has no other latent that fired and has a decoder.
  """
  rng = np.random.default_rng(seed)
  layer_F, norm_F = decoders(subject)
  pools = [
    np.flatnonzero((subject.max_F > 0) & (norm_F > 0) & (layer_F == layer))
    for layer in range(len(subject.place.sites))
  ]
  writer_BK = edit_rows.feature_BK.copy()
  for b, row in enumerate(edit_rows.feature_BK):
    features = row[edit_rows.kind_BK[b] != _NONE].tolist()
    for k, feature in enumerate(row):
      if edit_rows.kind_BK[b, k] == _NONE:
        continue
      pool = pools[layer_F[feature]]
      if len(pool) <= np.isin(features, pool).sum():
        raise ValueError(
          'A control needs another latent that fired in the same layer; there '
          'is none.'
        )
      while True:
        drawn = int(rng.choice(pool))
        if drawn not in features:
          break
      features.append(drawn)
      writer_BK[b, k] = drawn
  return edit_rows._replace(
    writer_BK=writer_BK, gain_BK=gains(norm_F, edit_rows.feature_BK, writer_BK)
  )


def with_controls(
  subject: Subject, edit_rows: Rows, count: int, seed: int = 0
) -> Rows:
  """The rows, followed by `count` sets of controls for them."""
  sets = [edit_rows]
  sets += [control(subject, edit_rows, seed + c) for c in range(count)]
  return stacked(sets)


def stacked(row_sets: Sequence[Rows]) -> Rows:
  """The parts, concatenated."""
  return Rows(*map(np.concatenate, zip(*row_sets, strict=True)))


def decoders(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
  """Each latent's layer and the norm of its decoder, both [F]."""
  layer_width = subject.width // len(subject.place.sites)
  layer_F = np.arange(subject.width) // layer_width
  W_dec = subject.params['W_dec']
  if subject.carried:  # the decoder of the latent's own layer
    W_dec = jnp.stack([W_dec[l, :, l] for l in range(len(W_dec))])
    square_F = jnp.sum(jnp.square(W_dec), -1)
  else:
    axes = (-2, -1) if W_dec.ndim == 4 else -1
    square_F = jnp.sum(jnp.square(W_dec), axes)
  return layer_F, np.sqrt(np.asarray(square_F)).reshape(-1)


def gains(norm_F, feature, writer) -> np.ndarray:
  """Factors that scale the decoders of `writer` to the norms of `feature`."""
  gain = norm_F[feature] / np.where(norm_F[writer] > 0, norm_F[writer], 1)
  return gain.astype(np.float32)


def edits(
  place: sites.Wiring,
  params: Mapping[str, jax.Array],
  rows: Rows,
  where_BT: jax.Array,
  projects: bool = True,
  norm_bounds: outliers.Bounds = types.MappingProxyType({}),
) -> dict[sites.Site, hooks.Edit]:
  """The edits of one forward pass; call this while the pass is traced.

  Args:
    place, params: as in `Subject`.
    rows: the changes, one row for each row of the pass.
    where_BT: bool, tokens that the changes apply to; [B, T, K] for each change.
    projects: False if no change is project_out (`Rows.projects`): its matrix
      inverse is slow to compile.
    norm_bounds: outlier tokens, at a site that is read or written, are not
      changed there.
  """
  layer_width = params['b_enc'].size // len(place.sites)
  layer_BK, own_BK = jnp.divmod(rows.feature_BK, layer_width)
  writer_BK = jnp.mod(rows.writer_BK, layer_width)
  kind_B1K = rows.kind_BK[:, None]
  where_BTK = where_BT if where_BT.ndim == 3 else where_BT[..., None]
  step = {}  # layer -> change of each latent's value [B, T, K]
  usual = lambda site, x: ~outliers.is_outlier({site: x}, norm_bounds)

  def read(layer, x_BTD):
    x_BTD = x_BTD.astype(jnp.float32)
    f_BTK = _values(params, layer, own_BK, x_BTD)
    changed_BTK = jnp.select(
      [kind_B1K == _ADD, kind_B1K == _CLAMP, kind_B1K == _ABLATE],
      [f_BTK + rows.value_BK[:, None], rows.value_BK[:, None], 0.0],
      f_BTK,
    )
    applies_BTK = (layer_BK == layer)[:, None] & where_BTK
    applies_BTK &= usual(place.sites[layer], x_BTD)[..., None]
    step[layer] = jnp.where(applies_BTK, changed_BTK - f_BTK, 0)

  def write(layer, y_BTD):
    dtype, y_BTD = y_BTD.dtype, y_BTD.astype(jnp.float32)
    W_BKD = params['W_dec']
    W_BKD = (
      W_BKD[layer_BK, writer_BK, layer] if W_BKD.ndim == 4 else W_BKD[writer_BK]
    ) * rows.gain_BK[..., None]
    total_BTK = step[layer] if carried(place) else sum(step.values())
    if projects:
      there_BK = layer_BK == layer if carried(place) else layer_BK <= layer
      out_BK = (rows.kind_BK == _PROJECT) & there_BK
      part_BTK = _projected(jnp.where(out_BK[..., None], W_BKD, 0), y_BTD)
      total_BTK -= jnp.where(where_BTK, part_BTK, 0)
    usual_BT1 = usual(place.targets[layer], y_BTD)[..., None]
    change_BTD = jnp.einsum('btk,bkd->btd', total_BTK, W_BKD)
    return (y_BTD + jnp.where(usual_BT1, change_BTD, 0)).astype(dtype)

  def reader(layer):
    def read_only(x_BTD):
      with jax.default_matmul_precision('highest'):
        read(layer, x_BTD)
      return x_BTD

    return read_only

  def writer(layer, reads):
    def change(y_BTD):
      with jax.default_matmul_precision('highest'):
        if reads:
          read(layer, y_BTD)
        return write(layer, y_BTD)

    return change

  site_edits = {}
  pairs = zip(place.sites, place.targets, strict=True)
  for layer, (site, target) in enumerate(pairs):
    if site != target:
      site_edits[site] = reader(layer)
    site_edits[target] = writer(layer, site == target)
  return site_edits


def _projected(W_BKD, y_BTD):
  """The projection of y onto the span of decoders, as coefficients [B, T, K].

  Decoders may be equal or zero: a pseudoinverse handles the lower rank.
  """
  gram_BKK = jnp.einsum('bkd,bjd->bkj', W_BKD, W_BKD)
  inverse_BKK = jnp.linalg.pinv(gram_BKK, hermitian=True)
  return jnp.einsum('btd,bkd->btk', y_BTD, W_BKD) @ inverse_BKK


def _values(params, layer: int, own_BK, x_BTD):
  """Values of each row's latents `own_BK` in one layer: [B, T, K]."""
  if 'k' in params:  # the active latents depend on all of them
    f_BTF = sae_lib.encode(params, x_BTD)
    return jnp.take_along_axis(f_BTF, own_BK[:, None], -1)
  layer_params = {
    key: params[key][layer] if params['W_enc'].ndim == 3 else params[key]
    for key in ('W_enc', 'b_enc', 'threshold')
  }
  W_DBK = jnp.take(layer_params['W_enc'], own_BK, axis=1)
  z_BTK = jnp.einsum('btd,dbk->btk', x_BTD, W_DBK)
  z_BTK += layer_params['b_enc'][own_BK][:, None]
  fires = z_BTK > layer_params['threshold'][own_BK][:, None]
  return jnp.where(fires, jax.nn.relu(z_BTK), 0)
