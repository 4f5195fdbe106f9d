"""A stack is its members trained apart, on any mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import objectives, sae, sites, stack

D, F, B = 16, 32, 64
SITES = (sites.Site(0, 'mlp_out'), sites.Site(1, 'resid_post'))
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def optimizer(**changes):
  return stack.Optimizer(
      **{
          **dict(
              b2=0.999, eps=1e-8, clip=0.0, warm_up=5, decay=5,
              sparsity_warm_up=10, threshold_rate=3.0, steps=40,
              dead_after=500,
          ),
          **changes,
      }
  )  # fmt: skip


def make(settings, at, seeds, **changes):
  """A stack of JumpReLU members: (kind, value) and site index of each."""
  coefficients = [objectives.sparsity(*s) for s in settings]
  return stack.Stack(
    sae.JumpReLU(D, F, bandwidth=0.05, initial_threshold=0.1),
    SITES,
    stack.Setting(
      jax.tree.map(lambda *a: jnp.stack(a), *coefficients),
      jnp.full((len(settings),), 3e-3),
      jnp.asarray(at),
    ),
    tuple(seeds),
    optimizer(**changes),
  )


EIGHT = make(
  [('target_l0', 2.0 + i) for i in range(4)] + [('l0', 1e-3)] * 4,
  [0, 1] * 4,
  [0, 0, 0, 0, 1, 1, 2, 3],
)


def data(steps=12):
  key = jax.random.key(7)
  features = sae.unit_rows(jax.random.normal(key, (24, D)))
  for i in range(steps):
    keys = jax.random.split(jax.random.fold_in(key, i), 2)
    codes = jax.random.exponential(keys[0], (2, B, 24))
    codes *= jax.random.bernoulli(keys[1], 0.1, codes.shape)
    yield jnp.einsum('NBF,FD->NBD', codes, features) / 2


@functools.partial(jax.jit, static_argnums=0)
def run_steps(which, state, x_KNBD):
  chosen = STACKS[which]

  def body(state, inputs):
    return chosen.step(state, inputs[1], inputs[0])

  steps = jnp.arange(x_KNBD.shape[0])
  return jax.lax.scan(body, state, (steps, x_KNBD))


STACKS = {'eight': EIGHT}


def train(which='eight', steps=12):
  x_KNBD = jnp.stack(list(data(steps)))
  return run_steps(which, STACKS[which].init(jax.random.key(0)), x_KNBD)


def test_stack_equals_separate_runs():
  together, _ = train()
  for i in (0, 3, 6):
    STACKS[i] = stack.Stack(
      EIGHT.module,
      SITES,
      jax.tree.map(lambda a, i=i: a[i : i + 1], EIGHT.setting),
      EIGHT.seeds[i : i + 1],
      EIGHT.optimizer,
    )
    alone, _ = train(i)
    for name, value in alone.params.items():
      np.testing.assert_allclose(
        together.params[name][i], value[0], rtol=1e-4, atol=1e-5, err_msg=name
      )
    np.testing.assert_array_equal(
      together.silent_tokens[i], alone.silent_tokens[0]
    )


@pytest.mark.parametrize('shape', MESHES)
def test_any_mesh_gives_one_devices_result(shape):
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = mesh_lib.make(dict(zip(mesh_lib.AXES, shape, strict=True)), devices)
  state = stack.init_all([EIGHT], jax.random.key(0), mesh)
  shardings = (EIGHT.shardings(mesh),)
  step = jax.jit(
    functools.partial(stack.step_all, [EIGHT]),
    out_shardings=(shardings, None),
    donate_argnums=0,
  )
  place = mesh_lib.place(mesh, 'data', None)
  for i, x_NBD in enumerate(data()):
    rows = dict(zip(SITES, x_NBD, strict=True))
    state, _ = step(state, jax.device_put(rows, place), jnp.int32(i))
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
    if name in ('count', 'skipped'):
      continue
    axes = stack.SHARDING[name]
    assert tuple(place.spec[1 : 1 + len(axes)]) == axes, path


def test_decoder_rows_keep_norm_one_and_loss_falls():
  state, metrics = train(steps=12)
  norms = np.linalg.norm(state.params['W_dec'], axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)
  squared = np.asarray(metrics['squared_error'])
  assert np.all(squared[-3:].mean(0) < squared[:3].mean(0))


def test_update_is_adam_with_beta1_zero_on_the_projected_gradient():
  """Two steps against optax.adam(b1=0) and a projection written out here."""
  one = stack.Stack(
      EIGHT.module, SITES[:1],
      jax.tree.map(lambda a: a[:1], EIGHT.setting), (0,),
      optimizer(warm_up=0, decay=0, threshold_rate=1.0),
  )  # fmt: skip
  state = one.init(jax.random.key(0))
  params = jax.tree.map(lambda a: a[0], state.params)
  adam = optax.adam(3e-3, b1=0.0, b2=0.999, eps=1e-8)
  moments = adam.init(params)
  setting = objectives.sparsity('target_l0', 2.0)
  for i, x_NBD in enumerate(data(2)):
    state, _ = one.step(state, x_NBD[:1], jnp.int32(i))
    gradient = jax.grad(
      lambda p, x=x_NBD[0], i=i: objectives.loss(
        one.module, p, x, setting, jnp.float32(i / 10)
      )[0]
    )(params)
    w = params['W_dec']
    g = gradient['W_dec']
    gradient['W_dec'] = g - (g * w).sum(1, keepdims=True) * w
    updates, moments = adam.update(gradient, moments)
    params = optax.apply_updates(params, updates)
    w = params['W_dec']
    params['W_dec'] = w / jnp.linalg.norm(w, axis=1, keepdims=True)
  for name, value in params.items():
    np.testing.assert_allclose(
      state.params[name][0], value, rtol=2e-4, atol=1e-6, err_msg=name
    )


def test_no_first_moment_is_kept():
  state = EIGHT.init(jax.random.key(0))
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  moments = sum(x.size for x in jax.tree.leaves(state.moments))
  assert moments == parameters + len(EIGHT.seeds)  # one count a member


def test_a_batch_with_infinity_changes_no_parameter():
  state = EIGHT.init(jax.random.key(0))
  bad = next(data()).at[1, 0, 0].set(jnp.inf)  # site 1 only
  after, _ = EIGHT.step(state, bad, jnp.int32(20))
  reads_bad = np.asarray(EIGHT.setting.site) == 1
  np.testing.assert_array_equal(after.skipped, reads_bad)
  for name, value in after.params.items():
    assert np.all(np.isfinite(value)), name
    unchanged = np.all(
      np.isclose(value, state.params[name], rtol=1e-6, atol=1e-7),
      axis=tuple(range(1, value.ndim)),
    )
    assert np.all(unchanged[reads_bad]), name
  assert not np.allclose(after.params['W_enc'][0], state.params['W_enc'][0])


def test_silent_tokens_count_tokens_since_a_latent_fired():
  one = make([('l0', 0.0)], [0], [0])
  state = one.init(jax.random.key(0))
  state.params['log_threshold'] = jnp.where(
    jnp.arange(F) < 10, 50.0, state.params['log_threshold']
  )
  for i, x_NBD in enumerate(data(3)):
    state, metrics = one.step(state, x_NBD, jnp.int32(i))
  assert state.silent_tokens[0, :10].tolist() == [3 * B] * 10
  assert metrics['dead'][0] == 0
  one = make([('l0', 0.0)], [0], [0], dead_after=2 * B)
  _, metrics = one.step(state, x_NBD, jnp.int32(3))
  assert metrics['dead'][0] >= 10 / F


def test_schedules():
  o = optimizer(warm_up=10, decay=10, sparsity_warm_up=20, steps=100)
  assert float(o.rate_factor(0)) == pytest.approx(0.1)
  assert float(o.rate_factor(5)) == pytest.approx(0.55)
  assert float(o.rate_factor(10)) == pytest.approx(1.0)
  assert float(o.rate_factor(95)) == pytest.approx(0.5)
  assert float(o.sparsity_factor(0)) == 0
  assert float(o.sparsity_factor(10)) == pytest.approx(0.5)
  assert float(o.sparsity_factor(50)) == 1


def test_sparsity_ladder_is_monotone():
  """More lambda, less L0; lambda 0 is the densest."""
  ladder = make([('l0', v) for v in (0.0, 0.01, 0.1)], [0] * 3, [0] * 3,
                steps=400, decay=0, threshold_rate=10.0)  # fmt: skip
  STACKS['ladder'] = ladder
  _, metrics = train('ladder', 150)
  l0 = np.asarray(metrics['l0'])[-10:].mean(0)
  assert l0[0] > l0[1] > l0[2] > 0, l0
