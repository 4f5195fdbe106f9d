"""References for squared errors: means, outlier rules, largest dimensions.

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
  """The language model of an evaluation, its mesh and its callbacks."""

  gemma: lm.Gemma
  params: lm.Params
  mesh: Mesh | None
  watch: batches_lib.Watch

  def taps(self, tokens_BT, sites_read: Sequence[sites.Site]) -> splice.Taps:
    """Activations at the sites, by a pass without logits."""
    self.watch.poll()
    sites_read = tuple(sorted(set(sites_read)))
    return splice.taps(self.gemma, self.params, tokens_BT, sites_read)


@dataclasses.dataclass(frozen=True, eq=False)
class References:
  """What all SAEs of an evaluation are measured against.

  Attributes:
    bounds: the distinct outlier rules.
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

  def weights(self, targets: Sequence[sites.Site]) -> np.ndarray:
    """[M, D]: 0 for the dimensions left out at each site, else 1."""
    return np.stack([self.centres[site].weight_D for site in targets])

  def describe(
    self, name: str, targets: Sequence[sites.Site]
  ) -> dict[str, Any]:
    """Metrics entries: an SAE's outlier rule and the largest dimensions."""
    index, of_card = self.rule_of[name]
    bounds = {str(site): bound for site, bound in self.bounds[index].items()}
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
        for site in targets
      ],
    }


def measure(
  model: Model,
  wirings: Mapping[str, sites.Wiring],
  cards: Mapping[str, Mapping[str, Any]],
  batches: batches_lib.Batches,
) -> References:
  """Means, rules and dimensions of all sites that the SAEs read or write."""
  all_sites = {
    site
    for wiring in wirings.values()
    for site in (*wiring.sites, *wiring.targets)
  }
  rules = {name: outliers.norm_bounds(card) for name, card in cards.items()}
  missing = [wirings[name] for name, rule in rules.items() if not rule]
  unruled = {
    site for wiring in missing for site in (*wiring.sites, *wiring.targets)
  }
  medians = _medians(model, unruled, batches) if unruled else {}
  bounds, rule_of = [], {}
  for name, rule in rules.items():
    of_card = bool(rule)
    if not rule:
      wiring = wirings[name]
      ends = sorted({*wiring.sites, *wiring.targets})
      rule = {site: MAX_NORM * medians[site] for site in ends}
    if rule not in bounds:
      bounds.append(rule)
    rule_of[name] = bounds.index(rule), of_card
  return References(
    bounds, rule_of, *_centres(model, all_sites, batches, bounds)
  )


def _medians(model: Model, sites_read, batches) -> dict[sites.Site, float]:
  """The median norm of the rows that count, on a sample."""
  norms_by_site: dict[sites.Site, list] = {site: [] for site in sites_read}
  for batch in batches.sample():
    taps = model.taps(batch.tokens_BT, sites_read)
    norms = {site: passes.norms(taps[site], model.mesh) for site in sites_read}
    keep = jax.device_get(passes.fetched(batch.keep_BT, model.mesh)) > 0
    for site, norms_BT in jax.device_get(norms).items():
      norms_by_site[site].append(norms_BT[keep])
  return {
    site: float(np.median(np.concatenate(parts)))
    for site, parts in norms_by_site.items()
  }


def _centres(model: Model, all_sites, batches, bounds):
  total: dict[sites.Site, list] = {site: [0.0, 0.0, 0.0] for site in all_sites}
  counts: Any = 0
  for batch in batches:
    taps = model.taps(batch.tokens_BT, all_sites)
    sums, batch_counts = jax.device_get(
      passes.moments(taps, batch.keep_BT, bounds, model.mesh)
    )
    counts = counts + batch_counts.astype(np.int64)
    for site, site_sums in sums.items():
      for i, batch_sum in enumerate(site_sums):
        total[site][i] = total[site][i] + batch_sum.astype(np.float64)
  centres, largest = {}, {}
  for site, (sum_D, square_D, inlier_RD) in total.items():
    mean_D = sum_D / counts[0]
    variance_D = np.maximum(square_D / counts[0] - mean_D**2, 0)
    shares_D = variance_D / max(variance_D.sum(), 1e-30)
    largest_dimensions = np.argsort(-shares_D, kind='stable')[:DIMENSIONS]
    weight_D = np.ones(len(mean_D), np.float32)
    weight_D[largest_dimensions] = 0
    largest[site] = [
      (int(dimension), float(shares_D[dimension]))
      for dimension in largest_dimensions
    ]
    centres[site] = passes.Centres(
      mean_D.astype(np.float32),
      (inlier_RD / np.maximum(counts[1:, None], 1)).astype(np.float32),
      weight_D,
    )
  return centres, largest
