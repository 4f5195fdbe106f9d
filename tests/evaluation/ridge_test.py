"""Ridge regression: one solution, in the latents and in the rows."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from gemma_scope.evaluation import ridge


def test_the_ridge_is_chosen_on_rows_left_out():
  """Of noise that nothing explains the largest; of a law the smallest."""
  rng = np.random.default_rng(0)
  f_RF = rng.exponential(size=(400, 20)) * (rng.random((400, 20)) < 0.3)
  W_FD = rng.normal(size=(20, 3))
  for y_RD, chosen in (
    (f_RF @ W_FD + 1, ridge._RIDGES[0]),
    (rng.normal(size=(400, 3)), ridge._RIDGES[-1]),
  ):
    W, b = ridge.fit(sparse.csr_array(f_RF), y_RD)
    expected, _ = ridge._solver(sparse.csr_array(f_RF), y_RD)(chosen)
    np.testing.assert_allclose(W, expected, rtol=1e-10)
    assert np.isfinite(b).all()


def test_a_wide_least_squares_decoder_is_fitted_in_the_rows():
  """More latents than rows: the dual problem has the primal's solution."""
  rng = np.random.default_rng(1)
  f_RF = rng.exponential(size=(40, 25)) * (rng.random((40, 25)) < 0.3)
  y_RD = rng.normal(size=(40, 3)) + 2
  primal = ridge._solver(sparse.csr_array(f_RF), y_RD)
  wide_RF = np.concatenate([f_RF, np.zeros((40, 75))], 1)
  dual = ridge._solver(sparse.csr_array(wide_RF), y_RD)
  # The ridge is in units of the mean square of a latent.
  (W, b), (V, c) = primal(0.1), dual(0.4)
  np.testing.assert_allclose(V[:25], W, atol=1e-8)
  np.testing.assert_allclose(V[25:], 0, atol=1e-8)
  np.testing.assert_allclose(c, b, atol=1e-8)
