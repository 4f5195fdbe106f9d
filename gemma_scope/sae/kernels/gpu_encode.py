"""The encoder on a GPU, which keeps only the candidates.

Defined as `tpu_encode`, by `plain.select` of the mask z + bias > least. A
program takes a block of rows and a share of the latents, multiplies one tile of
latents at a time, and appends the tile's candidates to those it has. In each
iteration every row of the block finds its next candidate, until the row with
the most candidates has found all of them.

The candidates of all shares, K per row and share, are then concatenated by
plain code: no program adds to memory that another one writes, and a row's
candidates are always in the order of the latents.

Compiled to Hopper's code by Triton 3.9: its tensor cores' instructions, 218
registers a thread in bfloat16 (232 in float32, by TF32 as XLA's), none spilled,
98 (197) of 227 KB of shared memory; a larger tile would spill. Never run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gemma_scope.sae.kernels import plain

_ROWS, _LATENTS, _DEPTH = 128, 128, 64  # of a tile's product
_PROGRAMS = 1024  # about: some for each multiprocessor


def encode(
  x_BD: jax.Array,
  W_FD: jax.Array,
  bias_F: jax.Array,
  least_F: jax.Array,
  count: int,
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`tpu_encode.encode` with the factors as they are; 128 divides D."""
  (rows, width), latents = x_BD.shape, len(W_FD)
  blocks, tiles = pl.cdiv(rows, _ROWS), pl.cdiv(latents, _LATENTS)
  shares = max(1, min(tiles, _PROGRAMS // blocks))
  tiles_per_share = pl.cdiv(tiles, shares)  # tiles

  def kernel(*refs):
    x_ref, W_ref, bias_ref, least_ref, i_ref, z_ref, found_ref = refs
    share = pl.program_id(1)
    row_b = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    lane_bf = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, _LATENTS), 1)

    def tile(t, found_b):
      first = (share * tiles_per_share + t) * _LATENTS
      latent_f = first + jnp.arange(_LATENTS)

      def multiply(step, z_bf):
        column_d = step * _DEPTH + jnp.arange(_DEPTH)
        x_bd = plgpu.load(
          x_ref.at[row_b[:, None], column_d[None]],
          mask=(row_b < rows)[:, None],
          other=0,
        )
        W_df = plgpu.load(
          W_ref.at[latent_f[None], column_d[:, None]],
          mask=(latent_f < latents)[None],
          other=0,
        )
        return z_bf + jnp.dot(x_bd, W_df, preferred_element_type=jnp.float32)

      zero_bf = jnp.zeros((_ROWS, _LATENTS), jnp.float32)
      z_bf = jax.lax.fori_loop(0, width // _DEPTH, multiply, zero_bf)
      bias_f, least_f = (
        plgpu.load(ref.at[latent_f], mask=latent_f < latents, other=fill)
        for ref, fill in ((bias_ref, 0), (least_ref, jnp.inf))
      )
      may_bf = z_bf + bias_f[None] > least_f[None]
      more_b = jnp.sum(may_bf.astype(jnp.int32), 1)
      turns = jnp.max(jnp.minimum(more_b, count - found_b))

      def keep(turn, last_b):
        left_bf = may_bf & (lane_bf > last_b[:, None])
        next_b = jnp.min(jnp.where(left_bf, lane_bf, _LATENTS), 1)
        z_b = jnp.sum(jnp.where(lane_bf == next_b[:, None], z_bf, 0), 1)
        slot_b = found_b + turn
        writes_b = (next_b < _LATENTS) & (slot_b < count) & (row_b < rows)
        slot_index = share, row_b, slot_b
        plgpu.store(i_ref.at[slot_index], first + next_b, mask=writes_b)
        plgpu.store(z_ref.at[slot_index], z_b, mask=writes_b)
        return next_b

      jax.lax.fori_loop(0, turns, keep, jnp.full(_ROWS, -1, jnp.int32))
      return found_b + more_b

    found_b = jax.lax.fori_loop(
      0, tiles_per_share, tile, jnp.zeros(_ROWS, jnp.int32)
    )
    plgpu.store(found_ref.at[share, row_b], found_b, mask=row_b < rows)

  shape = shares, rows, count
  i_SBK, z_SBK, found_SB = pl.pallas_call(
    kernel,
    grid=(blocks, shares),
    out_shape=[
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct((shares, rows), jnp.int32),
    ],
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
  )(x_BD, W_FD, bias_F, least_F)
  return _together(i_SBK, z_SBK, found_SB)


def _together(i_SBK, z_SBK, found_SB):
  """The shares' candidates, one share's after the other's."""
  slot_K = jnp.arange(i_SBK.shape[2], dtype=jnp.int32)
  end_SB = jnp.cumsum(found_SB, 0)
  passed_SBK = end_SB[..., None] <= slot_K
  share_BK = jnp.minimum(jnp.sum(passed_SBK, 0), len(i_SBK) - 1)
  before_BK = jnp.max(jnp.where(passed_SBK, end_SB[..., None], 0), 0)
  row_B1 = jnp.arange(i_SBK.shape[1])[:, None]
  index = share_BK, row_B1, jnp.minimum(slot_K - before_BK, slot_K[-1])
  there_BK = slot_K < end_SB[-1][:, None]
  return (
    jnp.where(there_BK, i_SBK[index], 0),
    jnp.where(there_BK, z_SBK[index], plain.ABSENT),
    end_SB[-1],
  )
