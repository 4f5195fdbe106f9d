"""JumpReLU and its estimators, against finite differences and numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import config_fields, sae
from gemma_scope.sae import activation_functions as functions
from gemma_scope.sae import architectures, released
from gemma_scope.training import objectives

D, F, B = 8, 16, 64


def make(module=None, seed=0):
  module = module or architectures.JumpReLU(
    D, D, F, bandwidth=0.1, initial_threshold=0.2
  )
  x_BD = jax.random.normal(jax.random.key(seed), (B, D)) / D**0.5
  return module, module.init(jax.random.key(1), x_BD)['params'], x_BD


def loss(module, params, x_BD, penalty, value, **options):
  """The loss of an SAE with one penalty at full strength."""
  objective = objectives.Objective(penalty, **options)
  one = jnp.float32(1)
  dead_F = jnp.zeros(F, bool)
  batch = objectives.Batch(x_BD, x_BD, jnp.float32(value), one, one, dead_F)
  return objectives.loss(module, objective, params, batch)


def test_jumprelu_is_zero_at_its_threshold():
  z = jnp.array([[-1.0, 0.1999, 0.2, 0.2001, 3.0]])
  theta = jnp.full((5,), 0.2)
  assert functions.jumprelu(z, theta, 0.1)[0].tolist() == [0, 0, 0, z[0, 3], 3]
  assert functions.step(z, theta, 0.1)[0].tolist() == [0, 0, 0, 1, 1]


def test_threshold_gradient_estimates_the_expected_losss_slope():
  """Mean over many rows = central difference of the expectation in theta."""
  n, lam, eps = 400_000, 0.05, 0.05
  key = jax.random.key(0)
  x = jax.random.normal(key, (n, 1))
  target = 1.3 * x + 0.2
  w = 0.7

  def loss(theta):
    z = x + 0.1
    f = functions.jumprelu(z, theta, eps)
    l0 = jnp.mean(jnp.sum(functions.step(z, theta, eps), -1))
    return jnp.mean(jnp.sum((target - w * f) ** 2, -1)) + lam * l0

  theta, h = jnp.array([0.4]), 0.02
  slope = jax.grad(loss)(theta)[0]
  difference = (loss(theta + h) - loss(theta - h)) / (2 * h)
  np.testing.assert_allclose(slope, difference, rtol=0.05)


def test_estimators_read_z_and_not_the_value_after_the_jump():
  """Rows just below theta count: half of the window lies there."""
  z = jnp.array([[0.39], [0.41]])  # one on each side, both in the window
  theta, eps = jnp.array([0.4]), 0.05
  slope = jax.grad(lambda t: jnp.sum(functions.step(z, t, eps)))(theta)
  np.testing.assert_allclose(slope, [-2 / eps], rtol=1e-6)
  slope = jax.grad(lambda t: jnp.sum(functions.jumprelu(z, t, eps)))(theta)
  np.testing.assert_allclose(slope, [-2 * 0.4 / eps], rtol=1e-6)


def test_gradient_of_step_in_z_is_zero_and_of_jumprelu_the_true_one():
  z = jnp.array([[0.1, 0.39, 0.41, 2.0]])
  theta = jnp.full((4,), 0.4)
  g = jax.grad(lambda z: jnp.sum(functions.step(z, theta, 0.05)))(z)
  assert not np.any(g)
  g = jax.grad(lambda z: jnp.sum(functions.jumprelu(z, theta, 0.05)))(z)
  assert g.tolist() == [[0, 0, 1, 1]]


def test_sparsity_reaches_thresholds_alone():
  module, params, x_BD = make()

  def penalty(params):
    bound = module.bind({'params': params})
    return jnp.sum(bound.latents(x_BD).active_BF)

  gradient = jax.grad(penalty)(params)
  assert np.any(gradient.pop('log_threshold'))
  for name, g in gradient.items():
    assert not np.any(g), name


def test_loss_and_gradient_match_independent_numpy():
  """Every gradient of the whole loss, written out by hand in float64."""
  module, params, x_BD = make()
  lam, eps = 0.01, 0.1
  (value, _), gradient = jax.value_and_grad(
    lambda p: loss(module, p, x_BD, 'l0', lam), has_aux=True
  )(params)
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  x = np.asarray(x_BD, np.float64)
  theta = np.exp(p['log_threshold'])
  z = (x - p['b_dec']) @ p['W_enc'].T + p['b_enc']
  on = z > theta
  near = np.abs(z - theta) < eps / 2
  f = z * on
  r = f @ p['W_dec'] + p['b_dec'] - x
  expected = (r**2).sum(1).mean() + lam * on.sum(1).mean()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  df = 2 * r @ p['W_dec'].T / B
  dz = df * on
  dtheta = (near * (-theta / eps * df - lam / eps / B)).sum(0)
  by_hand = {
    'W_dec': f.T @ (2 * r / B),
    'b_dec': (2 * r / B).sum(0) - (dz @ p['W_enc']).sum(0),
    'W_enc': dz.T @ (x - p['b_dec']),
    'b_enc': dz.sum(0),
    'log_threshold': theta * dtheta,
  }
  for name, g in by_hand.items():
    np.testing.assert_allclose(gradient[name], g, rtol=1e-4, atol=1e-6)


def test_initial_parameters():
  module, params, _ = make()
  np.testing.assert_allclose(
    np.linalg.norm(params['W_dec'], axis=1), 1, rtol=1e-6
  )
  np.testing.assert_array_equal(params['W_enc'], params['W_dec'])
  assert not np.any(params['b_enc']) and not np.any(params['b_dec'])
  np.testing.assert_allclose(np.exp(params['log_threshold']), 0.2, rtol=1e-6)


def test_raw_threshold_trains_theta_itself_and_never_acts_below_zero():
  module = architectures.JumpReLU(D, D, F, bandwidth=0.1, log_threshold=False)
  _, params, _ = make(module)
  assert 'threshold' in params and 'log_threshold' not in params
  params['threshold'] = params['threshold'].at[0].set(-1.0)
  assert module.bind({'params': params}).threshold()[0] == 0


def test_a_raw_threshold_below_zero_is_not_stuck():
  module = architectures.JumpReLU(D, D, F, bandwidth=0.1, log_threshold=False)
  _, params, x_BD = make(module)
  params['threshold'] = jnp.full(F, -0.01)
  gradient = jax.grad(lambda p: loss(module, p, x_BD, 'l0', 0.1)[0])(params)
  assert np.any(gradient['threshold'] < 0)  # the penalty raises theta
  allowed = module.constrained(params)['threshold']
  np.testing.assert_array_equal(allowed, 0)


@pytest.mark.parametrize('log_threshold', [True, False])
def test_a_relus_latents_start_at_the_configured_threshold(log_threshold):
  module = architectures.JumpReLU(
    D, D, F, initial_threshold=0.05, log_threshold=log_threshold
  )
  _, params, _ = make(module)
  released = module.released(params, 0.0, 1)
  released['threshold'] = jnp.arange(F) * 0.1
  begun = module.trainable(released)
  theta = module.bind({'params': begun}).threshold()
  np.testing.assert_allclose(theta[0], 0.05, rtol=1e-6)
  np.testing.assert_allclose(theta[1:], np.arange(1, F) * 0.1, rtol=1e-6)


def test_thresholds_stay_float32_under_bfloat16_matmuls():
  module = architectures.JumpReLU(
    D, D, F, matmul_dtype='bfloat16', initial_threshold=0.2
  )
  _, params, x_BD = make(module)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(params))
  bound = module.bind({'params': params})
  z_BF = bound.project(x_BD) + bound.b_enc
  assert z_BF.dtype == jnp.float32 and bound.write(z_BF).dtype == jnp.float32
  exact = architectures.JumpReLU(D, D, F, initial_threshold=0.2).bind(
    {'params': params}
  )
  np.testing.assert_allclose(
    z_BF, (exact.project(x_BD) + exact.b_enc), atol=0.02
  )
  assert np.any(z_BF != (exact.project(x_BD) + exact.b_enc))


def test_without_pre_encoder_bias_b_dec_leaves_the_encoder_alone():
  module = architectures.JumpReLU(D, D, F, pre_encoder_bias=False)
  _, params, x_BD = make(module)
  moved = {**params, 'b_dec': params['b_dec'] + 1}
  np.testing.assert_array_equal(
    module.bind({'params': params}).latents(x_BD).f_BF,
    module.bind({'params': moved}).latents(x_BD).f_BF,
  )


def test_relu_baseline():
  module = architectures.ReLU(D, D, F)
  _, params, x_BD = make(module)
  bound = module.bind({'params': params})
  f_BF = bound.latents(x_BD).f_BF
  np.testing.assert_array_equal(
    f_BF, jnp.maximum((bound.project(x_BD) + bound.b_enc), 0)
  )
  total, terms = loss(module, params, x_BD, 'l1', 0.3)
  expected = terms.squared_error + 0.3 * jnp.mean(jnp.sum(f_BF, -1))
  np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_released_encode_and_decode_are_the_modules_own():
  module, params, x_BD = make()
  bound = module.bind({'params': params})
  flat = module.released(params, jnp.float32(0), jnp.float32(1))
  centred = x_BD - params['b_dec']
  np.testing.assert_allclose(
    sae.encode(flat, centred), bound.latents(x_BD).f_BF, rtol=1e-6
  )
  np.testing.assert_allclose(
    sae.decode(flat, bound.latents(x_BD).f_BF), bound(x_BD), rtol=1e-5
  )


@pytest.mark.parametrize('target', [4.0, 12.0])
def test_target_term_is_zero_at_its_target_and_quadratic(target):
  module, params, x_BD = make()
  total, terms = loss(module, params, x_BD, 'target_l0', target, strength=2.0)
  penalty = total - terms.squared_error
  np.testing.assert_allclose(
    penalty, 2.0 * (terms.l0 / target - 1) ** 2, rtol=1e-4
  )
  total, terms = loss(module, params, x_BD, 'target_l0', float(terms.l0))
  np.testing.assert_allclose(total, terms.squared_error, rtol=1e-6)


@pytest.mark.parametrize('penalty', config_fields.ARCHITECTURES['jumprelu'])
def test_penalties_are_their_formulas(penalty):
  """The forms of the papers, written out in numpy on the same latents."""
  module, params, x_BD = make()
  params['W_dec'] = params['W_dec'] * 1.5
  free = dataclasses.replace(module, unit_decoder=False)
  f = np.asarray(module.bind({'params': params}).latents(x_BD).f_BF)
  p = (f > 0).mean(0)
  l0, value, norm = p.sum(), 3.0, 1.5
  expected = {
    'l0': value * l0,
    'target_l0': 0.7 * (l0 / value - 1) ** 2,
    'quadratic_l0': 0.7 * 2.0 / value * (l0 - value) ** 2,
    'quadratic_frequency': value * (p * (1 + p / 0.2)).sum(),
    'tanh': value * np.tanh(4 * f * norm).sum(1).mean(),
  }[penalty]
  total, terms = loss(free, params, x_BD, penalty, value, strength=0.7, p0=0.2)
  np.testing.assert_allclose(
    total - terms.squared_error, expected, rtol=1e-4, atol=1e-5
  )


def test_the_frequency_penalty_falls_on_the_excess_alone():
  module, params, x_BD = make()
  fired = (module.bind({'params': params}).latents(x_BD).f_BF > 0).mean(0)
  limit = float(jnp.sort(fired)[F // 2])
  total, terms = loss(
    module, params, x_BD, 'l0', 0.0, frequency=3.0, frequency_limit=limit
  )
  expected = 3.0 * np.maximum(np.asarray(fired) - limit, 0).sum()
  np.testing.assert_allclose(total - terms.squared_error, expected, rtol=1e-4)
  gradient = jax.grad(
    lambda p: (
      loss(module, p, x_BD, 'l0', 0.0, frequency=3.0, frequency_limit=limit)[0]
      - loss(module, p, x_BD, 'l0', 0.0)[0]
    )
  )(params)
  moved = np.asarray(gradient['log_threshold']) != 0
  assert moved.any() and not moved[np.asarray(fired) <= limit].any()


def test_ste_to_input_moves_z_against_theta():
  """Anthropic's: what raises theta lowers z (its true gradient beside)."""
  z, theta = jnp.array([[0.39], [0.41], [2.0]]), jnp.array([0.4])

  def total(z, theta, to_input):
    f = functions.jumprelu(z, theta, 0.05, to_input)
    return jnp.sum(f) + 3 * jnp.sum(functions.step(z, theta, 0.05, to_input))

  dz, dtheta = jax.grad(total, (0, 1))(z, theta, True)
  jump = (0.4 + 3) / 0.05
  np.testing.assert_allclose(dz[:, 0], [jump, 1 + jump, 1], rtol=1e-6)
  np.testing.assert_allclose(dtheta, [-2 * jump], rtol=1e-6)
  plain, _ = jax.grad(total, (0, 1))(z, theta, False)
  assert plain[:, 0].tolist() == [0, 1, 1]


def test_kth_largest_is_that_of_a_sort():
  f = jax.nn.relu(jax.random.normal(jax.random.key(0), (40, 30)))
  f = f.at[0].set(0).at[1, :3].set(f[1, 5])  # fewer than k, and ties
  descending = np.sort(np.asarray(f), 1)[:, ::-1]
  for k in (1, 4, 29, 30):
    found = functions.kth_largest(f, jnp.float32(k), 1)
    np.testing.assert_array_equal(found[:, 0], descending[:, k - 1])
  whole = functions.kth_largest(f, jnp.float32(77), (0, 1))
  assert float(whole[0, 0]) == np.sort(np.asarray(f).ravel())[-77]
  beyond = functions.kth_largest(f, jnp.float32(31), 1)
  assert not np.any(beyond)


def test_top_k_keeps_k_and_batch_top_k_keeps_k_on_average():
  z = jax.random.normal(jax.random.key(0), (40, 30))
  f = jnp.where(z >= functions.kth_of_row(z, jnp.float32(5)), z, 0)
  assert np.all((f > 0).sum(1) == 5)
  order = np.argsort(-np.asarray(z), 1)[:, :5]
  np.testing.assert_array_equal(
    np.take_along_axis(np.asarray(f), order, 1),
    np.take_along_axis(np.asarray(z), order, 1),
  )
  least = functions.kth_of_batch(z, jnp.float32(5))
  f = jnp.where(z >= least, z, 0)
  assert (f > 0).sum() == 5 * 40
  assert float(least) == np.asarray(f)[np.asarray(f) > 0].min()


def test_projection_and_unit_rows():
  w = sae.unit_rows(jax.random.normal(jax.random.key(0), (F, D)))
  g = jax.random.normal(jax.random.key(1), (F, D))
  np.testing.assert_allclose(
    jnp.sum(sae.remove_parallel(g, w) * w, -1), 0, atol=1e-6
  )
  assert np.all(np.isfinite(sae.unit_rows(jnp.zeros((F, D)))))


def test_counts_of_a_batch_beyond_32_bits():
  """2^16 rows of 2^16 latents, never in memory: the compiler fuses them."""

  @jax.jit
  def counted(value):
    mask = jnp.broadcast_to(value, (1 << 16, 1 << 16)) >= 0
    return functions.count_true(mask, (0, 1))

  assert counted(jnp.int32(1)) == 2.0**32


def test_a_fractional_k_is_rounded_however_a_row_is_ranked():
  z = jnp.abs(jax.random.normal(jax.random.key(0), (3, 600)))
  for k, kept in ((2.4, 2), (2.6, 3)):
    for width in (40, 600):  # sorted, and by bisection
      least = functions.kth_of_row(z[:, :width], jnp.float32(k))
      assert np.all(np.sum(z[:, :width] >= least, 1) == kept)


def test_saes_that_do_not_fit_together_are_put_one_at_a_time():
  saes = [{'b_enc': np.zeros(4, np.float32)} for _ in range(3)]
  for budget, stay in ((48, True), (47, False)):
    for call in released.on_demand(saes, None, budget):
      assert (call()['b_enc'] is call()['b_enc']) is stay
