"""Stores in a bucket, read into a cache that the host keeps.

  $GEMMA_SCOPE_CACHE/stores/<address>/<folder>/<hash>-<file>

A file, or a part of a large one (`Array`), is fetched when it is first read,
compared with the SHA-256 in its folder's list (see `remote`), and used by every
process of the host and by later runs. The cache holds at most
$GEMMA_SCOPE_CACHE_GB gigabytes (100), and what is being fetched: before a file
is fetched, those that were not used for longest are deleted.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import os
import pathlib
import threading
from typing import Any, BinaryIO

import numpy as np

from gemma_scope import files
from gemma_scope.runtime import objects, remote


class Store:
  """The folders below an address that were written whole.

  Raises:
    BucketError: from every method, where the bucket does not answer.
  """

  def __init__(self, address: str):
    self._objects = objects.Objects(address)
    self.address = self._objects.address
    name = hashlib.sha256(self.address.encode()).hexdigest()[:16]
    self._root = remote.cache() / 'stores' / name
    self.listed = functools.cache(self._listed)

  def read(self, name: str) -> bytes | None:
    """An object that is no part of a folder, such as a manifest."""
    return self._objects.read(name)

  def _listed(self, folder: str) -> dict[str, Any]:
    """The files of a folder: bytes and SHA-256 of their parts.

    Raises:
      ValueError: there is no such folder.
    """
    described = remote.listed(self._objects, folder)
    if described is None:
      raise ValueError(f'There is no folder {self.address}/{folder}.')
    return described

  def path(self, folder: str, file: str) -> pathlib.Path:
    """A file, on this host's disk."""
    return self._kept(folder, file, slice(None))

  def part(self, folder: str, file: str, index: int) -> pathlib.Path:
    """Part `index` of a file, of `remote.PART` bytes, on this host's disk."""
    return self._kept(folder, file, slice(index, index + 1))

  def _kept(self, folder: str, file: str, parts: slice) -> pathlib.Path:
    """Some parts of a file as a file of the cache, fetched if they are not."""
    listed = self.listed(folder)
    if file not in listed:
      raise ValueError(f'There is no file {self.address}/{folder}/{file}.')
    sums, size = listed[file]['sha256'][parts], listed[file]['bytes']
    digest = files.json_sha256(sums)[:16]
    path = self._root / folder / f'{digest}-{pathlib.PurePath(file).name}'
    with contextlib.suppress(FileNotFoundError):
      os.utime(path)
      return path
    make_room(min(size, len(sums) * remote.PART))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_file(path) as opened:
      for data in remote.parts(self._objects, folder, file, listed, parts):
        opened.write(data)
    return path

  def forget(self, folder: str, file: str) -> None:
    """Deletes a file of this host's disk that turned out to be damaged."""
    self.path(folder, file).unlink(missing_ok=True)


class Array:
  """A file of numbers, of which those parts are fetched that are read.

  Several threads may read; each part is fetched once.

  Args:
    address: of the file.
    dtype: of its numbers; a part holds a whole number of them.
  """

  def __init__(self, address: str, dtype: str):
    above, self._folder, self._file = address.rsplit('/', 2)
    self._store, self._dtype = Store(above), np.dtype(dtype)
    self._turns = collections.defaultdict(threading.Lock)

  def __getitem__(self, index: slice) -> np.ndarray:
    """Numbers from `index.start` to `index.stop`, which are both given."""
    size = self._dtype.itemsize
    at, stop, pieces = index.start * size, index.stop * size, []
    while at < stop:
      part, offset = divmod(at, remote.PART)
      count = min(stop - at, remote.PART - offset)
      with self._opened(part) as file:
        file.seek(offset)
        pieces.append(file.read(count))
      at += count
    return np.frombuffer(b''.join(pieces), self._dtype)

  def _opened(self, part: int) -> BinaryIO:
    while True:
      with self._turns[part]:
        path = self._store.part(self._folder, self._file, part)
      # Another process may have deleted it, to make room.
      with contextlib.suppress(FileNotFoundError):
        return open(path, 'rb')


def make_room(num_bytes: int) -> None:
  """Deletes files of stores, the least lately used first, until it fits."""
  bound = float(os.environ.get('GEMMA_SCOPE_CACHE_GB', '100')) * 1e9
  if num_bytes > bound:
    raise ValueError(
      f'A file of {num_bytes:,} bytes does not fit in the cache of '
      f'{bound:,.0f} bytes: set GEMMA_SCOPE_CACHE_GB to more.'
    )
  entries = []
  for path in (remote.cache() / 'stores').rglob('*'):
    with contextlib.suppress(OSError):
      if path.is_file() and not path.name.startswith('.'):
        status = path.stat()
        entries.append((status.st_mtime, status.st_size, path))
  total = sum(size for _, size, _ in entries)
  for _, size, path in sorted(entries):
    if total + num_bytes <= bound:
      return
    path.unlink(missing_ok=True)  # who has it open keeps it
    total -= size
