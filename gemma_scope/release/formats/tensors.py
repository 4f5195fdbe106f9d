"""safetensors files of an SAE: read warily, written the same every time.

a plain file under the size cap -> a header of at most 1 MB -> safetensors'
own checks (offsets, overlaps, whole file) -> known names, floating types ->
the caller's word on the shapes -> the data in float32, every value finite
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemma_scope.release import npz

_HEADER_BYTES = 1 << 20
_JSON_BYTES = 1 << 20
_TYPES = 'F64', 'F32', 'F16', 'BF16'
_WHOLE = 'I32', 'I64'
MAX_BYTES = 128 << 30


def read(
  path: str | os.PathLike[str],
  *,
  required: Collection[str],
  optional: Collection[str] = (),
  whole: Collection[str] = (),
  check: Callable[[npz.Shapes], None] = lambda shapes: None,
  max_bytes: int = MAX_BYTES,
) -> dict[str, np.ndarray]:
  """Reads a file of tensors as float32.

  Args:
    path: the file.
    required: names that must be there.
    optional: names that may be; any other is refused.
    whole: names that may hold whole numbers.
    check: is given every shape before data is read; may raise `npz.Refused`.
    max_bytes: the largest file to accept.

  Raises:
    npz.Refused: one sentence that starts with the file's name.
  """
  try:
    with npz.open_file(path, max_bytes) as (file, size):
      length = int.from_bytes(file.read(8), 'little')
      if length > min(_HEADER_BYTES, size - 8):
        raise npz.Refused(
          f'is no safetensors file of an SAE (its header would have {length:,} '
          'bytes)'
        )
    with safe_open(path, framework='np') as file:
      names = list(file.keys())
      shapes = {name: _shape(file, name, name in whole) for name in names}
      missing = [name for name in required if name not in shapes]
      if missing:
        raise npz.Refused(f'lacks {", ".join(missing)}')
      unknown = sorted(set(names) - {*required, *optional})
      if unknown:
        raise npz.Refused(f'holds {npz.show(unknown[0])}, which no SAE has')
      check(shapes)
      arrays = {}
      for name in names:
        arrays[name] = file.get_tensor(name).astype(np.float32)
        if not np.isfinite(arrays[name]).all():
          raise npz.Refused(f'has values in {name} that are not finite')
      return arrays
  except npz.Refused as error:
    raise npz.Refused(f'{npz.show(path)} {error}.') from None
  except (SafetensorError, OSError, ValueError, MemoryError) as error:
    raise npz.Refused(
      f'{npz.show(path)} is not a whole safetensors file '
      f'({str(error)[:120]}); fetch or write it again.'
    ) from None


def _shape(file, name: str, whole: bool) -> tuple[int, ...]:
  found = file.get_slice(name)
  if found.get_dtype() not in (*_TYPES, *_WHOLE * whole):
    raise npz.Refused(
      f'has {npz.show(name)} in {found.get_dtype()}; expected one of '
      f'{", ".join(_TYPES)}'
    )
  return tuple(found.get_shape())


def write(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], **metadata: str
) -> None:
  """Writes float32 tensors; equal ones give equal bytes. Syncs to disk."""
  arrays = {k: np.array(a, np.float32, order='C') for k, a in arrays.items()}
  with open(path, 'xb') as file:
    file.write(save(arrays, metadata=metadata or None))
    file.flush()
    os.fsync(file.fileno())


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object as text that people read."""
  path.write_text(json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A small JSON object.

  Raises:
    npz.Refused: it is none.
  """
  try:
    with npz.open_file(path, _JSON_BYTES) as (file, _):
      found = json.loads(file.read())
  except npz.Refused as error:
    raise npz.Refused(f'{npz.show(path)} {error}.') from None
  except (ValueError, RecursionError) as error:
    raise npz.Refused(
      f'{npz.show(path)} is not JSON ({str(error)[:120]}).'
    ) from None
  if not isinstance(found, dict):
    raise npz.Refused(f'{npz.show(path)} is not a JSON object.')
  return found
