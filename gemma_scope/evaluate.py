"""What trained SAEs keep and what they lose: a whole collection in one pass.

  L0          mean number of latents with f > 0
  FVU         sum |x - x_hat|^2 / sum |x - m|^2,  m the mean vector
  delta loss  loss with x_hat in the place of x - clean loss, nats a token
  recovered   (L_ablated - L_sae) / (L_ablated - L_clean); ablated: x is 0, or m

All over tokens that are not special (BOS, EOS, padding): arXiv 2408.05147,
section 4. Where a token is special x stays as it is: BOS is like no other, and
to replace it costs more than all others together. A loss counts where neither
the token it is computed at nor the one it predicts is special.

The text is read once for all members, after two cheap looks that form no
logits: one at all of it for m, one at a sample of sequences for L0, to which
the controls are set (`controls`). For each batch of sequences:

  clean pass  -> x at every site, the residual stream before it, the losses
  each SAE    -> x_hat, L0, errors, and the losses with x_hat in the place of
                 x, from its layer on; controls, 0 and m go the same way

Sums are kept for each sequence, the independent draws of the intervals.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope import controls, lm, metrics, sites, splice

_LOG10_EDGES = np.arange(-7, 0.25, 0.25)  # of the frequency histogram
_DENSE = 0.1  # a latent that fires on more than this share of tokens
_SAMPLE_TOKENS, _SAMPLE_SEQUENCES = 2**13, 32  # at least, to set the controls
_SAMPLE_BYTES = 2**31  # activations of the sample in memory at once
_RESIDENT_BYTES = 2**32  # SAEs that together are smaller stay on the devices


class _Sums:
  """Running sums in float64; `name_B` [B] of each batch are joined to [N]."""

  def __init__(self):
    self._parts = collections.defaultdict(list)

  def add(self, found: Mapping[str, np.ndarray], rows: int) -> None:
    """Adds a batch whose first `rows` sequences are real, the others filler."""
    for name, value in found.items():
      parts = self._parts[name]
      value = np.asarray(value, np.float64)
      if name.endswith('_B'):
        parts.append(value[:rows])
      elif parts:
        parts[0] += value
      else:
        parts.append(value.copy())

  def __getitem__(self, name: str) -> np.ndarray:
    return np.concatenate(self._parts[name])


@dataclasses.dataclass(frozen=True, eq=False)
class _Replacement:
  """Something to put in the place of x: an SAE's x_hat, or an ablation."""

  site: sites.Site
  name: str
  params: Callable[[], Mapping[str, jax.Array]] | None = None
  value: Any = 0.0  # where there are no params
  sums: _Sums = dataclasses.field(default_factory=_Sums)

  def of(self, x_BTD, keep_BT, mesh) -> tuple[jax.Array, splice.Sums]:
    if self.params is None:
      return splice.ablate(x_BTD, keep_BT, self.value), {}
    return splice.reconstruct(self.params(), x_BTD, keep_BT, mesh)


def evaluate(
  gemma: lm.Gemma,
  params: lm.Params,
  saes: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
  sequences: np.ndarray,
  *,
  batch: int,
  special: Sequence[int],
  progress: Callable[[int, int], None] | None = None,
  poll: Callable[[], None] | None = None,
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Measures every SAE, and a control beside each.

  Args:
    gemma, params: the language model; sharded parameters are used as they lie.
    saes: (parameters, card) of each, in released form (raw activations); of
      the card only `site` and `name` are read.
    sequences: int32 [N, T], each starting with BOS.
    batch: sequences a forward pass; need not divide N.
    special: token ids that do not count: padding, BOS, EOS.
    progress: called as progress(sequences done, N) after each batch.
    poll: called often; may raise to stop.
    seed: of the controls.

  Returns:
    name -> metrics, plain numbers for JSON. A figure is {'value', 'low',
    'high', 'tokens'}, with a 95 % interval: l0, fvu, fvu_elementwise (squared
    error / variance of all elements around one scalar mean, the tutorials'),
    delta_loss, loss_recovered_zero, loss_recovered_mean, clean_loss. `dead` and
    `dense` are the shares of latents that fired on none, and on over 10 %, of
    `tokens` tokens. `control` has l0, fvu and delta_loss of the control.

  Raises:
    ValueError: an SAE does not fit the site its card names, or the sequences
      are not what they should be.
  """
  poll = poll or (lambda: None)
  mesh = _mesh_of(params)
  members = _members(gemma.config, saes, mesh)
  text = _Text(sequences, batch, special, mesh)
  at = tuple(sorted({member.site for member in members}))
  means = _means(gemma, params, at, text, mesh, poll)
  twins = _controls(gemma, params, members, means, text, mesh, seed, poll)

  zeros = {site: _Replacement(site, 'zero') for site in at}
  averages = {s: _Replacement(s, 'mean', value=m) for s, m in means.items()}
  queue = [*zeros.values(), *averages.values(), *members, *twins.values()]
  total, variances = _Sums(), {site: _Sums() for site in at}
  waiting, done = [], 0
  for tokens_BT, keep_BT, rows in text.batches():
    poll()
    taps, losses_BT, counts_BT, *found = splice.clean(
      gemma, params, tokens_BT, keep_BT, at, means, mesh
    )
    found = jax.device_get(found)
    total.add(found[0], rows)
    for site in at:
      variances[site].add(found[1][site], rows)
    for one in queue:
      poll()
      x_BTD, before_BTD = taps[one.site], taps[splice.before(one.site)]
      x_hat_BTD, sums = one.of(x_BTD, keep_BT, mesh)
      delta = splice.delta(
          gemma, params, tokens_BT, one.site, x_hat_BTD, before_BTD, losses_BT,
          counts_BT, mesh,
      )  # fmt: skip
      # Fetched one late: the devices do not wait, and do not run far ahead.
      _collect(waiting)
      waiting = [(one, {**sums, **delta}, rows)]
    done += rows
    if progress:
      progress(done, text.size)
  _collect(waiting)

  return {
      member.name: _metrics(
          member.sums, twins[member].sums, total, variances[member.site],
          zeros[member.site].sums, averages[member.site].sums,
      )
      for member in members
  }  # fmt: skip


def _collect(waiting: list[tuple[_Replacement, splice.Sums, int]]) -> None:
  for one, sums, rows in waiting:
    one.sums.add(jax.device_get(sums), rows)


def _mesh_of(params: lm.Params) -> Mesh | None:
  sharding = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _members(config: lm.Config, saes, mesh: Mesh | None) -> list[_Replacement]:
  """The members, checked; their parameters on the devices when they fit."""
  if not saes:
    raise ValueError('There is no SAE to evaluate.')
  size = sum(sum(a.nbytes for a in arrays.values()) for arrays, _ in saes)
  members = []
  for arrays, card in saes:
    name, site = card['name'], sites.parse(card['site']).check(config)
    if set(arrays) != set(splice.SHARDING):
      raise ValueError(
        f'{name} has the parameters {", ".join(sorted(arrays))}; expected '
        f'{", ".join(splice.SHARDING)}: an SAE that reads and writes one site.'
      )
    d_in, d_out = arrays['W_enc'].shape[0], arrays['W_dec'].shape[1]
    width = site.width(config)
    if (d_in, d_out) != (width, width):
      raise ValueError(
        f'{name} reads activations {d_in} wide and writes {d_out}, and those '
        f'of {config.name} at {site} are {width} wide: is it an SAE of '
        'another model or site?'
      )
    for key, array in arrays.items():
      if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f'{name} has NaN or infinity in {key}.')
    place = functools.partial(_place, arrays, mesh)
    if size <= _RESIDENT_BYTES:
      place = functools.cache(place)
    members.append(_Replacement(site, name, place))
  counts = collections.Counter(member.name for member in members)
  for name, count in counts.items():
    if count > 1:
      raise ValueError(f'{count} of the SAEs are named {name}.')
  return members


def _place(arrays, mesh: Mesh | None) -> dict[str, jax.Array]:
  """An SAE on the devices, latents over the mesh's axis where they divide."""
  arrays = {key: arrays[key].astype(np.float32) for key in splice.SHARDING}
  if mesh is None:
    return jax.device_put(arrays)
  where = splice.shardings(mesh, arrays['b_enc'].size)
  return jax.device_put(arrays, where)


class _Text:
  """Sequences in batches of one size, on the devices, with what counts."""

  def __init__(self, sequences, batch: int, special, mesh: Mesh | None):
    self._tokens_NT = np.asarray(sequences, np.int32)
    shape = self._tokens_NT.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 3:
      raise ValueError(
        'Sequences to evaluate on are [N, T], at least one of at least three '
        f'tokens; found {list(shape)}.'
      )
    self.size = shape[0]
    self._keep_NT = ~np.isin(self._tokens_NT, np.asarray(special))
    wrong = np.flatnonzero(self._keep_NT[:, 0])
    if wrong.size:
      raise ValueError(
        f'Sequences start with BOS; sequence {wrong[0]} starts with token '
        f'{self._tokens_NT[wrong[0], 0]}, and special are {list(special)}.'
      )
    if not (self._keep_NT[:, 1:] & self._keep_NT[:, :-1]).any():
      raise ValueError('No token counts: all to evaluate on are special.')
    self._batch, self._sharding = batch, None
    if mesh is not None:
      data = mesh.shape['data']
      if batch % data:
        raise ValueError(
          f"A batch of {batch} sequences cannot be split over the mesh's "
          f'data axis ({data}).'
        )
      self._sharding = NamedSharding(mesh, PartitionSpec('data', None))

  def batches(self) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """tokens_BT, keep_BT, and how many rows are real: the others are filler."""
    return self._of(np.arange(self.size))

  def sample(self) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """The same for a sample spread evenly over the text."""
    length = self._tokens_NT.shape[1]
    count = max(_SAMPLE_SEQUENCES, -(-_SAMPLE_TOKENS // length))
    count = min(count, self.size)
    return self._of(np.linspace(0, self.size - 1, count).round().astype(int))

  def _of(self, index_n):
    for start in range(0, len(index_n), self._batch):
      index_B = index_n[start : start + self._batch]
      real_B = np.arange(self._batch) < len(index_B)
      filled_B = np.resize(index_B, self._batch)
      keep_BT = self._keep_NT[filled_B] & real_B[:, None]
      placed = self._tokens_NT[filled_B], keep_BT
      yield *jax.device_put(placed, self._sharding), len(index_B)


def _means(gemma, params, at, text, mesh, poll) -> dict[sites.Site, np.ndarray]:
  """The mean vector of each site over all tokens that count, float32."""
  sums, tokens = {site: 0.0 for site in at}, 0
  for tokens_BT, keep_BT, _ in text.batches():
    poll()
    taps = splice.taps(gemma, params, tokens_BT, at)
    found = {site: splice.masked_sum(taps[site], keep_BT, mesh) for site in at}
    for site, (sum_D, _) in jax.device_get(found).items():
      sums[site] = sums[site] + sum_D.astype(np.float64)
    tokens += int(found[at[0]][1])
  return {site: (sums[site] / tokens).astype(np.float32) for site in at}


def _controls(gemma, params, members, means, text, mesh, seed, poll):
  """Member -> its control, set to the member's L0 on the sample."""
  twins, chosen = {}, list(text.sample())
  size = sum(keep_BT.size for _, keep_BT, _ in chosen)
  for at in _fitting(tuple(means), gemma.config, 4 * size):
    sample = []
    for tokens_BT, keep_BT, _ in chosen:
      poll()
      sample.append((splice.taps(gemma, params, tokens_BT, at), keep_BT))
    groups = collections.defaultdict(list)
    for member in members:
      if member.site in at:
        groups[member.site, member.params()['b_enc'].size].append(member)
    for (site, width), group in groups.items():
      here = [(taps[site], keep_BT) for taps, keep_BT in sample]
      active = []
      for member in group:
        poll()
        found = [splice.active(member.params(), *b, mesh) for b in here]
        active.append(float(sum(map(float, found))))
      # By the place alone: a control is the same whoever else is evaluated.
      name = zlib.crc32(f'{site}/{width}'.encode())
      key = jax.random.fold_in(jax.random.key(seed), name)
      settings = controls.calibrate(key, means[site], width, active, here, mesh)
      for member, setting in zip(group, settings, strict=True):
        make = functools.partial(
          controls.make, key, means[site], width, *setting, mesh
        )
        twins[member] = _Replacement(site, f'{member.name} control', make)
  return twins


def _fitting(
  at, config, bytes_a_value: int
) -> Iterator[tuple[sites.Site, ...]]:
  """Sites in groups whose activations fit in `_SAMPLE_BYTES`."""
  group, size = [], 0
  for site in at:
    more = bytes_a_value * site.width(config)
    if group and size + more > _SAMPLE_BYTES:
      yield tuple(group)
      group, size = [], 0
    group.append(site)
    size += more
  yield tuple(group)


def _figure(a_n, b_n, tokens: float) -> dict[str, Any]:
  """sum(a) / sum(b) with its interval; what is not finite is None (JSON)."""
  found = metrics.ratio_interval(a_n, b_n)
  value, low, high = (x if math.isfinite(x) else None for x in found)
  return {'value': value, 'low': low, 'high': high, 'tokens': int(tokens)}


def _metrics(own, twin, total, variance, zero, mean) -> dict[str, Any]:
  tokens_N, counts_N = total['tokens_B'], total['counts_B']
  tokens, counts = tokens_N.sum(), counts_N.sum()
  frequency_F = own['fired_F'] / tokens
  fired_F = frequency_F[frequency_F > 0]
  binned, _ = np.histogram(np.log10(np.maximum(fired_F, 1e-7)), _LOG10_EDGES)

  def common(sums):
    return {
      'l0': _figure(sums['l0_B'], tokens_N, tokens),
      'fvu': _figure(sums['error_B'], variance['variance_B'], tokens),
      'delta_loss': _figure(sums['delta_B'], counts_N, counts),
    }

  def recovered(ablation):
    won_N = ablation['delta_B'] - own['delta_B']
    return _figure(won_N, ablation['delta_B'], counts)

  return {
    **common(own),
    'fvu_elementwise': _figure(own['error_B'], variance['flat_B'], tokens),
    'loss_recovered_zero': recovered(zero),
    'loss_recovered_mean': recovered(mean),
    'clean_loss': _figure(total['clean_B'], counts_N, counts),
    'dead': float(np.mean(frequency_F == 0)),
    'dense': float(np.mean(frequency_F > _DENSE)),
    'tokens': int(tokens),
    'sequences': len(tokens_N),
    'frequency_histogram': {
      'log10_edges': _LOG10_EDGES.tolist(),
      'counts': binned.tolist(),
      'never': int((frequency_F == 0).sum()),
    },
    'by_position': _by_position(own, total, variance),
    'control': common(twin),
  }


def _by_position(own, total, variance) -> dict[str, list[float]]:
  """Curves over bins of position, three to a doubling; empty bins left out."""
  tokens_T = total['tokens_T']
  length = len(tokens_T)
  # The last position predicts nothing.
  counts_T = np.append(total['counts_T'], 0)
  delta_T = np.append(own['delta_T'], 0)
  edges = 2 ** np.arange(0, np.log2(length), 1 / 3)
  edges = np.unique(edges.round().astype(int))
  curves = {'position': [], 'delta_loss': [], 'fvu': []}
  for start, stop in zip(edges, [*edges[1:], length], strict=True):
    here = slice(start, stop)
    tokens, counts = tokens_T[here].sum(), counts_T[here].sum()
    spread = variance['variance_T'][here].sum()
    if not (tokens and counts and spread):
      continue
    where = (tokens_T[here] * np.arange(start, stop)).sum() / tokens
    curves['position'].append(float(where))
    curves['delta_loss'].append(float(delta_T[here].sum() / counts))
    curves['fvu'].append(float(own['error_T'][here].sum() / spread))
  return curves
