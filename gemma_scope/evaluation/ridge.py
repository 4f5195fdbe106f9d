"""Ridge regression of activations on sparse latents, in the host's memory.

  W, b = argmin sum_rows |y - f W - b|^2 + ridge s |W|^2

with s the mean over latents of sum_rows f^2. The ridge is the best of a few
on a fifth of the rows, which the others were fitted without.
"""

from __future__ import annotations

import numpy as np

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of a latent
_MOST_EQUATIONS = 2**13  # solved at once; wider dictionaries use fewer rows


def fit(f_RF, y_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """W [F, D] and b [D] of y = f W + b, the ridge chosen on held-out rows.

  Args:
    f_RF: sparse array; of many rows and latents some rows are taken.
    y_RD: what to predict.
  """
  if min(f_RF.shape) > _MOST_EQUATIONS:
    step = -(-len(y_RD) // _MOST_EQUATIONS)
    f_RF, y_RD = f_RF[::step], y_RD[::step]
  held_out = len(y_RD) - max(1, len(y_RD) // 5)
  # Single precision is enough to compare ridges, and twice as fast.
  solve = _solver(f_RF[:held_out], y_RD[:held_out], np.float32)

  def error(ridge):
    try:
      W_FD, b_D = solve(ridge)
    except np.linalg.LinAlgError:  # not positive in single precision
      return np.inf
    return np.sum(np.square(f_RF[held_out:] @ W_FD + b_D - y_RD[held_out:]))

  return _solver(f_RF, y_RD)(min(_RIDGES, key=error))


def _solver(f_RF, y_RD: np.ndarray, dtype=np.float64):
  """ridge -> (W, b): in the latents, or in the rows where they are fewer."""
  from scipy import linalg  # slow to import

  rows, width = f_RF.shape
  f_RF = f_RF.astype(np.float64)
  mean_F, mean_D = f_RF.mean(0), y_RD.mean(0, dtype=np.float64)
  y_RD = y_RD - mean_D
  square = max((f_RF.multiply(f_RF)).sum() / width, 1e-30)
  few_rows = rows < width
  if few_rows:
    along_R = f_RF @ mean_F
    gram = (f_RF @ f_RF.T).toarray() - along_R[:, None] - along_R
    gram += mean_F @ mean_F
    right = y_RD
  else:
    gram = (f_RF.T @ f_RF).toarray() - rows * np.outer(mean_F, mean_F)
    right = f_RF.T @ y_RD
  gram, right = gram.astype(dtype), right.astype(dtype)

  def solve(ridge):
    ridged = gram.copy()
    np.fill_diagonal(ridged, gram.diagonal() + dtype(ridge * square))
    W = linalg.cho_solve(linalg.cho_factor(ridged, overwrite_a=True), right)
    if few_rows:
      W = f_RF.T @ W - np.outer(mean_F, W.sum(0))
    return W, mean_D - mean_F @ W

  return solve
