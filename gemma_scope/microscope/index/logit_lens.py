"""What latents write: directions, their neighbours, the logits that they move.

  logit_V = (W_dec[i] * gain) . E_V

per unit of activation and of the final norm's denominator: Gemma's final norm
multiplies by its gain, and its soft-cap, monotone, changes no order. A latent
writes into the residual stream as its target does:

  resid_*, attn_add, mlp_out, ple_out   as it is
  attn_out                              through W_O and the gain of its norm
  attn_raw, mlp_raw, experts_out        through the gain of the norm
  others                                not read: no effects

The denominator of a norm differs from token to token and is left out, so that a
direction through a norm is right up to a positive factor. Of an SAE that writes
to several layers, the last one is read. Logits are computed in blocks of
latents, so that F x V numbers never exist at once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm

TOKENS, NEAR = 10, 12
_BLOCK = 1 << 10
_AS_IT_IS = (
  'resid_pre',
  'resid_mid',
  'resid_post',
  'attn_add',
  'mlp_out',
  'ple_out',
)
_NORM = {
  'attn_out': 'post_attention_norm',
  'attn_raw': 'post_attention_norm',
  'mlp_raw': 'post_ffw_norm',
  'experts_out': 'post_ffw_norm',
}


def directions(
  lm_params: lm.Params,
  params: Mapping[str, np.ndarray],
  card: Mapping[str, Any],
) -> np.ndarray | None:
  """What each latent writes into the residual stream, [F, D]; None: nothing."""
  place = sites.wiring_of(card)
  W_dec, target = np.asarray(params['W_dec'], np.float32), place.targets[-1]
  if place.several:
    W_dec = W_dec[:, :, -1].reshape(-1, W_dec.shape[-1])
  if target.kind in _AS_IT_IS:
    return W_dec
  if target.kind not in _NORM:
    return None
  block = lm_params[f'layer_{target.layer}']
  if target.kind == 'attn_out':
    heads_KHD = np.asarray(block['attn']['attn_vec_einsum']['w'], np.float32)
    W_dec = W_dec @ heads_KHD.reshape(-1, heads_KHD.shape[-1])
  norm = block[_NORM[target.kind]]
  return W_dec * np.asarray(lm.gain(lm_params, norm))


def effects(
  lm_params: lm.Params,
  params: Mapping[str, np.ndarray],
  card: Mapping[str, Any],
) -> dict[str, np.ndarray | None]:
  """The tokens whose logits each latent moves most, as an `Index` has them."""
  names = (
    'positive_FL',
    'positive_value_FL',
    'negative_FL',
    'negative_value_FL',
  )
  rows_FD = directions(lm_params, params, card)
  if rows_FD is None:
    return dict.fromkeys(names)
  table_VD = lm_params['embedder']['input_embedding']
  gain_D = lm.gain(lm_params, lm_params['final_norm'])
  blocks = [
    _extremes(rows_FD[start : start + _BLOCK] * gain_D, table_VD)
    for start in range(0, len(rows_FD), _BLOCK)
  ]
  arrays = (
    np.concatenate([np.asarray(block[n]) for block in blocks]) for n in range(4)
  )
  return dict(zip(names, arrays, strict=True))


@jax.jit
def _extremes(rows_FD, table_VD):
  with jax.default_matmul_precision('highest'):
    logits_FV = rows_FD @ table_VD.astype(jnp.float32).T
  high, positive = jax.lax.top_k(logits_FV, TOKENS)
  low, negative = jax.lax.top_k(-logits_FV, TOKENS)
  return positive, high, negative, -low


def decoders(params: Mapping[str, np.ndarray]) -> np.ndarray:
  """Each latent's decoder, to all layers together, [F, D]."""
  W_dec = np.asarray(params['W_dec'], np.float32)
  if W_dec.ndim == 4:
    return W_dec.reshape(-1, W_dec.shape[2] * W_dec.shape[3])
  return W_dec


def geometry(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Norms, encoder against decoder, nearest decoders, thresholds."""
  W_enc, W_dec = (np.asarray(params[k], np.float32) for k in ('W_enc', 'W_dec'))
  several = W_enc.ndim == 3
  enc_FD = np.swapaxes(W_enc, -1, -2).reshape(-1, W_enc.shape[-2])
  own_decoder = W_dec
  if several:  # what a latent writes to its own layer, and to all
    own_decoder = np.moveaxis(np.diagonal(W_dec, axis1=0, axis2=2), -1, 0)
    own_decoder = own_decoder.reshape(-1, W_dec.shape[-1])
  W_dec = decoders(params)
  norm = lambda a: np.linalg.norm(a, axis=-1)
  cosine_F = np.full(len(enc_FD), np.nan, np.float32)
  if enc_FD.shape == own_decoder.shape:
    product = norm(enc_FD) * norm(own_decoder)
    cosine_F = np.einsum('fd,fd->f', enc_FD, own_decoder) / np.maximum(
      product, 1e-30
    )
  unit_FD = W_dec / np.maximum(norm(W_dec), 1e-30)[:, None]
  blocks = [
    _nearest(unit_FD[start : start + _BLOCK], unit_FD, start)
    for start in range(0, len(unit_FD), _BLOCK)
  ]
  value, near = (
    np.concatenate([np.asarray(block[n]) for block in blocks]) for n in (0, 1)
  )
  return {
    'neighbour_FC': near.astype(np.int32),
    'neighbour_value_FC': value,
    'decoder_norm_F': norm(W_dec),
    'encoder_norm_F': norm(enc_FD),
    'cosine_F': cosine_F,
    'threshold_F': np.asarray(params['threshold'], np.float32).reshape(-1),
  }


@functools.partial(jax.jit)
def _nearest(rows_BD, unit_FD, start):
  with jax.default_matmul_precision('highest'):
    cosine_BF = rows_BD @ unit_FD.T
  itself = jnp.arange(len(unit_FD)) == start + jnp.arange(len(rows_BD))[:, None]
  count = min(NEAR, len(unit_FD))
  return jax.lax.top_k(jnp.where(itself, -2.0, cosine_BF), count)
