"""Sums over the few latents per row that have a gradient.

Only latents that fire, and those in the window of a gradient estimator, have a
gradient (arXiv 2407.14435). A step with these latents alone, K per row, is
exact. Its decoder and gradients read K rows of D numbers, where a dense step
multiplies
by all F. Only the encoder's forward pass stays dense:

  z_BF = x W_enc^T            dense, 2 D F FLOPs a row of the dense step's 10
  i_BK = select(mask(z))      the candidates, or a count that says they are > K
  y    = sum_k f_k W_dec[i_k]                          `gather_add`
  df_k = W_dec[i_k] . dy                               `gather_dot`
  dW_dec[i] = sum f_k dy,  dW_enc[i] = sum dz_k x      `scatter_add`

If latents are sharded, each shard selects K of its own latents. Only sums of
[B, D] and [B, K] cross shards, never pre-activations.

The three sums are in `kernels`: plain functions, and Pallas kernels of the same
names for TPUs and GPUs, used if the shapes fit. There a kernel also finds the
candidates if thresholds are known beforehand, without writing z
(`Candidates.of_encoder`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope.sae.kernels import choice, plain

# The same sums with gradients, on a mesh, for L layers. Per-latent values are
# [L, F], those of candidates [B, L, K], rows [B, L, D], and the decoder
# [L, L, F, D], from layer l to layer m >= l.


@dataclasses.dataclass(frozen=True)
class _Shards:
  """Layers, latents per layer, mesh (or None) and dtype of the matmuls."""

  layers: int
  latents: int
  mesh: Mesh | None
  dtype: str
  device: jax.Device  # any one of the devices

  @property
  def local(self) -> int:
    """Number of latents of a layer in one shard."""
    return self.latents // (self.mesh.shape['latent'] if self.mesh else 1)

  def run(self, function, inputs, outputs, *arguments):
    """Runs `function` on each shard; the specs are the constants below."""
    if self.mesh is None:
      return function(*arguments)
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=inputs,
      out_specs=outputs,
      check_vma=False,
    )(*arguments)

  def sum_over(self, axis: str, x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, axis) if self.mesh else x

  def flat(self, i_BLK: jax.Array) -> jax.Array:
    """Indices into the shard's latents of all layers."""
    first_L = self.local * jnp.arange(self.layers, dtype=i_BLK.dtype)
    return i_BLK + first_L[:, None]


_CANDIDATES = PartitionSpec('data', None, 'latent')
_OWN = PartitionSpec(None, 'latent')
_ROWS = PartitionSpec('data')
_ENCODER = PartitionSpec(None, 'latent')
_DECODER = PartitionSpec(None, None, 'latent')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at(shards, v_LF, i_BLK):
  """Per-latent values, looked up at the candidates."""

  def local(v_LF, i_BLK):
    return v_LF.reshape(-1)[shards.flat(i_BLK)]

  return shards.run(local, (_OWN, _CANDIDATES), _CANDIDATES, v_LF, i_BLK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(shards, a_BLK, i_BLK):
  """Sums the candidates' values over rows: the transpose of `_at`."""

  def local(a_BLK, i_BLK):
    zero = jnp.zeros(shards.layers * shards.local)
    total = zero.at[shards.flat(i_BLK)].add(a_BLK)
    return shards.sum_over('data', total.reshape(shards.layers, -1))

  return shards.run(local, (_CANDIDATES,) * 2, _OWN, a_BLK, i_BLK)


_at.defvjp(
  lambda shards, v_LF, i_BLK: (_at(shards, v_LF, i_BLK), i_BLK),
  lambda shards, i_BLK, g_BLK: (_total(shards, g_BLK, i_BLK), None),
)
_total.defvjp(
  lambda shards, a_BLK, i_BLK: (_total(shards, a_BLK, i_BLK), i_BLK),
  lambda shards, i_BLK, g_LF: (_at(shards, g_LF, i_BLK), None),
)


def _to(m: int, a_BLK: jax.Array) -> jax.Array:
  """Candidates of all layers that write to layer m, in one axis."""
  return a_BLK[:, : m + 1].reshape(a_BLK.shape[0], -1)


def _decoder_to(m: int, W_LLFD: jax.Array) -> jax.Array:
  return W_LLFD[: m + 1, m].reshape(-1, W_LLFD.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _write(shards, f_BLK, i_BLK, W_LLFD):
  """f W_dec over the candidates, [B, L, D]."""
  add = choice.on(shards.device, plain.gather_add)

  def local(f_BLK, i_BLK, W_LLFD):
    at_BLK = shards.flat(i_BLK)
    y_LBD = [
      add(_to(m, f_BLK), _to(m, at_BLK), _decoder_to(m, W_LLFD), shards.dtype)
      for m in range(shards.layers)
    ]
    return shards.sum_over('latent', jnp.stack(y_LBD, 1))

  inputs = (_CANDIDATES, _CANDIDATES, _DECODER)
  return shards.run(local, inputs, _ROWS, f_BLK, i_BLK, W_LLFD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(shards, y_BLD, i_BLK, W_LLFD):
  """y W_dec^T at the candidates: the transpose of `_write` in f."""
  dot = choice.on(shards.device, plain.gather_dot)

  def local(y_BLD, i_BLK, W_LLFD):
    at_BLK = shards.flat(i_BLK)
    f_BLK = jnp.zeros(i_BLK.shape)
    for m in range(shards.layers):
      y_BD, at_BK = y_BLD[:, m], _to(m, at_BLK)
      f_BK = dot(y_BD, at_BK, _decoder_to(m, W_LLFD), shards.dtype)
      f_BLK = f_BLK.at[:, : m + 1].add(f_BK.reshape(len(y_BD), m + 1, -1))
    return f_BLK

  inputs = (_ROWS, _CANDIDATES, _DECODER)
  return shards.run(local, inputs, _CANDIDATES, y_BLD, i_BLK, W_LLFD)


def _decoder_gradient(shards, f_BLK, i_BLK, y_BLD):
  """Sum over rows of f^T y at the candidates, in the shape of W_dec."""
  add = choice.on(shards.device, plain.scatter_add)

  def local(f_BLK, i_BLK, y_BLD):
    at_BLK, dW_MLFD = shards.flat(i_BLK), []
    for m in range(shards.layers):
      f_BK, at_BK = _to(m, f_BLK), _to(m, at_BLK)
      count = (m + 1) * shards.local
      dW_FD = add(f_BK, at_BK, y_BLD[:, m], count, shards.dtype)
      dW_LFD = dW_FD.reshape(m + 1, shards.local, -1)
      later_layers = shards.layers - m - 1
      dW_MLFD.append(jnp.pad(dW_LFD, ((0, later_layers), (0, 0), (0, 0))))
    return shards.sum_over('data', jnp.stack(dW_MLFD, 1))

  inputs = (_CANDIDATES, _CANDIDATES, _ROWS)
  return shards.run(local, inputs, _DECODER, f_BLK, i_BLK, y_BLD)


def _write_backward(shards, saved, g_BLD):
  f_BLK, i_BLK, W_LLFD = saved
  df_BLK = _read(shards, g_BLD, i_BLK, W_LLFD)
  return df_BLK, None, _decoder_gradient(shards, f_BLK, i_BLK, g_BLD)


def _read_backward(shards, saved, g_BLK):
  y_BLD, i_BLK, W_LLFD = saved
  dy_BLD = _write(shards, g_BLK, i_BLK, W_LLFD)
  return dy_BLD, None, _decoder_gradient(shards, g_BLK, i_BLK, y_BLD)


_write.defvjp(
  lambda shards, *arguments: (_write(shards, *arguments), arguments),
  _write_backward,
)
_read.defvjp(
  lambda shards, *arguments: (_read(shards, *arguments), arguments),
  _read_backward,
)


def encoder(mesh: Mesh | None, width: int, dtype: str):
  """The fused encoder kernel of the devices, or None if they have none.

  Args:
    mesh: the devices; None for one.
    width: the width of the encoder's input.
    dtype: the dtype of the factors of matmuls.
  """
  return choice.encoder(_device(mesh), width, dtype)


def _device(mesh):
  return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


class Bound(NamedTuple):
  """A latent may have a gradient where x W_enc^T + bias > least.

  Attributes:
    W_enc: [F, D] or [L, F, D].
    bias, least: per-latent values.
  """

  W_enc: jax.Array
  bias: jax.Array
  least: jax.Array


class _Search(NamedTuple):
  """How a shard finds its candidates.

  Attributes:
    find: a function of a shard's part of `inputs` and K that gives candidates
      [B, L, K], how many there are [B, L], and values of candidates.
    inputs, specs: arrays, and how they lie on the mesh.
    values: how many values `find` gives.
  """

  find: Callable
  inputs: Sequence[jax.Array]
  specs: Sequence[PartitionSpec]
  values: int = 0


class Candidates:
  """The latents of a batch that can have a gradient, at most K per row.

  Per-latent values are [F] or [L, F], values of a batch [B, F] or [B, L, F],
  and those of candidates [B, K] or [B, L, K]: K per layer and shard of latents.

  Args:
    shape: of latents, [F] or [L, F].
    count: K.
    mesh: the devices, None for one; rows lie on 'data', latents on 'latent'.
    dtype: of the matmuls' factors.
    search: finds the candidates in each shard.
  """

  def __init__(
    self,
    shape: Sequence[int],
    count: int,
    mesh: Mesh | None,
    dtype: str,
    search: _Search,
  ):
    device = _device(mesh)
    if mesh is not None and mesh.size == 1:
      mesh = None
    self.shape = shape
    self._shards = _Shards(
      math.prod(shape[:-1]), shape[-1], mesh, dtype, device
    )
    self.count = min(count, self._shards.local)

    def local(*inputs):
      i_BLK, found_BL, *values = search.find(*inputs, self.count)
      return i_BLK, found_BL[..., None], *values

    self._i, count_BLS, *self._more = self._shards.run(
      local,
      search.specs,
      (_CANDIDATES,) * (2 + search.values),
      *search.inputs,
    )
    # Over rows, layers and shards; above K, some candidates are missing.
    self.most = jnp.max(count_BLS)
    slots = jnp.arange(self._i.shape[-1]) % self.count
    self._there = slots < jnp.repeat(count_BLS, self.count, -1)

  @classmethod
  def of_mask(
    cls, mask: jax.Array, count: int, mesh: Mesh | None, dtype: str
  ) -> Candidates:
    """Candidates from a mask, bool [B, F] or [B, L, F]."""

    def find(mask_BLF, count):
      latents = mask_BLF.shape[-1]
      i, counts = plain.select(mask_BLF.reshape(-1, latents), count)
      lead = mask_BLF.shape[:-1]
      return i.reshape(*lead, -1), counts.reshape(lead)

    shape = mask.shape[1:]
    mask_BLF = mask.reshape(len(mask), math.prod(shape[:-1]), -1)
    search = _Search(find, (mask_BLF,), (_CANDIDATES,))
    return cls(shape, count, mesh, dtype, search)

  @classmethod
  def of_encoder(
    cls,
    kernel: Callable,
    x: jax.Array,
    bound: Bound,
    count: int,
    mesh: Mesh | None,
    dtype: str,
  ) -> tuple[Candidates, jax.Array]:
    """Candidates above a bound, and their x W_enc^T.

    Args:
      kernel: `encoder`'s.
      x: rows [B, D] or [B, L, D].
      bound: what a candidate exceeds.
      count, mesh, dtype: see above.
    """

    def find(x_BLD, W_LFD, bias_LF, least_LF, count):
      by_layer = [
        kernel(x_BLD[:, l], W_LFD[l], bias_LF[l], least_LF[l], count)
        for l in range(len(W_LFD))
      ]
      i_BLK, z_BLK, found_BL = (
        jnp.stack(by_layer_array, 1)
        for by_layer_array in zip(*by_layer, strict=True)
      )
      return i_BLK, found_BL, z_BLK

    shape = bound.W_enc.shape[:-1]
    layered = lambda values: values if len(shape) == 2 else values[None]
    per_latent = (bound.bias, bound.least)
    bound_arrays = (
      layered(jnp.broadcast_to(values, shape)) for values in per_latent
    )
    x_BLD = x if len(shape) == 2 else x[:, None]
    inputs = (x_BLD, layered(bound.W_enc), *bound_arrays)
    search = _Search(find, inputs, (_ROWS, _ENCODER, _OWN, _OWN), values=1)
    candidates = cls(shape, count, mesh, dtype, search)
    (z_BLK,) = candidates._more
    return candidates, candidates._out(z_BLK)

  def _in(self, a: jax.Array) -> jax.Array:
    """Adds the axis L where there is none."""
    return a if len(self.shape) == 2 else a[:, None]

  def _out(self, a: jax.Array) -> jax.Array:
    return a if len(self.shape) == 2 else a[:, 0]

  def values(self, z: jax.Array) -> jax.Array:
    """z [B, F] at the candidates; `plain.ABSENT` in empty slots."""

    def local(z_BLF, i_BLK):
      return jnp.take_along_axis(z_BLF, i_BLK, -1)

    z_BLK = self._shards.run(
      local, (_CANDIDATES,) * 2, _CANDIDATES, self._in(z), self._i
    )
    return self._out(jnp.where(self._there, z_BLK, plain.ABSENT))

  def at(self, v: jax.Array) -> jax.Array:
    """Per-latent values, looked up at the candidates."""
    v_LF = v.reshape(self._shards.layers, -1)
    return self._out(_at(self._shards, v_LF, self._i))

  def total(self, a: jax.Array) -> jax.Array:
    """Sums the candidates' values over rows, for each latent."""
    return _total(self._shards, self._in(a), self._i).reshape(self.shape)

  def together(self, a: jax.Array) -> jax.Array:
    """Gathers each row on one device, where it can be ranked."""
    if self._shards.mesh is None:
      return a
    return jax.lax.with_sharding_constraint(
      a, NamedSharding(self._shards.mesh, _ROWS)
    )

  def write(self, f: jax.Array, W_dec: jax.Array) -> jax.Array:
    """f W_dec, rows [B, D] or [B, L, D]."""
    W_LLFD = W_dec if len(self.shape) == 2 else W_dec[None, None]
    return self._out(_write(self._shards, self._in(f), self._i, W_LLFD))

  def read(self, y: jax.Array, W_dec: jax.Array) -> jax.Array:
    """y W_dec^T at the candidates, of rows [B, D] or [B, L, D]."""
    W_LLFD = W_dec if len(self.shape) == 2 else W_dec[None, None]
    return self._out(_read(self._shards, self._in(y), self._i, W_LLFD))

  def encoder_gradient(self, g: jax.Array, x: jax.Array) -> jax.Array:
    """Gradient of W_enc [F, D] or [L, F, D], given that of x W_enc^T."""

    shards = self._shards
    add = choice.on(shards.device, plain.scatter_add)

    def local(*arrays):
      dW_LFD = [
        add(*(array[:, l] for array in arrays), shards.local, shards.dtype)
        for l in range(shards.layers)
      ]
      return shards.sum_over('data', jnp.stack(dW_LFD))

    arguments = self._in(g), self._i, self._in(x)
    inputs = (_CANDIDATES, _CANDIDATES, _ROWS)
    dW_LFD = shards.run(local, inputs, _ENCODER, *arguments)
    return dW_LFD.reshape(*self.shape, -1)
