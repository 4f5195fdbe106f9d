"""A mixture of experts: of E small MLPs, every token passes through k.

  share_e = softmax(logits) of the k largest, divided by their sum, 0 elsewhere
  y       = sum over e of share_e scale_e MLP_e(x)

The T k pairs of a token and one of its experts are sorted by expert, so that
each expert's matrices meet their rows in one ragged product; then they are
brought back into their order and summed, k a token, in float32.

Shares that were edited may name any experts, so that all of them are run.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Weights(NamedTuple):
  """Of all experts of a layer; F is the hidden layer of one."""

  gating_E2FD: jax.Array
  linear_EFD: jax.Array
  scale_E: jax.Array


def shares(logits_BTE: jax.Array, k: int) -> jax.Array:
  """The router's choice [B, T, E], float32; each token's sum is 1."""
  logits_BTE = logits_BTE.astype(jnp.float32)
  _, chosen_BTk = jax.lax.top_k(logits_BTE, k)
  chosen_BTE = jax.nn.one_hot(chosen_BTk, logits_BTE.shape[-1]).sum(-2)
  return jax.nn.softmax(logits_BTE, where=chosen_BTE > 0)


def of_chosen(x_BTD, shares_BTE, k: int, weights: Weights) -> jax.Array:
  """y where at most k shares of a token are not 0."""
  batch, length, width = x_BTD.shape
  experts = shares_BTE.shape[-1]
  share_Nk, chosen_Nk = jax.lax.top_k(shares_BTE.reshape(-1, experts), k)
  share_Nk *= weights.scale_E.astype(jnp.float32)[chosen_Nk]
  order = jnp.argsort(chosen_Nk.reshape(-1), stable=True)
  rows_MD = x_BTD.reshape(-1, width)[order // k]
  sizes_E = jnp.bincount(chosen_Nk.reshape(-1), length=experts)
  hidden = weights.linear_EFD.shape[1]
  into_EDH = weights.gating_E2FD.reshape(experts, 2 * hidden, width)
  into_EDH = into_EDH.swapaxes(1, 2)
  gate, up = jnp.split(
    jax.lax.ragged_dot(rows_MD, into_EDH, sizes_E.astype(jnp.int32)), 2, -1
  )
  y_MD = jax.lax.ragged_dot(
    nn.gelu(gate) * up, weights.linear_EFD, sizes_E.astype(jnp.int32)
  )
  y_NkD = y_MD[jnp.argsort(order)].reshape(-1, k, width)
  y_ND = jnp.einsum('nkd,nk->nd', y_NkD.astype(jnp.float32), share_Nk)
  return y_ND.reshape(batch, length, width).astype(x_BTD.dtype)


def of_all(x_BTD, shares_BTE, weights: Weights) -> jax.Array:
  """y for any shares; E / k times the work."""

  def add(y_BTD, expert):
    share_BT, (gating_2FD, linear_FD, scale) = expert
    gate, up = (x_BTD @ w_FD.T for w_FD in gating_2FD)
    out_BTD = (nn.gelu(gate) * up) @ linear_FD
    share_BT1 = (share_BT * scale.astype(jnp.float32))[..., None]
    return y_BTD + share_BT1 * out_BTD.astype(jnp.float32), None

  zeros = jnp.zeros(x_BTD.shape, jnp.float32)
  each = jnp.moveaxis(shares_BTE, -1, 0), tuple(weights)
  return jax.lax.scan(add, zeros, each)[0].astype(x_BTD.dtype)
