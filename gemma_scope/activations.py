"""Sequences -> rows of activations per site, in shuffled chunks.

  chunk c   the sequences [c n, (c + 1) n) of the shuffled text
  harvest   one forward pass over them reads all sites at once -> [n, T, D]
  rows      BOS, EOS, padding and rows that are not finite are left out; the
            rest is permuted as a whole by (seed, c)
  batches   step s -> chunk s // k, batch s % k of k = n (T - 1) // B

So every batch is a pure function of (config, step): there is no iterator state
to lose, and a resumed run recomputes its chunk. All shapes are fixed: where
rows were left out, the permutation wraps around, and a few rows of the chunk
appear twice (about one in a thousand: the EOS between documents).

A chunk keeps its rows as [k, B, D] per site, batches first, so that taking a
batch moves nothing between devices that hold B. It stays on the devices, or in
host memory when it would not fit.

`ModelSource` runs the language model; `StoreSource` reads what `write_store`
wrote from a `ModelSource`. Both give the same rows, hence the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from gemma_scope import lm, sites
from gemma_scope import mesh as mesh_lib

FORMAT = 1  # of the store on disk


@dataclasses.dataclass(frozen=True)
class Layout:
  """The arithmetic of chunks, all static.

  Attributes:
    seq_len: tokens a sequence T, BOS included.
    sequences: sequences a chunk n.
    batch: rows a step B.
    lm_batch: sequences a forward pass; divides `sequences`.
    dtype: rows are kept in it, 'float32' or 'bfloat16'.
  """

  seq_len: int
  sequences: int
  batch: int
  lm_batch: int
  dtype: str

  @classmethod
  def of(cls, *, chunk_rows, seq_len, batch, lm_batch, dtype) -> Layout:
    """The layout whose chunks hold at least `chunk_rows` rows."""
    per_pass = lm_batch * (seq_len - 1)
    passes = -(-max(chunk_rows, batch) // per_pass)
    return cls(seq_len, passes * lm_batch, batch, lm_batch, dtype)

  @property
  def rows(self) -> int:
    """Rows of a chunk before any is left out (BOS already is)."""
    return self.sequences * (self.seq_len - 1)

  @property
  def batches(self) -> int:
    """Batches, that is steps, a chunk."""
    return self.rows // self.batch


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
    special: token ids whose rows are left out (BOS, EOS, padding).
  """

  def __init__(
      self,
      gemma: lm.Gemma,
      params: lm.Params,
      at: Sequence[sites.Site],
      sequences: Callable[[int, int], np.ndarray],
      layout: Layout,
      mesh: Mesh,
      special: Sequence[int],
  ):
    self.layout = layout
    self.sites = tuple(at)
    self._params = params
    self._sequences = sequences
    self._special = np.asarray(special)
    self._tokens_place = mesh_lib.place(mesh, 'data', None)

    @functools.partial(
        jax.jit, out_shardings=mesh_lib.place(mesh, 'data', None, None)
    )
    def harvest(params, tokens_BT):
      taps = gemma.forward(params, tokens_BT, taps=self.sites, logits=False).taps
      # BOS's row goes here, where it costs nothing.
      return {
          site: taps[site][:, 1:].astype(layout.dtype) for site in self.sites
      }

    self._harvest = harvest

  def rows(self, chunk: int, poll: Callable[[], None] = lambda: None):
    """See `Raw`; calls `poll` before each forward pass."""
    layout = self.layout
    tokens_NT = self._sequences(chunk * layout.sequences, layout.sequences)
    passes = []
    for start in range(0, layout.sequences, layout.lm_batch):
      poll()
      tokens_BT = tokens_NT[start : start + layout.lm_batch]
      tokens_BT = jax.device_put(tokens_BT, self._tokens_place)
      passes.append(self._harvest(self._params, tokens_BT))
    counts_R = ~np.isin(tokens_NT[:, 1:], self._special).reshape(-1)
    return {site: [taps[site] for taps in passes] for site in self.sites}, counts_R


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
      finite_R &= np.concatenate([np.asarray(self._finite(p)) for p in parts[site]])
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
        x_RD = np.concatenate([np.asarray(p).reshape(-1, p.shape[-1]) for p in x])
        rows[site] = x_RD[index_R].reshape(
            self.layout.batches, self.layout.batch, -1
        )
    return Chunk(rows, int((~counts_R).sum()), int((counts_R & ~finite_R).sum()))

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


def measure_scales(chunk: Chunk) -> dict[sites.Site, float]:
  """C = sqrt(E|x|^2) of each site over a chunk (arXiv 2408.05147 section 3.1)."""

  @jax.jit
  def mean_square(x_KBD):
    per_row = jnp.sum(jnp.square(x_KBD.astype(jnp.float32)), -1)
    return jnp.sqrt(jnp.mean(per_row))

  return {site: float(mean_square(x)) for site, x in chunk.rows.items()}


# The store on disk: one folder a chunk, one .npy a site, rows in the order of
# the text (unshuffled, unscaled), beside counts.npy. A chunk is written to a
# temporary folder and renamed, so an interrupted writer starts where it was.


def _file(site: sites.Site) -> str:
  return f'{site.kind}.{site.layer}.npy'


def write_store(
    folder: pathlib.Path,
    source: ModelSource,
    chunks: int,
    facts: dict,
    poll: Callable[[], None] = lambda: None,
    report: Callable[[int], None] = lambda chunk: None,
) -> None:
  """Writes `chunks` chunks of `source`; continues where it was stopped.

  Args:
    folder: the store.
    source: what to harvest.
    chunks: how many chunks it shall hold in the end.
    facts: what the rows depend on (model, text, ...); a folder with other
      facts is refused.
    poll: called often; may raise to stop.
    report: called after each chunk.

  Raises:
    ValueError: the folder holds another store.
  """
  folder.mkdir(parents=True, exist_ok=True)
  layout = source.layout
  header = {
      'format': FORMAT,
      'layout': {
          'seq_len': layout.seq_len,
          'sequences': layout.sequences,
          'lm_batch': layout.lm_batch,
          'dtype': layout.dtype,
      },
      'sites': [str(site) for site in source.sites],
      'facts': facts,
  }
  manifest = _read_manifest(folder) or {**header, 'chunks': {}}
  for key in header:
    if manifest[key] != header[key]:
      raise ValueError(
          f'{str(folder)!r} holds another activation store: its {key} is '
          f'{manifest[key]}, and this run wants {header[key]}.'
      )
  for leftover in folder.glob('*.tmp'):
    shutil.rmtree(leftover)
  for chunk in range(chunks):
    name = f'chunk_{chunk:06d}'
    if name in manifest['chunks'] and (folder / name).is_dir():
      report(chunk)
      continue
    parts, counts_R = source.rows(chunk, poll)
    temporary = folder / f'{name}.tmp'
    temporary.mkdir()
    files = {'counts.npy': counts_R}
    for site in source.sites:
      x_RD = np.concatenate(
          [np.asarray(p).reshape(-1, p.shape[-1]) for p in parts[site]]
      )
      files[_file(site)] = _to_disk(x_RD)
    checksums = {}
    for file, array in files.items():
      np.save(temporary / file, array)
      checksums[file] = zlib.crc32(array.reshape(-1).view(np.uint8))
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    manifest['chunks'][name] = checksums
    _write_manifest(folder, manifest)
    report(chunk)


def _to_disk(x: np.ndarray) -> np.ndarray:
  """.npy knows no bfloat16: its bits are kept as uint16."""
  return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


def _read_manifest(folder: pathlib.Path) -> dict | None:
  path = folder / 'manifest.json'
  return json.loads(path.read_text()) if path.exists() else None


def _write_manifest(folder: pathlib.Path, manifest: dict) -> None:
  temporary = folder / 'manifest.json.tmp'
  temporary.write_text(json.dumps(manifest, indent=1))
  os.replace(temporary, folder / 'manifest.json')


class StoreSource:
  """Rows of a store, memory-mapped; a chunk's checksums are checked on reading.

  Args:
    folder: what `write_store` wrote.
    at: the sites to read, some or all of the store's.
    batch: rows a step.

  Raises:
    ValueError: no store there, a site is missing, or a chunk is damaged.
  """

  def __init__(self, folder: pathlib.Path, at: Sequence[sites.Site], batch: int):
    self._folder = pathlib.Path(folder)
    self._manifest = _read_manifest(self._folder)
    if not self._manifest or self._manifest.get('format') != FORMAT:
      raise ValueError(
          f'No activation store of format {FORMAT} at {str(folder)!r}; '
          'launch/harvest.py writes one.'
      )
    missing = {str(site) for site in at} - set(self._manifest['sites'])
    if missing:
      raise ValueError(
          f'The store {str(folder)!r} has no rows of '
          f'{", ".join(sorted(missing))}; it has '
          f'{", ".join(self._manifest["sites"])}.'
      )
    self.sites = tuple(at)
    self.layout = Layout(batch=batch, **self._manifest['layout'])

  @property
  def chunks(self) -> int:
    """Chunks on disk."""
    return len(self._manifest['chunks'])

  @property
  def facts(self) -> dict:
    """What the rows depend on, as given to `write_store`."""
    return self._manifest['facts']

  @property
  def fingerprint(self) -> dict:
    """Identifies the rows: a hash of the manifest's checksums."""
    text = json.dumps(self._manifest, sort_keys=True)
    return {'store_sha256': hashlib.sha256(text.encode()).hexdigest()}

  def rows(self, chunk: int, poll: Callable[[], None] = lambda: None):
    """See `Raw`; the store repeats when all its chunks are read."""
    name = f'chunk_{chunk % self.chunks:06d}'
    checksums = self._manifest['chunks'][name]

    def read(file):
      poll()
      try:
        array = np.load(self._folder / name / file, mmap_mode='r')
        intact = zlib.crc32(array.reshape(-1).view(np.uint8)) == checksums[file]
      except (OSError, ValueError):
        intact = False
      if not intact:
        raise ValueError(
            f'{str(self._folder / name / file)!r} is damaged; delete the folder '
            f'{name} and run launch/harvest.py again to rewrite it.'
        )
      return array

    counts_R = np.asarray(read('counts.npy'))
    bfloat16 = self.layout.dtype == 'bfloat16'
    parts = {
        site: [
            x_RD.view(ml_dtypes.bfloat16) if bfloat16 else x_RD
            for x_RD in [read(_file(site))]
        ]
        for site in self.sites
    }
    return parts, counts_R
