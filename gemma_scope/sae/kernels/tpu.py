"""The sums of a sparse step on a TPU: rows of a weight matrix moved by DMA.

`gather_add`, `gather_dot` and `scatter_add` are defined by the functions of the
same names in `plain`. A row of W is d numbers in HBM, and each row of a batch
needs K of them:

  gathers  a row's _SLOTS rows of W are fetched, eight requests at a time, while
           those before them are summed; slots after the last that is used (few
           are, where latents are sharded) are neither fetched nor summed
  scatter  pairs (row, latent) sorted by latent; a block of _LATENTS latents is
           the sum of its groups of _PAIRS pairs, each a product of [latents,
           pairs] (c where the pair is the latent's, else 0) with the fetched
           rows [pairs, d]: every latent is written once, always in one order

Gathers sum in float32; the product of a scatter has the precision of XLA's
matmuls. A row that is not finite spoils the block of latents that it is added
to, but a step with such a gradient changes nothing anyway (`Stack.step`).

They are tested against the definitions in the interpreter and compiled for v4,
v5e, v5p, v6e and tpu7x at d = 2304, K = 128, F = 2^17, and for v5e and v5p at F
= 2^20, but have never run on a TPU. The compiler for v3 cannot move single rows
(`fits`).

Sizes follow from VMEM (16 MB that a kernel has everywhere; at d = 2304 the
gathers take 2.7 MB, the scatter 5) and from v5e's schedule, in instructions:
eight slots are 111 to request and 26 (`gather_dot`: 33) to sum, 2,500 a row of
K = 128 with what is done once, where HBM takes 2,160 cycles to bring 128 rows;
a group of pairs is 1,380 to request and 730 to multiply. With one request a
turn of its loop and its address checked, a slot took 26 to request, now 14.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_scope.sae.kernels import plain

_ROWS = 8  # of a batch, in a block
_SLOTS = 128  # fetched together
_REQUESTS = 8  # issued together: rows of a tile
_LATENTS = 128  # whose sums are made together
_PAIRS = 128  # (row, latent) pairs added together
_WIDEST = 8192
# Addresses are within their arrays, as `plain` promises; checks would be a
# third of the instructions of a request.
_UNCHECKED = pltpu.CompilerParams(disable_bounds_checks=True)


def fits(kind: str, width: int) -> bool:
  """Whether the kernels run on a chip of this kind, for rows of this width.

  Args:
    kind: `jax.Device.device_kind`, such as 'TPU v5 lite'.
    width: d; must be whole tiles, some hundreds of which fit in VMEM.
  """
  version = re.search(r'\d+', kind)
  after_v3 = bool(version) and int(version[0]) > 3
  return after_v3 and width % 128 == 0 and width <= _WIDEST


def _fetch(W_ref, row_of, buffer, arrived, first, last):
  """Requests W's rows `row_of(k)` for the tiles of k in [first, last)."""

  def tile(g, carry):
    for j in range(_REQUESTS):
      k = g * _REQUESTS + j
      pltpu.make_async_copy(
        W_ref.at[pl.ds(row_of(k), 1), :], buffer.at[pl.ds(k, 1), :], arrived
      ).start()
    return carry

  jax.lax.fori_loop(first // _REQUESTS, pl.cdiv(last, _REQUESTS), tile, 0)


def _await(buffer, arrived, first, last):
  """Waits until all rows that `_fetch` requested have arrived."""

  def tile(g, carry):
    rows = buffer.at[pl.ds(0, _REQUESTS), :]  # as many bytes as a tile's rows
    pltpu.make_async_copy(rows, rows, arrived).wait()
    return carry

  jax.lax.fori_loop(first // _REQUESTS, pl.cdiv(last, _REQUESTS), tile, 0)


def _tile(g: jax.Array):
  """The index of the g-th _REQUESTS rows."""
  return pl.ds(pl.multiple_of(g * _REQUESTS, _REQUESTS), _REQUESTS)


def _turned(a: jax.Array, axis: int) -> jax.Array:
  """[K, 1] -> [1, K] with axis 0; [1, K] -> [K, 1] with axis 1."""
  square = 2 * (a.size,)
  i_KK, j_KK = (
    jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1)
  )
  return jnp.sum(jnp.where(i_KK == j_KK, a, 0), axis, keepdims=True)


class _Fetched(NamedTuple):
  """_SLOTS slots of a row of the batch, whose rows of W are in VMEM."""

  row: jax.Array  # of the block
  part: jax.Array  # which _SLOTS slots of the row
  count: jax.Array  # how many of them are used
  tile: Callable[[jax.Array], jax.Array]  # g -> their g-th _REQUESTS rows of W


def _gather(slots, operand, W_ND, out_shape, use, interpret):
  """Calls `use` for _SLOTS slots of a row after the other, fetched before.

  Args:
    slots: i_RK, and how many of a row's slots are used [R].
    operand: [R, ...], a second operand.
    out_shape: the result is [R, *out_shape], zero at first.
    use: called with a `_Fetched`, scratch [_SLOTS, 1], the second operand's ref
      and the result's.
  """
  i_RK, used_R = slots
  rows, slots = i_RK.shape
  pad = -rows % _ROWS, -slots % _SLOTS
  i_RK = jnp.pad(i_RK, ((0, pad[0]), (0, pad[1])))
  operand = jnp.pad(operand, ((0, pad[0]), *((0, 0),) * (operand.ndim - 1)))
  used_GR = jnp.pad(used_R, (0, pad[0])).reshape(-1, 1, _ROWS)
  parts = i_RK.shape[1] // _SLOTS

  def kernel(used_ref, i_ref, other_ref, W_ref, out_ref, *scratch):
    buffer, column_ref, arrived = scratch
    out_ref[:] = jnp.zeros_like(out_ref)

    def used(unit):
      r, part = unit // parts, unit % parts
      return jnp.clip(used_ref[0, 0, r] - part * _SLOTS, 0, _SLOTS)

    def start(unit):
      r, first = unit // parts, unit % parts * _SLOTS
      _fetch(
        W_ref,
        lambda k: i_ref[r, first + k],
        buffer.at[unit % 2],
        arrived.at[unit % 2],
        0,
        used(unit),
      )

    def step(unit, carry):
      @pl.when(unit + 1 < _ROWS * parts)
      def _():
        start(unit + 1)

      fetched_rows, count = buffer.at[unit % 2], used(unit)
      _await(fetched_rows, arrived.at[unit % 2], 0, count)
      fetched = _Fetched(
        unit // parts, unit % parts, count, lambda g: fetched_rows[_tile(g)]
      )
      use(fetched, column_ref, other_ref, out_ref)
      return carry

    start(0)
    jax.lax.fori_loop(0, _ROWS * parts, step, 0)

  block = lambda shape: pl.BlockSpec(
    (_ROWS, *shape), lambda g: (g, *(0,) * len(shape))
  )
  smem = functools.partial(pl.BlockSpec, memory_space=pltpu.SMEM)
  result = pl.pallas_call(
    kernel,
    grid=(len(i_RK) // _ROWS,),
    in_specs=[
      smem((1, 1, _ROWS), lambda g: (g, 0, 0)),
      smem((_ROWS, i_RK.shape[1]), lambda g: (g, 0)),
      block(operand.shape[1:]),
      pl.BlockSpec(memory_space=pltpu.HBM),
    ],
    out_specs=block(out_shape),
    out_shape=jax.ShapeDtypeStruct((len(i_RK), *out_shape), jnp.float32),
    scratch_shapes=[
      pltpu.VMEM((2, _SLOTS, W_ND.shape[1]), W_ND.dtype),
      pltpu.VMEM((_SLOTS, 1), jnp.float32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    compiler_params=_UNCHECKED,
    interpret=interpret,
  )(used_GR, i_RK, operand, W_ND)
  return result[:rows]


def gather_add(
  c_RK: jax.Array,
  i_RK: jax.Array,
  W_ND: jax.Array,
  dtype='float32',
  interpret=False,
) -> jax.Array:
  """`plain.gather_add`, [R, D]."""
  c_RK = plain.rounded(c_RK, dtype)

  def use(fetched, column_ref, c_ref, y_ref):
    column_ref[:] = _turned(c_ref[fetched.row, pl.ds(fetched.part, 1), :], 1)

    def add(g, sum_8D):
      row_8D = plain.rounded(fetched.tile(g), dtype)
      return sum_8D + column_ref[_tile(g)] * row_8D

    zero_8D = jnp.zeros((_REQUESTS, y_ref.shape[1]), jnp.float32)
    tiles = pl.cdiv(fetched.count, _REQUESTS)
    sum_8D = jax.lax.fori_loop(0, tiles, add, zero_8D)
    y_ref[pl.ds(fetched.row, 1), :] += jnp.sum(sum_8D, 0, keepdims=True)

  pad = -i_RK.shape[1] % _SLOTS
  c_RPk = jnp.pad(c_RK, ((0, 0), (0, pad))).reshape(len(c_RK), -1, _SLOTS)
  slots = i_RK, plain.last(c_RK != 0)
  return _gather(slots, c_RPk, W_ND, W_ND.shape[1:], use, interpret)


def gather_dot(
  v_RD: jax.Array,
  i_RK: jax.Array,
  W_ND: jax.Array,
  dtype='float32',
  interpret=False,
) -> jax.Array:
  """`plain.gather_dot`, [R, K]; equal slots at a row's end are found once."""
  slots = i_RK.shape[1]
  used_R = plain.differing(i_RK)

  def use(fetched, column_ref, v_ref, f_ref):
    v_1D = v_ref[pl.ds(fetched.row, 1), :]

    def multiply(g, carry):
      product_8D = plain.rounded(fetched.tile(g), dtype) * v_1D
      column_ref[_tile(g)] = jnp.sum(product_8D, 1, keepdims=True)
      return carry

    jax.lax.fori_loop(0, pl.cdiv(fetched.count, _REQUESTS), multiply, 0)
    f_ref[fetched.row, pl.ds(fetched.part, 1), :] = _turned(column_ref[:], 0)

  parts = pl.cdiv(slots, _SLOTS)
  v_RD = plain.rounded(v_RD, dtype)
  slots_used = i_RK, used_R
  found_RPk = _gather(slots_used, v_RD, W_ND, (parts, _SLOTS), use, interpret)
  found_RK = found_RPk.reshape(len(i_RK), -1)[:, :slots]
  return plain.repeat_last(found_RK, used_R)


def _add_pairs(dtype, *refs):
  """The kernel of `scatter_add`: one turn, a group of pairs for a block."""
  block_ref, group_ref, first_ref, last_ref = refs[:4]  # of the turns
  n_ref, c_ref, r_ref, next_ref, v_ref = refs[4:9]  # pairs, and rows of v
  out_ref, buffer, arrived = refs[9:]
  del group_ref  # read by the block specs
  turn = pl.program_id(0)

  def start(turn, of_pairs):
    _fetch(
      v_ref,
      lambda p: of_pairs[0, 0, p],
      buffer.at[turn % 2],
      arrived.at[turn % 2],
      first_ref[turn],
      last_ref[turn],
    )

  @pl.when(turn == 0)
  def _():
    buffer[:] = jnp.zeros_like(buffer)  # is multiplied by 0 before it is used
    start(turn, r_ref)

  @pl.when(turn + 1 < pl.num_programs(0))
  def _():
    start(turn + 1, next_ref)

  block, first, last = block_ref[turn], first_ref[turn], last_ref[turn]
  fetched_rows = buffer.at[turn % 2]

  @pl.when((turn == 0) | (block != block_ref[jnp.maximum(turn - 1, 0)]))
  def _():
    out_ref[:] = jnp.zeros_like(out_ref)

  @pl.when(first < last)
  def _():
    _await(fetched_rows, arrived.at[turn % 2], first, last)
    n_Np, p_Np = (
      jax.lax.broadcasted_iota(jnp.int32, (_LATENTS, _PAIRS), axis)
      for axis in (0, 1)
    )
    own_Np = (n_ref[0] == block * _LATENTS + n_Np) & (p_Np >= first)
    c_Np = jnp.where(own_Np & (p_Np < last), c_ref[0], 0)
    out_ref[:] += jnp.dot(
      c_Np.astype(dtype),
      fetched_rows[:].astype(dtype),
      preferred_element_type=jnp.float32,
    )


def scatter_add(
  c_RK: jax.Array,
  i_RK: jax.Array,
  v_RD: jax.Array,
  count: int,
  dtype='float32',
  interpret=False,
) -> jax.Array:
  """`plain.scatter_add`, [N, D]."""
  n_P, c_P, r_P, used = plain.sorted_pairs(c_RK, i_RK, count)
  pad = -len(n_P) % _PAIRS
  n_Gp, c_Gp, r_Gp = (
    jnp.pad(a, (0, pad)).reshape(-1, 1, _PAIRS) for a in (n_P, c_P, r_P)
  )
  groups, blocks = len(n_Gp), pl.cdiv(count, _LATENTS)
  block_T, group_T, first_T, last_T = _turns(n_P, used, blocks, groups)

  pairs = lambda t, block, group, *_: (group[t], 0, 0)
  after = lambda t, block, group, *_: (
    group[jnp.minimum(t + 1, len(block_T) - 1)],
    0,
    0,
  )
  width = v_RD.shape[1]
  return pl.pallas_call(
    functools.partial(_add_pairs, dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(len(block_T),),
      in_specs=[
        pl.BlockSpec((1, 1, _PAIRS), pairs),
        pl.BlockSpec((1, 1, _PAIRS), pairs),
        pl.BlockSpec((1, 1, _PAIRS), pairs, memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, _PAIRS), after, memory_space=pltpu.SMEM),
        pl.BlockSpec(memory_space=pltpu.HBM),
      ],
      out_specs=pl.BlockSpec(
        (_LATENTS, width), lambda t, block, *_: (block[t], 0)
      ),
      scratch_shapes=[
        pltpu.VMEM((2, _PAIRS, width), v_RD.dtype),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((count, width), jnp.float32),
    compiler_params=_UNCHECKED,
    interpret=interpret,
  )(block_T, group_T, first_T, last_T, n_Gp, c_Gp, r_Gp, r_Gp, v_RD)


def _turns(n_P, used, blocks: int, groups: int):
  """Which block of latents takes which group of pairs, in which turn.

  A block takes the groups that hold its pairs, and at least one group. There
  are blocks + groups turns; those that are not needed do nothing.

  Returns:
    For each turn: block, group, and the first and the end of its pairs within
    the group.
  """
  bound = _LATENTS * jnp.arange(blocks + 1, dtype=n_P.dtype)
  end = jnp.minimum(jnp.searchsorted(n_P, bound), used).astype(jnp.int32)
  begin_N, end_N = end[:-1], end[1:]
  first_N = jnp.minimum(begin_N // _PAIRS, groups - 1)
  count_N = jnp.maximum(pl.cdiv(end_N, _PAIRS) - first_N, 1)
  passed_N = jnp.cumsum(count_N)
  turn_T = jnp.arange(blocks + groups, dtype=jnp.int32)
  block_T = jnp.minimum(
    jnp.searchsorted(passed_N, turn_T, side='right'), blocks - 1
  ).astype(jnp.int32)
  nth_T = turn_T - (passed_N - count_N)[block_T]
  idle_T = nth_T >= count_N[block_T]
  group_T = jnp.minimum(first_N[block_T] + nth_T, groups - 1)
  low_T = jnp.clip(begin_N[block_T] - group_T * _PAIRS, 0, _PAIRS)
  high_T = jnp.clip(end_N[block_T] - group_T * _PAIRS, 0, _PAIRS)
  return block_T, group_T, low_T, jnp.where(idle_T, low_T, high_T)
