"""Writes and reads float32 arrays in an .npz file, deterministic and checked.

An npz is a zip of .npy files. `write` fixes everything that could differ
between two writings of the same arrays (order, time stamps, attributes), so
equal arrays give equal bytes and equal hashes.

`read` checks in this order; no step but the last needs much memory:

  a plain file, not a link or a pipe, below the size limit
  -> a zip directory of at most `len(required) + len(optional)` entries
  -> only the known names, each once, stored and not compressed
  -> each header: little-endian float32, and the shape it declares fills its
     entry to the byte (so a declared size can never pass the file's own)
  -> the caller's check of the shapes -> the SHA-256 if one is known
  -> the data, with the zip's CRC -> every value finite

Nothing here can run code from the file: numpy parses a header as a literal,
and arrays of objects have no way in.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np

from gemma_scope import files

Shapes = Mapping[str, tuple[int, ...]]

# The zip directory of seven entries is under 1 kB.
_DIRECTORY_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 22


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]):
  """Writes float32 arrays, uncompressed, in the order given."""
  with files.whole_file(path) as file:
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
      for name, array in arrays.items():
        entry = zipfile.ZipInfo(f'{name}.npy', (1980, 1, 1, 0, 0, 0))
        entry.create_system = 3  # the same bytes on every system
        entry.external_attr = 0o644 << 16
        # zip64 always: an entry's size must not change the entry's form.
        with archive.open(entry, 'w', force_zip64=True) as stream:
          np.lib.format.write_array(
            stream,
            np.asarray(array, '<f4', order='C'),
            version=(1, 0),
            allow_pickle=False,
          )


def shapes(
  path: str | os.PathLike[str],
  *,
  required: Sequence[str],
  optional: Sequence[str] = (),
  max_bytes: int,
) -> dict[str, tuple[int, ...]]:
  """Every array's shape, from the headers alone; arguments as of `read`."""
  with _opened(path, required, optional, max_bytes) as (_, _, _, by_name):
    return by_name


def read(
  path: str | os.PathLike[str],
  *,
  required: Sequence[str],
  optional: Sequence[str] = (),
  check: Callable[[Shapes], None],
  max_bytes: int,
  sha256: str | None = None,
) -> dict[str, np.ndarray]:
  """Reads an npz of float32 arrays; all else is refused before it is loaded.

  Args:
    path: the file.
    required: names of the arrays that must be there.
    optional: names that may be. Lower-case spellings of both are accepted.
    check: is given every array's shape before any data is read, and raises
      `files.Refused` when it does not like them.
    max_bytes: the largest file to accept.
    sha256: hex digest that the file must have; None: not known.

  Returns:
    Arrays under the names of `required` and `optional`, in that order.

  Raises:
    files.Refused: one sentence that starts with the file's name.
  """
  opened = _opened(path, required, optional, max_bytes)
  with opened as (file, archive, entries, by_name):
    check(by_name)
    if sha256 is not None:
      file.seek(0)
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
      if digest != sha256:
        raise files.Refused(
          f'is damaged or was changed: its SHA-256 should be '
          f'{sha256[:12]}... and is {digest[:12]}...'
        )
    return {name: _data(archive, entries[name], name) for name in by_name}


@contextlib.contextmanager
def _opened(path, required, optional, max_bytes):
  """(file, archive, name -> entry, name -> shape), errors as sentences."""
  known = {f'{name}.npy'.lower(): name for name in (*required, *optional)}
  try:
    with files.open_plain(path, max_bytes) as (file, size):
      entries = _entries(file, size, known)
      missing = [name for name in required if name not in entries]
      if missing:
        raise files.Refused(f'lacks {", ".join(missing)}')
      with zipfile.ZipFile(_Bounded(file)) as archive:
        by_name = {}
        for name in (name for name in known.values() if name in entries):
          with archive.open(entries[name]) as stream:
            by_name[name] = _header(stream, name, entries[name], size)
        yield file, archive, entries, by_name
  except files.Refused as error:
    raise files.Refused(f'{files.show(path)} {error}.') from None
  except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
    raise files.Refused(
      f'{files.show(path)} is not a whole npz file ({str(error)[:120]}); fetch '
      'or write it again.'
    ) from None
  except (OSError, RuntimeError, ValueError, MemoryError) as error:
    raise files.Refused(
      f'{files.show(path)} cannot be read as an npz file '
      f'({type(error).__name__}: {str(error)[:120]}).'
    ) from None


class _Bounded(io.RawIOBase):
  """Refuses a large read: zipfile reads a whole directory at once."""

  def __init__(self, file: BinaryIO):
    super().__init__()
    self._file = file

  def readable(self):
    return True

  def seekable(self):
    return True

  def seek(self, offset, whence=os.SEEK_SET):
    return self._file.seek(offset, whence)

  def tell(self):
    return self._file.tell()

  def read(self, size=-1):
    if size is None or size < 0:
      position = self._file.tell()
      size = self._file.seek(0, os.SEEK_END) - position
      self._file.seek(position)
    if size > _BLOCK_BYTES:
      raise files.Refused(f'has a zip directory of {size:,} bytes')
    return self._file.read(size)


def _entries(
  file: BinaryIO, size: int, known: Mapping[str, str]
) -> dict[str, zipfile.ZipInfo]:
  """Reads the zip directory: array name -> entry; other names are refused."""
  file.seek(0)
  if file.read(4) != b'PK\x03\x04':
    raise files.Refused('is not an npz file (it does not begin as a zip does)')
  directory = _Directory(file)
  with zipfile.ZipFile(directory) as archive:
    infos = archive.infolist()
  entries = {}
  for info in infos:
    name = known.get(info.filename.lower())
    if name is None:
      raise files.Refused(
        f'holds {files.show(info.filename)}, which is no parameter of an SAE; '
        f'expected '
        f'{", ".join(known.values())} only'
      )
    if name in entries:
      raise files.Refused(f'holds {name} twice')
    if info.flag_bits & 0x1:
      raise files.Refused(f'holds {name} encrypted')
    if (
      info.compress_type != zipfile.ZIP_STORED
      or info.compress_size != info.file_size
    ):
      raise files.Refused(
        f'holds {name} compressed ({info.compress_size:,} bytes for '
        f'{info.file_size:,}); write it with np.savez, which does not compress'
      )
    entries[name] = info
  other_bytes = size - sum(info.file_size for info in infos)
  if not 0 <= other_bytes <= _DIRECTORY_BYTES:
    raise files.Refused(
      f'has {size:,} bytes, {other_bytes:,} more than its arrays; expected '
      'only the arrays'
    )
  return entries


class _Directory(_Bounded):
  """Limits what zipfile may read of the directory in total."""

  _left = 4 * _DIRECTORY_BYTES

  def read(self, size=-1):
    data = super().read(size)
    self._left -= len(data)
    if self._left < 0:
      raise files.Refused('has a zip directory much larger than an SAE needs')
    return data


def _header(
  stream: BinaryIO, name: str, entry: zipfile.ZipInfo, size: int
) -> tuple[int, ...]:
  """Reads one .npy header: the shape, which fills its entry to the byte."""
  try:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
      raise files.Refused(f'holds {name} with no numpy header of version 1.0')
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
  except files.Refused:
    raise
  except ValueError:
    raise files.Refused(
      f'holds {name} with a header that numpy does not write'
    ) from None
  if dtype.str != '<f4':
    raise files.Refused(
      f"holds {name} as {dtype.str!r}; expected float32 ('<f4')"
    )
  if 0 in shape:
    raise files.Refused(f'holds {name} as {shape}, which is empty')
  declared = stream.tell() + 4 * math.prod(shape)
  if declared != entry.file_size or declared > size:
    raise files.Refused(
      f'declares {name} as {shape}, {declared:,} bytes with its header, '
      f'and holds {entry.file_size:,}'
    )
  return shape


def _data(
  archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str
) -> np.ndarray:
  """Reads one array; the zip checks its CRC as the last byte passes."""
  with archive.open(entry) as stream:
    array = np.lib.format.read_array(stream, allow_pickle=False)
    stream.read(1)  # past the end: the CRC is compared here at the latest
  # min and max carry a NaN through and need no second array.
  if not (np.isfinite(array.min()) and np.isfinite(array.max())):
    raise files.Refused(f'holds values in {name} that are not finite')
  return np.asarray(array, order='C')  # Fortran order is turned
