"""What follows the last step: L0 at its target, decoders of least squares."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.sae import architectures
from gemma_scope.training import closing, objectives, stack
from gemma_scope.training import optimizer as optimizer_lib

D, F, B, L = 12, 40, 256, 3
SITES = tuple(sites.Site(n, 'resid_post') for n in range(L))
BASES = ('jumprelu', 'batch_topk', 'gated')


def make(base, layers=0, k=4.0):
  module = architectures.ARCHITECTURES[base](
    D, D, F * max(layers, 1), layers=layers
  )
  optimizer = optimizer_lib.Optimizer(
    b2=0.9,
    eps=1e-8,
    clip=0.0,
    warm_up=0,
    decay=0,
    sparsity_warm_up=0,
    threshold_rate=1.0,
    steps=1,
    dead_after=10**6,
    theta_decay=0.9,
    adaptive_rate=0.1,
  )
  at = jnp.asarray([list(range(L)) if layers else 1] * 2)
  value, rate = jnp.asarray([k, 2 * k]), jnp.zeros(2)
  setting = stack.Setting(value, rate, at, at)
  one = stack.Stack(
    module, objectives.Objective('k'), SITES, SITES, setting, (0, 1), optimizer
  )
  state = jax.jit(one.init)(jax.random.key(0))
  return one, jax.tree.map(np.array, state)  # in numpy, to be changed


@functools.cache
def batches(count=6):
  """Rows by site; sums of some directions, and a mean."""
  rng = np.random.default_rng(2)
  made_of_NGD = rng.normal(size=(L, 30, D))
  out = []
  for _ in range(count):
    codes_BG = rng.random((B, 30)) * (rng.random((B, 30)) < 0.1)
    x_NBD = np.einsum('BG,NGD->NBD', codes_BG, made_of_NGD) / 3 + 0.1
    out.append(dict(zip(SITES, x_NBD.astype(np.float32), strict=True)))
  return out


def latents(one, state, i, rows):
  """Of a member on a batch of normalised rows, as they are released."""
  state = jax.device_get(state)
  params = {name: value[i] for name, value in state.params.items()}
  value = np.asarray(one.setting.value)[i]
  released = jax.device_get(one.module.released(params, state.theta[i], value))
  rows_NBD = np.stack([rows[s] for s in SITES])
  at = np.asarray(one.setting.reads)[i]
  x = np.moveaxis(rows_NBD[at], 0, 1) if at.ndim else rows_NBD[at]
  x = x - params['b_dec']
  terms = 'bld,ldf->blf' if one.module.layers else 'bd,df->bf'
  z = np.einsum(terms, x, released['W_enc']) + released['b_enc']
  return np.where(z > released['threshold'], np.maximum(z, 0), 0), params


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('start', [0.02, 0.5])
def test_the_target_l0_is_met_from_both_sides(base, start):
  one, state = make(base)
  if base == 'jumprelu':
    state.params['log_threshold'][:] = np.log(start)
  elif base == 'gated':
    state.params['b_gate'][:] = -start
  state = state.replace(theta=np.full(2, start, np.float32))
  rows = batches()
  before, after = (
    [
      np.mean([np.sum(latents(one, s, i, r)[0] > 0) / B for r in rows])
      for i in range(2)
    ]
    for s in (state, closing.meet_l0(one, state, rows))
  )
  assert np.abs(np.array(before) / [4, 8] - 1).max() > 0.2
  np.testing.assert_allclose(after, [4, 8], rtol=0.02)


@pytest.mark.parametrize('layers', [0, L])
@pytest.mark.parametrize('mesh', [None, (1, 2, 4)])
def test_decoders_are_those_of_least_squares(layers, mesh, monkeypatch):
  """Against numpy's, the latents unchanged, no layer writing to an earlier."""
  monkeypatch.setattr(closing, '_PRIOR', 1e-3)
  monkeypatch.setattr(closing, '_TOLERANCE', 1e-6)
  monkeypatch.setattr(closing, '_ITERATIONS', 1000)
  one, state = make('jumprelu', layers)
  state.params['log_threshold'][:] = np.log(0.2)
  rows = batches()
  if mesh:
    mesh = mesh_lib.make(dict(zip(mesh_lib.AXES, mesh, strict=True)))
  state = jax.device_put(state, one.shardings(mesh) if mesh else None)
  after = closing.refit_decoders(one, state, lambda: iter(rows), mesh)
  for i in range(2):
    f, _ = zip(*[latents(one, state, i, r) for r in rows], strict=True)
    new, params = zip(*[latents(one, after, i, r) for r in rows], strict=True)
    np.testing.assert_allclose(
      np.concatenate(new), np.concatenate(f), rtol=1e-3, atol=2e-4
    )
    f, p = np.concatenate(f), params[0]
    for m in range(max(layers, 1)):
      y = np.concatenate([r[SITES[m if layers else 1]] for r in rows])
      f_m = f[:, : m + 1] if layers else f
      ones = np.ones((len(y), 1))
      A = np.concatenate([f_m.reshape(len(y), -1), ones], 1)
      best = A @ np.linalg.lstsq(A, y, rcond=None)[0]
      W = p['W_dec'][: m + 1, m].reshape(-1, D) if layers else p['W_dec']
      b = p['b_dec'][m] if layers else p['b_dec']
      error = np.square(y - f_m.reshape(len(y), -1) @ W - b).sum()
      least = np.square(y - best).sum()
      assert error <= least * 1.01 + 1e-3, (error, least)
    if layers:
      earlier = np.tril(np.ones((L, L)), -1).astype(bool)
      assert not np.any(np.asarray(p['W_dec'])[earlier])


def test_a_latent_that_never_fires_keeps_its_decoder():
  one, state = make('jumprelu')
  state.params['log_threshold'][:] = np.log(0.2)
  state.params['log_threshold'][:, :5] = 10.0
  state = jax.device_put(state)
  after = closing.refit_decoders(one, state, lambda: iter(batches()))
  before, new = state.params['W_dec'], after.params['W_dec']
  np.testing.assert_allclose(new[:, :5], before[:, :5], atol=1e-6)
  assert np.abs(new[:, 5:] - before[:, 5:]).max() > 0.01
