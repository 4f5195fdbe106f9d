"""The sparse step's sums on a TPU: rows of a weight matrix moved by DMA.

  gather_add(c, i, W)      y[r] = sum_k c[r, k] W[i[r, k]]
  gather_dot(v, i, W)      f[r, k] = W[i[r, k]] . v[r]
  scatter_add(c, i, v, N)  dW[n] = sum over (r, k) with i[r, k] = n of c v[r]
  encode_bits(x, W, b)     32 latents a word: whether x W^T > b

A row of W is d numbers in HBM, and K of them are needed for each row of a
batch: they are fetched into VMEM while the row before is summed. Nothing is
B x F: `encode_bits` leaves one bit of each pre-activation.

The definitions are the plain functions of `plain` with the same names (and
x W^T > b). Tested against them in the interpreter, and compiled by the TPU's
compiler for v5e, v5p and v6e at d = 2304, F = 2^17 and 2^20; never run on one.
Block sizes follow from VMEM: two rows' K x d (2.4 MB at d = 2304, K = 128), or
128 pairs' rows beside 64 latents' sums (1.8 MB), or [256, 4096] pre-activations
(4 MB) beside two blocks of weights (8 MB), of 16 MB that a kernel may have.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_ROWS = 8  # of a batch, a block
_LATENTS = 64  # whose sums are made in one block
_PAIRS = 128  # (row, latent) pairs fetched together
_ENCODE = (256, 4096)  # rows and latents of a block of pre-activations
_EXACT = jax.lax.Precision.HIGHEST


def fits(rows: int, slots: int, latents: int, width: int) -> bool:
  """Whether the shapes are whole tiles; else the plain functions serve."""
  return (
    not (rows % _ROWS or slots % 8 or latents % _LATENTS or width % 128)
    and latents >= slots
  )


def _round(x, dtype):
  return x.astype(dtype).astype(jnp.float32)


def _gather(i_ref, W_ref, buffer, arrived, use):
  """Calls use(r, W's rows [K, D]) for each row; the next are on their way."""
  slots = i_ref.shape[1]

  def start(r, place):
    def one(k, _):
      pltpu.make_async_copy(
        W_ref.at[pl.ds(i_ref[r, k], 1), :],
        buffer.at[place, pl.ds(k, 1), :],
        arrived.at[place],
      ).start()
      return _

    jax.lax.fori_loop(0, slots, one, 0)

  start(0, 0)
  for r in range(_ROWS):
    place = r % 2
    if r + 1 < _ROWS:
      start(r + 1, 1 - place)
    # Waits for as many bytes as all of the row's copies bring.
    pltpu.make_async_copy(
      W_ref.at[pl.ds(0, slots), :], buffer.at[place], arrived.at[place]
    ).wait()
    use(r, buffer[place])


def _call(kernel, i_RK, other, W_ND, out_width, interpret):
  rows, slots = i_RK.shape
  block = lambda width: pl.BlockSpec((_ROWS, width), lambda g: (g, 0))
  return pl.pallas_call(
    kernel,
    grid=(rows // _ROWS,),
    in_specs=[
      pl.BlockSpec((_ROWS, slots), lambda g: (g, 0), memory_space=pltpu.SMEM),
      block(other.shape[1]),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=block(out_width),
    out_shape=jax.ShapeDtypeStruct((rows, out_width), jnp.float32),
    scratch_shapes=[
      pltpu.VMEM((2, slots, W_ND.shape[1]), W_ND.dtype),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    interpret=interpret,
  )(i_RK, other, W_ND)


def gather_add(
  c_RK: jax.Array, i_RK: jax.Array, W_ND: jax.Array, dtype='float32',
  interpret=False,
) -> jax.Array:  # fmt: skip
  """`plain.gather_add`, [R, D]; shapes as `fits` says."""

  def kernel(i_ref, c_ref, W_ref, y_ref, buffer, arrived):
    def use(r, W_KD):
      c_1K = _round(c_ref[r : r + 1, :], dtype)
      y_ref[r : r + 1, :] = jnp.dot(
        c_1K, _round(W_KD, dtype), precision=_EXACT,
        preferred_element_type=jnp.float32,
      )  # fmt: skip

    _gather(i_ref, W_ref, buffer, arrived, use)

  return _call(kernel, i_RK, c_RK, W_ND, W_ND.shape[1], interpret)


def gather_dot(
  v_RD: jax.Array, i_RK: jax.Array, W_ND: jax.Array, dtype='float32',
  interpret=False,
) -> jax.Array:  # fmt: skip
  """`plain.gather_dot`, [R, K]; shapes as `fits` says."""

  def kernel(i_ref, v_ref, W_ref, f_ref, buffer, arrived):
    def use(r, W_KD):
      v_1D = _round(v_ref[r : r + 1, :], dtype)
      f_ref[r : r + 1, :] = jax.lax.dot_general(
        v_1D, _round(W_KD, dtype), (((1,), (1,)), ((), ())), precision=_EXACT,
        preferred_element_type=jnp.float32,
      )  # fmt: skip

    _gather(i_ref, W_ref, buffer, arrived, use)

  return _call(kernel, i_RK, v_RD, W_ND, i_RK.shape[1], interpret)


def scatter_add(
  c_RK: jax.Array, i_RK: jax.Array, v_RD: jax.Array, count: int,
  dtype='float32', interpret=False,
) -> jax.Array:  # fmt: skip
  """`plain.scatter_add`, [N, D]; always in the same order.

  Pairs are sorted by latent; those with c = 0 come last and belong to none. A
  block is _LATENTS latents; it reads the groups of _PAIRS in which its own lie.
  """
  pairs = i_RK.size
  n_P, order_P = jax.lax.sort(
    (
      jnp.where(c_RK == 0, count, i_RK).reshape(-1),
      jnp.arange(pairs, dtype=jnp.int32),
    ),
    num_keys=1,
  )
  c_P = _round(c_RK, dtype).reshape(-1)[order_P]
  r_P = order_P // i_RK.shape[1]
  blocks = count // _LATENTS
  first_G = jnp.searchsorted(
    n_P, jnp.arange(blocks + 1, dtype=n_P.dtype) * _LATENTS
  ).astype(jnp.int32)
  pad = -pairs % _PAIRS
  groups = [
    jnp.pad(a, (0, pad)).reshape(-1, 1, _PAIRS) for a in (n_P, r_P, c_P)
  ]

  def kernel(first_ref, n_hbm, r_hbm, c_hbm, v_hbm, out_ref, *scratch):
    n_ref, r_ref, c_ref, rows, of_pairs, of_rows = scratch
    block = pl.program_id(0)
    low, high = first_ref[block], first_ref[block + 1]
    out_ref[:] = jnp.zeros_like(out_ref)

    def row_copy(p):
      return pltpu.make_async_copy(
        v_hbm.at[pl.ds(r_ref[0, 0, p], 1), :], rows.at[pl.ds(p, 1), :], of_rows
      )

    def group(g, _):
      copies = [
        pltpu.make_async_copy(a.at[pl.ds(g, 1)], b, of_pairs.at[s])
        for s, (a, b) in enumerate(
          [(n_hbm, n_ref), (r_hbm, r_ref), (c_hbm, c_ref)]
        )
      ]
      for copy in copies:
        copy.start()
      for copy in copies:
        copy.wait()
      start = jnp.maximum(low - g * _PAIRS, 0)
      stop = jnp.minimum(high - g * _PAIRS, _PAIRS)

      def fetch(p, _):
        row_copy(p).start()
        return _

      def arrive(p, _):
        row_copy(p).wait()
        return _

      def add(p, _):
        at = n_ref[0, 0, p] - block * _LATENTS
        row_1D = _round(rows[pl.ds(p, 1), :], dtype)
        out_ref[pl.ds(at, 1), :] += c_ref[0, 0, p] * row_1D
        return _

      for step in (fetch, arrive, add):
        jax.lax.fori_loop(start, stop, step, 0)
      return _

    jax.lax.fori_loop(low // _PAIRS, pl.cdiv(high, _PAIRS), group, 0)

  smem = lambda dtype: pltpu.SMEM((1, 1, _PAIRS), dtype)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(blocks,),
      in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
      out_specs=pl.BlockSpec((_LATENTS, v_RD.shape[1]), lambda g, _: (g, 0)),
      scratch_shapes=[
        smem(jnp.int32),
        smem(jnp.int32),
        smem(jnp.float32),
        pltpu.VMEM((_PAIRS, v_RD.shape[1]), v_RD.dtype),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA,
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((count, v_RD.shape[1]), jnp.float32),
    interpret=interpret,
  )(first_G, *groups, v_RD)


def encode_bits(
  x_BD: jax.Array, W_FD: jax.Array, bound_F: jax.Array, dtype='float32',
  interpret=False,
) -> jax.Array:  # fmt: skip
  """Whether x W^T > bound, a bit a latent: uint32 [B, F // 32].

  Bit j of word w is latent 32 w + j. B, F and D are whole blocks of 256, 4096
  and 128. Bits are packed by a product with powers of two, 16 bits at a time,
  which is exact in float32.
  """
  (rows, width), latents = x_BD.shape, len(W_FD)
  block_rows, block_latents = _ENCODE
  depth = next(n for n in (256, 128) if width % n == 0)
  if rows % block_rows or latents % block_latents:
    raise ValueError(
      f'encode_bits takes rows by {block_rows} and latents by {block_latents}; '
      f'found {rows} and {latents}.'
    )
  words = block_latents // 32
  j_F = jnp.arange(block_latents)
  power = lambda low: jnp.where(
    (j_F[:, None] // 32 == jnp.arange(words))
    & (j_F[:, None] % 32 // 16 == (0 if low else 1)),
    2.0 ** (j_F[:, None] % 16),
    0,
  ).astype(jnp.bfloat16)

  def kernel(x_ref, W_ref, bound_ref, low_ref, high_ref, out_ref, z_ref):
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _():
      z_ref[:] = jnp.zeros_like(z_ref)

    z_ref[:] += jax.lax.dot_general(
      x_ref[:].astype(dtype), W_ref[:].astype(dtype), (((1,), (1,)), ((), ())),
      precision=_EXACT if dtype == 'float32' else None,
      preferred_element_type=jnp.float32,
    )  # fmt: skip

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
      bits = jnp.where(z_ref[:] > bound_ref[:], 1.0, 0.0).astype(jnp.bfloat16)
      low, high = (
        jnp.dot(bits, p[:], preferred_element_type=jnp.float32).astype(
          jnp.int32
        )
        for p in (low_ref, high_ref)
      )
      out_ref[:] = low | (high << 16)

  whole = lambda shape: pl.BlockSpec(shape, lambda b, f, d: (0, 0))
  packed = pl.pallas_call(
    kernel,
    grid=(rows // block_rows, latents // block_latents, width // depth),
    in_specs=[
      pl.BlockSpec((block_rows, depth), lambda b, f, d: (b, d)),
      pl.BlockSpec((block_latents, depth), lambda b, f, d: (f, d)),
      pl.BlockSpec((1, block_latents), lambda b, f, d: (0, f)),
      whole((block_latents, words)),
      whole((block_latents, words)),
    ],
    out_specs=pl.BlockSpec((block_rows, words), lambda b, f, d: (b, f)),
    out_shape=jax.ShapeDtypeStruct((rows, latents // 32), jnp.int32),
    scratch_shapes=[pltpu.VMEM((block_rows, block_latents), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=48 << 20,
    ),
    interpret=interpret,
  )(x_BD, W_FD, bound_F[None], power(True), power(False))
  return jax.lax.bitcast_convert_type(packed, jnp.uint32)
