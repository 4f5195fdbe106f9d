"""A run's folder in a bucket: a copy on each host, uploaded piece by piece.

  with remote.folder('gs://bucket/run') as workdir:   # a local pathlib.Path
    remote.fetch(workdir)                 # what is there, without its big parts
    files.write_json(workdir / 'config.json', ...)    # uploaded when whole

Everything else works on the local copy, as on any folder; `files` tells this
module what was written below it. A file is one object. A folder that was
written whole (`files.whole_folder`) is an object for each of its files and,
last, FOLDER.complete.json: names, sizes, SHA-256. Readers believe that list
alone, so that half an upload is never seen; a folder is replaced by deleting
its list first. Files above 64 MiB are several objects, NAME.part-00000, ...

The copy belongs to one process and is deleted with it. The bucket is the truth,
so that another host may go on. What does not pass through the copy: the lease
(`bucket_lease`) and the checkpoints (`bucket_checkpoints`), which have their
own objects below the same address.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from gemma_scope import files, uploads
from gemma_scope.runtime import objects as objects_lib
from gemma_scope.runtime.objects import PART, BucketError

_COMPLETE = '.complete.json'
# Fetched only by name: large, or not read by a run that goes on.
_APART = ('checkpoints/', 'tokens/', 'microscope/', 'tensorboard/')
_TRIES = 3  # for bytes that do not have their checksum

_folders: dict[pathlib.Path, objects_lib.Objects] = {}  # by the local copy


def cache() -> pathlib.Path:
  """Where copies lie: $GEMMA_SCOPE_CACHE, else the user's cache folder."""
  chosen = os.environ.get('GEMMA_SCOPE_CACHE', '')
  base = os.environ.get('XDG_CACHE_HOME', '') or '~/.cache'
  return pathlib.Path(chosen or f'{base}/gemma_scope').expanduser()


@contextlib.contextmanager
def folder(path: files.PathLike) -> Iterator[pathlib.Path]:
  """The local folder to work in: a copy's for an address, else `path` itself.

  Raises:
    ValueError: an address that is not of a bucket, gs:// or s3://.
  """
  if not files.scheme(path):
    yield pathlib.Path(path)
    return
  store = objects_lib.Objects(os.fspath(path))
  with _copy() as local:
    _folders[local] = store
    uploads.published[local] = _publish
    try:
      yield local
    finally:
      del _folders[local], uploads.published[local]


@contextlib.contextmanager
def place(path: files.PathLike) -> Iterator[pathlib.Path]:
  """As `folder`, for a single folder that will be written whole."""
  if not files.scheme(path):
    yield pathlib.Path(path)
    return
  parent, _, name = os.fspath(path).rstrip('/').rpartition('/')
  with folder(parent) as local:
    yield local / name


@contextlib.contextmanager
def _copy() -> Iterator[pathlib.Path]:
  """An empty folder of this process; those of killed processes are removed."""
  base = cache() / 'buckets'
  base.mkdir(parents=True, exist_ok=True)
  for entry in base.iterdir():
    process = entry.name.partition('-')[0]
    if process.isdigit() and not files.is_alive(int(process)):
      shutil.rmtree(entry, ignore_errors=True)
  local = tempfile.mkdtemp(prefix=f'{os.getpid()}-', dir=base)
  try:
    yield pathlib.Path(os.path.realpath(local))
  finally:
    shutil.rmtree(local, ignore_errors=True)


def address(path: files.PathLike) -> str:
  """The address of a path in a copy; '' for any other path."""
  root, name = _placed(path)
  return '' if root is None else f'{_folders[root].address}/{name}'.rstrip('/')


def shown(path: files.PathLike) -> str:
  """The address of a path in a copy, else the path: for messages."""
  return address(path) or os.fspath(path)


def _placed(path: files.PathLike) -> tuple[pathlib.Path | None, str]:
  """The copy that a path lies in, and its name there."""
  if not _folders:
    return None, ''
  path = pathlib.Path(os.path.realpath(path))
  for root in _folders:
    if path.is_relative_to(root):
      name = path.relative_to(root).as_posix()
      return root, '' if name == '.' else name
  return None, ''


# ------------------------------------------------------------------- uploading


def publish(path: files.PathLike) -> None:
  """Uploads a file, or a folder with its list; nothing outside of a copy."""
  root, name = _placed(path)
  if root is not None:
    _publish(root, root / name)


def _publish(root: pathlib.Path, path: pathlib.Path) -> None:
  store, name = _folders[root], path.relative_to(root).as_posix()
  if not path.is_dir():
    store.write(name, path.read_bytes())
    return
  described = {
    file.relative_to(path).as_posix(): _described(file)
    for file in sorted(path.rglob('*'))
    if file.is_file()
  }
  store.delete(name + _COMPLETE)
  store.write_all(_read_parts(path, name, described))
  names_wanted = {
    part for file in described for part in _names(name, file, described)
  }
  for old_name in set(store.names(f'{name}/')) - names_wanted:
    store.delete(old_name)
  store.write(name + _COMPLETE, json.dumps(described, indent=1).encode())


def _described(file: pathlib.Path) -> dict[str, Any]:
  sums, size = [], 0
  with open(file, 'rb') as opened:
    while data := opened.read(PART):
      sums.append(hashlib.sha256(data).hexdigest())
      size += len(data)
  return {'bytes': size, 'sha256': sums}


def _names(folder_: str, file: str, listed: dict[str, Any]) -> list[str]:
  """The objects of a file: none if it is empty, one, or its parts."""
  count = len(listed[file]['sha256'])
  if count < 2:
    return [f'{folder_}/{file}'] * count
  return [f'{folder_}/{file}.part-{i:05d}' for i in range(count)]


def _read_parts(path: pathlib.Path, name: str, listed: dict[str, Any]):
  for file in listed:
    with open(path / file, 'rb') as opened:
      for part in _names(name, file, listed):
        yield part, opened.read(PART)


def drop_copy(path: pathlib.Path) -> None:
  """Deletes the copy of what was uploaded; nothing outside of a copy."""
  if address(path):
    shutil.rmtree(path, ignore_errors=True)


def delete(path: pathlib.Path) -> None:
  """Deletes a file or a folder, and its objects."""
  root, name = _placed(path)
  if root is not None:
    for object_name in (name + _COMPLETE, name):
      _folders[root].delete(object_name)
    _folders[root].delete_below(f'{name}/')
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


# ----------------------------------------------------------------- downloading


def fetch(path: files.PathLike) -> None:
  """Copies a file, a folder or all below a path from the bucket, if it is one.

  Below the run's folder itself, its big parts are left out. What is there
  locally is replaced.

  Raises:
    BucketError: bytes differ from their list, three times.
  """
  root, name = _placed(path)
  if root is None:
    return
  store = _folders[root]
  names = store.names(name)
  if not name:
    names = [
      object_name for object_name in names if not object_name.startswith(_APART)
    ]
  else:
    own_names = (name, name + _COMPLETE)
    names = [
      object_name
      for object_name in names
      if object_name in own_names or object_name.startswith(f'{name}/')
    ]
  whole_folders = [
    object_name.removesuffix(_COMPLETE)
    for object_name in names
    if object_name.endswith(_COMPLETE)
  ]
  for folder_name in whole_folders:
    _fetch_folder(store, root, folder_name)
  prefixes = tuple(f'{folder_name}/' for folder_name in whole_folders)
  single_files = [
    object_name
    for object_name in names
    if not object_name.endswith(_COMPLETE)
    and not object_name.startswith(prefixes)
  ]
  contents = store.read_all(single_files)
  for object_name, data in zip(single_files, contents, strict=True):
    if data is not None and _plain(object_name):
      _keep(root / object_name, data)


def _plain(name: str) -> bool:
  """Whether an object's name is a path that stays below the folder."""
  components = name.split('/')
  return not any(
    component in ('', '.', '..') or '\0' in component
    for component in components
  )


def _keep(path: pathlib.Path, data: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with uploads.silent():
    files.write_bytes(path, data)


def listed(store: objects_lib.Objects, folder_: str) -> dict[str, Any] | None:
  """The list of a folder that was written whole; None where there is none."""
  text = store.read(folder_ + _COMPLETE)
  if text is None:
    return None
  try:
    listing = json.loads(text)
    valid = all(
      _plain(file)
      and type(listing[file]['bytes']) is int
      and len(listing[file]['sha256']) == -(-listing[file]['bytes'] // PART)
      for file in listing
    )
  except (ValueError, TypeError, KeyError):
    valid = False
  if not valid:
    raise BucketError(f'{store.address}/{folder_}{_COMPLETE} is damaged.')
  return listing


def parts(
  store: objects_lib.Objects,
  folder_: str,
  file: str,
  listed: dict[str, Any],
  which: slice = slice(None),
) -> Iterator[bytes]:
  """The bytes of a listed file, part by part, each with its SHA-256.

  Raises:
    BucketError: bytes differ from the list, three times.
  """
  names = _names(folder_, file, listed)[which]
  sums = listed[file]['sha256'][which]
  for name, data, expected in zip(
    names, store.read_all(names), sums, strict=True
  ):
    yield _checked(store, name, data, expected)


def _fetch_folder(store, root: pathlib.Path, name: str) -> None:
  listing = listed(store, name) if _plain(name) else None
  if listing is None:
    return  # deleted since its name was listed
  with (
    uploads.silent(),
    files.whole_folder(root / name, replace=True) as draft,
  ):
    for file in listing:
      target = draft / file
      target.parent.mkdir(parents=True, exist_ok=True)
      with open(target, 'xb') as opened:
        for data in parts(store, name, file, listing):
          opened.write(data)


def _checked(store, name: str, data: bytes | None, expected: str) -> bytes:
  """An object's bytes once they have their SHA-256; read again if not."""
  for attempt in range(_TRIES):
    if data is not None and hashlib.sha256(data).hexdigest() == expected:
      return data
    if attempt < _TRIES - 1:
      data = store.read(name)
  raise BucketError(
    f'{store.address}/{name} does not have the checksum in its list: it is '
    'damaged; delete that folder and run the command that wrote it again.'
  )


def objects(path: files.PathLike) -> objects_lib.Objects | None:
  """The objects below a path in a copy; None for any other path."""
  url = address(path)
  return objects_lib.Objects(url) if url else None
