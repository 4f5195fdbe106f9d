"""Causal attention, in blocks of queries that see no later key.

  scores = q k^T,  soft-capped, masked;  out = softmax(scores) v

A block of queries meets the keys up to its own end: for four blocks 5/8 of the
T x T scores are formed, and a quarter of the memory is held at once. The
softmax's denominator is divided out after the values are summed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_MASKED = -2.3819763e38  # as in the package; finite, so that no row is NaN
_BLOCKS = 4  # at most, so that the program stays small
_SHORTEST = 256  # queries; shorter blocks gain nothing on a CPU


def attend(
  q_BTNH, k_BSKH, v_BSKH, mask_BTS, cap: float | None, causal: bool
) -> jax.Array:
  """[B, T, N, H]; each of K key heads serves N / K query heads.

  Args:
    mask_BTS: the keys that each query attends to.
    cap: of the scores; None for no soft-cap.
    causal: whether T = S and no query of the mask attends to a later key.
  """
  length = q_BTNH.shape[1]
  size = max(_SHORTEST, -(-length // _BLOCKS)) if causal else length
  outputs = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    keys = stop if causal else k_BSKH.shape[1]
    outputs.append(
      _attend(
        q_BTNH[:, start:stop],
        k_BSKH[:, :keys],
        v_BSKH[:, :keys],
        mask_BTS[:, start:stop, :keys],
        cap,
      )
    )
  return jnp.concatenate(outputs, 1) if len(outputs) > 1 else outputs[0]


def _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, cap: float | None):
  batch, length, heads, width = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, width)
  scores = jnp.einsum('BTKGH,BSKH->BKTGS', q_BTKGH, k_BSKH)
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  scores = jnp.where(mask_BTS[:, None, :, None], scores, _MASKED)
  largest = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
  weights = jnp.exp(scores - largest)
  out_BTKGH = jnp.einsum('BKTGS,BSKH->BTKGH', weights, v_BSKH)
  total_BTKG = jnp.moveaxis(jnp.sum(weights, -1), 1, 2)
  out_BTKGH /= total_BTKG[..., None]
  return out_BTKGH.reshape(batch, length, heads, width)


def rotated(
  x_BTNH, positions_BT, base: float, factor: float = 1.0, share: float = 1.0
):
  """Rotary embedding (arXiv 2104.09864): halves of H are the pairs.

  Args:
    base, factor: position p turns pair i by p / base**(2 i / H) / factor.
    share: of the pairs, the first ones, that are turned at all.
  """
  half = x_BTNH.shape[-1] // 2
  exponent_h = jnp.arange(int(share * half), dtype=jnp.float32) / half
  angle = positions_BT[..., None, None] / base**exponent_h / factor
  still = [(0, 0)] * (angle.ndim - 1) + [(0, half - angle.shape[-1])]
  angle = jnp.pad(angle, still) if share < 1 else angle
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x_BTNH, 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def near(positions_BT, positions_BS, window: int) -> jax.Array:
  """[B, T, S]: the keys less than `window` positions away."""
  return jnp.abs(positions_BT[:, :, None] - positions_BS[:, None, :]) < window
