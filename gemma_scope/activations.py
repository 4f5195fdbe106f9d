"""Sequences -> rows of activations per site, in shuffled chunks.

  chunk c   the sequences [c n, (c + 1) n) of the shuffled text
  harvest   one forward pass over them reads all sites at once -> [n, T, D]
  rows      BOS, EOS, padding, a chat's user and rows that are not finite are
            left out; the rest is permuted as a whole by (seed, c)
  batches   step s -> chunk s // k, batch s % k of k = n (T - 1) // B

So every batch is a pure function of (config, step): there is no iterator state
to lose, and a resumed run recomputes its chunk. All shapes are fixed: where
rows were left out, the permutation wraps around, and a few rows of the chunk
appear twice (about one in a thousand: the EOS between documents).

A chunk keeps its rows as [k, B, D] per site, batches first, so that taking a
batch moves nothing between devices that hold B. It stays on the devices, or in
host memory when it would not fit.

`ModelSource` runs the language model; `activation_store.StoreSource` reads what
was written from one. Both give the same rows, hence the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import lm, sites
from gemma_scope import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Layout:
  """The arithmetic of chunks, all static.

  Attributes:
    seq_len: tokens a sequence T, BOS included.
    sequences: sequences a chunk n.
    batch: rows a step B.
    lm_batch: sequences a forward pass; divides `sequences`.
    dtype: rows are kept in it, 'float32' or 'bfloat16'.
    share: of the rows count, about; in chats only the model's replies do.
  """

  seq_len: int
  sequences: int
  batch: int
  lm_batch: int
  dtype: str
  share: float = 1.0

  @classmethod
  def of(
    cls, *, chunk_rows, seq_len, batch, lm_batch, dtype, share=1.0
  ) -> Layout:
    """The layout whose chunks hold at least `chunk_rows` rows that count."""
    per_pass = lm_batch * (seq_len - 1) * share
    passes = math.ceil(max(chunk_rows, batch) / per_pass)
    return cls(seq_len, passes * lm_batch, batch, lm_batch, dtype, share)

  @property
  def rows(self) -> int:
    """Rows of a chunk before any is left out (BOS already is)."""
    return self.sequences * (self.seq_len - 1)

  @property
  def batches(self) -> int:
    """Batches, that is steps, a chunk."""
    return int(self.rows * self.share) // self.batch


class Raw(Protocol):
  """Where rows come from, in the order of the text."""

  layout: Layout

  def rows(self, chunk: int) -> tuple[dict[sites.Site, Any], np.ndarray]:
    """Rows [R, D] of each site, and where they count [R]."""


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Shuffled rows of each site as [k, B, D], and how many were left out."""

  rows: dict[sites.Site, jax.Array | np.ndarray]
  special: int  # rows left out: BOS, EOS, padding
  not_finite: int  # rows left out: NaN or infinity at some site

  def batch(self, index: int) -> dict[sites.Site, Any]:
    """Batch `index`, [B, D] per site."""
    return {site: x_KBD[index] for site, x_KBD in self.rows.items()}


class ModelSource:
  """Rows from a forward pass of the language model.

  Args:
    gemma, params: the model.
    at: the sites to read, all in one pass.
    sequences: `sequences(start, count)` -> int32 [count, T], any start.
    layout: the arithmetic.
    mesh: sequences lie on its 'data' axis.
    keep: tokens [N, T] -> bool [N, T], the rows that count: not those of
      BOS, EOS, padding, nor of a chat's user.
  """

  def __init__(
    self,
    gemma: lm.Gemma,
    params: lm.Params,
    at: Sequence[sites.Site],
    sequences: Callable[[int, int], np.ndarray],
    layout: Layout,
    mesh: Mesh,
    keep: Callable[[np.ndarray], np.ndarray],
  ):
    self.layout = layout
    self.sites = tuple(at)
    self.gemma, self.params = gemma, params
    self.sequences, self.keep = sequences, keep
    self._tokens_place = mesh_lib.place(mesh, 'data', None)

    @functools.partial(
      jax.jit, out_shardings=mesh_lib.place(mesh, 'data', None, None)
    )
    def harvest(params, tokens_BT):
      taps = gemma.forward(
        params, tokens_BT, taps=self.sites, logits=False
      ).taps
      # BOS's row goes here, where it costs nothing.
      return {
        site: taps[site][:, 1:].astype(layout.dtype) for site in self.sites
      }

    self._harvest = harvest

  def rows(self, chunk: int, poll: Callable[[], None] = lambda: None):
    """See `Raw`; calls `poll` before each forward pass."""
    layout = self.layout
    tokens_NT = self.sequences(chunk * layout.sequences, layout.sequences)
    passes = []
    for start in range(0, layout.sequences, layout.lm_batch):
      poll()
      tokens_BT = tokens_NT[start : start + layout.lm_batch]
      tokens_BT = jax.device_put(tokens_BT, self._tokens_place)
      passes.append(self._harvest(self.params, tokens_BT))
    counts_R = self.keep(tokens_NT)[:, 1:].reshape(-1)
    return {
      site: [taps[site] for taps in passes] for site in self.sites
    }, counts_R


class Chunks:
  """Chunks of one source, shuffled, in the memory they fit in.

  Args:
    source: `ModelSource` or `StoreSource`.
    seed: of the permutations.
    mesh: rows of a batch lie on its 'data' axis.
    memory: 'device', 'host', or 'auto': the devices when a chunk takes at most
      a quarter of their memory.
  """

  def __init__(self, source, seed: int, mesh: Mesh, memory: str = 'auto'):
    self.source = source
    self.layout = source.layout
    self._seed = seed
    self._mesh = mesh
    self._memory = memory
    self._shuffle = jax.jit(
      self._shuffle_rows, out_shardings=mesh_lib.place(mesh, None, 'data', None)
    )
    # Replicated, so that every process of a pod can read it.
    self._finite = jax.jit(
      lambda x: jnp.all(jnp.isfinite(x), -1).reshape(-1),
      out_shardings=mesh_lib.place(mesh),
    )

  def _shuffle_rows(self, parts, index_R):
    x_RD = jnp.concatenate([p.reshape(-1, p.shape[-1]) for p in parts])
    return x_RD[index_R].reshape(self.layout.batches, self.layout.batch, -1)

  def load(self, chunk: int, poll: Callable[[], None] = lambda: None) -> Chunk:
    """Chunk `chunk`, a pure function of (config, chunk).

    Raises:
      ValueError: it has no usable row.
    """
    parts, counts_R = self.source.rows(chunk, poll)
    finite_R = np.ones_like(counts_R)
    for site in parts:
      finite_R &= np.concatenate(
        [np.asarray(self._finite(p)) for p in parts[site]]
      )
    usable = np.flatnonzero(counts_R & finite_R)
    if not usable.size:
      raise ValueError(
        f'Chunk {chunk} has no usable row: {int((~counts_R).sum())} special '
        f'tokens and {int((~finite_R).sum())} rows with NaN or infinity of '
        f'{counts_R.size}.'
      )
    order = np.random.default_rng((self._seed, chunk)).permutation(usable)
    index_R = np.resize(order, self.layout.batches * self.layout.batch)
    on_device = self._fits(parts)
    rows = {}
    for site in list(parts):
      x = parts.pop(site)  # freed one by one: a chunk may fill the memory
      if on_device:
        rows[site] = self._shuffle(x, index_R)
      else:
        x_RD = np.concatenate(
          [np.asarray(p).reshape(-1, p.shape[-1]) for p in x]
        )
        rows[site] = x_RD[index_R].reshape(
          self.layout.batches, self.layout.batch, -1
        )
    return Chunk(
      rows, int((~counts_R).sum()), int((counts_R & ~finite_R).sum())
    )

  def put(self, batch: Mapping[sites.Site, Any]) -> dict[sites.Site, jax.Array]:
    """A batch of a chunk kept in host memory -> on the devices."""
    return jax.device_put(dict(batch), mesh_lib.place(self._mesh, 'data', None))

  def _fits(self, parts) -> bool:
    if self._memory != 'auto' or jax.process_count() > 1:
      return self._memory != 'host'
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' not in stats:  # the CPU: its devices are the host
      return True
    size = sum(p.nbytes for part in parts.values() for p in part)
    return size / self._mesh.size < stats['bytes_limit'] / 4


class Feed:
  """The batch of a step, from the chunk that it belongs to.

  Attributes:
    left_out: rows left out so far, 'special' and 'not_finite'; a resumed run
      sets it to what it was.
  """

  def __init__(self, chunks: Chunks):
    self.left_out = {'special': 0, 'not_finite': 0}
    self._chunks = chunks
    self._index, self._chunk = -1, None

  def at(
    self, step: int, poll: Callable[[], None] = lambda: None
  ) -> dict[sites.Site, jax.Array]:
    """Rows [B, D] of every site at `step`, on the devices."""
    index, offset = divmod(step, self._chunks.layout.batches)
    if index != self._index:
      self._index, self._chunk = -1, None  # its memory is for the next one
      self._chunk = self._chunks.load(index, poll)
      self._index = index
      if offset == 0:  # not again when a resumed run reloads its chunk
        self.left_out['special'] += self._chunk.special
        self.left_out['not_finite'] += self._chunk.not_finite
    return self._chunks.put(self._chunk.batch(offset))

  def scales(self, kind: str = 'rms') -> dict[sites.Site, float]:
    """C of each site, measured on the present chunk or sqrt(D)."""
    if kind == 'sqrt_d':
      return {s: x.shape[-1] ** 0.5 for s, x in self._chunk.rows.items()}
    return measure_scales(self._chunk)


def measure_scales(chunk: Chunk) -> dict[sites.Site, float]:
  """C = sqrt(E|x|^2) of each site over a chunk (arXiv 2408.05147, 3.2)."""

  @jax.jit
  def mean_square(x_KBD):
    per_row = jnp.sum(jnp.square(x_KBD.astype(jnp.float32)), -1)
    return jnp.sqrt(jnp.mean(per_row))

  return {site: float(mean_square(x)) for site, x in chunk.rows.items()}
