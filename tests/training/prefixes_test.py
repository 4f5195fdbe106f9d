"""Matryoshka prefixes of latents that several devices share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.performance import compile_check
from gemma_scope.sae import architectures
from gemma_scope.training import objectives, optimizer, prefixes, stack

D, F, B = 16, 48, 8


@pytest.mark.parametrize('layers', [0, 2])
@pytest.mark.parametrize(
  'ends, shards',
  [
    ((6, 12, 24, 48), 8),  # a block a shard
    ((6, 12, 24, 48), 2),  # several
    ((3, 24, 48), 8),  # a prefix that ends within a shard
    ((5, 11, 31, 48), 4),  # masks
  ],
)
def test_prefixes_of_shards_are_slices(ends, shards, layers):
  lead = (layers,) if layers else ()
  ends = [end // max(layers, 1) or 1 for end in ends]
  module = architectures.JumpReLU(D, D, F, layers=layers)
  params = module.init(jax.random.key(0), jnp.zeros((1, *lead, D)))
  f_BF = jax.random.normal(jax.random.key(1), (B, *module.latent_shape))

  @jax.jit
  def added(params, f_BF):
    bound = module.bind(params)
    return [list(prefixes.added(bound, ends, n, f_BF)) for n in (1, shards)]

  slices, blocks = added(params, f_BF)
  assert len(slices) == len(blocks) == len(ends)
  for want, got in zip(slices, blocks, strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def step_text(ends):
  """A step's program for 8 devices that share each SAE's latents."""
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 8})
  at = (sites.Site(0, 'resid_post'),)
  setting = stack.Setting(
    jnp.float32([8.0]), jnp.float32([1e-3]), *[jnp.zeros(1, jnp.int32)] * 2
  )
  one = stack.Stack(
    architectures.JumpReLU(D, D, F),
    objectives.Objective('quadratic_l0', prefixes=ends), at, at, setting, (0,),
    optimizer.Optimizer(
      b2=0.999, eps=1e-8, clip=0.0, warm_up=5, decay=5, sparsity_warm_up=10,
      threshold_rate=3.0, steps=40, dead_after=500, theta_decay=0.999,
      adaptive_rate=0.01,
    ),
  )  # fmt: skip
  shardings = one.shardings(mesh)
  state = jax.eval_shape(one.init, jax.random.key(0))
  state = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    state,
    shardings,
  )
  rows = jax.ShapeDtypeStruct(
    (1, B, D), jnp.float32, sharding=mesh_lib.sharding(mesh)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = lambda state, x, i, key: one.step(state, x, x, i, key, mesh)
  step = jax.jit(step, out_shardings=(shardings, None))
  return step.lower(state, rows, jnp.int32(0), key).compile().as_text()


def test_no_latents_move_between_shards():
  """Sums of [B, D] alone, one more for every prefix."""
  plain, nested = (
    compile_check.collectives(step_text(ends)) for ends in ((), (6, 12, 24, 48))
  )
  assert set(nested) == set(plain) == {'all-reduce'}
  more = nested['all-reduce']['bytes'] - plain['all-reduce']['bytes']
  assert 3 * B * D * 4 <= more <= 4 * B * D * 4 + 1024
