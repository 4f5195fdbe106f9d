"""safetensors files of an SAE, checked as they are read; configs in JSON.

a plain file below the size limit -> a header of at most 1 MB -> safetensors'
own checks (offsets, overlaps, whole file) -> known names, floating types ->
the data in float32, every value finite
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemma_scope import files
from gemma_scope.release import folder

_HEADER_BYTES = 1 << 20
_JSON_BYTES = 1 << 20
_TYPES = 'F64', 'F32', 'F16', 'BF16'
_WHOLE = 'I32', 'I64'
MAX_BYTES = folder.MAX_BYTES


def shapes(
  path: str | os.PathLike[str],
  *,
  required: Collection[str],
  optional: Collection[str] = (),
  integers: Collection[str] = (),
  max_bytes: int = MAX_BYTES,
) -> dict[str, tuple[int, ...]]:
  """Every tensor's shape, from the header alone; arguments as of `read`."""
  with _opened(path, required, optional, integers, max_bytes) as (_, by_name):
    return by_name


def read(
  path: str | os.PathLike[str],
  *,
  required: Collection[str],
  optional: Collection[str] = (),
  integers: Collection[str] = (),
  max_bytes: int = MAX_BYTES,
) -> dict[str, np.ndarray]:
  """Reads a file of tensors as float32.

  Args:
    path: the file.
    required: names that must be there.
    optional: names that may be there; any other is refused.
    integers: names that may hold whole numbers.
    max_bytes: the largest file to accept.

  Raises:
    files.Refused: one sentence that starts with the file's name.
  """
  with _opened(path, required, optional, integers, max_bytes) as (
    file,
    by_name,
  ):
    arrays = {}
    for name in by_name:
      arrays[name] = file.get_tensor(name).astype(np.float32)
      if not np.isfinite(arrays[name]).all():
        raise files.Refused(f'has values in {name} that are not finite')
    return arrays


@contextlib.contextmanager
def _opened(path, required, optional, integers, max_bytes):
  """Yields (the open file, name -> shape); errors become one sentence."""
  try:
    with naming(path), files.open_plain(path, max_bytes) as (file, size):
      length = int.from_bytes(file.read(8), 'little')
      if length > min(_HEADER_BYTES, size - 8):
        raise files.Refused(
          f'is no safetensors file of an SAE (its header would have {length:,} '
          'bytes)'
        )
    with naming(path), safe_open(path, framework='np') as file:
      names = list(file.keys())
      by_name = {name: _shape(file, name, name in integers) for name in names}
      missing = [name for name in required if name not in by_name]
      if missing:
        raise files.Refused(f'lacks {", ".join(missing)}')
      unknown = sorted(set(names) - {*required, *optional})
      if unknown:
        raise files.Refused(
          f'holds {files.show(unknown[0])}, which is no parameter that this '
          'reader knows'
        )
      yield file, by_name
  except files.Refused:
    raise
  except (SafetensorError, OSError, ValueError, MemoryError) as error:
    raise files.Refused(
      f'{files.show(path)} is not a whole safetensors file '
      f'({str(error)[:120]}); fetch or write it again.'
    ) from None


def _shape(file, name: str, integer: bool) -> tuple[int, ...]:
  tensor = file.get_slice(name)
  if tensor.get_dtype() not in (*_TYPES, *_WHOLE * integer):
    raise files.Refused(
      f'has {files.show(name)} in {tensor.get_dtype()}; expected one of '
      f'{", ".join(_TYPES)}'
    )
  return tuple(tensor.get_shape())


def write(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], **metadata: str
) -> None:
  """Writes float32 tensors; equal ones give equal bytes."""
  arrays = {
    key: np.array(array, np.float32, order='C') for key, array in arrays.items()
  }
  files.write_bytes(path, save(arrays, metadata=metadata or None))


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object, indented."""
  files.write_json(path, value, indent=2)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a small JSON object.

  Raises:
    files.Refused: the file is no JSON object.
  """
  try:
    with naming(path), files.open_plain(path, _JSON_BYTES) as (file, _):
      value = json.loads(file.read())
  except files.Refused:
    raise
  except (ValueError, RecursionError) as error:
    raise files.Refused(
      f'{files.show(path)} is not JSON ({str(error)[:120]}).'
    ) from None
  if not isinstance(value, dict):
    raise files.Refused(f'{files.show(path)} is not a JSON object.')
  return value


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Makes a refusal a whole sentence that begins with the file's name."""
  try:
    yield
  except files.Refused as error:
    text = str(error)
    complete = text.startswith(("'", '"'))
    raise files.Refused(
      text if complete else f'{files.show(path)} {text}.'
    ) from None


def check_fields(
  config: Mapping[str, Any], known: Collection[str], writer: str
) -> None:
  """Refuses a config with a field whose meaning is not known.

  Raises:
    files.Refused: the text continues a sentence that begins with the file.
  """
  unknown = sorted(set(config) - set(known))
  if unknown:
    raise files.Refused(
      f'has the field {files.show(unknown[0])}, which {writer} does not write '
      'and which may change what the SAE computes; remove the field if it does '
      'not'
    )
