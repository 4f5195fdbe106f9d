"""SCR and TPP: what ablating a few latents does to linear probes.

  a [F] = (E[f | y] - E[f | not y]) * (W_dec w)   what latents add to a probe w
  x' = x - sum_{i in top N} f_i W_dec[i]          the rest and the error stay

SCR, spurious correlation removal: a probe of a target t is trained where t and
a spurious s always agree. The N latents that most carry a probe of s are taken
out; how much of the lost accuracy comes back, on rows where t and s are
independent (each of the four cells weighs the same)?

  (accuracy without them - accuracy) / (that of an unbiased probe - accuracy)

TPP, targeted probe perturbation: the N latents of class i are taken out. Probe
i should lose accuracy and the others should not:

  mean_i (drop_ii - mean_{j != i} drop_ij)

Source: SAEBench (Karvonen et al., 2025), after SHIFT (Marks et al., 2024);
there on labelled texts with one probe for each pair, here on any rows.
The control beside each is N latents drawn from those that fire.

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
_WORTH = 0.02  # accuracy that must be lost before a share of it means anything


def remove(
  params: Mapping[str, Any], features: Sequence[int]
) -> dict[str, np.ndarray]:
  """An SAE whose latents `features` write nothing; all others as they were.

  Their decoders are zero, so that a TopK SAE puts no other latent in their
  place. Latents are counted over all layers, layer-major.

  Raises:
    ValueError: a latent that the SAE does not have.
  """
  width = params['b_enc'].size
  wrong = [i for i in features if not 0 <= i < width]
  if wrong:
    raise ValueError(f'There is no latent {wrong[0]}: the SAE has {width:,}.')
  changed = {key: np.array(array) for key, array in params.items()}
  W_dec = changed['W_dec']
  flat = W_dec.reshape(width, *W_dec.shape[params['b_enc'].ndim :])
  flat[list(features)] = 0
  changed['W_dec'] = flat.reshape(W_dec.shape)
  return changed


def edit(params: Mapping[str, Any], features: Sequence[int]) -> hooks.Edit:
  """x -> x less what the latents write: for `lm.Gemma.forward`'s edits.

  Of an SAE that reads and writes one site. What the SAE does not reconstruct
  stays, so that removing nothing changes nothing.
  """
  if params['W_dec'].ndim != 2 or 'W_skip' in params:
    raise ValueError(
      'An edit removes latents of an SAE that reads and writes one site; use '
      'remove() for transcoders and for several layers.'
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
  """What each latent adds to a probe's difference between the classes, [F]."""
  difference_F = f_BF[y_B].mean(0) - f_BF[~y_B].mean(0)
  return difference_F * (np.asarray(params['W_dec']) @ w_D)


def _without(x_BD, f_BF, params, index):
  return x_BD - f_BF[:, index] @ np.asarray(params['W_dec'])[index]


def _choices(effect_F, f_BF, count: int, seed: int):
  """The latents of largest effect, and as many of those that fire at random."""
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
  """Spurious correlation removal; see above. Plain for JSON.

  Returns:
    `biased` and `unbiased` (the probes' accuracies over four equal cells),
    `spurious` (the accuracy of the probe of s), and `removed`: for each N
    accuracy and score, for the SAE's latents and for random ones; a score is
    None where the bias costs less than 0.02.

  Raises:
    ValueError: one of the four cells is empty, in train or in test.
  """
  t_B, s_B = np.asarray(target_B, bool), np.asarray(spurious_B, bool)
  cell_B = 2 * t_B + s_B
  train_B, test_B = ~rows.test_B, rows.test_B
  for which, name in ((train_B, 'train'), (test_B, 'test')):
    if len(np.unique(cell_B[which])) < 4:
      raise ValueError(
        f'SCR needs rows with and without target and spurious label, in all '
        f'four combinations; one has no {name} rows.'
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
  before, after = (accuracy(p, x_bD, t_b) for p in (biased, unbiased))
  effect_F = attribution(f_BF[even_B], s_B[even_B], params, spurious.w_D)
  removed = []
  for count in counts:
    for on, index in _choices(effect_F, f_BF[train_B], count, seed).items():
      now = accuracy(biased, _without(x_bD, f_bF, params, index), t_b)
      worth = after - before >= _WORTH
      removed.append(
        {
          'on': on,
          'count': count,
          'features': index.tolist(),
          'accuracy': now,
          'score': (now - before) / (after - before) if worth else None,
        }
      )
  return {
    'biased': before,
    'unbiased': after,
    'spurious': accuracy(spurious, x_bD, s_B[test_B]),
    'removed': removed,
  }


def _even(cell_B, train_B, seed):
  """Train rows, as many of each cell."""
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
  """Targeted probe perturbation over classes; see above. Plain for JSON.

  Returns:
    `classes` (name -> balanced accuracy of its probe) and `removed`: for each N
    `score`, `intended` (mean drop of a class's own probe) and `unintended`.
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
    found = []
    for name, y_B in labels.items():
      right_b, y_b = (fitted[name](x_bD) > 0) == y_B[test_B], y_B[test_B]
      found.append((right_b[y_b].mean() + right_b[~y_b].mean()) / 2)
    return np.asarray(found)

  before_C, removed = accuracies(x_bD), []
  effects = [
    attribution(rows.f_BF[train_B], y_B[train_B], params, fitted[name].w_D)
    for name, y_B in labels.items()
  ]
  own = np.eye(len(labels), dtype=bool)
  for count in counts:
    chosen = [
      _choices(e, rows.f_BF[train_B], count, seed + i)
      for i, e in enumerate(effects)
    ]
    for on in chosen[0]:
      drop_CC = np.stack(
        [
          before_C - accuracies(_without(x_bD, f_bF, params, c[on]))
          for c in chosen
        ]
      )
      intended, other = drop_CC[own].mean(), drop_CC[~own].mean()
      removed.append(
        {
          'on': on,
          'count': count,
          'score': float(intended - other),
          'intended': float(intended),
          'unintended': float(other),
        }
      )
  return {
    'classes': dict(zip(labels, before_C.tolist(), strict=True)),
    'removed': removed,
  }
