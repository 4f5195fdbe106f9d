"""The sparse way of a step gives what the dense one gives, on any mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope.sae import sparse
from gemma_scope.sae.kernels import plain

R, K, N, D = 24, 5, 40, 12
KEY = jax.random.key(0)


def pairs(rows=R, count=K):
  keys = jax.random.split(KEY, 3)
  c = jax.random.normal(keys[0], (rows, count))
  i = jax.random.randint(keys[1], (rows, count), 0, N)
  return c.at[:, -1].set(0), i, jax.random.normal(keys[2], (N, D))


def dense(c, i):
  """[R, N] with c at i, by hand."""
  f = np.zeros((len(c), N))
  for r, (row, at) in enumerate(zip(np.asarray(c), np.asarray(i), strict=True)):
    for value, n in zip(row, at, strict=True):
      f[r, n] += value
  return f


@pytest.mark.parametrize('rows, count', [(R, K), (7, 1), (3, 150), (1, 300)])
def test_rows_are_gathered_and_scattered(rows, count):
  c, i, W = pairs(rows, count)
  f, W64 = dense(c, i), np.asarray(W, np.float64)
  y = plain.gather_add(c, i, W)
  np.testing.assert_allclose(y, f @ W64, rtol=1e-4, atol=1e-4)
  g = plain.gather_dot(y, i, W)
  wanted = np.take_along_axis(np.asarray(y, np.float64) @ W64.T, i, 1)
  np.testing.assert_allclose(g, wanted, rtol=1e-4, atol=1e-4)
  dW = plain.scatter_add(c, i, y, N)
  np.testing.assert_allclose(dW, f.T @ y, rtol=1e-4, atol=1e-3)


def test_factors_are_rounded_and_sums_are_not():
  c, i, W = pairs()
  rounded = [
    np.asarray(a.astype(jnp.bfloat16).astype(jnp.float32)) for a in (c, W)
  ]
  y = plain.gather_add(c, i, W, 'bfloat16')
  np.testing.assert_allclose(
    y, dense(rounded[0], i) @ rounded[1], rtol=1e-5, atol=1e-5
  )
  assert np.abs(y - plain.gather_add(c, i, W)).max() > 1e-4


@pytest.mark.parametrize('latents', [1, 31, 32, 33, 200, 1024])
@pytest.mark.parametrize('density', [0.0, 0.05, 0.9])
def test_candidates_are_found_in_order(latents, density):
  mask = np.random.default_rng(latents).random((50, latents)) < density
  mask[0] = False
  i, found = jax.jit(plain.select, static_argnums=1)(mask, 8)
  np.testing.assert_array_equal(found, mask.sum(1))
  for row, at, count in zip(
    mask, np.asarray(i), np.asarray(found), strict=True
  ):
    wanted = np.flatnonzero(row)[:8]
    np.testing.assert_array_equal(at[: len(wanted)], wanted)
    assert not at[count:].any()


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize('layers', [0, 3])
def test_a_batch_on_a_mesh(shape, layers):
  """Values, sums and gradients are those of the dense matrix of latents."""
  mesh = mesh_lib.make(
    dict(zip(mesh_lib.AXES, shape, strict=True)),
    jax.devices()[: int(np.prod(shape))],
  )
  lead = (layers,) if layers else ()
  rows, latents = 16, 64
  keys = iter(jax.random.split(KEY, 8))
  z = jax.random.normal(next(keys), (rows, *lead, latents))
  v = jax.random.normal(next(keys), (*lead, latents))
  W_dec = jax.random.normal(next(keys), (*lead, *lead, latents, D))
  if layers:
    W_dec *= np.triu(np.ones((layers, layers)))[:, :, None, None]
  x = jax.random.normal(next(keys), (rows, *lead, D))
  terms = 'blf,lmfd->bmd' if layers else 'bf,fd->bd'
  back = 'bmd,lmfd->blf' if layers else 'bd,fd->bf'

  def loss(weights, latents_of):
    z_F, v_F, W_dec = weights
    f, total, write, read = latents_of(z_F, v_F)
    y = write(f, W_dec)
    again = jnp.sum(f * jnp.tanh(read(x - y / 8, W_dec) / 16)) / 16
    return jnp.sum(jnp.sin(y) * x) + jnp.sum(jnp.cos(total(f)) * v) + again, y

  @jax.jit
  def sparsely(z, v, W_dec):
    found = sparse.Candidates.of_mask(z > 1.0, 32, mesh, 'float32')
    own = found.values(z)

    def latents_of(z_BK, v_F):
      return (
        jax.nn.relu(z_BK * jnp.exp(found.at(v_F))),
        found.total,
        found.write,
        found.read,
      )

    out = jax.value_and_grad(loss, has_aux=True)((own, v, W_dec), latents_of)
    W_enc = found.encoder_gradient(out[1][0], x)
    return out, W_enc, found.most

  @jax.jit
  def densely(z, v, W_dec):
    def latents_of(z, v_F):
      f = jnp.where(z > 1.0, jax.nn.relu(z * jnp.exp(v_F)), 0)
      return (
        f,
        lambda f: jnp.sum(f, 0),
        lambda f, W: jnp.einsum(terms, f, W),
        lambda y, W: jnp.einsum(back, y, W),
      )

    out = jax.value_and_grad(loss, has_aux=True)((z, v, W_dec), latents_of)
    into = 'blf,bld->lfd' if layers else 'bf,bd->fd'
    g = jnp.where(z > 1.0, out[1][0], 0)
    return out, jnp.einsum(into, g, x)

  ((value, y), grads), W_enc, most = sparsely(z, v, W_dec)
  ((wanted, wanted_y), wanted_grads), wanted_W_enc = densely(z, v, W_dec)
  assert 1 < int(most) <= 32
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(value, wanted)
  close(y, wanted_y)
  close(grads[1], wanted_grads[1], atol=1e-3)  # of up to 200
  causal = np.triu(np.ones((layers or 1,) * 2))[:, :, None, None]
  close(grads[2], wanted_grads[2] * (causal if layers else 1))
  close(W_enc, wanted_W_enc)
