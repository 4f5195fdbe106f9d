"""Where text comes from: one string names a source, a source is documents.

  python                          the running interpreter's standard library
                                  (standard_library)
  prose                           English of installed documentation (prose)
  files:GLOB                      txt, md, py; jsonl and jsonl.gz by `text`
  arrayrecord:GLOB                one document per ArrayRecord record
  tfds:NAME[/CONFIG][:VERSION]:SPLIT   a data set prepared on this disk

Documents come in a fixed order with names that hold no absolute path, so that
the same text has the same fingerprint on every machine. A document belongs to
`train` or `eval` by the hash of its group (its name unless it is derived from
another document, as docstrings are from their module): text is held out by
document, never by window.

Nothing here imports TensorFlow. Records of an ArrayRecord file may be UTF-8
text, JSON objects with a `text` string, or tf.train.Example with a `text`
bytes feature (parsed by tensorflow_datasets' own protobuf).
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from gemma_scope.text import corpus, prose, standard_library

KINDS = (
  'python',
  'prose',
  'files:GLOB',
  'arrayrecord:GLOB',
  'tfds:NAME[/CONFIG][:VERSION]:SPLIT',
)
_READ_AT_ONCE = 1024  # records


def documents(
  source: str, split: str | None = None
) -> Iterator[corpus.Document]:
  """Documents of a source in their fixed order; empty ones are left out.

  `split` is None (all), 'train' or 'eval'. Raises ValueError at the call, not
  at the first document, for an unknown kind of source.
  """
  if split is not None and split not in corpus.SPLITS:
    raise ValueError(
      f'split is {split!r}; it is one of {", ".join(corpus.SPLITS)}.'
    )
  kind, _, rest = source.partition(':')
  if source == 'python':
    found = standard_library.read()
  elif source == 'prose':
    found = prose.read()
  elif kind == 'files' and rest:
    found = _files(rest)
  elif kind == 'arrayrecord' and rest:
    found = _arrayrecord(rest)
  elif kind == 'tfds' and rest:
    found = _tfds(rest)
  else:
    raise ValueError(
      f'{source!r} is no text source; give one of: {", ".join(KINDS)}.'
    )
  return _kept(found, split)


def revision(source: str) -> dict[str, str] | None:
  """What else than its name decides a source's text, for the manifest."""
  return prose.versions() if source == 'prose' else None


def _kept(
  found: Iterator[corpus.Document], split: str | None
) -> Iterator[corpus.Document]:
  for candidate in found:
    if candidate.text and split in (None, candidate.split):
      yield candidate


# Files.


def _glob(pattern: str, kind: str) -> list[tuple[str, pathlib.Path]]:
  """Files of a glob with names relative to its part without wildcards."""
  pattern = os.path.expanduser(pattern)
  paths = [pathlib.Path(p) for p in glob.glob(pattern, recursive=True)]
  paths = [p for p in paths if p.is_file()]
  if not paths:
    raise ValueError(
      f'{kind}:{pattern} matches no file; check the pattern (quote it in a '
      'shell) and the folder it is relative to.'
    )
  root = pathlib.Path(pattern).parent
  while glob.has_magic(str(root)):
    root = root.parent
  return sorted((p.relative_to(root).as_posix(), p) for p in paths)


def _files(pattern: str) -> Iterator[corpus.Document]:
  found = _glob(pattern, 'files')
  for name, _ in found:  # before the first document, not after hours
    if not name.endswith(('.txt', '.md', '.py', '.jsonl', '.jsonl.gz')):
      raise ValueError(
        f'{name} is matched by files:{pattern}, which reads .txt, .md, .py, '
        '.jsonl and .jsonl.gz; narrow the pattern.'
      )
  for name, path in found:
    if name.endswith(('.jsonl', '.jsonl.gz')):
      yield from _json_lines(name, path)
      continue
    data = path.read_bytes()
    text = standard_library.decode(data) if name.endswith('.py') else None
    if text is None:  # a bad byte costs one character, not the file
      text = data.decode('utf-8', 'replace').removeprefix('\ufeff')
    yield corpus.Document(name, corpus.valid(text))


def _json_lines(name: str, path: pathlib.Path) -> Iterator[corpus.Document]:
  opener = gzip.open if name.endswith('.gz') else open
  number = 0
  try:
    with opener(path, 'rb') as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield corpus.Document(f'{name}#{number}', _json_text(line))
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(
      f'{path} cannot be read after line {number} ({error}); it is damaged '
      'or not what its name says: replace it.'
    ) from error
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(
      f'{path}, line {number}: expected a JSON object with the string '
      f'`text` ({error}).'
    ) from error


def _json_text(line: bytes) -> str:
  record = json.loads(line.decode('utf-8', 'replace'))
  if not isinstance(record, dict) or not isinstance(record.get('text'), str):
    raise TypeError('no string under `text`')
  return corpus.valid(record['text'])


# ArrayRecord and TFDS.


def _arrayrecord(pattern: str) -> Iterator[corpus.Document]:
  for name, path in _glob(pattern, 'arrayrecord'):
    count = _num_records(path)
    with _reader(path) as reader:
      for start in range(0, count, _READ_AT_ONCE):
        stop = min(count, start + _READ_AT_ONCE)
        for i, record in enumerate(reader.read(start, stop), start):
          yield corpus.Document(f'{name}#{i}', _record_text(record))


def _num_records(path: pathlib.Path) -> int:
  with _reader(path) as reader:
    return reader.num_records()


@contextlib.contextmanager
def _reader(path: pathlib.Path) -> Iterator[Any]:
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    yield reader
    reader.close()
  except (ValueError, RuntimeError, IndexError) as error:
    raise ValueError(
      f'{path} cannot be read as ArrayRecord ({error}); it is damaged or of '
      'another format.'
    ) from error


def _record_text(record: bytes) -> str:
  if record.startswith(b'{'):
    try:
      return _json_text(record)
    except (TypeError, ValueError, RecursionError):
      pass  # text that begins with a brace
  if record.startswith(b'\n') and b'\n\x04text\x12' in record:
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    try:
      example = tf_example_pb2.Example.FromString(record)
      value = example.features.feature['text'].bytes_list.value
      if len(value) == 1:
        return value[0].decode('utf-8', 'replace')
    except message.DecodeError:
      pass  # text that happens to begin like one
  return record.decode('utf-8', 'replace')


def _tfds(spec: str) -> Iterator[corpus.Document]:
  """Reads a TFDS data set that lies on this disk as ArrayRecord.

  The folder is $TFDS_DATA_DIR or ~/tensorflow_datasets. The text is the
  feature `text`, or the only text feature there is.
  """
  match = re.fullmatch(
    r'(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?:(\w+(?:\[[^/]*\])?)', spec
  )
  if not match:
    raise ValueError(
      f'tfds:{spec} is not of the form tfds:NAME[/CONFIG][:VERSION]:SPLIT, '
      'such as tfds:wiki40b/en:1.3.0:train.'
    )
  name, config, version, split = match.groups()
  data = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  folder = pathlib.Path(os.path.expanduser(data)) / name / (config or '')
  if version is None:
    found = [p.name for p in folder.glob('*.*.*') if _version(p.name)]
    version = max(found, key=_version, default='')
  folder = folder / version
  if not version or not (folder / 'dataset_info.json').is_file():
    raise ValueError(
      f'tfds:{spec} is not under {folder}; prepare it there with '
      'file_format="array_record", or set TFDS_DATA_DIR to where it lies.'
    )
  info = json.loads((folder / 'dataset_info.json').read_text())
  written = info.get('fileFormat', 'tfrecord')
  if written != 'array_record':
    raise ValueError(
      f'{folder} holds {written} files; only array_record is read (TFDS '
      'loses examples when it writes parquet, and tfrecord needs TensorFlow): '
      'prepare it again with file_format="array_record".'
    )

  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(folder)
  whole = split.partition('[')[0]
  if whole not in builder.info.splits:
    raise ValueError(
      f'tfds:{spec}: no split {whole!r}; there are '
      f'{", ".join(builder.info.splits)}.'
    )
  features = builder.info.features
  texts = [k for k, v in features.items() if isinstance(v, tfds.features.Text)]
  if 'text' not in texts and len(texts) != 1:
    raise ValueError(
      f'tfds:{spec} needs a feature `text` or a single text feature; it has '
      f'{", ".join(features)}.'
    )
  key = 'text' if 'text' in texts else texts[0]
  # The data source believes the metadata, so the files are counted first.
  files = builder.info.splits[whole].filepaths
  found = sum(_num_records(pathlib.Path(path)) for path in files)
  rows = builder.as_data_source(split=split)
  for count, expected in (
    (found, builder.info.splits[whole].num_examples),
    (len(rows), builder.info.splits[split].num_examples),
  ):
    if count != expected:
      raise ValueError(
        f'{folder} holds {count} examples of {split!r} and its metadata says '
        f'{expected}; it is incomplete: prepare it again.'
      )
  where = '/'.join(filter(None, (name, config, version, split)))
  for start in range(0, len(rows), _READ_AT_ONCE):
    block = range(start, min(len(rows), start + _READ_AT_ONCE))
    for i, row in zip(block, rows.__getitems__(block), strict=True):
      value = row[key]
      if isinstance(value, bytes):
        value = value.decode('utf-8', 'replace')
      yield corpus.Document(f'{where}#{i}', corpus.valid(value))


def _version(name: str) -> tuple[int, ...] | None:
  match = re.fullmatch(r'(\d+)\.(\d+)\.(\d+)', name)
  return tuple(map(int, match.groups())) if match else None
