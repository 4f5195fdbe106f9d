"""Feature absorption: a concept's latents are silent while another one fires.

A latent for a concept ("starts with s") can be silent on a token where a more
specific latent ("short") fires and writes the concept's direction as well.
Let w be the unit direction of a logistic probe for the concept on x. Absorption
is measured on held-out rows that have the concept and that the probe classifies
correctly:

  p_i   = f_i W_dec[i] . w       contribution of latent i along w
  p     = x . w                  projection of the activation, not centred
  main  = the concept's k best latents; k grows while F1 grows by over 0.03
  M     = sum of p_i over main
  A     = sum of the 3 largest p_i > 0 over other latents of cosine >= 0.1 to w

  fraction  0                          if M >= p or A < 0.4 p
            1                          else if M <= 0
            a / (a + M), a = min(A, p - M)  otherwise
  full      no main latent fires, and the latent of the largest p_i has a cosine
            of 0.025 to w or more and p_i >= 0.4 p

The two scores have different constants. Definitions and constants are those of
SAEBench 0.6.0 (sae_bench/evals/absorption), after Chanin et al., A is for
Absorption (arXiv 2409.14507). Three things differ here: the concept is any
label of tokens in their own context, where SAEBench prompts a model for the
first letter of a word; main latents are ranked by the difference of their class
means, there by the weights of an L1 probe; and F1 is measured on train rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_scope.evaluation import estimates
from gemma_scope.evaluation.saebench import probe
from gemma_scope.release import sae_folder

F1_JUMP = 0.03  # least gain of F1 from one more main latent
MOST_MAIN = 10
LEAST_SHARE = 0.4  # of the probe projection, in both scores
FRACTION_COSINE, FRACTION_LATENTS = 0.1, 3
FULL_COSINE = 0.025
_SILENT = 1e-8  # an activation below this does not count as firing
_PROBE_AUC = 0.8  # below it the direction is not that of the concept


class Scores(NamedTuple):
  """Absorption of each row: the fraction, and full absorption."""

  fraction_B: np.ndarray
  full_B: np.ndarray  # bool
  absorber_B: np.ndarray  # the latent of the largest p_i


def of_rows(
  x_BD: np.ndarray,
  f_BF: np.ndarray,
  W_dec: np.ndarray,
  w_D: np.ndarray,
  main: np.ndarray,
) -> Scores:
  """Absorption of rows with the concept that the probe classifies correctly.

  Args:
    x_BD, f_BF: raw activations and latents.
    W_dec: decoder, [F, D].
    w_D: direction of the probe, of any length.
    main: indices of the concept's own latents.
  """
  w_D = np.asarray(w_D, np.float64) / np.linalg.norm(w_D)
  along_F = np.asarray(W_dec, np.float64) @ w_D
  cosine_F = along_F / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
  p_BF, p_B = f_BF * along_F, np.asarray(x_BD, np.float64) @ w_D
  main_B = p_BF[:, main].sum(1)

  may_absorb_F = cosine_F >= FRACTION_COSINE
  may_absorb_F[main] = False
  others_BF = np.where(may_absorb_F, np.maximum(p_BF, 0), 0)
  count = min(FRACTION_LATENTS, others_BF.shape[1])
  absorbed_B = np.partition(others_BF, -count, 1)[:, -count:].sum(1)
  left_B = np.minimum(absorbed_B, p_B - main_B)
  with np.errstate(invalid='ignore', divide='ignore'):
    fraction_B = np.where(main_B <= 0, 1.0, left_B / (left_B + main_B))
  none_B = (main_B >= p_B) | (absorbed_B < LEAST_SHARE * p_B) | (p_B <= 0)
  fraction_B = np.where(none_B, 0.0, np.clip(fraction_B, 0, 1))

  top_B = p_BF.argmax(1)
  full_B = (f_BF[:, main] < _SILENT).all(1) & (cosine_F[top_B] >= FULL_COSINE)
  full_B &= p_B > 0
  full_B &= p_BF[np.arange(len(top_B)), top_B] >= LEAST_SHARE * p_B
  return Scores(fraction_B, full_B, top_B)


def of_concept(
  rows: probe.Rows, params: sae_folder.Params, y_B: np.ndarray
) -> dict[str, Any]:
  """Absorption of one concept, as a dictionary for JSON.

  Returns:
    `probe_auc`. If it is below 0.8 the probe does not know the concept's
    direction, and `fraction` and `full` are None. Otherwise both are {'value',
    'low', 'high'} over the `rows` true positives, with groups as clusters.
    `main` lists the concept's own latents, and `absorbers` the latents that
    fully absorbed it, with counts.
  """
  train_B = ~rows.test_B
  dense = probe.logistic(rows.x_BD[train_B], y_B[train_B])
  score_b, y_b = dense(rows.x_BD[rows.test_B]), y_B[rows.test_B]
  auc = probe.scores(score_b, y_b, rows.group_B[rows.test_B])['auc']['value']
  result = {'probe_auc': auc, 'main': [], 'fraction': None, 'full': None}
  hit_B = np.zeros(len(y_B), bool)
  hit_B[rows.test_B] = (score_b > 0) & y_b
  if auc < _PROBE_AUC or not hit_B.any():
    return result
  main = _main(rows.f_BF[train_B], y_B[train_B])
  scores = of_rows(
    rows.x_BD[hit_B], rows.f_BF[hit_B], params['W_dec'], dense.w_D, main
  )
  latents, counts = np.unique(
    scores.absorber_B[scores.full_B], return_counts=True
  )
  order = np.argsort(-counts, kind='stable')[:MOST_MAIN]
  return result | {
    'main': main.tolist(),
    'rows': int(hit_B.sum()),
    'fraction': _mean(scores.fraction_B, rows.group_B[hit_B]),
    'full': _mean(scores.full_B, rows.group_B[hit_B]),
    'absorbers': [[int(latents[i]), int(counts[i])] for i in order],
  }


def _main(f_BF: np.ndarray, y_B: np.ndarray) -> np.ndarray:
  """The concept's own latents: those that fire more where it is present."""
  difference_F = probe.class_difference(f_BF, y_B)
  order = np.argsort(-difference_F, kind='stable')[:MOST_MAIN]
  order = order[: max(1, np.sum(difference_F[order] > 0))]
  best = 0.0
  for k in range(1, len(order) + 1):
    f_Bk = f_BF[:, order[:k]]
    positive_B = probe.logistic(f_Bk, y_B)(f_Bk) > 0
    f1 = 2 * (positive_B & y_B).sum() / (positive_B.sum() + y_B.sum())
    if k > 1 and f1 <= best + F1_JUMP:
      return order[: k - 1]
    best = f1
  return order


def _mean(value_B, group_B) -> dict[str, float | None]:
  _, index_B = np.unique(group_B, return_inverse=True)
  sums_G = np.bincount(index_B, np.asarray(value_B, np.float64))
  mean, low, high = estimates.ratio_interval(sums_G, np.bincount(index_B))
  if not np.isfinite(low):
    return {'value': mean, 'low': None, 'high': None}
  return {'value': mean, 'low': max(low, 0.0), 'high': min(high, 1.0)}


def mean_of(
  by_concept: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """The mean over the concepts with a good probe, and their number."""
  scored = [
    scores for scores in by_concept.values() if scores['fraction'] is not None
  ]
  if not scored:
    return {'concepts': 0, 'fraction': None, 'full': None}
  return {
    'concepts': len(scored),
    'fraction': float(
      np.mean([scores['fraction']['value'] for scores in scored])
    ),
    'full': float(np.mean([scores['full']['value'] for scores in scored])),
  }
