"""Outlier rows: the few rows with a very large norm, and the rule for them.

On some tokens (in Gemma 3 the space before a year, or a lone newline) a site's
activation is many times longer than on all others. Such rows would dominate the
variance and the top examples of every latent, as BOS would. The rule is a bound
on the Euclidean norm at each site:

  |x| > max_norm * median |x|

The medians are measured when training starts. The card keeps the bounds:

  "outliers": {"max_norm": 10.0, "norm_bounds": {"resid_post/9": 57812.5}}

Evaluation, index, attribution and probes read the rule from the card. If a card
has no "outliers", no row is an outlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemma_scope import sites

Bounds = Mapping[sites.Site, float]


def describe(max_norm: float, bounds: Bounds) -> dict[str, Any]:
  """The card's entry 'outliers'."""
  return {
    'max_norm': max_norm,
    'norm_bounds': {str(site): bound for site, bound in bounds.items()},
  }


def norm_bounds(card: Mapping[str, Any]) -> dict[sites.Site, float]:
  """The largest norm of an ordinary row, by site; {} if there is no rule.

  Raises:
    ValueError: the card's rule is damaged.
  """
  rule = card.get('outliers')
  if rule is None:
    return {}
  try:
    bounds = {
      sites.parse(name): float(bound)
      for name, bound in rule['norm_bounds'].items()
    }
    damaged = not all(
      bound > 0 and math.isfinite(bound) for bound in bounds.values()
    )
  except (AttributeError, KeyError, TypeError, ValueError):
    damaged = True
  if damaged:
    raise ValueError(
      'The card\'s "outliers" must hold "norm_bounds", a positive norm for '
      f'each site; found {str(rule)[:80]}.'
    )
  return bounds


def is_outlier(rows: Mapping[sites.Site, Any], bounds: Bounds) -> Any:
  """Which rows are outliers at any of the sites.

  Args:
    rows: raw activations [..., D] by site, NumPy or JAX, of equal leading axes.
    bounds: see `norm_bounds`; sites without rows are ignored.

  Returns:
    bool [...].
  """
  outlier = None
  for site, x in rows.items():
    x = x.astype('float32')
    bound = bounds.get(site, math.inf)
    above = (x * x).sum(-1) > bound * bound
    outlier = above if outlier is None else outlier | above
  return outlier
