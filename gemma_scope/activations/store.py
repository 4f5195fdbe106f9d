"""Activations on disk, written once and used for many runs, as in the paper.

  store/manifest.json            what the rows depend on, and checksums
  store/chunk_000000/
    counts.npy                   bool [R]: rows that are no special token
    resid_post.12.npy            [R, D], float32 or the bits of bfloat16

Rows are in the order of the text, neither shuffled nor scaled. Training from a
store therefore sees the same batches as training from the model, and a store
serves any seed, batch size and selection of its sites. A chunk is written to a
temporary folder and then renamed, so that a stopped writer can continue.
Several processes write chunks of their own, and the first one the manifest, at
the end; until then each chunk's checksums are in its checksums.json. Files are
memory-mapped, and checked when they are read; those of a store in a bucket are
downloaded to a cache of the host when they are first read (`host_cache`).
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from gemma_scope import files, sites
from gemma_scope.activations import harvest
from gemma_scope.runtime import cluster, host_cache, objects, remote

FORMAT = 1
_SUMS = 'checksums.json'


def _file(site: sites.Site) -> str:
  return f'{site.kind}.{site.layer}.npy'


def write_store(
  folder: pathlib.Path,
  source: harvest.ModelSource,
  chunks: int,
  facts: dict,
  poll: Callable[[], None] = lambda: None,
  report: Callable[[int], None] = lambda chunk: None,
) -> None:
  """Writes `chunks` chunks of `source`; continues where it was stopped.

  In a cluster every process calls it, with a source on its own devices. Process
  i of n writes every n-th chunk from the i-th on; the first one writes the
  manifest, once all have written theirs.

  Args:
    folder: the store.
    source: what to harvest.
    chunks: the total number of chunks.
    facts: what the rows depend on (model, text, ...). A folder with other facts
      raises an error.
    poll: called often; may raise to stop.
    report: called after each chunk.

  Raises:
    ValueError: the folder holds another store.
  """
  files.refuse_address(folder, 'The folder of an activation store')
  folder.mkdir(parents=True, exist_ok=True)
  layout = source.layout
  header = {
    'format': FORMAT,
    'layout': {
      'seq_len': layout.seq_len,
      'sequences': layout.sequences,
      'lm_batch': layout.lm_batch,
      'dtype': layout.dtype,
      'share': layout.share,
    },
    'sites': [str(site) for site in source.sites],
    'facts': facts,
  }
  index, count = cluster.part()
  with cluster.first_goes_ahead():
    remote.fetch(folder / 'manifest.json')
    manifest = _read_manifest(folder) or {**header, 'chunks': {}}
    for key in header:
      if manifest[key] != header[key]:
        raise ValueError(
          f'{remote.shown(folder)!r} holds another activation store: '
          + _difference(key, manifest[key], header[key])
        )
    if index == 0 and count > 1:
      _write_manifest(folder, manifest)
  missing = max(0, chunks - len(manifest['chunks']))
  if remote.address(folder):
    missing = min(missing, 1)  # a chunk's copy is deleted once it is uploaded
  files.check_room(
    folder, missing * _bytes(source), f'A store of {chunks} chunks'
  )
  for chunk in range(index, chunks, count):
    sums = manifest['chunks'].get(_name(chunk))
    if sums is None or not _is_there(folder, chunk):
      sums = _sums(folder, chunk)
    if sums is None:
      sums = _write_chunk(folder, source, chunk, poll)
    manifest['chunks'][_name(chunk)] = sums
    if count == 1:
      _write_manifest(folder, manifest)
    report(chunk)
  cluster.wait_for_all('gemma_scope/activation_store')
  if index == 0 and count > 1:
    for chunk in range(chunks):
      sums = manifest['chunks'].get(_name(chunk)) or _sums(folder, chunk)
      manifest['chunks'][_name(chunk)] = sums
    _write_manifest(folder, manifest)


def _write_chunk(folder, source, chunk: int, poll) -> dict[str, int]:
  """Writes one chunk whole; returns the checksums of its files."""
  parts = list(harvest.one_late(source.passes(chunk, poll), np.asarray))
  arrays = {'counts.npy': source.counts(chunk)}
  for site in source.sites:
    x_RD = np.concatenate(
      [part[site].reshape(-1, part[site].shape[-1]) for part in parts]
    )
    arrays[_file(site)] = _to_disk(x_RD)
  checksums = {}
  with files.whole_folder(folder / _name(chunk), replace=True) as draft:
    for file, array in arrays.items():
      _save(draft / file, array)
      checksums[file] = zlib.crc32(array.reshape(-1).view(np.uint8))
    (draft / _SUMS).write_text(json.dumps(checksums))
  remote.drop_copy(folder / _name(chunk))
  return checksums


def _name(chunk: int) -> str:
  return f'chunk_{chunk:06d}'


def _is_there(folder: pathlib.Path, chunk: int) -> bool:
  store = remote.objects(folder)
  if store is not None:
    return remote.listed(store, _name(chunk)) is not None
  return (folder / _name(chunk)).is_dir()


def _sums(folder: pathlib.Path, chunk: int) -> dict[str, int] | None:
  """The checksums in a chunk that was written whole; None if it was not."""
  if not _is_there(folder, chunk):
    return None
  store = remote.objects(folder)
  if store is not None:
    text = store.read(f'{_name(chunk)}/{_SUMS}')
    return None if text is None else json.loads(text)
  path = folder / _name(chunk) / _SUMS
  return files.read_json(path) if path.exists() else None


def _difference(key: str, stored, wanted) -> str:
  """Describes the first field in which two manifests differ."""
  if isinstance(stored, dict) and isinstance(wanted, dict):
    for field in (*stored, *wanted):
      if stored.get(field) != wanted.get(field):
        return _difference(
          f'{key}.{field}', stored.get(field), wanted.get(field)
        )
  return f'its {key} is {stored}, and this run needs {wanted}.'


def _to_disk(x: np.ndarray) -> np.ndarray:
  """Views bfloat16 as uint16, because .npy has no bfloat16."""
  return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


def _save(path: pathlib.Path, array: np.ndarray) -> None:
  """`np.save`, which does not notice a disk that fills up at the very end."""
  array = np.ascontiguousarray(array)
  with open(path, 'xb') as file:
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.data)


def _bytes(source: harvest.ModelSource) -> int:
  """The size of a chunk on disk."""
  item_bytes = 2 if source.layout.dtype == 'bfloat16' else 4
  row_bytes = 1 + item_bytes * sum(source.widths[site] for site in source.sites)
  return source.layout.rows * row_bytes


_KEYS = ('chunks', 'facts', 'format', 'layout', 'sites')
_SEAL = 'manifest_sha256'  # version 0.3.0 wrote none


def _read_manifest(folder: pathlib.Path) -> dict | None:
  """The manifest without its seal; None where there is no store.

  Raises:
    ValueError: it is damaged.
  """
  path = folder / 'manifest.json'
  if not path.exists():
    return None
  with files.named(path):
    return _parsed(str(path), path.read_bytes())


def _parsed(name: str, text: bytes) -> dict:
  """A manifest without its seal; ValueError where it is damaged."""
  try:
    manifest = json.loads(text.decode('utf-8'))
    seal = manifest.pop(_SEAL, None)
    if sorted(manifest) != list(_KEYS):
      raise ValueError('it does not have the keys of a store of activations')
    if seal not in (None, files.json_sha256(manifest)):
      raise ValueError('it does not have its own hash')
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(
      f'{name!r} is damaged or not the manifest of an activation store '
      f'({str(error)[:200]}); delete the folder and write it again.'
    ) from None
  return manifest


def _write_manifest(folder: pathlib.Path, manifest: dict) -> None:
  sealed = manifest | {_SEAL: files.json_sha256(manifest)}
  files.write_json(folder / 'manifest.json', sealed, indent=1)


def facts(folder: str | os.PathLike[str]) -> dict:
  """What the rows of a store depend on, as given to `write_store`.

  Raises:
    ValueError: there is no store.
  """
  return _opened(folder)['facts']


def _opened(folder: str | os.PathLike[str]) -> dict:
  """The manifest of a store; raises where there is none."""
  if files.scheme(folder):
    name = f'{folder}/manifest.json'
    text = objects.Objects(os.fspath(folder)).read('manifest.json')
    manifest = None if text is None else _parsed(name, text)
  else:
    manifest = _read_manifest(pathlib.Path(folder))
  if not manifest or manifest.get('format') != FORMAT:
    raise ValueError(
      f'No activation store of format {FORMAT} at {str(folder)!r}; '
      'launch/harvest.py and launch/synthetic.py write one.'
    )
  if not manifest['chunks']:  # several hosts write it, and are not done
    raise ValueError(f'The activation store {str(folder)!r} is not complete.')
  return manifest


class StoreSource:
  """Rows of a store, memory-mapped; checksums are verified on reading.

  Args:
    folder: of the store, or its address in a bucket.
    at: the sites to read, some or all of the store's.
    batch: rows in a training step.

  Attributes:
    facts: what the rows depend on, as given to `write_store`.

  Raises:
    ValueError: there is no store, a site is missing, or a chunk is damaged.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    read_sites: Sequence[sites.Site],
    batch: int,
  ):
    self._folder, self._cached = folder, None
    if files.scheme(folder):
      self._cached = host_cache.Store(os.fspath(folder))
    self._manifest = _opened(folder)
    self.facts = self._manifest['facts']
    missing = {str(site) for site in read_sites} - set(self._manifest['sites'])
    if missing:
      raise ValueError(
        f'The store {str(folder)!r} has no rows of '
        f'{", ".join(sorted(missing))}; it has '
        f'{", ".join(self._manifest["sites"])}.'
      )
    self.sites = tuple(read_sites)
    self.layout = harvest.Layout(batch=batch, **self._manifest['layout'])
    self.parts = len(self.sites)
    self._files = harvest.Ahead(self._read, 1 + self.parts)

  @property
  def chunks(self) -> int:
    """The number of chunks on disk."""
    return len(self._manifest['chunks'])

  @property
  def fingerprint(self) -> dict:
    """Identifies the rows: a hash of the manifest's checksums."""
    return {'store_sha256': files.json_sha256(self._manifest)}

  @functools.cached_property
  def widths(self) -> dict[sites.Site, int]:
    """D of each site."""
    return {
      site: self._mapped(_name(0), _file(site)).shape[-1] for site in self.sites
    }

  def _path(self, name: str, file: str) -> pathlib.Path:
    """A file of a chunk, on this host's disk."""
    if self._cached is not None:
      return self._cached.path(name, file)
    return pathlib.Path(self._folder) / name / file

  def passes(self, chunk: int, poll: Callable[[], None] = lambda: None):
    """See `Raw`: each part is a site; the store repeats after its end."""
    arrays = self._files(chunk, poll)
    next(arrays)  # the counts
    for site, x_RD in zip(self.sites, arrays, strict=True):
      if self.layout.dtype == 'bfloat16':
        x_RD = x_RD.view(ml_dtypes.bfloat16)
      yield {site: x_RD}

  def counts(self, chunk: int) -> np.ndarray:
    """See `Raw`."""
    return np.asarray(next(self._files(chunk)))

  def _read(self, chunk: int, part: int) -> np.ndarray:
    """Reads one file of a chunk and verifies its checksum."""
    name = _name(chunk % self.chunks)
    file = ('counts.npy', *map(_file, self.sites))[part]
    expected = self._manifest['chunks'][name][file]
    array = self._mapped(name, file)
    checksum = zlib.crc32(array.reshape(-1).view(np.uint8))
    if checksum != expected:
      raise self._damaged(
        name, file, f'checksum {checksum}, expected {expected}'
      )
    return array

  def _mapped(self, chunk: str, file: str) -> np.ndarray:
    """A file of a chunk, memory-mapped: dtype, shape and order are checked."""
    if file == 'counts.npy':
      dtype, dims = np.dtype(bool), 1
    else:
      bits = self.layout.dtype == 'bfloat16'
      dtype, dims = np.dtype(np.uint16 if bits else np.float32), 2
    try:
      array = np.load(self._path(chunk, file), mmap_mode='r')
    except Exception as error:  # numpy has many kinds
      raise self._damaged(chunk, file, str(error)[:200]) from None
    if (
      array.dtype != dtype
      or not array.flags.c_contiguous
      or array.ndim != dims
      or len(array) != self.layout.rows
    ):
      why = f'{array.dtype.str} {array.shape}, expected {dtype.str} with '
      why += f'{self.layout.rows:,} rows'
      raise self._damaged(chunk, file, why)
    return array

  def _damaged(self, chunk: str, file: str, why: str) -> ValueError:
    if self._cached is not None:  # downloaded again by the next run
      self._cached.forget(chunk, file)
    return ValueError(
      f"'{self._folder}/{chunk}/{file}' is damaged ({why}); delete the "
      f'folder {chunk} and run the command that wrote it again.'
    )
