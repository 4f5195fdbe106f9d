"""Which features have an effect that their controls do not have.

For feature i and an edit (ablation, addition), with KL_c the divergence that
the edit causes in context c and KL_cm that of control m, a direction of the
same norm at the same token:

  S_i  = mean_c log KL_c        S_im = mean_c log KL_cm
  T_i  = S_i - mean_{m < M-1} S_im
  N_im = S_im - mean_{n != m} S_in       the same for each control

If the decoder is exchangeable with the control directions, T_i and N_im have
the same distribution. The p-value of i is the share of all features' N that are
at least T_i, with T_i counted in. N varies between features, but the expected
number of false discoveries above any threshold is at most what all features'
controls show there, so the Benjamini-Hochberg procedure stays valid.

There are two kinds of control, decoders of other features and random
directions; an edit's p-value is the larger of the two (an intersection-union
test). A feature's p-value is twice the smaller of its edits' (Bonferroni).

Sources: Benjamini and Hochberg (1995); pooled permutation nulls as in Storey
and Tibshirani (2003), section 'Remarks'; Berger (1982) for the larger p-value.
"""

from __future__ import annotations

import warnings

import numpy as np

_LEAST_KL = 1e-12  # nats; below it float32 has no digits left
VERDICTS = (
  'no measurable effect',
  'moves something else',
  'moves what its logit lens says',
)


def logs(kl: np.ndarray) -> np.ndarray:
  """log KL with a floor; nan (a context that is missing) stays nan."""
  return np.log(np.maximum(kl, _LEAST_KL))


def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
  """The mean over contexts that are there; nan where there are none."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)  # an empty mean
    return np.nanmean(values, axis)


def excess(
  kl_FC: np.ndarray, control_FCM: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """T of each feature [F] and N of each of its controls [F, M].

  Args:
    kl_FC: each feature's effect in each context, nan where there is none.
    control_FCM: the effects of its M >= 2 controls there.
  """
  s_F, s_FM = mean(logs(kl_FC)), mean(logs(control_FCM), 1)
  count = s_FM.shape[1]
  if count < 2:
    raise ValueError(f'At least 2 controls are needed; found {count}.')
  others_FM = (s_FM.sum(1, keepdims=True) - s_FM) / (count - 1)
  return s_F - s_FM[:, :-1].mean(1), s_FM - others_FM


def pooled_p(observed_F: np.ndarray, null: np.ndarray) -> np.ndarray:
  """The share of the null that is at least as large; nan stays nan."""
  pool = np.sort(null[np.isfinite(null)])
  above_F = len(pool) - np.searchsorted(pool, observed_F, 'left')
  p_F = (1 + above_F) / (1 + len(pool))
  return np.where(np.isfinite(observed_F), p_F, np.nan)


def edit_p(kl_FC: np.ndarray, control_FCM: np.ndarray) -> np.ndarray:
  """p-value of each feature's edit beside one kind of control."""
  return pooled_p(*excess(kl_FC, control_FCM))


def either_p(p_EF: np.ndarray) -> np.ndarray:
  """p-value of 'at least one of the edits has an effect' (Bonferroni)."""
  tested_EF = np.isfinite(p_EF)
  least_F = np.min(np.where(tested_EF, p_EF, 1), 0)
  p_F = np.minimum(tested_EF.sum(0) * least_F, 1)
  return np.where(tested_EF.any(0), p_F, np.nan)


def adjusted(p_F: np.ndarray) -> np.ndarray:
  """Benjamini-Hochberg adjusted p-values; nan (not tested) stays nan.

  Rejecting where they are at most alpha keeps the expected share of false
  rejections at most alpha.
  """
  q_F = np.full(len(p_F), np.nan)
  tested = np.flatnonzero(np.isfinite(p_F))
  order = tested[np.argsort(p_F[tested], kind='stable')]
  scaled = p_F[order] * len(order) / np.arange(1, len(order) + 1)
  q_F[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
  return q_F


def verdicts(
  q_F: np.ndarray, lens_p_F: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
  """Index into `VERDICTS` of each feature, -1 where it was not tested.

  Args:
    q_F: adjusted p-values of the effect.
    lens_p_F: p-values of the agreement with the logit lens; nan where a
      feature has none.
    alpha: the false discovery rate, of both steps.

  Returns:
    The verdicts, and the lens's p-values adjusted over the features that have
    an effect.
  """
  effect_F = q_F <= alpha
  lens_q_F = adjusted(np.where(effect_F, lens_p_F, np.nan))
  verdict_F = np.where(effect_F, np.where(lens_q_F <= alpha, 2, 1), 0)
  return np.where(np.isfinite(q_F), verdict_F, -1), lens_q_F


def interval(values_FC: np.ndarray) -> np.ndarray:
  """Mean over contexts with its 95 % interval (Student's), [F, 3]."""
  from scipy import special  # slow to import

  count_F = np.isfinite(values_FC).sum(1)
  middle_F = mean(values_FC)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)
    deviation_F = np.nanstd(values_FC, 1, ddof=1)
  with np.errstate(invalid='ignore', divide='ignore'):
    half_F = special.stdtrit(count_F - 1, 0.975) * deviation_F
    half_F = half_F / np.sqrt(count_F)
  return np.stack([middle_F, middle_F - half_F, middle_F + half_F], 1)


def halves_agree(kl_FC: np.ndarray, control_FCM: np.ndarray) -> float:
  """Spearman's correlation of the excess in two halves of the contexts.

  Each half is compared with a control of its own, so that a control that both
  share cannot make them agree.
  """
  from scipy import stats  # slow to import

  def half(k):
    own_FC, other_FC = kl_FC[:, k::2], control_FCM[:, k::2, k]
    return mean(logs(own_FC) - logs(other_FC))

  a_F, b_F = half(0), half(1)
  both_F = np.isfinite(a_F) & np.isfinite(b_F)
  if both_F.sum() < 3:
    return float('nan')
  return float(stats.spearmanr(a_F[both_F], b_F[both_F]).statistic)
