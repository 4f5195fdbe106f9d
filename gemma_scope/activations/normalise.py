"""Measures the normalisation of a site's rows for training: x -> (x - m) / C.

  centre      m     none              0
                    mean              E x
                    geometric_median  argmin_m E |x - m|
  scale       C     rms               sqrt(E |x|^2), as published
                    centred_rms       sqrt(E |x - m|^2)
                    sqrt_d            sqrt(D)

The expectations are over the rows of the run's first chunk. In a residual
stream most of E |x|^2 comes from the mean (85 % in the middle of Gemma 3 270M).
Without a centre every latent first learns the mean, and the scale is far larger
than the variation that is to be explained. Centre and scale are folded into the
released parameters (`sae.fold`).

Sources: scale, arXiv 2408.05147 section 3.2; mean, arXiv 2406.04093 appendix A;
geometric median, transformer-circuits.pub/2023/monosemantic-features, computed
by Weiszfeld's iteration.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope.sae import fold

_ITERATIONS = 64  # at most; the median moves by less than _MOVED in about 10
_MOVED = 1e-4  # of the median distance from it


def measure(
  x_KBD: jax.Array, centre: str = 'none', scale: str = 'rms'
) -> fold.Normalisation:
  """The normalisation of one site, measured on its rows [K, B, D].

  The names of `centre` and `scale` are listed above. The result is the same in
  every process of a cluster.
  """
  if centre == 'none' and scale == 'sqrt_d':
    return fold.Normalisation(x_KBD.shape[-1] ** 0.5)
  if centre == 'none':
    return fold.Normalisation(float(_rms(x_KBD)))
  m_D = _mean(x_KBD) if centre == 'mean' else geometric_median(x_KBD)
  if scale == 'sqrt_d':
    value = x_KBD.shape[-1] ** 0.5
  else:
    value = float(_rms(x_KBD) if scale == 'rms' else _rms(x_KBD, m_D))
  return fold.Normalisation(value, np.asarray(m_D))


@jax.jit
def _rms(x_KBD, m_D=None):
  x_KBD = x_KBD.astype(jnp.float32)
  if m_D is not None:
    x_KBD = x_KBD - m_D
  per_row = jnp.sum(jnp.square(x_KBD), -1)
  return jnp.sqrt(jnp.mean(per_row))


def _replicated(function):
  """jit, with the same result on every device of the rows' mesh."""

  @functools.wraps(function)
  def call(x_KBD, *arguments):
    mesh = getattr(x_KBD.sharding, 'mesh', None)
    if mesh is None:
      return jax.jit(function)(x_KBD, *arguments)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(function, out_shardings=replicated)(x_KBD, *arguments)

  return call


def _mean_D(x_KBD):
  # Batch by batch: one float32 sum over all rows would lose digits.
  return jnp.mean(jnp.mean(x_KBD.astype(jnp.float32), 1), 0)


_mean = _replicated(_mean_D)


@_replicated
def covariance(x_KBD: jax.Array, normalisation: fold.Normalisation):
  """E x' x'^T [D, D] of normalised rows x', float32."""

  def of_batch(x_BD):
    x_BD = normalisation.apply(x_BD.astype(jnp.float32))
    return jnp.matmul(x_BD.T, x_BD, precision='highest') / len(x_BD)

  return jnp.mean(jax.lax.map(of_batch, x_KBD), 0)


@_replicated
def geometric_median(x_KBD: jax.Array) -> jax.Array:
  """The point [D] whose mean distance to the rows is smallest.

  m <- sum_r w_r x_r / sum_r w_r with w_r = 1 / |x_r - m|, from the mean.
  """
  x_KBD = x_KBD.astype(jnp.float32)

  def distance(m_D):
    return jnp.sqrt(jnp.sum(jnp.square(x_KBD - m_D), -1))

  def unfinished(carry):
    i, _, moved = carry
    return (i < _ITERATIONS) & (moved > _MOVED)

  def move(carry):
    i, m_D, _ = carry
    d_KB = distance(m_D)
    typical = jnp.mean(d_KB)
    w_KB = 1 / jnp.maximum(d_KB, 1e-6 * typical)
    w_KB = w_KB / jnp.sum(w_KB)
    step_D = jnp.sum(jnp.einsum('kb,kbd->kd', w_KB, x_KBD - m_D), 0)
    moved = jnp.sqrt(jnp.sum(jnp.square(step_D)))
    return i + 1, m_D + step_D, moved / jnp.maximum(typical, 1e-30)

  start = jnp.int32(0), _mean_D(x_KBD), jnp.float32(jnp.inf)
  return jax.lax.while_loop(unfinished, move, start)[1]
