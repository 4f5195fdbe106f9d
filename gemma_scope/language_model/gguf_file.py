"""The GGUF container: its metadata and its tensors, still quantised.

  magic 'GGUF', version, counts | metadata: key, type, value | tensors: name,
  shape (innermost axis first), type, offset | padding | the tensors' bytes

Only the header is parsed here, so that a vocabulary of 262,144 strings takes
half a second (the `gguf` package's own reader takes many and 0.7 GB). What the
types mean, and how their blocks are dequantised, is the `gguf` package's.

Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

# Type codes of metadata values -> NumPy; 7 is a bool, 8 a string, 9 an array.
_SCALARS = {
  0: 'u1',
  1: 'i1',
  2: '<u2',
  3: '<i2',
  4: '<u4',
  5: '<i4',
  6: '<f4',
  7: '?',
  10: '<u8',
  11: '<i8',
  12: '<f8',
}
_STRING, _ARRAY = 8, 9
_VERSIONS = 2, 3
_ALIGNMENT = 32  # unless the metadata says another


class BadFile(ValueError):
  """A GGUF file that cannot be read; says why."""


@functools.cache
def library():
  """The `gguf` package; a sentence where it is missing."""
  try:
    import gguf
  except ImportError as error:
    raise ImportError(
      'Reading a GGUF file needs the gguf package, which is not installed: '
      "run launch/setup.sh gemma3-270m, or pip install 'gguf>=0.19'."
    ) from error
  return gguf


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor [..., rows, columns] or [size] of a file, dequantised in parts.

  A part is what NumPy's slicing of its axes says; only its rows are read and
  dequantised, to float32.
  """

  name: str
  shape: tuple[int, ...]  # outermost axis first, as in NumPy
  kind: str  # of its numbers: 'F32', 'Q4_K', ...
  data: np.ndarray  # uint8 [rows, bytes of a row], mapped from the file

  def get_shape(self) -> tuple[int, ...]:
    return self.shape

  def __getitem__(self, index) -> np.ndarray:
    gguf = library()
    index = index if isinstance(index, tuple) else (index,)
    *rows, columns = (0, *index) if len(self.shape) == 1 else index
    data = self.data.reshape(*(self.shape[:-1] or (1,)), -1)[tuple(rows)]
    kind = gguf.GGMLQuantizationType[self.kind]
    data = np.ascontiguousarray(data)
    if data.ndim == 1:
      return gguf.dequantize(data[None], kind)[0, columns]
    return gguf.dequantize(data, kind)[..., columns]


@dataclasses.dataclass(frozen=True)
class File:
  path: pathlib.Path
  metadata: dict[str, Any]  # arrays as lists of str or NumPy arrays
  tensors: dict[str, Tensor]


def open_file(path: pathlib.Path) -> File:
  """Reads the header and maps the tensors; a second call costs nothing.

  Raises:
    BadFile: the file is no GGUF file, is truncated, or has a tensor of a type
      that cannot be dequantised.
    FileNotFoundError: there is no such file.
  """
  path = pathlib.Path(path)
  status = path.stat()
  return _open_file(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open_file(path: pathlib.Path, size: int, _: int) -> File:
  if size < 4:
    raise BadFile(f'{str(path)!r} is not a GGUF file.')
  data = np.memmap(path, np.uint8, mode='r')
  try:
    return _parse(path, data)
  except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
    raise BadFile(
      f'{str(path)!r} is damaged or truncated: its header does not end before '
      'the file does. Download it again.'
    ) from error


class _Reader:
  """Numbers and strings, one after the other."""

  def __init__(self, data: np.ndarray):
    self.data, self.offset = memoryview(data), 0

  def number(self, code: int) -> Any:
    return self.numbers(code, 1)[0].item()

  def numbers(self, code: int, count: int) -> np.ndarray:
    dtype = np.dtype(_SCALARS[code])
    return np.frombuffer(self._take(dtype.itemsize * count), dtype)

  def string(self) -> str:
    (length,) = struct.unpack_from('<Q', self.data, self.offset)
    self.offset += 8
    return str(self._take(length), 'utf-8')

  def value(self, code: int) -> Any:
    if code == _STRING:
      return self.string()
    if code != _ARRAY:
      return self.number(code)
    item_code, count = self.number(4), self.number(10)
    if item_code in _SCALARS:
      return self.numbers(item_code, count)
    return [self.value(item_code) for _ in range(count)]

  def _take(self, count: int) -> memoryview:
    if count > len(self.data) - self.offset:
      raise IndexError
    self.offset += count
    return self.data[self.offset - count : self.offset]


def _parse(path: pathlib.Path, data: np.ndarray) -> File:
  if data[:4].tobytes() != b'GGUF':
    raise BadFile(f'{str(path)!r} is not a GGUF file.')
  reader = _Reader(data)
  reader.offset = 4
  version = reader.number(4)
  if version not in _VERSIONS:
    raise BadFile(
      f'{str(path)!r} is of GGUF version {version}; versions 2 and 3 in '
      'little-endian byte order can be read.'
    )
  tensor_count, metadata_count = reader.number(10), reader.number(10)
  metadata = {}
  for _ in range(metadata_count):
    key = reader.string()
    code = reader.number(4)
    if code not in (*_SCALARS, _STRING, _ARRAY):
      raise BadFile(f'{str(path)!r} has metadata {key} of unknown type {code}.')
    metadata[key] = reader.value(code)
  infos = []
  for _ in range(tensor_count):
    name = reader.string()
    shape = tuple(reader.numbers(10, reader.number(4))[::-1].tolist())
    infos.append((name, shape, reader.number(4), reader.number(10)))
  alignment = metadata.get('general.alignment', _ALIGNMENT)
  start = -(-reader.offset // alignment) * alignment
  tensors = {
    name: _tensor(path, data[start + offset :], name, shape, code)
    for name, shape, code, offset in infos
  }
  return File(path, metadata, tensors)


def _tensor(path, data, name, shape, code) -> Tensor:
  """Checks a tensor's type and extent; `data` begins with it."""
  gguf = library()
  try:
    kind = gguf.GGMLQuantizationType(code)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
  except (ValueError, KeyError, NotImplementedError) as error:
    names = [type_.name for type_ in gguf.GGMLQuantizationType if type_ == code]
    raise BadFile(
      f'{name} in {str(path)!r} is of type {names[0] if names else code}, '
      'which the installed gguf package cannot dequantise: upgrade it, or take '
      'the file in another quantisation.'
    ) from error
  if len(shape) not in (1, 2, 3) or shape[-1] % block_size:
    raise BadFile(
      f'{name} in {str(path)!r} has shape {shape}, which cannot be of type '
      f'{kind.name} in a Gemma.'
    )
  row_bytes = shape[-1] // block_size * block_bytes
  count = math.prod(shape[:-1]) * row_bytes
  if count > len(data):
    raise BadFile(
      f'{str(path)!r} is truncated: {name} lies beyond its end. Download it '
      'again.'
    )
  return Tensor(name, shape, kind.name, data[:count].reshape(-1, row_bytes))


def check_metadata(
  file: File,
  own_metadata: Mapping[str, Any],
  *,
  needed: Collection[str],
  known: Collection[str],
  equal: Mapping[str, str],
) -> None:
  """Refuses metadata of a model that its forward pass does not compute.

  Args:
    own_metadata: the metadata after the name of the architecture.
    needed, known: the keys that must occur, and those that may.
    equal: key -> another key, whose value it must have if it occurs.

  Raises:
    BadFile: a key is missing, unknown, or contradicts another.
  """
  path, prefix = str(file.path), file.metadata['general.architecture']
  if missing := [key for key in needed if key not in own_metadata]:
    raise BadFile(f'{path!r} lacks the metadata {prefix}.{missing[0]}.')
  if unknown := [key for key in own_metadata if key not in known]:
    raise BadFile(
      f'{path!r} has metadata {prefix}.{unknown[0]}, which this forward pass '
      'does not know.'
    )
  for key, other_key in equal.items():
    if (
      own_metadata.get(key, own_metadata[other_key]) != own_metadata[other_key]
    ):
      raise BadFile(
        f'{path!r}: {key} is {own_metadata[key]}, and {other_key} is '
        f'{own_metadata[other_key]}.'
      )
