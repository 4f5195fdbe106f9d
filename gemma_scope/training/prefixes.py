"""What each prefix of a Matryoshka SAE adds to the one before it.

On one device, a prefix is a slice of the latents. If several devices share the
latents, such a slice would end inside a shard and move latents between devices.
Every shard then writes its own latents in equal blocks, each of which belongs
to one prefix, and a prefix is a sum of blocks: only [B, D] per prefix crosses
shards. If that takes too many blocks, each prefix is a mask over all latents,
which costs one matmul.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from gemma_scope import sae
from gemma_scope.sae import sparse


def added(
  bound: sae.Autoencoder,
  ends: Sequence[int],
  shards: int,
  f_BF: jax.Array,
  candidates: sparse.Candidates | None = None,
) -> Iterator[jax.Array]:
  """Reconstructions [B, D] by the latents from one end to the next.

  Args:
    bound: the module with its parameters.
    ends: of the prefixes, among the latents of each layer.
    shards: number of devices that share the latents of each layer.
    f_BF, candidates: see `Autoencoder.write`.
  """
  ranges, width = list(zip((0, *ends), ends, strict=False)), f_BF.shape[-1]
  if shards == 1 or candidates is not None:
    for bounds in ranges:
      yield bound.write(f_BF, slice(*bounds), candidates)
    return
  size = math.gcd(width // shards, *ends)
  count = width // size
  if count <= 2 * shards * len(ends):
    first_K, y_KBD = size * jnp.arange(count), bound.write_blocks(f_BF, count)
    first_K = first_K.reshape(-1, *(1,) * (y_KBD.ndim - 1))
    for start, stop in ranges:
      inside_K = (first_K >= start) & (first_K < stop)
      yield jnp.sum(jnp.where(inside_K, y_KBD, 0), 0)
    return
  index_F = jnp.arange(width)
  for start, stop in ranges:
    inside_F = (index_F >= start) & (index_F < stop)
    yield bound.write(jnp.where(inside_F, f_BF, 0))
