"""Reads lines of text files and JSON Lines, for all commands.

  opened(path)   a binary stream; .gz and .zst are decompressed
  lines(path)    (number, text) of each line, numbered from 1
  records(path)  (number, value) of each line of JSON that is not blank

Lines end with '\\n' or '\\r\\n' and with nothing else: U+2028 and its like may
stand in a JSON string. A byte order mark is dropped. Bytes that are not UTF-8
become U+FFFD, with one warning that names the file and the first such line.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pathlib
import warnings
import zlib
from collections.abc import Iterator
from typing import IO, Any

SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """Opens a file; .gz and .zst are decompressed.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is truncated or damaged (this may be raised while it is
      read), or it is a .zst file and zstandard is not installed.
  """
  path = pathlib.Path(path)
  try:
    with contextlib.ExitStack() as stack:
      stream = stack.enter_context(open(path, 'rb'))
      if path.name.endswith('.gz'):
        stream = stack.enter_context(gzip.open(stream, 'rb'))
      elif path.name.endswith('.zst'):
        stream = io.BufferedReader(_Zstandard(stream, path), _BLOCK_BYTES)
      yield stream
  except FileNotFoundError:
    raise
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(
      f'{path} cannot be read ({error}); it is damaged or not what its name '
      'says. Replace it.'
    ) from error


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
  """Number and text of each line, without its end."""
  warned = False
  with opened(path) as stream:
    for number, line in enumerate(stream, 1):
      try:
        text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
      except UnicodeDecodeError as error:
        refuse_utf_16(path, line)
        text = line.decode('utf-8', 'replace').removeprefix('\ufeff')
        if not warned:
          warn_of_bytes(f'{path}, line {number}', error)
          warned = True
      yield number, text.removesuffix('\n').removesuffix('\r')


def records(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
  """Number and value of each line; blank lines are passed over.

  Raises:
    ValueError: names the first line that is not JSON.
  """
  for number, line in lines(path):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f'{path}, line {number} is not JSON ({error}); a .jsonl file holds a '
        'JSON value in each line.'
      ) from error
    yield number, value


def warn_of_bytes(position: str, error: UnicodeDecodeError) -> None:
  """Says where a file has the first bytes that are not UTF-8."""
  warnings.warn(
    f'{position} is not UTF-8 ({error.reason} at byte {error.start}); such '
    'bytes are read as U+FFFD. Convert the file if they matter: '
    'iconv -f latin1 -t utf-8.',
    stacklevel=3,
  )


def refuse_utf_16(path: str | os.PathLike[str], data: bytes) -> None:
  """Refuses bytes that begin as a file of UTF-16 does."""
  if data.startswith((b'\xff\xfe', b'\xfe\xff')):
    raise ValueError(
      f'{path} is UTF-16 text; convert it to UTF-8: iconv -f utf-16 -t utf-8.'
    )


class _Zstandard(io.RawIOBase):
  """Decompresses a file of zstd frames; raises if the last one is incomplete.

  zstandard's own stream reader ends silently if a file is truncated.
  """

  def __init__(self, stream: IO[bytes], path: pathlib.Path):
    super().__init__()
    try:
      import zstandard
    except ImportError as error:
      raise ValueError(
        f'{path} needs the package zstandard: pip install zstandard.'
      ) from error
    self._library, self._stream = zstandard, stream
    self._frame = zstandard.ZstdDecompressor().decompressobj()
    self._begun, self._left = False, b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._left:
      data = self._frame.unused_data if self._frame.eof else b''
      data = data or self._stream.read(_BLOCK_BYTES)
      if not data:
        if self._begun and not self._frame.eof:
          raise EOFError('the file is cut off')
        return 0
      if self._frame.eof:
        self._frame = self._library.ZstdDecompressor().decompressobj()
      try:
        self._begun, self._left = True, self._frame.decompress(data)
      except self._library.ZstdError as error:
        raise OSError(str(error)) from error
    count = min(len(buffer), len(self._left))
    buffer[:count] = self._left[:count]
    self._left = self._left[count:]
    return count
