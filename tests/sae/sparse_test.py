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
SELECT = jax.jit(plain.select, static_argnums=1)


def pairs(rows=R, count=K):
  rng = np.random.default_rng(0)
  c = rng.normal(size=(rows, count)).astype(np.float32)
  c[:, -1] = 0
  i = rng.integers(0, N, (rows, count), dtype=np.int32)
  return c, i, rng.normal(size=(N, D)).astype(np.float32)


# Compiled whole: a sum is a loop over slices.
gather_add = jax.jit(plain.gather_add, static_argnums=3)
gather_dot = jax.jit(plain.gather_dot)
scatter_add = jax.jit(plain.scatter_add, static_argnums=3)


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
  y = gather_add(c, i, W)
  np.testing.assert_allclose(y, f @ W64, rtol=1e-4, atol=1e-4)
  g = gather_dot(y, i, W)
  wanted = np.take_along_axis(np.asarray(y, np.float64) @ W64.T, i, 1)
  np.testing.assert_allclose(g, wanted, rtol=1e-4, atol=1e-4)
  dW = scatter_add(c, i, y, N)
  np.testing.assert_allclose(dW, f.T @ y, rtol=1e-4, atol=1e-3)


def test_factors_are_rounded_and_sums_are_not():
  c, i, W = pairs()
  rounded = [a.astype(jnp.bfloat16).astype(np.float32) for a in (c, W)]
  y = gather_add(c, i, W, 'bfloat16')
  np.testing.assert_allclose(
    y, dense(rounded[0], i) @ rounded[1], rtol=1e-5, atol=1e-5
  )
  assert np.abs(y - gather_add(c, i, W)).max() > 1e-4


@pytest.mark.parametrize('latents', [1, 31, 32, 33, 200, 1024])
@pytest.mark.parametrize('density', [0.0, 0.05, 0.9])
def test_candidates_are_found_in_order(latents, density):
  mask = np.random.default_rng(latents).random((50, latents)) < density
  mask[0] = False
  i, found = SELECT(mask, 8)
  np.testing.assert_array_equal(found, mask.sum(1))
  for row, at, count in zip(
    mask, np.asarray(i), np.asarray(found), strict=True
  ):
    wanted = np.flatnonzero(row)[:8]
    np.testing.assert_array_equal(at[: len(wanted)], wanted)
    assert not at[count:].any()


def loss(weights, latents_of, x, v):
  """A function of what is written, read and summed over rows, and y."""
  z_F, v_F, W_dec = weights
  f, total, write, read = latents_of(z_F, v_F)
  y = write(f, W_dec)
  again = jnp.sum(f * jnp.tanh(read(x - y / 8, W_dec) / 16)) / 16
  return jnp.sum(jnp.sin(y) * x) + jnp.sum(jnp.cos(total(f)) * v) + again, y


gradients = jax.value_and_grad(loss, has_aux=True)


@functools.cache
def factors(layers):
  """z [B, F], v [F], W_dec and x, with layers in them if there are several."""
  lead = (layers,) if layers else ()
  rows, latents = 16, 64

  @jax.jit
  def make(key):
    keys = iter(jax.random.split(key, 8))
    z = jax.random.normal(next(keys), (rows, *lead, latents))
    v = jax.random.normal(next(keys), (*lead, latents))
    W_dec = jax.random.normal(next(keys), (*lead, *lead, latents, D))
    if layers:
      W_dec *= np.triu(np.ones((layers, layers)))[:, :, None, None]
    return z, v, W_dec, jax.random.normal(next(keys), (rows, *lead, D))

  return jax.device_get(make(jax.random.key(0)))


@functools.cache
def densely(layers):
  """Of the matrix of all latents: loss, y, gradients, that of the encoder."""
  terms = 'blf,lmfd->bmd' if layers else 'bf,fd->bd'
  back = 'bmd,lmfd->blf' if layers else 'bd,fd->bf'
  into = 'blf,bld->lfd' if layers else 'bf,bd->fd'

  @jax.jit
  def run(z, v, W_dec, x):
    def latents_of(z, v_F):
      f = jnp.where(z > 1.0, jax.nn.relu(z * jnp.exp(v_F)), 0)
      return (
        f,
        lambda f: jnp.sum(f, 0),
        lambda f, W: jnp.einsum(terms, f, W),
        lambda y, W: jnp.einsum(back, y, W),
      )

    out = gradients((z, v, W_dec), latents_of, x, v)
    g = jnp.where(z > 1.0, out[1][0], 0)
    return out, jnp.einsum(into, g, x)

  return run(*factors(layers))


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize('layers', [0, 3])
def test_a_batch_on_a_mesh(shape, layers, short_loops):
  """Values, sums and gradients are those of the dense matrix of latents."""
  mesh = mesh_lib.make(
    dict(zip(mesh_lib.AXES, shape, strict=True)),
    jax.devices()[: int(np.prod(shape))],
  )

  @jax.jit
  def sparsely(z, v, W_dec, x):
    found = sparse.Candidates.of_mask(z > 1.0, 32, mesh, 'float32')

    def latents_of(z_BK, v_F):
      return (
        jax.nn.relu(z_BK * jnp.exp(found.at(v_F))),
        found.total,
        found.write,
        found.read,
      )

    out = gradients((found.values(z), v, W_dec), latents_of, x, v)
    return out, found.encoder_gradient(out[1][0], x), found.most

  ((value, y), grads), W_enc, most = sparsely(*factors(layers))
  ((wanted, wanted_y), wanted_grads), wanted_W_enc = densely(layers)
  assert 1 < int(most) <= 32
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(value, wanted)
  close(y, wanted_y)
  close(grads[1], wanted_grads[1], atol=1e-3)  # of up to 200
  causal = np.triu(np.ones((layers or 1,) * 2))[:, :, None, None]
  close(grads[2], wanted_grads[2] * (causal if layers else 1))
  close(W_enc, wanted_W_enc)
