"""SCR and TPP: the effect of ablating a few latents on linear probes.

  a [F] = (E[f | y] - E[f | not y]) * (W_dec w)   attribution to a probe w
  x' = x - sum_{i in top N} f_i W_dec[i]          ablation; the error stays

Spurious correlation removal (SCR). A probe for a target label t is trained on
rows where t always agrees with a spurious label s. The N latents with the
largest attribution to a probe for s are ablated. The score is the share of the
lost accuracy that comes back on rows where t and s are independent (the four
combinations have equal weight):

  (accuracy after ablation - biased accuracy)
  / (accuracy of an unbiased probe - biased accuracy)

Targeted probe perturbation (TPP). The N latents of class i are ablated. The
probe for class i should lose accuracy, the other probes should not:

  mean_i (drop_ii - mean_{j != i} drop_ij)

Source: SAEBench (Karvonen et al., 2025), after SHIFT (Marks et al., 2024). They
use labelled texts and one probe for each pair of labels; here any rows do. The
control for each score ablates N random latents that fire.

Both scores are disputed as measures of SAE quality (arXiv 2605.18229): read
sparse probing first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae
from gemma_scope.evaluation.saebench import probe
from gemma_scope.language_model import hooks
from gemma_scope.release import sae_folder

COUNTS = (2, 5, 10, 20, 50)
_WORTH = 0.02  # a smaller loss of accuracy is too small to divide by


def remove(
  params: Mapping[str, Any], features: Sequence[int]
) -> dict[str, np.ndarray]:
  """Sets the decoders of the latents `features` to zero.

  The encoder is unchanged, so that in a TopK SAE no other latent takes their
  place. Latents are numbered over all layers, layer-major.

  Raises:
    ValueError: the SAE has no latent of that number.
  """
  width = params['b_enc'].size
  unknown = [i for i in features if not 0 <= i < width]
  if unknown:
    raise ValueError(f'There is no latent {unknown[0]}: the SAE has {width:,}.')
  changed = {key: np.array(array) for key, array in params.items()}
  W_dec = changed['W_dec']
  flat = W_dec.reshape(width, *W_dec.shape[params['b_enc'].ndim :])
  flat[list(features)] = 0
  changed['W_dec'] = flat.reshape(W_dec.shape)
  return changed


def edit(params: Mapping[str, Any], features: Sequence[int]) -> hooks.Edit:
  """An edit for `lm.Gemma.forward` that ablates latents of an SAE.

  The SAE must read and write one site. Its error is kept, so that ablating no
  latent changes nothing.
  """
  if params['W_dec'].ndim != 2 or 'W_skip' in params:
    raise ValueError(
      'edit() is for SAEs that read and write one site; use remove() for '
      'transcoders and for SAEs of several layers.'
    )
  index = np.asarray(features, np.int32)
  W_dec = jnp.asarray(params['W_dec'])[index]

  def without(x_BTD: jax.Array) -> jax.Array:
    f_BTF = sae.encode(params, x_BTD.astype(jnp.float32))
    return (x_BTD - f_BTF[..., index] @ W_dec).astype(x_BTD.dtype)

  return without


def attribution(
  f_BF: np.ndarray, y_B: np.ndarray, params: sae_folder.Params, w_D: np.ndarray
) -> np.ndarray:
  """Each latent's part of a probe's difference between the classes, [F]."""
  difference_F = f_BF[y_B].mean(0) - f_BF[~y_B].mean(0)
  return difference_F * (np.asarray(params['W_dec']) @ w_D)


def _without(x_BD, f_BF, params, index):
  return x_BD - f_BF[:, index] @ np.asarray(params['W_dec'])[index]


def _choices(effect_F, f_BF, count: int, seed: int):
  """The latents with the largest effect, and as many random ones that fire."""
  chosen = np.argsort(-effect_F, kind='stable')[:count]
  chosen = chosen[effect_F[chosen] > 0]
  fires = np.flatnonzero((f_BF > 0).any(0))
  rng = np.random.default_rng(seed)
  return {
    'latents': chosen,
    'random_latents': rng.permutation(fires)[: len(chosen)],
  }


def scr(
  rows: probe.Rows,
  params: sae_folder.Params,
  target_B: np.ndarray,
  spurious_B: np.ndarray,
  counts: Sequence[int] = COUNTS,
  seed: int = 0,
) -> dict[str, Any]:
  """Spurious correlation removal; see the module. The result is JSON.

  Returns:
    `biased` and `unbiased`: the accuracies of the two probes, with equal weight
    for the four combinations of labels; `spurious`: the accuracy of the probe
    for s; `removed`: accuracy and score for each N, for the SAE's latents and
    for random ones. A score is None if the bias costs less than 0.02.

  Raises:
    ValueError: a combination of labels has no train rows or no test rows.
  """
  t_B, s_B = np.asarray(target_B, bool), np.asarray(spurious_B, bool)
  cell_B = 2 * t_B + s_B
  train_B, test_B = ~rows.test_B, rows.test_B
  for rows_B, name in ((train_B, 'train'), (test_B, 'test')):
    if len(np.unique(cell_B[rows_B])) < 4:
      raise ValueError(
        'SCR needs rows of all four combinations of target and spurious '
        f'label; one combination has no {name} rows.'
      )
  even_B = _even(cell_B, train_B, seed)
  biased_B = train_B & (t_B == s_B)
  x_BD, f_BF = rows.x_BD, rows.f_BF
  biased = probe.logistic(x_BD[biased_B], t_B[biased_B])
  unbiased = probe.logistic(x_BD[even_B], t_B[even_B])
  spurious = probe.logistic(x_BD[even_B], s_B[even_B])

  def accuracy(fitted, x_bD, y_b):
    right_b = (fitted(x_bD) > 0) == y_b
    cell_b = cell_B[test_B]
    return float(np.mean([right_b[cell_b == c].mean() for c in range(4)]))

  x_bD, f_bF, t_b = x_BD[test_B], f_BF[test_B], t_B[test_B]
  biased_accuracy, unbiased_accuracy = (
    accuracy(fitted, x_bD, t_b) for fitted in (biased, unbiased)
  )
  effect_F = attribution(f_BF[even_B], s_B[even_B], params, spurious.w_D)
  removed = []
  for count in counts:
    choices = _choices(effect_F, f_BF[train_B], count, seed)
    for chosen_by, index in choices.items():
      ablated_accuracy = accuracy(
        biased, _without(x_bD, f_bF, params, index), t_b
      )
      worth = unbiased_accuracy - biased_accuracy >= _WORTH
      removed.append(
        {
          'on': chosen_by,
          'count': count,
          'features': index.tolist(),
          'accuracy': ablated_accuracy,
          'score': (ablated_accuracy - biased_accuracy)
          / (unbiased_accuracy - biased_accuracy)
          if worth
          else None,
        }
      )
  return {
    'biased': biased_accuracy,
    'unbiased': unbiased_accuracy,
    'spurious': accuracy(spurious, x_bD, s_B[test_B]),
    'removed': removed,
  }


def _even(cell_B, train_B, seed):
  """Selects equally many train rows of each combination of labels."""
  rng = np.random.default_rng(seed)
  cells = [np.flatnonzero(train_B & (cell_B == c)) for c in range(4)]
  size = min(map(len, cells))
  chosen = np.concatenate([rng.permutation(cell)[:size] for cell in cells])
  even_B = np.zeros(len(cell_B), bool)
  even_B[chosen] = True
  return even_B


def tpp(
  rows: probe.Rows,
  params: sae_folder.Params,
  labels: Mapping[str, np.ndarray],
  counts: Sequence[int] = COUNTS,
  seed: int = 0,
) -> dict[str, Any]:
  """Targeted probe perturbation; see the module. The result is JSON.

  Returns:
    `classes`: the balanced accuracy of each class's probe; `removed`: for each
    N `score`, `intended` (mean drop of a class's own probe) and `unintended`
    (that of the others).
  """
  if len(labels) < 2:
    raise ValueError('TPP needs at least two classes.')
  train_B, test_B = ~rows.test_B, rows.test_B
  x_bD, f_bF = rows.x_BD[test_B], rows.f_BF[test_B]
  fitted = {
    name: probe.logistic(rows.x_BD[train_B], y_B[train_B])
    for name, y_B in labels.items()
  }

  def accuracies(x_bD):
    balanced = []
    for name, y_B in labels.items():
      right_b, y_b = (fitted[name](x_bD) > 0) == y_B[test_B], y_B[test_B]
      balanced.append((right_b[y_b].mean() + right_b[~y_b].mean()) / 2)
    return np.asarray(balanced)

  before_C, removed = accuracies(x_bD), []
  effects = [
    attribution(rows.f_BF[train_B], y_B[train_B], params, fitted[name].w_D)
    for name, y_B in labels.items()
  ]
  own_CC = np.eye(len(labels), dtype=bool)
  for count in counts:
    choices = [
      _choices(effect_F, rows.f_BF[train_B], count, seed + i)
      for i, effect_F in enumerate(effects)
    ]
    for chosen_by in choices[0]:
      drop_CC = np.stack(
        [
          before_C - accuracies(_without(x_bD, f_bF, params, choice[chosen_by]))
          for choice in choices
        ]
      )
      intended, unintended = drop_CC[own_CC].mean(), drop_CC[~own_CC].mean()
      removed.append(
        {
          'on': chosen_by,
          'count': count,
          'score': float(intended - unintended),
          'intended': float(intended),
          'unintended': float(unintended),
        }
      )
  return {
    'classes': dict(zip(labels, before_C.tolist(), strict=True)),
    'removed': removed,
  }
