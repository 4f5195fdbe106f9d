"""Activation functions: pre-activations -> sparse latents.

JumpReLU (arXiv 2407.14435; Gemma Scope, arXiv 2408.05147 equation 3):
  f = z H(z - theta), theta > 0, H(0) = 0.
Its gradient in theta is an expectation that a kernel density estimate of z at
theta replaces: with K(u) = 1 for |u| < 1/2, bandwidth eps,
  d step(z) / d theta     = -(1/eps)     K((z - theta) / eps)
  d jumprelu(z) / d theta = -(theta/eps) K((z - theta) / eps)
Both use z itself, not the value after the jump, which would halve the window.
The gradient in z is 0 for `step` and the true one, H(z - theta), for
`jumprelu`. With `to_input` (Anthropic, January 2025) the estimate for the jump
also flows into z, with the opposite sign.

TopK (arXiv 2406.04093) keeps the k largest positive latents of each row,
BatchTopK (arXiv 2412.06410) the k B largest of a batch of B rows. Both amount
to one threshold, found by bisection on the bits of a float32. That needs counts
alone, so that k can be data and sharded latents need not be gathered.

The custom gradients are elementwise on broadcast arrays, so that they work
under vmap and sharding; the broadcast itself has the sum over rows (`_rows`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

# Bits found where a lower bound of the threshold will do, 2^-8 below it.
_BITS = 16
_SORTED = 512  # rows of up to so many latents are sorted


def _window(z, theta, bandwidth):
  return (jnp.abs(z - theta) < bandwidth / 2).astype(z.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _step(z, theta, bandwidth, to_input):
  return (z > theta).astype(z.dtype)


def _step_forward(z, theta, bandwidth, to_input):
  return _step(z, theta, bandwidth, to_input), (z, theta)


def _step_backward(bandwidth, to_input, saved, g):
  z, theta = saved
  jump = g * _window(z, theta, bandwidth) / bandwidth
  return jump if to_input else jnp.zeros_like(z), -jump


_step.defvjp(_step_forward, _step_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _jumprelu(z, theta, bandwidth, to_input):
  return jnp.where(z > theta, z, 0)


def _jumprelu_forward(z, theta, bandwidth, to_input):
  return _jumprelu(z, theta, bandwidth, to_input), (z, theta)


def _jumprelu_backward(bandwidth, to_input, saved, g):
  z, theta = saved
  jump = g * _window(z, theta, bandwidth) * theta / bandwidth
  g_z = jnp.where(z > theta, g, 0)
  return g_z + jump if to_input else g_z, -jump


_jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _on_rows(theta, shape):
  return jnp.broadcast_to(theta, shape)


def _on_rows_backward(shape, _, g):
  # A product with ones is faster than a sum, for which XLA's CPU backend would
  # write each factor of g to memory.
  return (
    jnp.einsum('b,b...->...', jnp.ones(shape[0]), g, precision='highest'),
  )


_on_rows.defvjp(
  lambda theta, shape: (_on_rows(theta, shape), None), _on_rows_backward
)


def _rows(theta, shape):
  """Thresholds [F] -> [B, F]; those of candidates are [B, K] already."""
  return theta if theta.shape == shape else _on_rows(theta, shape)


def step(
  z_BF: jax.Array,
  theta_F: jax.Array,
  bandwidth: float,
  to_input: bool = False,
) -> jax.Array:
  """H(z - theta) with the straight-through gradient in theta; [B, F]."""
  theta_BF = _rows(theta_F, z_BF.shape)
  return _step(z_BF, theta_BF, bandwidth, to_input)


def jumprelu(
  z_BF: jax.Array,
  theta_F: jax.Array,
  bandwidth: float,
  to_input: bool = False,
) -> jax.Array:
  """z H(z - theta) with the straight-through gradient in theta; [B, F]."""
  theta_BF = _rows(theta_F, z_BF.shape)
  return _jumprelu(z_BF, theta_BF, bandwidth, to_input)


def kth_largest(
  f: jax.Array, k: jax.Array, axes: int | tuple[int, ...], bits: int = 31
) -> jax.Array:
  """The k-th largest of non-negative float32 values; no gradient.

  Args:
    f: values >= 0, whose order is that of their bits as integers.
    k: how many to keep, from 1 (data, not a shape); 0 where there are fewer.
    axes: to rank over; they stay, with size 1.
    bits: how many bits of the result to find, one pass each. Below 31 the
      result is a lower bound, at least 1 - 2^(8 - bits) of the exact one.

  Returns:
    t with count(f >= t) >= k and count(f > t) < k, exactly: a value of f.
  """
  values = jax.lax.bitcast_convert_type(
    jax.lax.stop_gradient(f).astype(jnp.float32), jnp.int32
  )

  axes = (axes,) if isinstance(axes, int) else axes

  def set_bit(i, kth):
    larger = kth | (jnp.int32(1) << (30 - i))
    return jnp.where(count_true(values >= larger, axes) >= k, larger, kth)

  start = jnp.zeros_like(jnp.max(values, axes, keepdims=True))
  kth = jax.lax.fori_loop(0, bits, set_bit, start)
  return jax.lax.bitcast_convert_type(kth, jnp.float32)


def count_true(mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Number of true entries over `axes`, which stay with size 1.

  A batch may hold more than 2^31 entries, so only the last axis is summed in
  int32; the sum over the others is in float32, exact up to 2^24 and rounded
  above.
  """
  *outer, last = axes
  count = jnp.sum(mask, last, dtype=jnp.int32, keepdims=True)
  if not outer:
    return count
  return jnp.sum(count.astype(jnp.float32), tuple(outer), keepdims=True)


def kth_of_row(z_BF: jax.Array, k: jax.Array, blocks: int = 0) -> jax.Array:
  """The k-th largest latent of each row, [B, 1], 0 where fewer are positive.

  Args:
    z_BF: pre-activations; axes after the first are ranked together.
    k: how many to keep, rounded to an integer; ties at the last place all stay.
    blocks: if not 0, rank the maxima of about so many blocks of latents, at a
      fraction of the cost. The result is a lower bound: the latents that reach
      it are the k largest and a few more.
  """
  k = jnp.round(k)
  if blocks:
    maxima = _maxima(z_BF, blocks)
    return kth_largest(maxima, k, tuple(range(1, z_BF.ndim)), _BITS)
  latents = math.prod(z_BF.shape[1:])
  if latents > _SORTED:
    return kth_largest(jax.nn.relu(z_BF), k, tuple(range(1, z_BF.ndim)))
  z_BF = jax.lax.stop_gradient(z_BF)
  sorted_BF = jnp.sort(jax.nn.relu(z_BF).reshape(-1, latents), descending=True)
  column = jnp.clip(jnp.asarray(k, jnp.int32), 1, latents + 1) - 1
  found_B = jnp.take(sorted_BF, column, 1, mode='fill', fill_value=0)
  return found_B.reshape(-1, *(1,) * (z_BF.ndim - 1))


def kth_of_batch(z_BF: jax.Array, k: jax.Array, blocks: int = 0) -> jax.Array:
  """The k B-th largest latent of the whole batch, a scalar.

  k may be fractional: k B is rounded.
  """
  total = jnp.round(k * z_BF.shape[0])
  least = kth_largest(
    _maxima(z_BF, blocks),
    total,
    tuple(range(z_BF.ndim)),
    _BITS if blocks else 31,
  )
  return least.reshape(())


def _maxima(z_BF, blocks):
  """relu(z), or its maximum in each block of latents."""
  latents, size = z_BF.shape[-1], 1
  while size < 32 and blocks and latents % (2 * size) == 0:
    if latents // (2 * size) < blocks:
      break
    size *= 2
  if size > 1:
    z_BF = jnp.max(z_BF.reshape(*z_BF.shape[:-1], -1, size), -1)
  return jax.nn.relu(z_BF)
