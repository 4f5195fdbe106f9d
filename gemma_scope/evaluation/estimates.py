"""Sums of an evaluation -> figures with their intervals, plain for JSON.

Sums are kept for each sequence n, the independent draws, and target m. Of a
member that writes several layers, a figure is the mean over its targets:

  FVU         1/M sum_m r_m,  r_m = E_m / V_m,  E_m = sum_n |y - y_hat|^2
  delta loss  1/M sum_m sum_n delta_nm / sum_n counts_n

Both are ratios of sums over sequences, so that `ratio_interval` holds.
For a mean r of ratios, a_n and b_n are chosen such that a_n - r b_n is what
sequence n adds to the errors of all the r_m, to first order:

  b_n = sum_m V_nm / V_m        a_n = sum_m (E_nm + (r - r_m) V_nm) / V_m
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LOG10_EDGES = np.arange(-7, 0.25, 0.25)  # of the frequency histogram
_Z975 = 1.959964  # the 97.5 % point of the normal distribution
_DENSE = 0.1  # a latent that fires on more than this share of tokens


class Sums:
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

  @property
  def names(self) -> list[str]:
    return list(self._parts)

  def __getitem__(self, name: str) -> np.ndarray:
    return np.concatenate(self._parts[name])


def joined(parts: Sequence[Sums]) -> dict[str, np.ndarray]:
  """The sums of M targets, each [N] or [T], also as [N, 1], as [.., M]."""
  return {
    name: np.stack([part[name].reshape(-1) for part in parts], -1)
    for name in parts[0].names
  }


def figure(a_n, b_n, tokens: float) -> dict[str, Any]:
  """sum(a) / sum(b) with its interval; what is not finite is None (JSON)."""
  found = ratio_interval(a_n, b_n)
  value, low, high = (x if math.isfinite(x) else None for x in found)
  return {'value': value, 'low': low, 'high': high, 'tokens': int(tokens)}


def _mean_ratio(e_nM, v_nM, tokens: float) -> dict[str, Any]:
  """Mean over M of sum(e) / sum(v), with its interval; see above."""
  with np.errstate(divide='ignore', invalid='ignore'):
    whole_M = v_nM.sum(0)
    ratio_M = e_nM.sum(0) / whole_M
    a_nM = (e_nM + (ratio_M.mean() - ratio_M) * v_nM) / whole_M
    return figure(a_nM.sum(1), (v_nM / whole_M).sum(1), tokens)


def of_member(
  own: Sums,
  twin: Sums,
  total: Sums,
  variance: Mapping[str, np.ndarray],
  zero: Mapping[str, np.ndarray],
  mean: Mapping[str, np.ndarray],
  targets: Sequence[str] | None,
) -> dict[str, Any]:
  """The metrics of one member; see `evaluate.evaluate`.

  Args:
    own, twin: of the member and of its control: l0_B, fired_F, error_B [N, M],
      error_T [T, M], delta_B [N, M], delta_T [T - 1, M].
    total: tokens, counts and clean losses.
    variance: variance_B, flat_B [N, M], variance_T [T, M] of its targets.
    zero, mean: delta_B [N, M] of the ablations at its targets.
    targets: names for `by_target`, or None where there is one target.
  """
  tokens_N, counts_N = total['tokens_B'], total['counts_B']
  tokens, counts = tokens_N.sum(), counts_N.sum()
  frequency_F = own['fired_F'].reshape(-1) / tokens
  fired_F = frequency_F[frequency_F > 0]
  binned, _ = np.histogram(np.log10(np.maximum(fired_F, 1e-7)), _LOG10_EDGES)

  def losses(sums, which):
    delta_N = sums['delta_B'][:, which].mean(1)
    spread_NM = variance['variance_B'][:, which]
    return {
      'fvu': _mean_ratio(sums['error_B'][:, which], spread_NM, tokens),
      'delta_loss': figure(delta_N, counts_N, counts),
    }

  def common(sums):
    found = {'l0': figure(sums['l0_B'], tokens_N, tokens)}
    found |= losses(sums, slice(None))
    if targets:
      found['by_target'] = [
        {'target': target, **losses(sums, [m])}
        for m, target in enumerate(targets)
      ]
    return found

  def recovered(ablation):
    # Of the mean loss over targets, not the mean of the shares: a target
    # where an ablation hardly costs anything has a share of no meaning.
    lost_N = ablation['delta_B'].sum(1)
    return figure(lost_N - own['delta_B'].sum(1), lost_N, counts)

  return {
    **common(own),
    'fvu_elementwise': _mean_ratio(own['error_B'], variance['flat_B'], tokens),
    'loss_recovered_zero': recovered(zero),
    'loss_recovered_mean': recovered(mean),
    'clean_loss': figure(total['clean_B'], counts_N, counts),
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
  delta_T = np.append(own['delta_T'].mean(1), 0)
  edges = 2 ** np.arange(0, np.log2(length), 1 / 3)
  edges = np.unique(edges.round().astype(int))
  curves = {'position': [], 'delta_loss': [], 'fvu': []}
  for start, stop in zip(edges, [*edges[1:], length], strict=True):
    here = slice(start, stop)
    tokens, counts = tokens_T[here].sum(), counts_T[here].sum()
    spread_M = variance['variance_T'][here].sum(0)
    if not (tokens and counts and spread_M.all()):
      continue
    where = (tokens_T[here] * np.arange(start, stop)).sum() / tokens
    error_M = own['error_T'][here].sum(0)
    curves['position'].append(float(where))
    curves['delta_loss'].append(float(delta_T[here].sum() / counts))
    curves['fvu'].append(float((error_M / spread_M).mean()))
  return curves


def ratio_interval(a_n: Any, b_n: Any) -> tuple[Any, Any, Any]:
  """A ratio of sums over n clusters, with its 95 % confidence interval.

    r   = sum(a) / sum(b)
    var = n / (n - 1) * sum((a - r b)^2) / sum(b)^2
    r -+ t(n - 1) sqrt(var),  t the 97.5 % point of Student's distribution

  The clusters (sequences) are the independent draws; the tokens in one are
  not. `a` and `b` are the sums over a cluster's tokens (of loss and of 1; of
  squared error and of squared distance to the mean), so that a mean over all
  tokens, an FVU and a difference of losses are all ratios.

  Source: Cochran, Sampling Techniques, 3rd ed., the ratio estimator and its
  variance by linearisation, section 6.3, without finite-population correction.

  Args:
    a_n: [n, ...] numerators. b_n: [n, ...] denominators, broadcast to a_n.

  Returns:
    (value, low, high): floats when a_n has one axis, arrays [...] otherwise.
    With one cluster the interval is (-inf, inf).
  """
  a_n, b_n = np.asarray(a_n, np.float64), np.asarray(b_n, np.float64)
  n = len(a_n)
  if n == 0 or len(b_n) != n:
    raise ValueError(
      f'A ratio needs as many numerators as denominators, and at least one;'
      f' found {n} and {len(b_n)}.'
    )
  b_n = b_n.reshape(b_n.shape + (1,) * (a_n.ndim - b_n.ndim))
  with np.errstate(invalid='ignore', divide='ignore'):
    bottom = b_n.sum(0)
    value = a_n.sum(0) / bottom
    if n > 1:
      from scipy import special  # slow to import, and needed only here

      error = ((a_n - value * b_n) ** 2).sum(0)
      sigma = np.sqrt(n / (n - 1) * error) / np.abs(bottom)
      half = special.stdtrit(n - 1, 0.975) * sigma
    else:
      half = np.full_like(value, np.inf)
  result = value, value - half, value + half
  return result if a_n.ndim > 1 else tuple(map(float, result))


def wilson_interval(hits: int, count: int) -> tuple[float, float, float]:
  """A share of independent trials with Wilson's 95 % interval.

  Returns:
    (value, low, high), all within 0 and 1.
  """
  z2, share = _Z975**2, hits / count
  middle = (share + z2 / (2 * count)) / (1 + z2 / count)
  spread = share * (1 - share) / count + z2 / (4 * count**2)
  half = math.sqrt(z2 * spread) / (1 + z2 / count)
  return share, max(middle - half, 0.0), min(middle + half, 1.0)
