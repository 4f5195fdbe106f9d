"""Rows -> shuffled chunks -> batches; the next chunk is made during training.

  harvest   the parts of chunk c, in the order of the text
  rows      special tokens, rows that are not finite and outliers are left out;
            (seed, c) seeds one permutation of the rest, the same for all sites
  batches   step s -> chunk s // k, batch s % k, with k = n (T - 1) // B

Every batch is therefore a pure function of (config, step): there is no iterator
state, and a resumed run recomputes its chunk. All shapes are fixed. If rows are
left out the permutation wraps around, and the same number of rows appears twice
(about one in a thousand, because of EOS between documents).

A chunk holds the rows of each site as [k, B, D]. Batches are the first axis, so
that taking one moves nothing between places of the mesh's axis 'data'; the
other axes split a chunk too, and a batch is gathered over them. A chunk stays
on the devices. If it does not fit there, it stays in host memory, and each host
keeps the part of its own devices.

If memory has room for two chunks, the next one is made while training uses this
one: its forward passes are dispatched between the steps, a few at a time. The
devices never wait for the host, a request to stop waits for at most one pass,
and every process dispatches the same programs in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunk_memory, harvest, normalise
from gemma_scope.sae import fold


@dataclasses.dataclass(frozen=True)
class OnHost:
  """An array in host memory; each process holds the part of its devices."""

  shape: tuple[int, ...]
  sharding: jax.sharding.NamedSharding
  pieces: dict[tuple, np.ndarray]  # by their position in the array

  @classmethod
  def of(cls, x: jax.Array) -> OnHost:
    pieces = {}
    for shard in x.addressable_shards:
      position = _place_in(shard.index, x.shape)
      if position not in pieces:  # several devices may hold copies
        pieces[position] = np.asarray(shard.data)
    return cls(x.shape, x.sharding, pieces)

  def up(self) -> jax.Array:
    """Copies it back to the devices."""
    return jax.make_array_from_callback(
      self.shape,
      self.sharding,
      lambda index: self.pieces[_place_in(index, self.shape)],
    )

  def __getitem__(self, index: int) -> OnHost:
    """An element of the first axis, which no device splits."""
    spec = self.sharding.spec[1:]
    return OnHost(
      self.shape[1:],
      mesh_lib.sharding(self.sharding.mesh, *spec),
      {position[1:]: piece[index] for position, piece in self.pieces.items()},
    )


def _place_in(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
  return tuple(
    part.indices(size) for part, size in zip(index, shape, strict=True)
  )


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Shuffled rows of each site as [k, B, D], and how many were left out."""

  rows: dict[sites.Site, jax.Array | OnHost]
  special: int  # rows left out: BOS, EOS, padding
  not_finite: int  # rows left out: NaN or infinity at some site
  outliers: int  # rows left out: a norm above the bound at some site


class Chunks:
  """Shuffled chunks of one source, in the memory that they fit in.

  Args:
    source: `ModelSource` or `StoreSource`.
    seed: of the permutations.
    mesh: its 'data' axis splits the rows of a batch; the other axes split a
      chunk further.
    memory: where chunks stay: 'device', 'host', or 'auto' for the devices if
      the chunks held at once take at most a quarter of their memory.
    ahead: whether to make the next chunk while one is in use, which holds two:
      'on', 'off', or 'auto' for on if the devices are not CPUs and both chunks
      take at most a quarter of the memory.
    max_norm: rows with a norm above `max_norm` times the site's median, at any
      site, are left out; 0 keeps all.

  Attributes:
    norm_bounds: the largest norm that is kept, by site. It is measured on the
      first chunk, unless a resumed run has set it.
    jobs: how many jobs `building` takes to make a chunk.
    ahead: whether the next chunk is made while one is in use.
  """

  def __init__(
    self,
    source: harvest.Raw,
    seed: int,
    mesh: Mesh,
    memory: str = 'auto',
    ahead: str = 'off',
    max_norm: float = 0.0,
  ):
    self.source = source
    self.norm_bounds: dict[sites.Site, float] = {}
    self._max_norm = max_norm
    self.layout = source.layout
    self.jobs = source.parts + 1 + len(source.widths)
    self._seed = seed
    self._mesh = mesh
    self._on_device, self.ahead = self._held(memory, ahead)
    over = chunk_memory.axes(mesh.shape, self.layout.batch)
    self._shuffles = {
      axis: jax.jit(
        self._shuffle_rows,
        out_shardings=mesh_lib.sharding(mesh, None, over, axis),
      )
      for axis in ('latent', None)
    }
    self._take = jax.jit(
      lambda rows, index: {site: x[index] for site, x in rows.items()},
      out_shardings=mesh_lib.sharding(mesh, 'data', None),
    )
    self._gather = jax.jit(
      lambda batch: batch, out_shardings=mesh_lib.sharding(mesh, 'data', None)
    )
    # Replicated, so that every process of a pod can read it.
    self._mark = jax.jit(self._marks_of, out_shardings=mesh_lib.sharding(mesh))

  def _held(self, memory: str, ahead: str) -> tuple[bool, bool]:
    """`chunk_memory.held` of this run; never two chunks on a CPU by itself."""
    sizes = chunk_memory.sizes(
      self._mesh,
      self.layout.rows * jnp.dtype(self.layout.dtype).itemsize,
      self.source.widths.values(),
      self.layout.batch,
    )
    if ahead == 'auto' and self._mesh.devices.flat[0].platform == 'cpu':
      ahead = 'off'
    return chunk_memory.held(memory, ahead, sizes, chunk_memory.memory())

  def _shuffle(self, site: sites.Site, parts, index_R) -> jax.Array:
    """Rows of a site in the order of a chunk, [k, B, D]."""
    width = self.source.widths[site]
    shuffle = self._shuffles[chunk_memory.columns(self._mesh.shape, width)]
    return shuffle(parts, index_R)

  def _shuffle_rows(self, parts, index_R):
    x_RD = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    return x_RD[index_R].reshape(self.layout.batches, self.layout.batch, -1)

  def _marks_of(self, part):
    """Which rows are finite [R]; with a rule also their norms [R], by site."""
    finite_R = jnp.all(
      jnp.stack(
        [jnp.all(jnp.isfinite(x), -1).reshape(-1) for x in part.values()]
      ),
      0,
    )
    if not self._max_norm:
      return finite_R, {}
    return finite_R, {
      site: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), -1)).reshape(-1)
      for site, x in part.items()
    }

  def batch(self, chunk: Chunk, index: int) -> dict[sites.Site, jax.Array]:
    """Batch `index` of a chunk, [B, D] per site, on the devices."""
    if not self._on_device:
      return self._gather(
        {site: x_KBD[index].up() for site, x_KBD in chunk.rows.items()}
      )
    index = mesh_lib.put(np.int32(index), mesh_lib.sharding(self._mesh))
    return self._take(chunk.rows, index)

  def load(self, chunk: int, poll: harvest.Poll = harvest.never) -> Chunk:
    """Makes a chunk, a pure function of the config and its number.

    Raises:
      ValueError: the chunk has no usable row.
    """
    *_, chunk_made = self.building(chunk, poll)
    return chunk_made

  def building(
    self, chunk: int, poll: harvest.Poll = harvest.never
  ) -> Iterator[Chunk | None]:
    """Makes a chunk in `jobs` jobs: yields None after each, then the chunk.

    Raises:
      ValueError: the chunk has no usable row.
    """
    marks = []
    parts = self._marked(chunk, poll, marks)
    if not self._on_device:
      parts = harvest.one_late(parts, OnHost.of)
    parts_of = {site: [] for site in self.source.widths}
    for part in parts:
      for site, x in part.items():
        parts_of[site].append(x)
      yield None
    counts_R = self.source.counts(chunk)
    finite_R, norms = self._read_marks(marks, counts_R.size)
    special, not_finite = ~counts_R, counts_R & ~finite_R
    usable_R = counts_R & finite_R
    ordinary_R = self._ordinary(norms, usable_R)
    outliers = usable_R & ~ordinary_R
    left_out = {
      'special tokens': special,
      'rows with NaN or infinity': not_finite,
      'outliers': outliers,
    }
    index_R = mesh_lib.put(
      self._order(chunk, usable_R & ordinary_R, left_out),
      mesh_lib.sharding(self._mesh),
    )
    yield None
    rows = {}
    for site in list(parts_of):
      x = parts_of.pop(site)  # freed one by one: a chunk may fill the memory
      if self._on_device:
        rows[site] = self._shuffle(site, x, index_R)
      else:
        rows[site] = OnHost.of(
          self._shuffle(site, [part.up() for part in x], index_R)
        )
      del x
      if parts_of:
        yield None
    counted = (int(rows_R.sum()) for rows_R in left_out.values())
    yield Chunk(rows, *counted)

  def _marked(self, chunk, poll, marks) -> Iterator[harvest.Part]:
    """Puts the source's parts on the devices; appends to `marks`."""
    rows = mesh_lib.sharding(self._mesh, 'data', None)
    for part in self.source.passes(chunk, poll):
      part = {
        site: x if isinstance(x, jax.Array) else mesh_lib.put(x, rows)
        for site, x in part.items()
      }
      marks.append((tuple(part), self._mark(part)))
      yield part

  def _read_marks(self, marks, count: int):
    """Which rows are finite at every site [R], and norms [R] by site."""
    finite_R = np.ones(count, bool)
    norms = {site: [] for site in self.source.widths}
    start = dict.fromkeys(self.source.widths, 0)
    for part_sites, (mark, norm) in marks:
      mark_r = np.asarray(mark)
      finite_R[start[part_sites[0]] :][: mark_r.size] &= mark_r
      for site in part_sites:
        start[site] += mark_r.size
      for site, norm_r in norm.items():
        norms[site].append(np.asarray(norm_r))
    if not self._max_norm:
      return finite_R, {}
    return finite_R, {
      site: np.concatenate(norms_of_site)
      for site, norms_of_site in norms.items()
    }

  def _ordinary(self, norms, usable_R: np.ndarray) -> np.ndarray:
    """Which rows are outliers at no site, [R]; measures the bounds first."""
    ordinary_R = np.ones(usable_R.size, bool)
    if norms and not self.norm_bounds and usable_R.any():
      self.norm_bounds = {
        site: self._max_norm * float(np.median(norm_R[usable_R]))
        for site, norm_R in norms.items()
      }
    for site, norm_R in norms.items():
      ordinary_R &= ~(norm_R > self.norm_bounds.get(site, np.inf))
    return ordinary_R

  def _order(self, chunk: int, usable_R, left_out) -> np.ndarray:
    """For each row of the chunk, its index among the source's rows, int32."""
    usable = np.flatnonzero(usable_R)
    if not usable.size:
      counted = ', '.join(
        f'{int(rows_R.sum())} {name}' for name, rows_R in left_out.items()
      )
      raise ValueError(
        f'Chunk {chunk} has no usable row among {usable_R.size}: {counted}.'
      )
    order = np.random.default_rng((self._seed, chunk)).permutation(usable)
    count = self.layout.batches * self.layout.batch
    return np.resize(order, count).astype(np.int32)


class Feed:
  """Gives the batch of each step.

  Args:
    chunks: makes the chunks; `chunks.ahead` says when.
    steps: the length of the run; no chunk is made beyond its end.

  Attributes:
    chunks: as given.
    left_out: number of rows left out so far: 'special', 'not_finite' and
      'outliers'; a resumed run restores it.
    status: a description of what `at` does while it makes a chunk; else ''.
  """

  def __init__(self, chunks: Chunks, steps: int):
    self.left_out = dict.fromkeys(('special', 'not_finite', 'outliers'), 0)
    self.chunks = chunks
    self._steps = steps
    self.status = ''
    self._index, self._chunk = -1, None
    self._building: Iterator[Chunk | None] | None = None  # the next one
    self._jobs, self._next = 0, None  # jobs left; the chunk when it is made

  def at(
    self, step: int, poll: harvest.Poll = harvest.never
  ) -> dict[sites.Site, jax.Array]:
    """Rows [B, D] of every site at `step`, on the devices."""
    count = self.chunks.layout.batches
    index, offset = divmod(step, count)
    if index != self._index:
      self._chunk = None  # its memory is for the next one
      if self._next is not None and index == self._index + 1:
        self._chunk, self._next = self._next, None
      else:
        self._chunk = self._load(index, poll)
      self._index, self._building = index, None
      if offset == 0:  # a resumed run has counted the chunk that it reloads
        for reason in self.left_out:
          self.left_out[reason] += getattr(self._chunk, reason)
    batch = self.chunks.batch(self._chunk, offset)
    if self.chunks.ahead and (index + 1) * count < self._steps:
      self._build(index + 1, count - offset, poll)
    return batch

  def of_chunk(self, step: int, count: int) -> tuple[int, int]:
    """The first steps of the chunk that `step` reads: [first, end)."""
    batches = self.chunks.layout.batches
    first = step // batches * batches
    return first, first + min(count, batches)

  def _load(self, index: int, poll: harvest.Poll) -> Chunk:
    """Makes a chunk in one go; `status` reports the progress."""
    building = self.chunks.building(index, poll)
    jobs = self.chunks.jobs
    try:
      for done in range(jobs):
        self.status = f'reading activations, part {done + 1} of {jobs}'
        made_chunk = next(building)
    finally:
      self.status = ''
    return made_chunk

  def _build(self, chunk: int, steps: int, poll: harvest.Poll) -> None:
    """Does some of the jobs for `chunk`; `steps` calls do all of them."""
    if self._building is None:
      self._building = self.chunks.building(chunk, poll)
      self._jobs = self.chunks.jobs
    for _ in range(-(-self._jobs // steps)):
      self._next = next(self._building)
      self._jobs -= 1

  def normalisation(
    self, centre: str = 'none', scale: str = 'rms'
  ) -> dict[sites.Site, fold.Normalisation]:
    """Measures the normalisation of each site on the current chunk."""
    return measure(self._chunk, self.chunks.norm_bounds, centre, scale)

  def covariance(self, site: sites.Site, normalisation) -> np.ndarray:
    """Covariance of a site's normalised rows in this chunk, [D, D]."""
    x_KBD = self._chunk.rows[site]
    x_KBD = x_KBD.up() if isinstance(x_KBD, OnHost) else x_KBD
    return np.asarray(normalise.covariance(x_KBD, normalisation))


def measure(
  chunk: Chunk,
  norm_bounds: Mapping[sites.Site, float],
  centre: str = 'none',
  scale: str = 'rms',
) -> dict[sites.Site, fold.Normalisation]:
  """The normalisation of each site, measured on a chunk."""
  normalisations = {}
  for site, x_KBD in chunk.rows.items():
    x_KBD = x_KBD.up() if isinstance(x_KBD, OnHost) else x_KBD
    normalisations[site] = normalise.measure(x_KBD, centre, scale)._replace(
      norm_bound=norm_bounds.get(site)
    )
  return normalisations
