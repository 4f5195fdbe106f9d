"""The sums of a sparse step on a GPU, in Triton: a program for each row or
latent.

`gather_add`, `gather_dot` and `scatter_add` are defined by the functions of the
same names in `plain`. A program keeps its sum in registers and reads rows of
the weights in blocks of a power of two. No program adds to memory that another
one writes, so that every sum has the same order each time.

They are tested against the definitions in the interpreter and compiled for
Hopper by Triton 3.9 (26 to 32 registers per thread), but have never run on a
GPU: the block sizes divide the usual widths and are not tuned. If a latent
fires on all rows, one program of `scatter_add` is long. JAX calls this route to
Triton deprecated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gemma_scope.sae.kernels import plain

_MOST = 1024  # columns of a block


def fits(kind: str, width: int) -> bool:
  """Whether the width can be cut into blocks of at least 128."""
  del kind
  return width % 128 == 0


def _block(width: int) -> int:
  return min(width & -width, _MOST)  # the power of two that divides it


def _call(kernel, grid, shape, interpret, *arguments):
  return pl.pallas_call(
    kernel,
    grid=grid,
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
  )(*arguments)


@functools.partial(jax.jit, static_argnums=(3, 4))
def gather_add(
  c_RK: jax.Array,
  i_RK: jax.Array,
  W_ND: jax.Array,
  dtype='float32',
  interpret=False,
) -> jax.Array:
  """`plain.gather_add`, [R, D]."""
  rows, width = len(i_RK), W_ND.shape[1]
  block = _block(width)

  def kernel(used_ref, c_ref, i_ref, W_ref, y_ref):
    r, columns = pl.program_id(0), pl.ds(pl.program_id(1) * block, block)

    def add(k, sum_d):
      row_d = W_ref[i_ref[r, k], columns]
      c = plain.rounded(c_ref[r, k], dtype)
      return sum_d + c * plain.rounded(row_d, dtype)

    zero_d = jnp.zeros(block, jnp.float32)
    y_ref[r, columns] = jax.lax.fori_loop(0, used_ref[r], add, zero_d)

  shape = rows, width
  return _call(
    kernel,
    (rows, width // block),
    shape,
    interpret,
    plain.last(c_RK != 0),
    c_RK,
    i_RK,
    W_ND,
  )


@functools.partial(jax.jit, static_argnums=(3, 4))
def gather_dot(
  v_RD: jax.Array,
  i_RK: jax.Array,
  W_ND: jax.Array,
  dtype='float32',
  interpret=False,
) -> jax.Array:
  """`plain.gather_dot`, [R, K]."""
  (rows, slots), width = i_RK.shape, W_ND.shape[1]
  block = _block(width)

  used_R = plain.differing(i_RK)

  def kernel(used_ref, v_ref, i_ref, W_ref, f_ref):
    r, k = pl.program_id(0), pl.program_id(1)
    n = i_ref[r, k]
    blocks = (k < used_ref[r]).astype(jnp.int32) * (width // block)

    def add(number, sum_d):
      columns = pl.ds(number * block, block)
      v_d, row_d = v_ref[r, columns], W_ref[n, columns]
      return sum_d + plain.rounded(v_d, dtype) * plain.rounded(row_d, dtype)

    zero_d = jnp.zeros(block, jnp.float32)
    f_ref[r, k] = jnp.sum(jax.lax.fori_loop(0, blocks, add, zero_d))

  found_RK = _call(
    kernel, (rows, slots), (rows, slots), interpret, used_R, v_RD, i_RK, W_ND
  )
  return plain.repeat_last(found_RK, used_R)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def scatter_add(
  c_RK: jax.Array,
  i_RK: jax.Array,
  v_RD: jax.Array,
  count: int,
  dtype='float32',
  interpret=False,
) -> jax.Array:
  """`plain.scatter_add`, [N, D]: pairs sorted by latent, a program a latent."""
  width = v_RD.shape[1]
  block = _block(width)
  n_P, c_P, r_P, _ = plain.sorted_pairs(c_RK, i_RK, count)
  c_P = plain.rounded(c_P, dtype)
  first_N = jnp.searchsorted(n_P, jnp.arange(count + 1, dtype=n_P.dtype))
  first_N = first_N.astype(jnp.int32)

  def kernel(first_ref, r_ref, c_ref, v_ref, out_ref):
    n, columns = pl.program_id(0), pl.ds(pl.program_id(1) * block, block)

    def add(p, sum_d):
      row_d = v_ref[r_ref[p], columns]
      return sum_d + c_ref[p] * plain.rounded(row_d, dtype)

    zero_d = jnp.zeros(block, jnp.float32)
    out_ref[n, columns] = jax.lax.fori_loop(
      first_ref[n], first_ref[n + 1], add, zero_d
    )

  shape = count, width
  return _call(
    kernel, (count, width // block), shape, interpret, first_N, r_P, c_P, v_RD
  )
