"""The sums that a sparse step is made of, on one device.

  gather_add(c, i, W)      y[r] = sum_k c[r, k] W[i[r, k]]
  gather_dot(v, i, W)      f[r, k] = W[i[r, k]] . v[r]
  scatter_add(c, i, v, N)  dW[n] = sum over (r, k) with i[r, k] = n of c v[r]

c, i are [R, K], W [N, D], v [R, D]. These functions define the sums, and are
what a CPU runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_UNROLL = 16  # gathered rows summed in one fused loop
_PAIRS = 8  # sorted (row, latent) pairs, unrolled
# Stands for z where a row has fewer than K candidates: below any threshold,
# and finite, so that its zero gradients stay zero.
ABSENT = -1e30


def gather_add(
  c_RK: jax.Array, i_RK: jax.Array, W_ND: jax.Array, dtype: str = 'float32'
) -> jax.Array:
  """sum_k c[r, k] W[i[r, k]], [R, D]; factors in `dtype`, sums in float32."""
  rows, count = i_RK.shape
  width = min(_UNROLL, count)
  blocks = -(-count // width)
  pad = ((0, 0), (0, blocks * width - count))
  c_RK = jnp.pad(_round(c_RK, dtype), pad)
  i_RK = jnp.pad(i_RK, pad)

  def block(at, sum_RD):
    c_Rk, i_Rk = (
      jax.lax.dynamic_slice_in_dim(a, at * width, width, 1)
      for a in (c_RK, i_RK)
    )
    for k in range(width):  # one fused pass, which keeps its sum in registers
      row_RD = W_ND.at[i_Rk[:, k]].get(mode='promise_in_bounds')
      sum_RD += c_Rk[:, k, None] * _round(row_RD, dtype)
    return sum_RD

  zero_RD = jnp.zeros((rows, W_ND.shape[1]), jnp.float32)
  if blocks == 1:
    return block(0, zero_RD)
  return jax.lax.fori_loop(0, blocks, block, zero_RD)


def gather_dot(
  v_RD: jax.Array, i_RK: jax.Array, W_ND: jax.Array, dtype: str = 'float32'
) -> jax.Array:
  """W[i[r, k]] . v[r], [R, K]; the same."""

  def row(args):
    v_D, i_K = args
    W_KD = W_ND.at[i_K].get(mode='promise_in_bounds')
    return _round(W_KD, dtype) @ v_D

  return jax.lax.map(row, (_round(v_RD, dtype), i_RK))


def scatter_add(
  c_RK: jax.Array,
  i_RK: jax.Array,
  v_RD: jax.Array,
  count: int,
  dtype: str = 'float32',
) -> jax.Array:
  """sum over (r, k) with i[r, k] = n of c[r, k] v[r], [N, D]; the same.

  Pairs are sorted by n: rows are written in order, and always in the same one.
  Those with c = 0 come last, and are left out.
  """
  n_P, c_P, r_P, used = sorted_pairs(c_RK, i_RK, count)
  v_RD = _round(v_RD, dtype)
  pad = -i_RK.size % _PAIRS
  columns = n_P, _round(c_P, dtype), r_P
  columns = [jnp.pad(a, (0, pad), mode='edge') for a in columns]

  def add(at, sum_ND):
    n_p, c_p, r_p = (
      jax.lax.dynamic_slice_in_dim(a, at * _PAIRS, _PAIRS) for a in columns
    )
    c_p = jnp.where(at * _PAIRS + jnp.arange(_PAIRS) < used, c_p, 0)
    n_p = jnp.minimum(n_p, count - 1)
    for p in range(_PAIRS):  # a slice is updated in place, unlike a scatter's
      v_1D = jax.lax.dynamic_slice_in_dim(v_RD, r_p[p], 1)
      old_1D = jax.lax.dynamic_slice_in_dim(sum_ND, n_p[p], 1)
      sum_ND = jax.lax.dynamic_update_slice_in_dim(
        sum_ND, old_1D + c_p[p] * v_1D, n_p[p], 0
      )
    return sum_ND

  zero_ND = jnp.zeros((count, v_RD.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, -(-used // _PAIRS), add, zero_ND)


# What the kernels share: candidates fill a row's first slots, the rest have
# c = 0 and the same i, and need not be read.


def last(there_RK: jax.Array) -> jax.Array:
  """Number of slots up to and including the last true one, [R]."""
  slot_K = 1 + jnp.arange(there_RK.shape[1], dtype=jnp.int32)
  return jnp.max(jnp.where(there_RK, slot_K, 0), 1)


def differing(i_RK: jax.Array) -> jax.Array:
  """Number of slots before the run of equal values at the end, [R]."""
  return jnp.minimum(last(i_RK != i_RK[:, -1:]) + 1, i_RK.shape[1])


def repeat_last(a_RK: jax.Array, used_R: jax.Array) -> jax.Array:
  """Copies the value of the last used slot to the slots after it."""
  last_R1 = jnp.take_along_axis(a_RK, used_R[:, None] - 1, 1)
  return jnp.where(jnp.arange(a_RK.shape[1]) < used_R[:, None], a_RK, last_R1)


def sorted_pairs(c_RK: jax.Array, i_RK: jax.Array, count: int):
  """Sorts the pairs (r, k) by i, those with c = 0 last.

  Returns:
    i (`count` where c = 0), c and r of each, [R K], and how many are not 0.
  """
  n_P, order_P = jax.lax.sort(
    (
      jnp.where(c_RK == 0, count, i_RK).reshape(-1),
      jnp.arange(i_RK.size, dtype=jnp.int32),
    ),
    num_keys=1,
  )
  c_P = c_RK.reshape(-1)[order_P]
  return n_P, c_P, order_P // i_RK.shape[1], jnp.sum(c_RK != 0)


def _round(x, dtype):
  """Rounds the inputs of a matmul to `dtype`, as float32."""
  return x.astype(dtype).astype(jnp.float32)
