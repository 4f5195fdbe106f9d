"""The encoder on a TPU, which keeps only the candidates.

  z = x W^T a block of [rows, latents] at a time, in VMEM
    -> where z + bias > least, a row's first K: their latents and z
    -> how many there are, K or not

Pre-activations [B, F] (17 GB at B = 4,096, F = 2^20) are therefore never
written. Defined by `plain.select` of the mask z + bias > least, and tested
against it.

Blocks go through the latents in order, rows outside; a row's candidates so far
stay in VMEM. In a block the rows of a strip find their next candidate together,
the one of lowest index, as often as the strip's fullest row needs: about twice
at a trained sparsity, K times over all blocks at most.

Compiled for v4, v5e, v5p, v6e and tpu7x at d = 2304, F = 2^17, for v5e and v5p
at F = 2^20; never run on a TPU. By v5e's schedule the product of a block of
d = 2304 is 7,950 instructions, its 16 strips are 123 each, and 112 for each
time they look: 59 % of the product's own rate if that is twice. A block's
weights are 4,300 cycles of HBM; fewer rows than 512 would wait for them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_scope.sae.kernels import plain

_ROWS, _LATENTS = 512, 512  # of a block
_STRIP = 32  # rows that look for candidates together
_VMEM = 13 << 20  # bytes of the 16 MB that a kernel has everywhere


def _blocks(width: int, count: int) -> tuple[int, int]:
  """Rows and latents of a block: as many as VMEM holds."""

  def bytes_of(rows, latents):
    factors = 2 * 2 * (rows + latents) * width  # two blocks each, bfloat16
    return factors + 4 * rows * latents + 2 * 2 * 4 * rows * count

  rows, latents = _ROWS, _LATENTS
  while bytes_of(rows, latents) > _VMEM and rows > _STRIP:
    if latents > 128:
      latents //= 2
    else:
      rows //= 2
  return rows, latents


def _encode_block(latents, *refs):
  """The kernel: candidates of a block of rows among a block of latents."""
  x_ref, W_ref, bias_ref, least_ref, *kept = refs
  i_ref, z_ref, found_ref, all_z = kept
  first = pl.program_id(1) * W_ref.shape[0]

  @pl.when(pl.program_id(1) == 0)
  def _():
    i_ref[:] = jnp.zeros_like(i_ref)
    z_ref[:] = jnp.full_like(z_ref, plain.ABSENT)
    found_ref[:] = jnp.zeros_like(found_ref)

  lane_bf = jax.lax.broadcasted_iota(jnp.int32, all_z.shape, 1)
  z_bf = jax.lax.dot_general(
    x_ref[:],
    W_ref[:],
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  may = (z_bf + bias_ref[:] > least_ref[:]) & (lane_bf < latents - first)
  all_z[:] = jnp.where(may, z_bf, plain.ABSENT)

  def strip(s, carry):
    _keep(pl.ds(pl.multiple_of(s * _STRIP, _STRIP), _STRIP), first, *kept)
    return carry

  jax.lax.fori_loop(0, x_ref.shape[0] // _STRIP, strip, 0)


def _keep(strip, first, i_ref, z_ref, found_ref, all_z):
  """Adds a block's candidates to those that the rows of a strip have.

  Args:
    strip: the index of its rows.
    first: the block's first latent.
    i_ref, z_ref, found_ref: as `encode` returns them.
    all_z: the block's pre-activations; `plain.ABSENT` where no candidate is.
  """
  count, of_latents = i_ref.shape[1], all_z.shape[1]
  lane_sf = jax.lax.broadcasted_iota(jnp.int32, (_STRIP, of_latents), 1)
  slot_sK = jax.lax.broadcasted_iota(jnp.int32, (_STRIP, count), 1)
  may_sf = (all_z[strip] > plain.ABSENT).astype(jnp.int32)
  more_s1 = jnp.sum(may_sf, 1, keepdims=True)
  found_s1 = found_ref[strip]
  turns = jnp.max(jnp.minimum(more_s1, count - found_s1))

  def keep(_, carry):
    last_s1, slot_s1 = carry
    z_sf = all_z[strip]
    left = (z_sf > plain.ABSENT) & (lane_sf > last_s1)
    next_s1 = jnp.min(jnp.where(left, lane_sf, of_latents), 1, keepdims=True)
    value_s1 = jnp.sum(jnp.where(lane_sf == next_s1, z_sf, 0), 1, keepdims=True)
    chosen = (slot_sK == slot_s1) & (next_s1 < of_latents)
    i_ref[strip] = jnp.where(chosen, first + next_s1, i_ref[strip])
    z_ref[strip] = jnp.where(chosen, value_s1, z_ref[strip])
    return next_s1, slot_s1 + 1

  before = jnp.full((_STRIP, 1), -1, jnp.int32)
  jax.lax.fori_loop(0, turns, keep, (before, found_s1))
  found_ref[strip] = found_s1 + more_s1


def encode(
  x_BD: jax.Array,
  W_FD: jax.Array,
  bias_F: jax.Array,
  least_F: jax.Array,
  count: int,
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The first `count` latents of each row with x W^T + bias > least.

  Args:
    x_BD, W_FD: factors, rounded to bfloat16, as XLA rounds those of a matmul
      at its default precision; summed in float32.
    bias_F, least_F: see above.
    count: K.

  Returns:
    i int32 [B, K], x W^T there, and how many there are, [B]; 0 and
    `plain.ABSENT` in empty slots.
  """
  (rows, width), latents = x_BD.shape, len(W_FD)
  of_rows, of_latents = _blocks(width, count)
  row = lambda width: pl.BlockSpec((of_rows, width), lambda b, f: (b, 0))
  own = pl.BlockSpec((1, of_latents), lambda b, f: (0, f))
  i_BK, z_BK, found_B1 = pl.pallas_call(
    functools.partial(_encode_block, latents),
    grid=(pl.cdiv(rows, of_rows), pl.cdiv(latents, of_latents)),
    in_specs=[
      row(width),
      pl.BlockSpec((of_latents, width), lambda b, f: (f, 0)),
      own,
      own,
    ],
    out_specs=[row(count), row(count), row(1)],
    out_shape=[
      jax.ShapeDtypeStruct((rows, count), jnp.int32),
      jax.ShapeDtypeStruct((rows, count), jnp.float32),
      jax.ShapeDtypeStruct((rows, 1), jnp.int32),
    ],
    scratch_shapes=[pltpu.VMEM((of_rows, of_latents), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
  )(
    x_BD.astype(jnp.bfloat16),
    W_FD.astype(jnp.bfloat16),
    bias_F[None],
    least_F[None],
  )
  return i_BK, z_BK, found_B1[:, 0]
