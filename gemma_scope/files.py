"""Writes files and folders atomically, and opens untrusted files.

A writer works on a hidden draft beside the target, `.NAME.partial-HOST-PID-N`,
syncs it to disk and renames it: readers meet the old file or the new one, never
half of one. A draft that a killed process left is removed by the next writer.

`open_plain` opens a file of unknown origin, which must be a plain file under a
size limit. Otherwise it raises `Refused`, with one sentence.

An address ('gs://bucket/run') is no path: `pathlib` would make a local folder
named 'gs:' of it. `refuse_address` is called wherever a path comes in.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from gemma_scope import uploads

PathLike = str | os.PathLike[str]

_numbers = itertools.count()
_in_flight: set[str] = set()  # names of this process's drafts


class Refused(ValueError):
  """A file that is not what it should be; the text is one sentence."""


_ADDRESS = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*):/')


def scheme(path: PathLike) -> str:
  """'gs' of 'gs://bucket/run'; '' for a path of this machine.

  'gs:/bucket/run' has it as well: that is what `pathlib` leaves of an address.
  """
  match = _ADDRESS.match(os.fspath(path))
  return match[1] if match else ''


def refuse_address(path: PathLike, name: str, hint: str = '') -> None:
  """Refuses an address where a path of this machine is expected.

  Args:
    path: what was given.
    name: of the flag, field or argument, for the message.
    hint: what to do instead, after a colon.

  Raises:
    ValueError: it is an address.
  """
  if scheme(path):
    raise ValueError(
      f'{name} must be a path on this machine; found the address '
      f'{show(path)}{hint and f": {hint}"}.'
    )


class NotWritten(OSError):
  """A file or folder that could not be written; the text is one sentence."""


def show(name: object) -> str:
  """A name for a message: quoted, control characters escaped, shortened."""
  text = repr(str(name))
  return text if len(text) < 200 else f'{text[:90]}...{text[-90:]}'


def near(path: PathLike) -> str:
  """' Did you mean ...?' for a path that does not exist; '' without a guess.

  The first part that does not exist is compared with the names beside it.
  """
  path = pathlib.Path(path)
  for ancestor in (*reversed(path.parents), path):
    if ancestor.exists():
      continue
    try:
      names = sorted(os.listdir(ancestor.parent))
    except OSError:
      return ''
    for guess in difflib.get_close_matches(ancestor.name, names, 1):
      nearest = ancestor.with_name(guess)
      file = nearest / path.relative_to(ancestor)
      return f' Did you mean {show(file if file.exists() else nearest)}?'
    break
  return ''


def check_room(path: PathLike, needed: int, subject: str) -> None:
  """Refuses to begin to write what the disk has no room for.

  Args:
    path: where it will be; need not exist.
    needed: bytes.
    subject: the subject of the sentence.

  Raises:
    NotWritten: fewer bytes are free.
  """
  path = pathlib.Path(os.path.abspath(path))
  existing = next(p for p in (path, *path.parents) if p.exists())
  free_bytes = shutil.disk_usage(existing).free
  if needed > free_bytes:
    raise NotWritten(
      f'{subject} needs {needed:,} bytes in {show(path)}, and {free_bytes:,} '
      'are free: make room or choose another folder.'
    )


@contextlib.contextmanager
def whole_file(path: PathLike) -> Iterator[BinaryIO]:
  """A binary file that appears under `path` when the block ends without error.

  The folder must exist. A file of that name is replaced.
  """
  refuse_address(path, 'A file to write')
  path = pathlib.Path(path)
  with _naming(path), _draft(path) as draft:
    with open(draft, 'xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
    _sync(path.parent)
  uploads.publish(path)


@contextlib.contextmanager
def whole_folder(
  path: PathLike, replace: bool = False
) -> Iterator[pathlib.Path]:
  """A folder that appears under `path` when the block ends without error.

  Args:
    path: of the folder; the folders above it are made.
    replace: whether one that has files is replaced; else FileExistsError.

  Yields:
    An empty folder to write into.
  """
  refuse_address(path, 'A folder to write')
  path = pathlib.Path(os.path.realpath(path))
  aside = path.with_name(f'.{path.name}.replaced')
  with _naming(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path.parent):
      if replace and aside.exists() and not path.exists():
        os.rename(aside, path)  # the last writer stopped between two renames
    with _draft(path) as draft:
      os.mkdir(draft)
      yield draft
      for folder, _, names in os.walk(draft):
        for name in names:
          _sync(os.path.join(folder, name))
        _sync(folder)
      with _turn(path.parent):
        if replace and path.exists():
          _remove(aside)
          os.rename(path, aside)
        try:
          os.rename(draft, path)
        except OSError as error:
          if path.exists():
            raise FileExistsError(f'{show(path)} is not empty') from error
          if aside.exists():
            os.rename(aside, path)
          raise
        _sync(path.parent)
        if replace:
          _remove(aside)
  uploads.publish(path)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Turns an error of the system into a sentence that names the target."""
  try:
    yield
  except OSError as error:
    explained = isinstance(error, (NotWritten, FileExistsError))
    if explained or not _is_of_writing(error, path):
      raise
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      with contextlib.suppress(OSError):
        existing = next(p for p in path.parents if p.exists())
        why += f', {shutil.disk_usage(existing).free:,} bytes are free'
    sentence = NotWritten(
      f'{show(path)} could not be written ({why}); what was there is unchanged.'
    )
    sentence.errno = error.errno
    raise sentence from error


def _is_of_writing(error: OSError, path: pathlib.Path) -> bool:
  """Whether the error is about the target, not a file its writer reads."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
    return True
  if error.filename is None:  # of an open file
    return error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
  name, target = map(os.path.abspath, (error.filename, path))
  draft = os.path.join(os.path.dirname(target), f'.{path.name}.')
  return name in (target, os.path.dirname(target)) or name.startswith(draft)


def write_bytes(path: PathLike, data: bytes) -> None:
  """Writes a file, whole or not at all."""
  with whole_file(path) as file:
    file.write(data)


def write_text(path: PathLike, text: str) -> None:
  """Writes text as UTF-8, whole or not at all."""
  write_bytes(path, text.encode('utf-8', 'backslashreplace'))


def write_json(path: PathLike, value: Any, **options: Any) -> None:
  """Writes JSON, whole or not at all; `options` as of `json.dumps`."""
  write_text(path, json.dumps(value, **options) + '\n')


@contextlib.contextmanager
def named(path: PathLike) -> Iterator[None]:
  """Names the file in an error of an open file, which names none."""
  try:
    yield
  except OSError as error:
    error.filename = os.fspath(path)
    raise


def read_json(path: PathLike) -> dict[str, Any]:
  """Reads a JSON object that this project wrote.

  Raises:
    Refused: it is damaged.
  """
  try:
    with named(path), open(path, encoding='utf-8') as file:
      content = json.load(file)
    if not isinstance(content, dict):
      raise ValueError('it is not a JSON object')
  except (ValueError, RecursionError) as error:
    raise Refused(f'{show(path)} is damaged ({str(error)[:100]}).') from None
  return content


def sha256(path: PathLike) -> str:
  """SHA-256 of a file's bytes, in hexadecimal."""
  with named(path), open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def json_sha256(value: Any, **options: Any) -> str:
  """SHA-256 of a value's JSON with sorted keys, in hexadecimal."""
  text = json.dumps(value, sort_keys=True, **options)
  return hashlib.sha256(text.encode('ascii')).hexdigest()


@contextlib.contextmanager
def open_plain(
  path: PathLike, max_bytes: int
) -> Iterator[tuple[BinaryIO, int]]:
  """Opens a plain file to read, unbuffered.

  Args:
    path: the file; a symbolic link only in huggingface_hub's cache.
    max_bytes: the largest size to accept.

  Yields:
    (the open file, its size in bytes).

  Raises:
    Refused: the text continues a sentence that begins with the file's name.
  """
  # O_NONBLOCK: opening a pipe must not wait for its writer.
  flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
  try:
    descriptor = os.open(_cached(path), flags)
  except FileNotFoundError:
    raise Refused('does not exist') from None
  except (OSError, ValueError) as error:
    if os.path.islink(path):
      raise Refused('is a symbolic link') from None
    raise Refused(f'cannot be opened ({error})') from None
  try:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
      raise Refused('is not a plain file')
    if status.st_size > max_bytes:
      raise Refused(
        f'has {status.st_size:,} bytes, and at most {max_bytes:,} are expected'
      )
    with open(descriptor, 'rb', buffering=0, closefd=False) as file:
      yield file, status.st_size
  except OSError as error:
    raise Refused(f'cannot be read ({error})') from None
  finally:
    os.close(descriptor)


def _cached(path: PathLike) -> PathLike:
  """The file behind a link of huggingface_hub's cache; else `path` itself.

  There snapshots/REVISION/... are links into blobs/ of the same repository.
  """
  if not os.path.islink(path):
    return path
  target = pathlib.Path(os.path.realpath(path))
  for ancestor in pathlib.Path(os.path.abspath(path)).parents:
    if ancestor.name == 'snapshots':
      is_blob = target.parent == (ancestor.parent / 'blobs').resolve()
      return target if is_blob else path
  return path


@contextlib.contextmanager
def _draft(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A free hidden name beside `path`; whatever is left there is removed."""
  if path.exists() and not (path.is_file() or path.is_dir()):
    raise NotWritten(f'{show(path)} is a device or a pipe: name a file.')
  start = f'.{path.name}.partial-{platform.node()}-'
  for name in os.listdir(path.parent):
    if name.startswith(start) and name not in _in_flight:
      process = name.removeprefix(start).split('-')[0]
      same_number = process == str(os.getpid())  # of one that had our number
      if process.isdigit() and (same_number or not is_alive(int(process))):
        _remove(path.with_name(name))
  name = f'{start}{os.getpid()}-{next(_numbers)}'
  _in_flight.add(name)
  try:
    yield path.with_name(name)
  finally:
    _remove(path.with_name(name))
    _in_flight.discard(name)


def is_alive(process: int) -> bool:
  """Whether a process of this machine has the number."""
  try:
    os.kill(process, 0)
  except OSError as error:  # another is that it belongs to another user
    return not isinstance(error, ProcessLookupError)
  return True


@contextlib.contextmanager
def _turn(folder: pathlib.Path) -> Iterator[None]:
  """Processes take turns to replace a folder's entries, if it has locks."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def _sync(path: PathLike) -> None:
  """Makes a file, or the names in a folder, survive a loss of power."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:  # file systems that cannot sync a folder
    if not os.path.isdir(path):
      raise
  finally:
    os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)
