"""A mixture of experts: of E small MLPs, every token passes through k.

  share_e = softmax(logits) of the k largest, divided by their sum, 0 elsewhere
  y       = sum over e of share_e scale_e MLP_e(x)

`of_all` adds up every expert, for shares that were edited and may name any.
`of_chosen` leaves out the terms whose share is 0: the pairs of a token and one
of its experts are sorted by expert, so that each expert's matrices meet their
rows in one ragged product; then the rows are brought back into their order and
summed, in float32.

On a mesh the 'latent' axis splits the experts. Every device computes the terms
of its own experts for the tokens that it has, and the sums of the devices are
added up: [B, T, D] crosses devices, and neither experts nor rows do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


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


def of_chosen(
  x_BTD: jax.Array,
  shares_BTE: jax.Array,
  k: int,
  weights: Weights,
  place: NamedSharding | None = None,
) -> jax.Array:
  """y where at most k shares of a token are not 0.

  Args:
    place: where x is, on a mesh that splits the experts; None: one device.
  """
  terms = functools.partial(_chosen_terms, k=k)
  return _summed(terms, x_BTD, shares_BTE, weights, place)


def of_all(
  x_BTD: jax.Array,
  shares_BTE: jax.Array,
  weights: Weights,
  place: NamedSharding | None = None,
) -> jax.Array:
  """y for any shares; E / k times the work. Arguments as above."""
  return _summed(_all_terms, x_BTD, shares_BTE, weights, place)


def _summed(
  terms: Callable[..., jax.Array],
  x_BTD: jax.Array,
  shares_BTE: jax.Array,
  weights: Weights,
  place: NamedSharding | None,
) -> jax.Array:
  """The sum over all experts, of each device's over its own."""
  mesh = None if place is None else place.mesh
  if mesh is None or shares_BTE.shape[-1] % mesh.shape['latent']:
    return terms(x_BTD, shares_BTE, weights).astype(x_BTD.dtype)
  rows = place.spec[0]

  def of_device(*own):
    return jax.lax.psum(terms(*own), 'latent')

  y_BTD = jax.shard_map(
    of_device,
    mesh=mesh,
    in_specs=(
      PartitionSpec(rows),
      PartitionSpec(rows, None, 'latent'),
      PartitionSpec('latent'),
    ),
    out_specs=PartitionSpec(rows),
    check_vma=False,
  )(x_BTD, shares_BTE, weights)
  return y_BTD.astype(x_BTD.dtype)


def _chosen_terms(x_BTD, shares_BTE, weights: Weights, k: int) -> jax.Array:
  """The terms whose share is not 0, at most k a token: float32.

  Rows of pairs without a share are behind the others and in no group. What a
  ragged product leaves there is not defined, and is neither read nor given a
  gradient.
  """
  width, experts = x_BTD.shape[-1], shares_BTE.shape[-1]
  k = min(k, experts)
  share_Nk, expert_Nk = jax.lax.top_k(shares_BTE.reshape(-1, experts), k)
  group_M = jnp.where(share_Nk != 0, expert_Nk, experts).reshape(-1)
  sizes_E = jnp.bincount(group_M, length=experts + 1)[:experts]
  sizes_E = sizes_E.astype(jnp.int32)
  order_M = jnp.argsort(group_M, stable=True)
  real_M1 = (jnp.arange(len(group_M)) < sizes_E.sum())[:, None]
  rows_MD = jnp.where(real_M1, x_BTD.reshape(-1, width)[order_M // k], 0)
  into_EFD = weights.gating_E2FD.reshape(experts, -1, width)
  gate, up = jnp.split(
    jax.lax.ragged_dot(rows_MD, into_EFD.swapaxes(1, 2), sizes_E), 2, -1
  )
  y_MD = jax.lax.ragged_dot(nn.gelu(gate) * up, weights.linear_EFD, sizes_E)
  y_NkD = y_MD[jnp.argsort(order_M)].reshape(-1, k, width)
  y_NkD = jnp.where((share_Nk != 0)[..., None], y_NkD, 0)
  share_Nk *= weights.scale_E.astype(jnp.float32)[expert_Nk]
  y_ND = jnp.einsum('nkd,nk->nd', y_NkD.astype(jnp.float32), share_Nk)
  return y_ND.reshape(x_BTD.shape)


def _all_terms(x_BTD, shares_BTE, weights: Weights) -> jax.Array:
  """The terms of all experts, one after the other: float32."""

  def add(y_BTD, expert):
    share_BT, (gating_2FD, linear_FD, scale) = expert
    gate, up = (x_BTD @ w_FD.T for w_FD in gating_2FD)
    out_BTD = (nn.gelu(gate) * up) @ linear_FD
    share_BT1 = (share_BT * scale.astype(jnp.float32))[..., None]
    return y_BTD + share_BT1 * out_BTD.astype(jnp.float32), None

  zeros = jnp.zeros(x_BTD.shape, jnp.float32)
  each = jnp.moveaxis(shares_BTE, -1, 0), tuple(weights)
  return jax.lax.scan(add, zeros, each)[0]
