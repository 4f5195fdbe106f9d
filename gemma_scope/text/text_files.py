"""Documents of files that a glob matches: text, JSON Lines, parquet.

  .txt .md .py        one document a file; .gz and .zst are decompressed
  .jsonl              one document a line, the string under `column`
  .parquet            one document a row, the strings of `column`

Names are relative to the part of the glob without wildcards.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_scope import files
from gemma_scope.text import corpus, json_lines, standard_library

DEFAULT_COLUMN = 'text'
_TEXT = re.compile(r'\.(txt|md|py)(\.gz|\.zst)?$')
_ROWS = 256  # of a parquet file, read at once


def matches(pattern: str, kind: str) -> list[tuple[str, pathlib.Path]]:
  """Relative name and path of each file, sorted by name.

  Raises:
    ValueError: there is none; `kind` is what the pattern follows.
  """
  files.refuse_address(pattern, f'The pattern of {kind}:')
  pattern = os.path.expanduser(pattern)
  paths = [pathlib.Path(path) for path in glob.glob(pattern, recursive=True)]
  paths = [path for path in paths if path.is_file()]
  if not paths:
    raise ValueError(
      f'{kind}:{pattern} matches no file; check the pattern (quote it in a '
      'shell) and the folder it is relative to.'
    )
  root = pathlib.Path(pattern).parent
  while glob.has_magic(str(root)):
    root = root.parent
  return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def read(pattern: str, column: str = '') -> Iterator[corpus.Document]:
  """The documents of all matching files, file by file."""
  paths = matches(pattern, 'files')
  for name, _ in paths:  # before the first document, not after hours
    if _TEXT.search(name) or name.endswith('.parquet'):
      continue
    if not name.endswith(json_lines.SUFFIXES):
      raise ValueError(
        f'{name} is matched by files:{pattern}, which reads .txt, .md, .py and '
        '.jsonl (each also with .gz or .zst) and .parquet; narrow the pattern.'
      )
  if column and all(_TEXT.search(name) for name, _ in paths):
    raise ValueError(
      f'files:{pattern} has no columns, so column={column!r} means nothing: '
      'only .jsonl and .parquet have them.'
    )
  warned = False
  for name, path in paths:
    if name.endswith('.parquet'):
      yield from _parquet(name, path, column)
    elif name.endswith(json_lines.SUFFIXES):
      for number, record in json_lines.records(path):
        position = f'{path}, line {number}'
        text = text_of(record, column or DEFAULT_COLUMN, position)
        yield corpus.Document(f'{name}#{number}', text)
    else:
      text, error = _whole(name, path)
      if error and not warned:
        json_lines.warn_of_bytes(str(path), error)
        warned = True
      yield corpus.Document(name, text)


def _whole(
  name: str, path: pathlib.Path
) -> tuple[str, UnicodeDecodeError | None]:
  """The text of a file, and what is wrong where it is not UTF-8.

  A bad byte costs one character, not the file.
  """
  with json_lines.opened(path) as stream:
    data = stream.read()
  is_code = _TEXT.search(name)[1] == 'py'
  text = standard_library.decode(data) if is_code else None
  problem = None
  if text is None:
    json_lines.refuse_utf_16(path, data)
    try:
      text = data.decode('utf-8')
    except UnicodeDecodeError as error:
      text, problem = data.decode('utf-8', 'replace'), error
  return corpus.valid(text.removeprefix('\ufeff')), problem


def text_of(record: Any, column: str, position: str) -> str:
  """The string under `column` of a JSON object; '' where it is null.

  Raises:
    ValueError: begins with `position`.
  """
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise ValueError(f'{position}: expected a JSON object, found a {kind}.')
  value = record.get(column, 0)
  if value is None:
    return ''
  if not isinstance(value, str):
    texts = [key for key, item in record.items() if isinstance(item, str)]
    raise ValueError(
      f'{position}: expected a string under {column!r}. {_choice(texts)}'
    )
  return corpus.valid(value)


def choose_column(columns: Mapping[str, bool], column: str, source: str) -> str:
  """The column to read: the one asked for, 'text', or the only one of text.

  Args:
    columns: name -> whether it holds text.
    column: '' leaves the choice to this function.
    source: what has the columns, for the error.
  """
  texts = [name for name, holds_text in columns.items() if holds_text]
  if not column and len(texts) == 1:
    return texts[0]
  column = column or DEFAULT_COLUMN
  if column not in texts:
    raise ValueError(
      f'{source} has no column of text {column!r}. {_choice(texts)}'
    )
  return column


def _choice(texts: Sequence[str]) -> str:
  if not texts:
    return 'Nothing in it is text.'
  return f'Choose text.column (--column) from {", ".join(map(repr, texts))}.'


def _parquet(
  name: str, path: pathlib.Path, column: str
) -> Iterator[corpus.Document]:
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError(
      f'{path} needs the package pyarrow: pip install pyarrow.'
    ) from error
  try:
    with parquet.ParquetFile(path) as file:
      columns = {
        field.name: pa.types.is_string(field.type)
        or pa.types.is_large_string(field.type)
        for field in file.schema_arrow
      }
      text_column = choose_column(columns, column, str(path))
      number = 0
      for batch in file.iter_batches(_ROWS, columns=[text_column]):
        for value in batch.column(0).to_pylist():
          yield corpus.Document(f'{name}#{number}', value or '')
          number += 1
  except (pa.ArrowException, OSError) as error:
    raise ValueError(
      f'{path} cannot be read as parquet ({error}); it is damaged or of '
      'another format.'
    ) from error
