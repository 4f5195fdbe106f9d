"""What squared errors are measured against: means, inliers, dimensions.

Before the evaluation proper, one pass over all of the text without logits
gives at each site the mean vector over the tokens that count, the mean over
those that are no outliers, and the dimensions of largest variance. A card's own
rule says which rows are outliers (`activations.outliers`); for an SAE without
one the rule is a norm of more than `MAX_NORM` medians at a site that it reads
or writes, the medians measured on a sample of this text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_scope import sites
from gemma_scope.activations import outliers
from gemma_scope.evaluation import batches as batches_lib
from gemma_scope.evaluation import passes
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice

DIMENSIONS = 4  # of largest variance, left out in `fvu_rest`
MAX_NORM = 4.0  # medians; the rule of a card that has none


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """The language model of an evaluation, where it lies, and who watches."""

  gemma: lm.Gemma
  params: lm.Params
  mesh: Mesh | None
  watch: batches_lib.Watch

  def taps(self, tokens_BT, at: Sequence[sites.Site]) -> splice.Taps:
    """Activations at the sites, by a pass without logits."""
    self.watch.poll()
    at = tuple(sorted(set(at)))
    return splice.taps(self.gemma, self.params, tokens_BT, at)


@dataclasses.dataclass(frozen=True, eq=False)
class References:
  """What all SAEs of an evaluation are measured against.

  Attributes:
    bounds: the distinct rules of outliers.
    rule_of: the index of each SAE's rule, by name, and whether it is the
      card's.
    centres: of each site.
    largest: of each site, the dimensions left out and the share of the variance
      that each carries.
  """

  bounds: list[outliers.Bounds]
  rule_of: dict[str, tuple[int, bool]]
  centres: dict[sites.Site, passes.Centres]
  largest: dict[sites.Site, list[tuple[int, float]]]

  def weights(self, at: Sequence[sites.Site]) -> np.ndarray:
    """[M, D]: 0 for the dimensions left out at each site, else 1."""
    return np.stack([self.centres[site].weight_D for site in at])

  def describe(self, name: str, at: Sequence[sites.Site]) -> dict[str, Any]:
    """For the metrics of an SAE: its rule, and the largest dimensions."""
    index, of_card = self.rule_of[name]
    bounds = {str(site): b for site, b in self.bounds[index].items()}
    return {
      'outliers': {
        'rule': 'card' if of_card else f'{MAX_NORM:g} medians',
        'norm_bounds': bounds,
      },
      'largest_dimensions': [
        {
          'target': str(site),
          'dimensions': [dimension for dimension, _ in self.largest[site]],
          'shares': [share for _, share in self.largest[site]],
        }
        for site in at
      ],
    }


def measure(
  model: Model,
  wirings: Mapping[str, sites.Wiring],
  cards: Mapping[str, Mapping[str, Any]],
  batches: batches_lib.Batches,
) -> References:
  """Means, rules and dimensions of all sites that the SAEs read or write."""
  at = {s for w in wirings.values() for s in (*w.sites, *w.targets)}
  rules = {name: outliers.norm_bounds(card) for name, card in cards.items()}
  missing = [wirings[name] for name, rule in rules.items() if not rule]
  unruled = {s for wiring in missing for s in (*wiring.sites, *wiring.targets)}
  measured = _medians(model, unruled, batches) if unruled else {}
  bounds, rule_of = [], {}
  for name, rule in rules.items():
    of_card = bool(rule)
    if not rule:
      wiring = wirings[name]
      ends = sorted({*wiring.sites, *wiring.targets})
      rule = {site: MAX_NORM * measured[site] for site in ends}
    if rule not in bounds:
      bounds.append(rule)
    rule_of[name] = bounds.index(rule), of_card
  return References(bounds, rule_of, *_centres(model, at, batches, bounds))


def _medians(model: Model, at, batches) -> dict[sites.Site, float]:
  """The median norm of the rows that count, on a sample."""
  found: dict[sites.Site, list] = {site: [] for site in at}
  for batch in batches.sample():
    taps = model.taps(batch.tokens_BT, at)
    norms = {s: passes.norms(taps[s], model.mesh) for s in at}
    keep = jax.device_get(passes.fetched(batch.keep_BT, model.mesh)) > 0
    for site, norms_BT in jax.device_get(norms).items():
      found[site].append(norms_BT[keep])
  return {s: float(np.median(np.concatenate(n))) for s, n in found.items()}


def _centres(model: Model, at, batches, bounds):
  total: dict[sites.Site, list] = {site: [0.0, 0.0, 0.0] for site in at}
  counts: Any = 0
  for batch in batches:
    taps = model.taps(batch.tokens_BT, at)
    sums, new = jax.device_get(
      passes.moments(taps, batch.keep_BT, bounds, model.mesh)
    )
    counts = counts + new.astype(np.int64)
    for site, parts in sums.items():
      for i, part in enumerate(parts):
        total[site][i] = total[site][i] + part.astype(np.float64)
  centres, largest = {}, {}
  for site, (sum_D, square_D, inlier_RD) in total.items():
    mean_D = sum_D / counts[0]
    variance_D = np.maximum(square_D / counts[0] - mean_D**2, 0)
    shares_D = variance_D / max(variance_D.sum(), 1e-30)
    first = np.argsort(-shares_D, kind='stable')[:DIMENSIONS]
    weight_D = np.ones(len(mean_D), np.float32)
    weight_D[first] = 0
    largest[site] = [(int(d), float(shares_D[d])) for d in first]
    centres[site] = passes.Centres(
      mean_D.astype(np.float32),
      (inlier_RD / np.maximum(counts[1:, None], 1)).astype(np.float32),
      weight_D,
    )
  return centres, largest
