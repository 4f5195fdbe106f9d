"""Values per token -> figures with intervals, as plain JSON.

Documents are the independent draws of a text: tokens of one document are
alike, whichever sequence they are in. Values are therefore summed for each
document n (where a text is given without documents, for each sequence), and for
each target m. For an SAE that writes several layers, a figure is the mean over
its targets:

  FVU         1/M sum_m r_m,  r_m = E_m / V_m,  E_m = sum_n |y - y_hat|^2
  delta loss  1/M sum_m sum_n delta_nm / sum_n counts_n

Both are ratios of sums over documents, so that `ratio_interval` holds. For a
mean r of ratios, a_n and b_n are chosen such that a_n - r b_n is what document
n adds to the errors of all the r_m, to first order:

  b_n = sum_m V_nm / V_m        a_n = sum_m (E_nm + (r - r_m) V_nm) / V_m
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LOG10_EDGES = np.arange(-7, 0.25, 0.25)  # of the frequency histogram
_Z975 = 1.959964  # the 97.5 % point of the normal distribution
ERRORS = ('fvu', 'fvu_inliers', 'fvu_rest', 'delta_loss', 'kl')
DENSE = 0.1  # a latent that fires on more than this share of tokens


class Tally:
  """Sums of values of tokens, by cluster [G, ...] and by position [T, ...].

  Args:
    clusters: how many documents (or sequences) there are.
    length: tokens of a sequence.
  """

  def __init__(self, clusters: int, length: int):
    self._clusters, self._length = clusters, length
    self._by_cluster: dict[str, np.ndarray] = {}
    self._by_position: dict[str, np.ndarray] = {}

  def add(
    self, name: str, value: np.ndarray, where_BT: np.ndarray, cluster_BT
  ) -> None:
    """Adds values [B, T] or [B, T, M] of the tokens of `where_BT`."""
    value = np.asarray(value, np.float64)
    value = value.reshape(*where_BT.shape, -1)
    value = np.where(where_BT[..., None], value, 0)
    chosen_B = where_BT.any(1)
    ids = np.asarray(cluster_BT)[chosen_B].reshape(-1)
    by_cluster = np.stack(
      [
        np.bincount(ids, value[chosen_B, :, m].reshape(-1), self._clusters)
        for m in range(value.shape[-1])
      ],
      -1,
    )
    for sums, addend in (
      (self._by_cluster, by_cluster),
      (self._by_position, value.sum(0)),
    ):
      sums[name] = sums[name] + addend if name in sums else addend

  def __contains__(self, name: str) -> bool:
    return name in self._by_cluster

  def __getitem__(self, name: str) -> np.ndarray:
    """Sums by cluster, [G, M]."""
    return self._by_cluster[name]

  def by_position(self, name: str) -> np.ndarray:
    """Sums by position, [T, M]."""
    return self._by_position[name]


def figure(a_n, b_n, tokens: float) -> dict[str, Any]:
  """sum(a) / sum(b) with its interval; None (JSON) if not finite.

  Clusters without a token that counts are left out: they are not draws.
  """
  a_n, b_n = np.asarray(a_n, np.float64), np.asarray(b_n, np.float64)
  drawn_n = (a_n != 0) | (b_n != 0)
  if not drawn_n.any():
    return {'value': None, 'low': None, 'high': None, 'tokens': int(tokens)}
  limits = ratio_interval(a_n[drawn_n], b_n[drawn_n])
  value, low, high = (
    limit if math.isfinite(limit) else None for limit in limits
  )
  return {'value': value, 'low': low, 'high': high, 'tokens': int(tokens)}


def _mean_ratio(e_nM, v_nM, tokens: float) -> dict[str, Any]:
  """Mean over M of sum(e) / sum(v), with its interval; see above."""
  with np.errstate(divide='ignore', invalid='ignore'):
    variance_M = v_nM.sum(0)
    ratio_M = e_nM.sum(0) / variance_M
    a_nM = (e_nM + (ratio_M.mean() - ratio_M) * v_nM) / variance_M
    return figure(a_nM.sum(1), (v_nM / variance_M).sum(1), tokens)


def fidelity(tally: Tally, targets: Sequence[str] = ()) -> dict[str, Any]:
  """L0, delta loss, KL and FVU of one dictionary, an SAE or a control.

  Args:
    tally: by token `tokens`, `replaced` with `l0` there, and, over targets,
      `error` and `variance`, each also `_inlier` and `_rest`; by loss `counts`,
      `delta` and `kl`.
    targets: names for `by_target`, where there are several.
  """
  tokens = tally['tokens'].sum()
  counts = tally['counts'].sum()

  def of_targets(columns) -> dict[str, Any]:
    figures = {}
    for key, name in (('delta_loss', 'delta'), ('kl', 'kl')):
      sums_n = tally[name][:, columns].mean(1)
      figures[key] = figure(sums_n, tally['counts'][:, 0], counts)
    for key, suffix, tokens_seen in (
      ('fvu', '', tokens),
      ('fvu_inliers', '_inlier', tally['inliers'].sum()),
      ('fvu_rest', '_rest', tokens),
    ):
      error, variance = tally[f'error{suffix}'], tally[f'variance{suffix}']
      figures[key] = _mean_ratio(
        error[:, columns], variance[:, columns], tokens_seen
      )
    return figures

  replaced_n = tally['replaced'][:, 0]
  metrics = {'l0': figure(tally['l0'][:, 0], replaced_n, replaced_n.sum())}
  metrics |= of_targets(slice(None))
  if targets:
    metrics['by_target'] = [
      {'target': target, **of_targets([m])} for m, target in enumerate(targets)
    ]
  return metrics


def of_sae(
  own: Tally,
  fired_F: np.ndarray,
  ablations: Mapping[str, np.ndarray],
  targets: Sequence[str] = (),
) -> dict[str, Any]:
  """All metrics of one SAE but its controls; see `evaluate.evaluate`.

  Args:
    own: as in `fidelity`, with `flat`, `l1`, `cosine`, `norm_ratio`, `clean`.
    fired_F: on how many replaced tokens each latent fired.
    ablations: `zero`, `mean` and `zero_kl`: [G, M] sums at its targets.
    targets: as in `fidelity`.
  """
  replaced_n, counts_n = own['replaced'][:, 0], own['counts'][:, 0]
  tokens, counts = own['tokens'].sum(), counts_n.sum()
  replaced = replaced_n.sum()
  frequency_F = np.asarray(fired_F, np.float64).reshape(-1) / replaced
  fired = frequency_F[frequency_F > 0]
  binned, _ = np.histogram(np.log10(np.maximum(fired, 1e-7)), _LOG10_EDGES)

  def regained(ablated_nM, own_nM):
    # Of the mean loss over targets, not the mean of the shares: a target
    # where an ablation hardly costs anything has a share of no meaning.
    ablated_n = ablated_nM.sum(1)
    return figure(ablated_n - own_nM.sum(1), ablated_n, counts)

  metrics = {
    **fidelity(own, targets),
    'fvu_elementwise': _mean_ratio(own['error'], own['flat'], tokens),
    'loss_recovered_zero': regained(ablations['zero'], own['delta']),
    'loss_recovered_mean': regained(ablations['mean'], own['delta']),
    'kl_score': regained(ablations['zero_kl'], own['kl']),
    'kl_zero': figure(ablations['zero_kl'].mean(1), counts_n, counts),
    'clean_loss': figure(own['clean'][:, 0], counts_n, counts),
    'l1': figure(own['l1'][:, 0], replaced_n, replaced),
  }
  for name in ('cosine', 'norm_ratio'):
    metrics[name] = figure(own[name].mean(1), replaced_n, replaced)
  return metrics | {
    'dead': float(np.mean(frequency_F == 0)),
    'dense': float(np.mean(frequency_F > DENSE)),
    'tokens': int(replaced),
    'frequency_histogram': {
      'log10_edges': _LOG10_EDGES.tolist(),
      'counts': binned.tolist(),
      'never': int(np.sum(frequency_F == 0)),
    },
    'by_position': _by_position(own),
  }


def strongest(
  controls: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """The strongest control for each figure.

  Returns:
    `l0` of the control with the smallest FVU, the smallest value of each figure
    over the controls, and `kinds`: which control has it.
  """
  value = lambda figure: (
    math.inf if figure['value'] is None else figure['value']
  )
  least, kinds = {}, {}
  for key in ERRORS:
    kinds[key] = min(controls, key=lambda kind: value(controls[kind][key]))
    least[key] = controls[kinds[key]][key]
  control = controls[kinds['fvu']]
  least = {'l0': control['l0'], **least, 'kinds': kinds}
  if 'by_target' in control:
    least['by_target'] = control['by_target']
  return least


def _by_position(tally: Tally) -> dict[str, list[float]]:
  """Curves over bins of position, three to a doubling; empty bins left out."""
  tokens_T = tally.by_position('tokens')[:, 0]
  counts_T = tally.by_position('counts')[:, 0]
  delta_T = tally.by_position('delta').mean(1)
  length = len(tokens_T)
  edges = 2 ** np.arange(0, np.log2(length), 1 / 3)
  edges = np.unique(edges.round().astype(int))
  curves = {'position': [], 'delta_loss': [], 'fvu': []}
  for start, stop in zip(edges, [*edges[1:], length], strict=True):
    bin_slice = slice(start, stop)
    tokens, counts = tokens_T[bin_slice].sum(), counts_T[bin_slice].sum()
    spread_M = tally.by_position('variance')[bin_slice].sum(0)
    if not (tokens and counts and spread_M.all()):
      continue
    mean_position = (
      tokens_T[bin_slice] * np.arange(start, stop)
    ).sum() / tokens
    error_M = tally.by_position('error')[bin_slice].sum(0)
    curves['position'].append(float(mean_position))
    curves['delta_loss'].append(float(delta_T[bin_slice].sum() / counts))
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
