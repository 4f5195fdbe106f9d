"""Absorption: rows with a concept on which its own latents are silent.

A latent of a concept ("begins with s") may stay off where a more special one
("short") fires, which then carries the concept's direction too. For a concept
with a probe direction w (a unit vector), on held-out rows that have it and that
the probe finds:

  p_i   = f_i W_dec[i] . w                       what latent i adds along w
  main  = the k best latents by class means; k grows while F1 on train does by
          more than tau_fs
  absorbers = others with cos(W_dec[i], w) > tau_ps, the 10 largest p_i

  fraction = A / (A + M),  A, M the sums of p over absorbers and over main;
             0 where M is all of x's own projection or more
  full     : no main latent fires, and the largest absorber has p_i > tau_pa of
             x's own projection

x's own projection is (x - mean of train rows without the concept) . w. Source:
Chanin et al., A is for Absorption (arXiv 2409.14507), and SAEBench, whose
constants these are. There the concept is a first letter, asked for in a prompt
that a large model answers; here any label of tokens in their own context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope.evaluation.saebench import probe
from gemma_scope.release import sae_folder
from gemma_scope.runtime import metrics

TAU_FS, TAU_PS, TAU_PA = 0.03, 0.025, 0.4
MAX_K = 10
_PROBE_AUC = 0.8  # below it the direction is not that of the concept


def of_concept(
  rows: probe.Rows, params: sae_folder.Params, y_B: np.ndarray
) -> dict[str, Any]:
  """Absorption of one concept, plain for JSON.

  Returns:
    `probe_auc`; where it is under 0.8 `fraction` and `full` are None, for there
    is no direction to absorb. Else both are {'value', 'low', 'high'} over
    `rows` true positives, clusters of rows of one group; `main` lists the
    latents of the concept, `absorbers` those that fully absorbed it, by count.
  """
  train_B = ~rows.test_B
  dense = probe.logistic(rows.x_BD[train_B], y_B[train_B])
  score_b, y_b = dense(rows.x_BD[rows.test_B]), y_B[rows.test_B]
  auc = probe.scores(score_b, y_b, rows.group_B[rows.test_B])['auc']['value']
  found = {'probe_auc': auc, 'main': [], 'fraction': None, 'full': None}
  hit_b = (score_b > 0) & y_b
  if auc < _PROBE_AUC or not hit_b.any():
    return found
  main = _main(rows.f_BF[train_B], y_B[train_B])
  w_D = dense.w_D / np.linalg.norm(dense.w_D)
  W_dec = np.asarray(params['W_dec'], np.float64)
  along_F = W_dec @ w_D
  cosine_F = along_F / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
  without_D = rows.x_BD[train_B & ~y_B].mean(0)
  x_b = (rows.x_BD[rows.test_B][hit_b] - without_D) @ w_D
  f_bF = rows.f_BF[rows.test_B][hit_b]
  p_bF = f_bF * along_F
  main_b = p_bF[:, main].sum(1)
  may_F = cosine_F > TAU_PS
  may_F[main] = False
  absorbing_bF = np.where(may_F, p_bF, 0)
  top_bK = -np.sort(-absorbing_bF, 1)[:, :MAX_K]
  a_b, m_b = top_bK.sum(1), np.maximum(main_b, 0)
  with np.errstate(invalid='ignore', divide='ignore'):
    fraction_b = np.where(a_b > 0, a_b / (a_b + m_b), 0)
  fraction_b = np.where(main_b >= x_b, 0, fraction_b)
  full_b = (f_bF[:, main] == 0).all(1) & (top_bK[:, 0] > TAU_PA * x_b)
  group_b = rows.group_B[rows.test_B][hit_b]
  who, times = np.unique(absorbing_bF[full_b].argmax(1), return_counts=True)
  order = np.argsort(-times, kind='stable')
  return found | {
    'main': main.tolist(),
    'rows': int(hit_b.sum()),
    'fraction': _mean(fraction_b, group_b),
    'full': _mean(full_b, group_b),
    'absorbers': [[int(who[i]), int(times[i])] for i in order[:MAX_K]],
  }


def _main(f_BF, y_B) -> np.ndarray:
  """The concept's own latents: as many as F1 on train rows asks for."""
  order, best = probe.ranked(f_BF, y_B)[:MAX_K], 0.0
  for k in range(1, len(order) + 1):
    positive_B = probe.logistic(f_BF[:, order[:k]], y_B)(f_BF[:, order[:k]]) > 0
    f1 = 2 * (positive_B & y_B).sum() / (positive_B.sum() + y_B.sum())
    if k > 1 and f1 - best <= TAU_FS:
      return order[: k - 1]
    best = f1
  return order


def _mean(value_b, group_b) -> dict[str, float | None]:
  _, index_b = np.unique(group_b, return_inverse=True)
  sums = np.bincount(index_b, value_b.astype(np.float64))
  mean, low, high = metrics.ratio_interval(sums, np.bincount(index_b))
  if not np.isfinite(low):
    return {'value': mean, 'low': None, 'high': None}
  return {'value': mean, 'low': max(low, 0.0), 'high': min(high, 1.0)}


def mean_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The mean over concepts whose probe found them, and how many they are."""
  told = [one for one in found.values() if one['fraction'] is not None]
  if not told:
    return {'concepts': 0, 'fraction': None, 'full': None}
  return {
    'concepts': len(told),
    'fraction': float(np.mean([one['fraction']['value'] for one in told])),
    'full': float(np.mean([one['full']['value'] for one in told])),
  }
