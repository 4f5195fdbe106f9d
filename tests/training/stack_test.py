"""A stack is its members trained apart, on any mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import sae, sites
from gemma_scope.sae import architectures
from gemma_scope.training import objectives, resampling, stack
from gemma_scope.training import optimizer as optimizer_lib

D, F, B = 16, 32, 64
SITES = (sites.Site(0, 'mlp_out'), sites.Site(1, 'resid_post'))
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def optimizer(**changes):
  return optimizer_lib.Optimizer(
    **{
      **dict(
        b2=0.999,
        eps=1e-8,
        clip=0.0,
        warm_up=5,
        decay=5,
        sparsity_warm_up=10,
        threshold_rate=3.0,
        steps=40,
        dead_after=500,
        theta_decay=0.999,
        adaptive_rate=0.01,
      ),
      **changes,
    }
  )


def make(penalty, values, at, seeds, **changes):
  """A stack of JumpReLU members: value and site index of each."""
  return stack.Stack(
    architectures.JumpReLU(D, D, F, bandwidth=0.05, initial_threshold=0.1),
    objectives.Objective(penalty),
    SITES,
    SITES,
    stack.Setting(
      jnp.asarray(values, jnp.float32),
      jnp.full((len(values),), 3e-3),
      *[jnp.asarray(at)] * 2,
    ),
    tuple(seeds),
    optimizer(**changes),
  )


EIGHT = make(
  'target_l0',
  [2.0 + i for i in range(8)],
  [0, 1] * 4,
  [0, 0, 0, 0, 1, 1, 2, 3],
)
KEY = jax.random.key(3)


@functools.cache
def data(steps=12):
  """Rows of both sites in each step, x_KNBD."""
  key = jax.random.key(7)

  @jax.jit
  def make(key):
    features = sae.unit_rows(jax.random.normal(key, (24, D)))

    def of_step(i):
      keys = jax.random.split(jax.random.fold_in(key, i), 2)
      codes = jax.random.exponential(keys[0], (2, B, 24))
      codes *= jax.random.bernoulli(keys[1], 0.1, codes.shape)
      return jnp.einsum('NBF,FD->NBD', codes, features) / 2

    return jax.vmap(of_step)(jnp.arange(steps))

  return np.asarray(make(key))


@functools.cache
def begun():
  return jax.device_get(jax.jit(EIGHT.init)(jax.random.key(0)))


@jax.jit
def run_steps(state, x_KNBD):
  def body(state, inputs):
    return EIGHT.step(state, inputs[1], inputs[1], inputs[0], KEY)

  steps = jnp.arange(x_KNBD.shape[0])
  return jax.lax.scan(body, state, (steps, x_KNBD))


@functools.cache
def train(steps=12):
  return run_steps(begun(), data(steps))


@pytest.mark.parametrize('shape', MESHES)
def test_any_mesh_gives_one_devices_result(shape):
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = mesh_lib.make(dict(zip(mesh_lib.AXES, shape, strict=True)), devices)
  shardings = (EIGHT.shardings(mesh),)
  if shape == MESHES[-1]:
    state = stack.init_all([EIGHT], jax.random.key(0), mesh)
  else:
    state = jax.device_put((begun(),), shardings)
  step = jax.jit(
    functools.partial(stack.step_all, [EIGHT]),
    out_shardings=(shardings, None),
    donate_argnums=0,
  )
  place = mesh_lib.sharding(mesh, 'data', None)
  for i, x_NBD in enumerate(data()):
    rows = dict(zip(SITES, x_NBD, strict=True))
    state, _ = step(state, jax.device_put(rows, place), jnp.int32(i), KEY)
  expected, _ = train()
  for name, value in state[0].params.items():
    np.testing.assert_allclose(
      value, expected.params[name], rtol=1e-3, atol=2e-5, err_msg=name
    )


def test_every_leaf_of_the_state_has_its_place_in_the_table():
  mesh = mesh_lib.make({'sae': 2, 'data': 2, 'latent': 2})
  for path, place in jax.tree_util.tree_leaves_with_path(EIGHT.shardings(mesh)):
    assert place.spec[0] == 'sae', path
    name = getattr(path[-1], 'key', getattr(path[-1], 'name', ''))
    axes = stack.SHARDING.get(name, ())
    split = set(place.spec[1:]) - {None}
    assert split == set(axes) - {None}, path
    whole = {'b_dec', 'theta', 'coefficient', 'count', 'skipped'}
    assert axes or name in whole, path


def test_decoder_rows_keep_norm_one_and_loss_falls():
  state, metrics = train(steps=12)
  norms = np.linalg.norm(state.params['W_dec'], axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)
  squared = np.asarray(metrics['squared_error'])
  assert np.all(squared[-3:].mean(0) < squared[:3].mean(0))


@pytest.mark.parametrize('b1', [0.0, 0.9])
def test_update_is_adam_on_the_projected_gradient(b1):
  """Two steps against optax.adam and a projection written out here."""
  one = make('l0', [0.01], [0], [0], warm_up=0, decay=0, b1=b1)
  state = jax.device_get(jax.jit(one.init)(jax.random.key(0)))
  params = {name: value[0] for name, value in state.params.items()}
  rates = {
    name: 3e-3 * (3.0 if name == 'log_threshold' else 1.0) for name in params
  }
  step = jax.jit(one.step)

  def slope(params, x_BD, warm_up):
    batch = objectives.Batch(
      x_BD, x_BD, jnp.float32(0.01), jnp.float32(0), warm_up, jnp.zeros(F, bool)
    )
    return jax.grad(
      lambda p: objectives.loss(one.module, one.objective, p, batch)[0]
    )(params)

  adam = optax.multi_transform(
    {name: optax.adam(r, b1, 0.999) for name, r in rates.items()},
    {name: name for name in params},
  )
  moments = adam.init(params)

  @jax.jit
  def by_hand(params, moments, x_BD, warm_up):
    gradient, w = slope(params, x_BD, warm_up), params['W_dec']
    g = gradient['W_dec']
    gradient['W_dec'] = g - (g * w).sum(1, keepdims=True) * w
    updates, moments = adam.update(gradient, moments)
    params = optax.apply_updates(params, updates)
    w = params['W_dec']
    params['W_dec'] = w / jnp.linalg.norm(w, axis=1, keepdims=True)
    return params, moments

  for i, x_NBD in enumerate(data(2)):
    state, _ = step(state, x_NBD, x_NBD, jnp.int32(i), KEY)
    params, moments = by_hand(params, moments, x_NBD[0], jnp.float32(i / 10))
  for name, value in params.items():
    np.testing.assert_allclose(
      state.params[name][0], value, rtol=2e-4, atol=1e-6, err_msg=name
    )


def test_no_first_moment_is_kept():
  state = begun()
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  moments = sum(x.size for x in jax.tree.leaves(state.moments))
  assert moments == parameters + len(EIGHT.seeds)  # one count a member


def test_a_batch_with_infinity_changes_no_parameter():
  state, bad = begun(), data()[0].copy()
  bad[1, 0, 0] = np.inf  # site 1 only
  after, _ = jax.jit(EIGHT.step)(state, bad, bad, jnp.int32(20), KEY)
  reads_bad = np.asarray(EIGHT.setting.reads) == 1
  np.testing.assert_array_equal(after.skipped, reads_bad)
  for name, value in after.params.items():
    assert np.all(np.isfinite(value)), name
    unchanged = np.all(
      np.isclose(value, state.params[name], rtol=1e-6, atol=1e-7),
      axis=tuple(range(1, value.ndim)),
    )
    assert np.all(unchanged[reads_bad]), name
  assert not np.allclose(after.params['W_enc'][0], state.params['W_enc'][0])


def test_schedules():
  o = optimizer(warm_up=10, decay=10, sparsity_warm_up=20, steps=100)
  assert float(o.rate_factor(0)) == pytest.approx(0.1)
  assert float(o.rate_factor(5)) == pytest.approx(0.55)
  assert float(o.rate_factor(10)) == pytest.approx(1.0)
  assert float(o.rate_factor(95)) == pytest.approx(0.5)
  assert float(o.sparsity_factor(0)) == 0
  assert float(o.sparsity_factor(10)) == pytest.approx(0.5)
  assert float(o.sparsity_factor(50)) == 1


def test_a_target_falls_from_where_it_starts():
  o = optimizer(initial_l0=100.0, l0_steps=50)
  value = jnp.array([20.0, 120.0])
  assert o.l0_target(value, 0).tolist() == [100, 120]
  assert o.l0_target(value, 25).tolist() == [60, 120]
  assert o.l0_target(value, 70).tolist() == [20, 120]
  assert optimizer().l0_target(value, 0).tolist() == [20, 120]


@pytest.mark.parametrize('penalty', ['l1', 'adaptive_l1'])
def test_only_the_adaptive_penalty_moves_its_coefficient(penalty):
  one = stack.Stack(
    architectures.ReLU(D, D, F),
    objectives.Objective(penalty),
    SITES,
    SITES,
    EIGHT.setting,
    EIGHT.seeds,
    optimizer(),
  )
  state = jax.jit(one.init)(jax.random.key(0))
  x_NBD = data()[0]
  after, _ = jax.jit(one.step)(state, x_NBD, x_NBD, jnp.int32(20), KEY)
  moved = np.any(np.asarray(after.coefficient != state.coefficient))
  assert moved == (penalty == 'adaptive_l1')


def test_resampled_latents_have_no_first_moment():
  one = make('l0', [0.01], [0], [0], b1=0.9)
  state = one.init(jax.random.key(0))
  params = {name: value[0] for name, value in state.params.items()}
  ones = jax.tree.map(jnp.ones_like, one.optimizer.transform().init(params))
  dead_F, x_BD = jnp.arange(F) < F // 4, data()[0][0]
  k = jnp.float32(4)
  batch = objectives.Batch(x_BD, x_BD, k, k, k, dead_F)
  key = jax.random.key(1)
  _, after = resampling.resample(one.module, params, ones, batch, key)
  adam = after[1]
  np.testing.assert_array_equal(adam.mu['b_enc'], ~dead_F)
  np.testing.assert_array_equal(adam.mu['b_dec'], 1)
  np.testing.assert_array_equal(adam.nu['b_enc'], 1)


@pytest.mark.parametrize('base', ['jumprelu', 'gated', 'relu'])
def test_resampled_latents_fire_as_often_as_the_others(base):
  """A quarter begun anew at a start of training whose threshold is low."""
  options = {'initial_threshold': 1e-3} if base == 'jumprelu' else {}
  module = architectures.ARCHITECTURES[base](D, D, F, **options)
  x_BD = data()[0][0] + np.float32(1)  # a mean, as activations have
  params = jax.jit(module.init)(jax.random.key(0), x_BD)['params']
  if base == 'jumprelu':
    params['log_threshold'] = jnp.full(F, jnp.log(1.5))
  else:
    name = 'b_gate' if base == 'gated' else 'b_enc'
    params[name] = jnp.full(F, -1.5)
  dead_F = np.arange(F) < F // 4
  k, key = jnp.float32(4), jax.random.key(1)
  one = jnp.float32(1)
  batch = objectives.Batch(x_BD, x_BD, k, one, one, dead_F)

  @jax.jit
  def latents(params, batch, key):
    after, _ = resampling.resample(module, params, {}, batch, key)
    x_BD = batch.x_BD
    return module.apply({'params': after}, x_BD, k, method='latents').f_BF

  share_F = (np.asarray(latents(params, batch, key)) > 0).mean(0)
  living = share_F[~dead_F].mean()
  assert 0.01 < living < 0.5
  np.testing.assert_allclose(share_F[dead_F], living, atol=1.5 / B)
