"""The sums that a sparse step is made of, on one device, and its candidates.

  select(mask, K)          the first K true entries of each row
  gather_add(c, i, W)      y[r] = sum_k c[r, k] W[i[r, k]]
  gather_dot(v, i, W)      f[r, k] = W[i[r, k]] . v[r]
  scatter_add(c, i, v, N)  dW[n] = sum over (r, k) with i[r, k] = n of c v[r]

c, i are [R, K], W [N, D], v [R, D]. These functions define what the kernels do,
and are what a CPU runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_UNROLL = 16  # gathered rows summed in one fused loop
_PAIRS = 8  # sorted (row, latent) pairs, unrolled
_WORD = 32  # bits that `select` packs together
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
  c_RK = jnp.pad(rounded(c_RK, dtype), pad)
  i_RK = jnp.pad(i_RK, pad)

  def block(number, sum_RD):
    c_Rk, i_Rk = (
      jax.lax.dynamic_slice_in_dim(a, number * width, width, 1)
      for a in (c_RK, i_RK)
    )
    for k in range(width):  # one fused pass, which keeps its sum in registers
      row_RD = W_ND.at[i_Rk[:, k]].get(mode='promise_in_bounds')
      sum_RD += c_Rk[:, k, None] * rounded(row_RD, dtype)
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
    return rounded(W_KD, dtype) @ v_D

  return jax.lax.map(row, (rounded(v_RD, dtype), i_RK))


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
  v_RD = rounded(v_RD, dtype)
  pad = -i_RK.size % _PAIRS
  columns = n_P, rounded(c_P, dtype), r_P
  columns = [jnp.pad(a, (0, pad), mode='edge') for a in columns]

  def add(number, sum_ND):
    n_p, c_p, r_p = (
      jax.lax.dynamic_slice_in_dim(a, number * _PAIRS, _PAIRS) for a in columns
    )
    c_p = jnp.where(number * _PAIRS + jnp.arange(_PAIRS) < used, c_p, 0)
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


def select(mask_BF: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The first `count` true entries of each row, by index.

  32 entries are packed into a word; the s-th one is then found by bisection
  over the words' running counts, and over the bits of its word: no sort, and
  work that does not depend on K but for [B, K] lookups.

  Returns:
    i int32 [B, K], 0 where a row has fewer, and how many it has, [B].
  """
  rows, latents = mask_BF.shape
  mask_BF = jnp.pad(mask_BF, ((0, 0), (0, -latents % _WORD)))
  bits_BWw = mask_BF.reshape(rows, -1, _WORD).astype(jnp.uint32)
  word_BW = jnp.sum(
    bits_BWw << jnp.arange(_WORD, dtype=jnp.uint32), -1, dtype=jnp.uint32
  )
  words = word_BW.shape[1]
  end_BW = jnp.cumsum(jax.lax.population_count(word_BW).astype(jnp.int32), 1)
  slot_K = jnp.arange(count, dtype=jnp.int32)[None]
  before_BK = jnp.zeros((rows, count), jnp.int32)  # words that end before s
  for power in reversed(range(words.bit_length())):
    more_BK = before_BK + (1 << power)
    at_BK = jnp.minimum(more_BK, words) - 1
    end_BK = jnp.take_along_axis(end_BW, at_BK, 1)
    skip = (more_BK <= words) & (end_BK <= slot_K)
    before_BK = jnp.where(skip, more_BK, before_BK)
  word_BK = jnp.minimum(before_BK, words - 1)
  passed_BK = jnp.take_along_axis(end_BW, jnp.maximum(before_BK - 1, 0), 1)
  rank_BK = slot_K - jnp.where(before_BK > 0, passed_BK, 0)
  left_BK = jnp.take_along_axis(word_BW, word_BK, 1)
  bit_BK = jnp.zeros_like(rank_BK)
  for half in (16, 8, 4, 2, 1):
    low_BK = left_BK & jnp.uint32((1 << half) - 1)
    in_low_BK = jax.lax.population_count(low_BK).astype(jnp.int32)
    high = rank_BK >= in_low_BK
    rank_BK = jnp.where(high, rank_BK - in_low_BK, rank_BK)
    left_BK = jnp.where(high, left_BK >> half, low_BK)
    bit_BK += jnp.where(high, half, 0)
  found_B = end_BW[:, -1]
  i_BK = word_BK * _WORD + bit_BK
  return jnp.where(slot_K < found_B[:, None], i_BK, 0), found_B


# Shared with the kernels. Candidates fill a row's first slots, the rest have
# c = 0 and the same i, and need not be read.


def rounded(x: jax.Array, dtype: str) -> jax.Array:
  """A sum's factor in the precision of `dtype`, as float32."""
  return x.astype(dtype).astype(jnp.float32)


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
