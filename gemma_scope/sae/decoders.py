"""Norms and directions of decoders, W_dec [F, D] or [L, L, F, D].

With several layers, a latent's decoder is the concatenation of its rows to all
layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _norm_axes(w: jax.Array) -> tuple[int, ...]:
  """Axes of a latent's decoder in W_dec [F, D] or [L, L, F, D]."""
  return (-1,) if w.ndim == 2 else (-3, -1)


def decoder_norm(W_dec: jax.Array) -> jax.Array:
  """Norm of each latent's decoder, [F] or [L, F]."""
  square = jnp.sum(jnp.square(W_dec), _norm_axes(W_dec))
  # The gradient at a zero row is zero, not NaN.
  positive = jnp.where(square > 0, square, 1)
  return jnp.where(square > 0, jnp.sqrt(positive), 0)


# Barriers keep XLA's CPU backend from fusing the row sum, a library call, with
# the code around it, which makes the whole update three times as slow.


def unit_rows(W_dec: jax.Array) -> jax.Array:
  """Decoders scaled to Euclidean norm 1 (a zero one stays zero)."""
  W_dec = jax.lax.optimization_barrier(W_dec)
  norm = jnp.sqrt(jnp.sum(jnp.square(W_dec), _norm_axes(W_dec), keepdims=True))
  return W_dec / jax.lax.optimization_barrier(jnp.maximum(norm, 1e-12))


def remove_parallel(gradient: jax.Array, W_dec: jax.Array) -> jax.Array:
  """The part of W_dec's gradient orthogonal to each unit decoder.

  It is applied before Adam, so that the moments never see the direction that
  renormalisation removes (arXiv 2408.05147 section 3.2).
  """
  along = jnp.sum(gradient * W_dec, _norm_axes(W_dec), keepdims=True)
  return gradient - jax.lax.optimization_barrier(along) * W_dec


def near(W_dec: jax.Array, start: jax.Array, cosine: float) -> jax.Array:
  """Rotates unit decoders back to a least cosine with their start.

  Args:
    W_dec, start: decoders of norm 1.
    cosine: the least one allowed.
  """
  along = jnp.sum(W_dec * start, _norm_axes(W_dec), keepdims=True)
  away = unit_rows(W_dec - along * start)
  turned = cosine * start + (1 - cosine**2) ** 0.5 * away
  return jnp.where(along < cosine, turned, W_dec)


def own_layer(W_dec):
  """Unit vectors that latents write to their own layer; initial W_enc."""
  if W_dec.ndim == 4:
    W_dec = jnp.moveaxis(jnp.diagonal(W_dec), -1, 0)
    W_dec /= jnp.linalg.norm(W_dec, axis=-1, keepdims=True)
  return W_dec
