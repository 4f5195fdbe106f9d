"""Stores in a bucket, read file by file into a cache that the host keeps.

  $GEMMA_SCOPE_CACHE/stores/<address>/<folder>/<hash>-<file>

A file is fetched when it is first read, compared with the SHA-256 in its
folder's list (see `remote`), and used by every process of the host and by later
runs. The cache holds at most $GEMMA_SCOPE_CACHE_GB gigabytes (100): before a
file is fetched, those that were not used for longest are deleted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
from typing import Any

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
    listed = self.listed(folder)
    if file not in listed:
      raise ValueError(f'There is no file {self.address}/{folder}/{file}.')
    about = listed[file]
    digest = files.json_sha256(about['sha256'])[:16]
    path = self._root / folder / f'{digest}-{pathlib.PurePath(file).name}'
    with contextlib.suppress(FileNotFoundError):
      os.utime(path)
      return path
    make_room(about['bytes'])
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_file(path) as opened:
      for data in remote.parts(self._objects, folder, file, listed):
        opened.write(data)
    return path

  def forget(self, folder: str, file: str) -> None:
    """Deletes a file of this host's disk that turned out to be damaged."""
    self.path(folder, file).unlink(missing_ok=True)


def folder(path: str) -> pathlib.Path:
  """A whole folder on this host's disk: `path`, or what is at the address."""
  if not files.scheme(path):
    return pathlib.Path(path)
  above, _, name = path.rstrip('/').rpartition('/')
  store = Store(above)
  listed = store.listed(name)
  target = store._root / name / files.json_sha256(listed)[:16]
  if not target.exists():
    make_room(sum(about['bytes'] for about in listed.values()))
    with (
      contextlib.suppress(FileExistsError),
      files.whole_folder(target) as draft,
    ):
      for file in listed:
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        with open(draft / file, 'xb') as opened:
          for data in remote.parts(store._objects, name, file, listed):
            opened.write(data)
  for file in target.iterdir():
    os.utime(file)
  return target


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
