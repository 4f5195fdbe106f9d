"""What trained members keep and what they lose: a whole collection in one pass.

  L0          mean number of latents with f > 0, of all layers
  FVU         sum |y - y_hat|^2 / sum |y - m|^2,  m the mean vector
  delta loss  loss with y_hat in the place of y - clean loss, nats a token
  recovered   (L_ablated - L_sae) / (L_ablated - L_clean); ablated: y is 0, or m

y is the activation at a member's target, which in an SAE is the one it reads.
Of a member with several targets, a figure is the mean over them (`figures`),
each replaced alone, the others clean.

All over tokens that count: not BOS, EOS or padding (arXiv 2408.05147, section
4), nor a chat's user turn. Where a token does not count y stays as it is: BOS
is like no other, and to replace it costs more than all others together. A loss
counts where both the token it is computed at and the one it predicts do.

The text is read once for all members, after two cheap looks that form no
logits: one at all of it for m, one at a sample of sequences for L0, to which
the controls are set (`controls`). For each batch of sequences:

  clean pass   -> x and y at every site, the residual stream before each target,
                  the losses
  each member  -> y_hat, L0, errors, and the losses with y_hat in the place of
                  y, from its layer on; controls, 0 and m go the same way

Sums are kept for each sequence, the independent draws of the intervals.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope import files, release, sites
from gemma_scope.evaluation import controls, estimates, passes
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.release import sae_folder
from gemma_scope.sae import released

_SAMPLE_TOKENS, _SAMPLE_SEQUENCES = 2**13, 32  # at least, to set the controls
_SAMPLE_BYTES = 2**31  # activations of the sample in memory at once
_RESIDENT_BYTES = 2**32  # members that together are smaller stay on the devices

Keep = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class _Replacement:
  """Something to put in the place of y: a member's y_hat, or an ablation."""

  place: sites.Wiring
  name: str
  params: Callable[[], Mapping[str, jax.Array]] | None = None
  value: Any = 0.0  # where there are no params
  sums: estimates.Sums = dataclasses.field(default_factory=estimates.Sums)

  def of(self, taps, keep_BT, mesh) -> tuple[Sequence[jax.Array], passes.Sums]:
    """y_hat at each target, and the sums of its making."""
    y = tuple(taps[site] for site in self.place.targets)
    if self.params is None:
      return [passes.ablate(y[0], keep_BT, self.value)], {}
    x = tuple(taps[site] for site in self.place.sites)
    y = None if self.place.sites == self.place.targets else y
    return passes.reconstruct(self.params(), x, y, keep_BT, mesh)


def _ablation(target: sites.Site, name: str, value: Any) -> _Replacement:
  place = sites.Wiring('sae', (target,), (target,))
  return _Replacement(place, name, value=value)


def evaluate(
  gemma: lm.Gemma,
  params: lm.Params,
  members: Sequence[release.Released],
  sequences: np.ndarray,
  *,
  batch: int,
  keep: Keep,
  progress: Callable[[int, int], None] | None = None,
  poll: Callable[[], None] | None = None,
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Measures every member, and a control beside each.

  Args:
    gemma, params: the language model; sharded parameters are used as they lie.
    members: the SAEs; of a card only `type`, `sites` and `targets` are read.
    sequences: int32 [N, T], each starting with BOS.
    batch: sequences a forward pass; need not divide N.
    keep: which tokens count: int32 [N, T] -> bool [N, T], never BOS
      (`tokenizers.Special.keep`).
    progress: called as progress(sequences done, N) after each batch.
    poll: called often; may raise to stop.
    seed: of the controls.

  Returns:
    name -> metrics, plain numbers for JSON. A figure is {'value', 'low',
    'high', 'tokens'}, with a 95 % interval: l0, fvu, fvu_elementwise (squared
    error / variance of all elements around one scalar mean, the tutorials'),
    delta_loss, loss_recovered_zero, loss_recovered_mean, clean_loss. `dead` and
    `dense` are the shares of latents that fired on none, and on over 10 %, of
    `tokens` tokens. `control` has l0, fvu and delta_loss of the control. Where
    several layers are written, `by_target` (of the control too) lists target,
    fvu and delta_loss of each.

  Raises:
    ValueError: a member does not fit the sites its card names, or the sequences
      are not what they should be.
  """
  poll = poll or (lambda: None)
  mesh = _mesh_of(params)
  found = _members(gemma.config, members, mesh)
  text = _Text(sequences, batch, keep, mesh)
  targets = tuple(sorted({t for one in found for t in one.place.targets}))
  at = tuple(sorted({*targets, *(s for one in found for s in one.place.sites)}))
  means = _means(gemma, params, at, text, mesh, poll)
  twins = _controls(gemma, params, found, means, text, mesh, seed, poll)

  zeros = {site: _ablation(site, 'zero', 0.0) for site in targets}
  averages = {site: _ablation(site, 'mean', means[site]) for site in targets}
  queue = [*zeros.values(), *averages.values(), *found, *twins.values()]
  total, variances = (
    estimates.Sums(),
    {site: estimates.Sums() for site in targets},
  )
  waiting, done = [], 0
  for tokens_BT, keep_BT, rows in text.batches():
    poll()
    taps, losses_BT, counts_BT, *sums = passes.clean(
      gemma, params, tokens_BT, keep_BT, at, targets, means, mesh
    )
    sums = jax.device_get(sums)
    total.add(sums[0], rows)
    for site in targets:
      variances[site].add(sums[1][site], rows)
    for one in queue:
      poll()
      y_hats, sums = one.of(taps, keep_BT, mesh)
      deltas = []
      for target, y_hat_BTD in zip(one.place.targets, y_hats, strict=True):
        before_BTD = taps[splice.before(target)]
        delta = passes.delta(
            gemma, params, tokens_BT, target, y_hat_BTD, before_BTD, losses_BT,
            counts_BT, mesh,
        )  # fmt: skip
        deltas.append(delta)
      # Fetched one late: the devices do not wait, and do not run far ahead.
      _collect(waiting)
      waiting = [(one, sums, deltas, rows)]
    done += rows
    if progress:
      progress(done, text.size)
  _collect(waiting)

  def at_targets(one, sums_of):
    return estimates.joined([sums_of[site] for site in one.place.targets])

  ablated = [{s: r.sums for s, r in rs.items()} for rs in (zeros, averages)]
  return {
      one.name: estimates.of_member(
          one.sums, twins[one].sums, total, at_targets(one, variances),
          *(at_targets(one, sums_of) for sums_of in ablated),
          list(map(str, one.place.targets)) if one.place.several else None,
      )
      for one in found
  }  # fmt: skip


def _collect(waiting: list[tuple]) -> None:
  for one, sums, deltas, rows in waiting:
    sums, deltas = jax.device_get((sums, deltas))
    for name in deltas[0]:
      sums[name] = np.stack([delta[name] for delta in deltas], -1)
    one.sums.add(sums, rows)


def _mesh_of(params: lm.Params) -> Mesh | None:
  sharding = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _members(config: lm.Config, given, mesh: Mesh | None) -> list[_Replacement]:
  """The members, checked; their parameters on the devices when they fit."""
  if not given:
    raise ValueError('There is nothing to evaluate: no SAE was given.')
  for name, count in collections.Counter(sae.name for sae in given).items():
    if count > 1:
      raise ValueError(f'{count} of the SAEs are named {name}.')
  loaded = [(sae.name, sae.load(), sae.card) for sae in given]
  size = sum(sum(a.nbytes for a in arrays.values()) for _, arrays, _ in loaded)
  found = []
  for name, arrays, card in loaded:
    place = _fitting_place(config, name, arrays, card)
    for key, array in arrays.items():
      if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f'{name} has NaN or infinity in {key}.')
    put = functools.partial(released.put, arrays, mesh)
    if size <= _RESIDENT_BYTES:
      put = functools.cache(put)
    found.append(_Replacement(place, name, put))
  return found


def _fitting_place(config: lm.Config, name: str, arrays, card) -> sites.Wiring:
  """What an SAE reads and writes, if its parameters fit this model there."""
  place = sites.wiring_of(card)
  for site in (*place.sites, *place.targets):
    site.check(config)
  known = {*sae_folder.KEYS, *sae_folder.OPTIONAL_KEYS}
  if not set(sae_folder.KEYS) <= set(arrays) <= known:
    raise ValueError(
      f'{name} has the parameters {", ".join(sorted(arrays))}; expected '
      f'{", ".join(sae_folder.KEYS)} and at most '
      f'{", ".join(sae_folder.OPTIONAL_KEYS)}.'
    )
  sizes = {
    'd_in': place.sites[0].width(config),
    'd_out': place.targets[0].width(config),
    'width': arrays['b_enc'].size,
  }
  shapes = {key: array.shape for key, array in arrays.items()}
  try:
    sae_folder.check_shapes(
      shapes, {**card, **sizes, 'affine': 'W_skip' in arrays}
    )
  except files.Refused as error:
    raise ValueError(
      f'{name} {error}, as in {config.name} at {place}: is it a member of '
      'another model or site?'
    ) from None
  return place


class _Text:
  """Sequences in batches of one size, on the devices, with what counts."""

  def __init__(self, sequences, batch: int, keep: Keep, mesh: Mesh | None):
    self._tokens_NT = np.asarray(sequences, np.int32)
    shape = self._tokens_NT.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 3:
      raise ValueError(
        'Sequences to evaluate on are [N, T], at least one of at least three '
        f'tokens; found {list(shape)}.'
      )
    self.size = shape[0]
    self._keep_NT = np.asarray(keep(self._tokens_NT))
    if self._keep_NT.shape != shape or self._keep_NT.dtype != bool:
      raise ValueError(
        f'`keep` gave {self._keep_NT.dtype} {list(self._keep_NT.shape)}; '
        f'expected bool {list(shape)}.'
      )
    wrong = np.flatnonzero(self._keep_NT[:, 0])
    if wrong.size:
      raise ValueError(
        f'Sequences start with BOS, which does not count; sequence {wrong[0]} '
        f'starts with token {self._tokens_NT[wrong[0], 0]}, which does.'
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
    (index_n,) = np.nonzero(self._keep_NT.any(1))
    length = self._tokens_NT.shape[1]
    count = max(_SAMPLE_SEQUENCES, -(-_SAMPLE_TOKENS // length))
    count = min(count, len(index_n))
    chosen = np.linspace(0, len(index_n) - 1, count).round().astype(int)
    return self._of(index_n[chosen])

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
    found = {site: passes.masked_sum(taps[site], keep_BT, mesh) for site in at}
    for site, (sum_D, _) in jax.device_get(found).items():
      sums[site] = sums[site] + sum_D.astype(np.float64)
    tokens += int(found[at[0]][1])
  return {site: (sums[site] / tokens).astype(np.float32) for site in at}


def _controls(gemma, params, members, means, text, mesh, seed, poll):
  """Member -> its control, set to the member's L0 on the sample."""
  twins, chosen = {}, list(text.sample())
  size = sum(keep_BT.size for _, keep_BT, _ in chosen)
  groups = collections.defaultdict(list)
  for one in members:
    groups[one.place].append(one)
  for at, together in _fitting(
    sorted(groups, key=sites.wiring_order), gemma.config, 4 * size
  ):
    sample = []
    for tokens_BT, keep_BT, _ in chosen:
      poll()
      taps = splice.taps(gemma, params, tokens_BT, at)
      sample.append(controls.Batch(taps, keep_BT))
    for place in together:
      by_width = collections.defaultdict(list)
      for one in groups[place]:
        by_width[one.params()['b_enc'].size].append(one)
      for width, group in by_width.items():
        active = []
        for one in group:
          poll()
          found = [
            passes.active(
              one.params(),
              tuple(batch.taps[site] for site in place.sites),
              batch.keep_BT,
              mesh,
            )
            for batch in sample
          ]
          active.append(float(sum(map(float, found))))
        # By the place alone: a control is the same whoever else is evaluated.
        name = zlib.crc32(f'{place}/{width}'.encode())
        key = jax.random.fold_in(jax.random.key(seed), name)
        there = {s: means[s] for s in {*place.sites, *place.targets}}
        settings = controls.calibrate(
          key, place, there, width, active, sample, mesh
        )
        for one, setting in zip(group, settings, strict=True):
          make = functools.partial(
            controls.make, key, place, there, width, setting, mesh
          )
          twins[one] = _Replacement(place, f'{one.name} control', make)
  return twins


def _fitting(
  ordered: Sequence[sites.Wiring], config, bytes_a_value: int
) -> Iterator[tuple[tuple[sites.Site, ...], list[sites.Wiring]]]:
  """Groups of places whose activations fit in `_SAMPLE_BYTES`; their sites."""
  at, group = set(), []
  for place in ordered:
    more = at | {*place.sites, *place.targets}
    size = bytes_a_value * sum(site.width(config) for site in more)
    if group and size > _SAMPLE_BYTES:
      yield tuple(sorted(at)), group
      more, group = {*place.sites, *place.targets}, []
    at = more
    group.append(place)
  yield tuple(sorted(at)), group
