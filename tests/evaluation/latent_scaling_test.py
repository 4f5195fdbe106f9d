"""Latents of two models whose place is known, and the fit by least squares."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope.evaluation import latent_scaling

D, F, B, T = 6, 5, 4, 64
SCALES = (2.0, 6.0)
SHARED, SPECIFIC, SHRUNK, DECOUPLED, PARTNER = range(F)


def crosscoder():
  """Latents along axes of both models; the last of each model is for none."""
  first, second = np.zeros((2, F, D), np.float32)
  axis = np.eye(D, dtype=np.float32)
  first[SHARED], second[SHARED] = axis[0], axis[0]
  second[SPECIFIC] = axis[1]
  second[SHRUNK] = axis[2]  # the first model has it too
  second[DECOUPLED], first[PARTNER] = axis[3], axis[3]
  # Each reads the second model; the partner is active with its other half.
  read = np.zeros((2 * D, F), np.float32)
  for latent, place in (
    (SHARED, 0),
    (SPECIFIC, 1),
    (SHRUNK, 2),
    (DECOUPLED, 3),
  ):
    read[D + place, latent] = 1 / SCALES[1]
  read[D + 3, PARTNER] = 1 / SCALES[1]
  return {
    'W_enc': read,
    'b_enc': np.zeros(F, np.float32),
    'threshold': np.full(F, 0.1, np.float32),
    'W_dec': np.concatenate([SCALES[0] * first, SCALES[1] * second], 1),
    'b_dec': np.zeros(2 * D, np.float32),
  }


def rows():
  """Activations [B, T, D] of both models, raw; noise along unused axes."""
  rng = np.random.default_rng(0)
  on = rng.uniform(0.5, 2.0, (B, T, D)) * (rng.random((B, T, D)) < 0.3)
  first, second = on.copy(), on.copy()
  first[..., 1] = 0  # what only the second model has
  for x in (first, second):
    x[..., 4:] = 0.3 * rng.normal(size=(B, T, 2))
  return [
    (scale * x).astype(np.float32)
    for scale, x in zip(SCALES, (first, second), strict=True)
  ]


@pytest.fixture(scope='module')
def keep_BT():
  return np.arange(T) % 7 != np.arange(B)[:, None]


@pytest.fixture(scope='module')
def measured(keep_BT):
  params = crosscoder()
  decoders = latent_scaling.Decoders.of(params, SCALES)
  total = latent_scaling.sums(params, decoders, tuple(rows()), keep_BT)
  return total, latent_scaling.scaling(total, decoders)


def test_artefacts_of_sparsity_are_told_from_specific_latents(measured):
  _, scaled = measured
  np.testing.assert_allclose(scaled.rho_F, [0.5, 1, 1, 1, 0], atol=1e-6)
  assert scaled.own_F.tolist()[SPECIFIC:] == [1, 1, 1, 0]
  assert scaled.exclusive.tolist() == [False, True, True, True, True]
  assert scaled.shared.tolist() == [True] + [False] * 4
  assert np.flatnonzero(scaled.specific).tolist() == [SPECIFIC]
  assert np.flatnonzero(scaled.shrunk).tolist() == [SHRUNK]
  # Each of the two says of the other that it writes the same.
  assert np.flatnonzero(scaled.decoupled).tolist() == [DECOUPLED, PARTNER]
  np.testing.assert_allclose(scaled.nu_error_F, [1, 0, 1, 0, 0], atol=0.05)
  np.testing.assert_allclose(
    scaled.nu_reconstruction_F, [1, 0, 0, 1, 1], atol=0.05
  )
  np.testing.assert_allclose(scaled.beta_MF[1, SHARED:DECOUPLED], 1, atol=0.05)


def test_the_sums_are_the_least_squares_fit(keep_BT):
  """Of a random crosscoder, row by row in float64, on rows that count."""
  rng = np.random.default_rng(1)
  params = {
    'W_enc': rng.normal(size=(2 * D, F)),
    'b_enc': 0.1 * rng.normal(size=F),
    'threshold': np.full(F, 0.3),
    'W_dec': rng.normal(size=(F, 2 * D)),
    'b_dec': rng.normal(size=2 * D),
  }
  params = {key: a.astype(np.float32) for key, a in params.items()}
  x = rows()
  decoders = latent_scaling.Decoders.of(params, SCALES)
  total = latent_scaling.sums(params, decoders, tuple(x), keep_BT)
  scaled = latent_scaling.scaling(total, decoders)

  x_RD = np.concatenate(x, -1)[keep_BT].astype(np.float64)
  z_RF = x_RD @ params['W_enc'] + params['b_enc']
  f_RF = np.where(z_RF > 0.3, z_RF, 0)
  fit = {'error': np.zeros((2, F)), 'reconstruction': np.zeros((2, F))}
  for m, half in enumerate((slice(0, D), slice(D, None))):
    d_FD = params['W_dec'][:, half].astype(np.float64)
    for j in range(F):
      others = np.delete(np.arange(F), j)
      left = (
        x_RD[:, half] - params['b_dec'][half] - f_RF[:, others] @ d_FD[others]
      )
      own = int(scaled.own_F[j])
      o_D = params['W_dec'][j, D * own : D * (own + 1)] / SCALES[own]
      column = (f_RF[:, j, None] * o_D).reshape(-1, 1)
      for name, y in (('error', left), ('reconstruction', f_RF @ d_FD)):
        solved = np.linalg.lstsq(
          column, (y / SCALES[m]).reshape(-1), rcond=None
        )
        fit[name][m, j] = solved[0][0]
  np.testing.assert_allclose(scaled.beta_MF, fit['error'], rtol=2e-4)
  latents = np.arange(F)
  for name, nu_F in (
    ('error', scaled.nu_error_F),
    ('reconstruction', scaled.nu_reconstruction_F),
  ):
    own = fit[name][scaled.own_F, latents]
    want = np.where(own > 0, fit[name][1 - scaled.own_F, latents] / own, np.nan)
    np.testing.assert_allclose(nu_F, want, rtol=1e-3)
  y_RD = f_RF @ params['W_dec'] + params['b_dec']
  for m, half in enumerate((slice(0, D), slice(D, None))):
    left = np.square(x_RD[:, half] - y_RD[:, half]).sum()
    spread = np.square(x_RD[:, half] - x_RD[:, half].mean(0)).sum()
    assert total.fvu()[m] == pytest.approx(left / spread, rel=1e-4)


def test_controls_fire_as_often_and_serve_once(measured):
  _, scaled = measured
  scaled = scaled._replace(
    rho_F=np.array([0.5, 0.5, 0.5, 1.0, 1.0]),
    fired_F=np.array([10.0, 100.0, 1000.0, 90.0, 120.0]),
  )
  assert latent_scaling.alike(scaled, [3, 4]) == [1, 2]
  assert latent_scaling.alike(scaled, [3, 4, 3, 4]) == [1, 2, 0]


def test_a_latent_that_never_fires_is_of_no_kind(measured):
  total, _ = measured
  decoders = latent_scaling.Decoders.of(crosscoder(), SCALES)
  silent = np.zeros(F)
  total = total._replace(
    fired_F=silent, square_F=silent,
    error_MF=np.zeros((2, F)), written_MF=np.zeros((2, F)),
  )  # fmt: skip
  scaled = latent_scaling.scaling(total, decoders)
  assert np.isnan(scaled.nu_error_F).all()
  for chosen in (scaled.exclusive, scaled.shared, scaled.specific):
    assert not chosen.any()
