"""What is put in the place of an activation, and the pass that measures it.

A replacement is an SAE's reconstruction, a control's, or an ablation. For each
batch of sequences all of them are made from the activations of one clean pass,
and the losses of a few spliced streams are computed beside the clean one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma_scope import sites
from gemma_scope.evaluation import batches as batches_lib
from gemma_scope.evaluation import centres, estimates, passes
from gemma_scope.language_model import splice

_TOGETHER = 6  # streams whose losses are computed beside one clean one
_FEW_BATCHES = 3  # with fewer, controls go through the model on each


@dataclasses.dataclass(eq=False)
class Replacement:
  """A replacement for y: an SAE's reconstruction, or an ablation."""

  wiring: sites.Wiring
  name: str
  params: Callable[[], Mapping[str, jax.Array]] | None = None
  value: Any = 0.0  # where there are no params
  rule: int = 0  # of outliers
  spares: bool = False  # outliers stay as they are, as BOS does
  turn: int | None = None  # of a control: which batches it is spliced on
  tally: estimates.Tally | None = None
  fired_F: Any = 0.0

  def of(self, taps, keep_BT, references: centres.References, mesh):
    """y_hat at each target, values of tokens, and how often latents fired."""
    targets = self.wiring.targets
    y = tuple(taps[site] for site in targets)
    if self.params is None:
      return [passes.ablate(y[0], keep_BT, self.value)], {}, 0.0
    x = tuple(taps[site] for site in self.wiring.sites)
    y = None if self.wiring.sites == targets else y
    weight_MD = references.weights(targets)
    return passes.reconstruct(self.params(), x, y, keep_BT, weight_MD, mesh)


def ablation(target: sites.Site, name: str, value: Any) -> Replacement:
  wiring = sites.Wiring('sae', (target,), (target,))
  return Replacement(wiring, name, value=value)


class _Streams:
  """Last residual streams whose losses are computed together, a few at once."""

  def __init__(self, model: centres.Model, tokens_BT, clean_BTD, positions_t):
    self._model, self._tokens_BT = model, tokens_BT
    self._clean_BTD, self._positions_t = clean_BTD, positions_t
    self._waiting: list[tuple] = []
    self.loss_Bt, self.delta, self.kl = None, {}, {}

  def add(self, key, end_BTD: jax.Array) -> None:
    self._waiting.append((key, end_BTD))
    if len(self._waiting) == _TOGETHER:
      self.flush()

  def flush(self) -> None:
    """Fetches `loss_Bt` (clean), and `delta` and `kl` [B, t] by key."""
    if not self._waiting:
      return
    keys, ends = zip(*self._waiting, strict=True)
    self._waiting = []
    model = self._model
    loss, kl = jax.device_get(
      passes.losses(
        model.gemma,
        model.params,
        self._tokens_BT,
        (self._clean_BTD, *ends),
        self._positions_t,
        model.mesh,
      )
    )
    self.loss_Bt = loss[..., 0]
    for k, key in enumerate(keys, 1):
      self.delta[key] = loss[..., k] - loss[..., 0]
      self.kl[key] = kl[..., k]


def measure(
  model: centres.Model,
  batches: batches_lib.Batches,
  references: centres.References,
  queue: Sequence[Replacement],
) -> None:
  """Fills the tallies of all replacements, batch by batch."""
  for replacement in queue:
    replacement.tally = estimates.Tally(batches.clusters, batches.length)
  all_sites = {
    site
    for replacement in queue
    for site in (*replacement.wiring.sites, *replacement.wiring.targets)
  }
  targets = {
    target for replacement in queue for target in replacement.wiring.targets
  }
  last = splice.last(model.gemma)
  taps_needed = {*all_sites, *map(splice.before, targets), last}
  all_turns = len(batches) < _FEW_BATCHES
  done = 0
  for number, batch in enumerate(batches):
    taps = model.taps(batch.tokens_BT, taps_needed)
    activations = {site: taps[site] for site in all_sites}
    centres_at = {site: references.centres[site] for site in targets}
    measured = passes.spread(
      activations, centres_at, references.bounds, model.mesh
    )
    outlier_RBT, spread = jax.device_get(measured)
    keep_BT = np.asarray(passes.fetched(batch.keep_BT, model.mesh)) > 0
    positions_t = batches.loss_positions(number)
    token = _Tokens(batch, keep_BT, outlier_RBT, spread)
    streams = _Streams(model, batch.tokens_BT, taps[last], positions_t)
    turns, waiting = [], []
    for i, replacement in enumerate(queue):
      model.watch.poll()
      replaced_BT = batch.keep_BT
      if replacement.spares:
        replaced_BT = passes.without(replaced_BT, measured[0], replacement.rule)
      y_hats, values, fired_F = replacement.of(
        taps, replaced_BT, references, model.mesh
      )
      if (
        all_turns or replacement.turn is None or replacement.turn == number % 3
      ):
        turns.append(replacement)
        for target, y_hat_BTD in zip(
          replacement.wiring.targets, y_hats, strict=True
        ):
          end_BTD = passes.residual(
            model.gemma,
            model.params,
            batch.tokens_BT,
            target,
            y_hat_BTD,
            taps[splice.before(target)],
          )
          streams.add((replacement, target), end_BTD)
      # Fetched one iteration late, so that the devices do not wait.
      for late in waiting:
        token.add_values(*late)
      waiting = [(replacement, values, fired_F)]
      share = (i + 1) / len(queue)
      model.watch.progress(done + share * batch.rows, batches.size)
    streams.flush()
    for late in waiting:
      token.add_values(*late)
    for replacement in turns:
      token.add_losses(replacement, streams, positions_t)
    done += batch.rows
  model.watch.progress(batches.size, batches.size)


class _Tokens:
  """Which tokens of a batch count for what, and the sums they are added to."""

  def __init__(self, batch, keep_BT, outlier_RBT, spread):
    self._cluster_BT, self._keep_BT = batch.cluster_BT, keep_BT
    self._inlier_RBT, self._spread = keep_BT & ~outlier_RBT, spread
    self._both_BT = np.zeros_like(keep_BT)  # the token and its next count
    self._both_BT[:, :-1] = keep_BT[:, 1:] & keep_BT[:, :-1]

  def _add(self, tally, where_BT, **values):
    for name, value in values.items():
      tally.add(name, value, where_BT, self._cluster_BT)

  def add_values(self, replacement: Replacement, values, fired_F) -> None:
    """Squared errors and firing counts, beside what they are a share of."""
    if not values:
      return
    values, fired_F = jax.device_get((values, fired_F))
    replacement.fired_F = replacement.fired_F + np.asarray(fired_F, np.float64)
    spread = [self._spread[target] for target in replacement.wiring.targets]
    by_target = lambda name: np.stack(
      [target_spread[name] for target_spread in spread], -1
    )
    inlier_BT = self._inlier_RBT[replacement.rule]
    variance_inlier = by_target('variance_inlier')[..., replacement.rule, :]
    ones_BT = np.ones(inlier_BT.shape)
    errors = {k: values.pop(k) for k in ('error', 'error_rest')}
    self._add(
      replacement.tally,
      self._keep_BT,
      tokens=ones_BT,
      variance=by_target('variance'),
      variance_rest=by_target('variance_rest'),
      flat=by_target('flat'),
      **errors,
    )
    self._add(
      replacement.tally,
      inlier_BT if replacement.spares else self._keep_BT,
      replaced=ones_BT,
      **values,
    )
    self._add(
      replacement.tally,
      inlier_BT,
      inliers=ones_BT,
      variance_inlier=variance_inlier,
      error_inlier=errors['error'],
    )

  def add_losses(
    self, replacement: Replacement, streams: _Streams, positions_t: np.ndarray
  ) -> None:
    """Losses at the positions where they were computed."""
    where_BT = np.zeros_like(self._both_BT)
    where_BT[:, positions_t] = self._both_BT[:, positions_t]

    def placed(*columns):
      full = np.zeros((*where_BT.shape, len(columns)))
      full[:, positions_t] = np.stack(columns, -1)
      return full

    targets = replacement.wiring.targets
    self._add(
      replacement.tally,
      where_BT,
      counts=np.ones(where_BT.shape),
      clean=placed(streams.loss_Bt),
      delta=placed(*(streams.delta[replacement, target] for target in targets)),
      kl=placed(*(streams.kl[replacement, target] for target in targets)),
    )
