"""Causal attention, in blocks of queries that see no later key.

  scores = q k^T,  soft-capped, masked;  out = softmax(scores) v

A block of queries meets the keys up to its own end: for four blocks 5/8 of the
T x T scores are formed, and a quarter of the memory is held at once. The
softmax's denominator is divided out after the values are summed.

It stands in for the middle of the `gemma` package's Attention module, whose
submodules, and so their taps and edits, are called as there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_MASKED = -2.3819763e38  # as in the package; finite, so that no row is NaN
_BLOCKS = 4  # at most, so that the program stays small
_SHORTEST = 256  # queries; shorter blocks gain nothing on a CPU


def attention(module, x_BTD, positions_BT, mask_BTT, causal: bool):
  """What the package's `Attention` returns without a cache: [B, T, D].

  Args:
    module: the package's bound module.
    positions_BT: of each token in its document.
    mask_BTT: the keys that each query attends to.
    causal: whether no query of the mask attends to a later key.
  """
  if module.use_qkv_einsum:
    q_BTNH, k_BSKH, v_BSKH = module.qkv_einsum('BTD,SNDH->SBTNH', x_BTD)
  else:
    q_BTNH = module.q_einsum('BTD,NDH->BTNH', x_BTD)
    k_BSKH, v_BSKH = module.kv_einsum('BSD,CKDH->CBSKH', x_BTD)
  if module.use_qk_norm:
    q_BTNH, k_BSKH = module._query_norm(q_BTNH), module._key_norm(k_BSKH)
  base, factor = module.rope_base_frequency, module.rope_scale_factor
  q_BTNH = _rotated(q_BTNH, positions_BT, base, factor)
  q_BTNH *= module.query_pre_attn_scalar
  k_BSKH = _rotated(k_BSKH, positions_BT, base, factor)
  if module.attn_type.name == 'LOCAL_SLIDING':
    window = module.sliding_window_size
    apart_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
    mask_BTT = mask_BTT & (jnp.abs(apart_BTT) < window)
  length = x_BTD.shape[1]
  size = max(_SHORTEST, -(-length // _BLOCKS)) if causal else length
  parts = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    seen = stop if causal else length
    parts.append(
      _attend(
        q_BTNH[:, start:stop],
        k_BSKH[:, :seen],
        v_BSKH[:, :seen],
        mask_BTT[:, start:stop, :seen],
        module.attn_logits_soft_cap,
      )
    )
  out_BTNH = jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]
  return module.attn_vec_einsum('BTNH,NHD->BTD', out_BTNH)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, cap: float | None):
  """Each key head serves G query heads."""
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


def _rotated(x_BTNH, positions_BT, base: float, factor: float):
  """Rotary embedding (arXiv 2104.09864): halves of H are the pairs."""
  half = x_BTNH.shape[-1] // 2
  period_h = base ** (jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BT[..., None, None] / period_h / factor
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x_BTNH, 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
