"""Documents of record files: ArrayRecord by a glob, TFDS data sets by name.

Nothing here imports TensorFlow: tf.train.Example records are parsed by the
protobuf that tensorflow_datasets brings along.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from gemma_scope import files
from gemma_scope.text import corpus, text_files

_READ_AT_ONCE = 1024  # records


def arrayrecord(pattern: str, column: str = '') -> Iterator[corpus.Document]:
  """A document for each record of the ArrayRecord files of a glob.

  A record is UTF-8 text, a JSON object or a tf.train.Example, with a string
  under `column` ('text').
  """
  key = column or text_files.DEFAULT_COLUMN
  for name, path in text_files.matches(pattern, 'arrayrecord'):
    count = _num_records(path)
    with _reader(path) as reader:
      for start in range(0, count, _READ_AT_ONCE):
        stop = min(count, start + _READ_AT_ONCE)
        for i, record in enumerate(reader.read(start, stop), start):
          yield corpus.Document(f'{name}#{i}', _record_text(record, key))


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


def _record_text(record: bytes, column: str) -> str:
  if record.startswith(b'{'):
    try:
      value = json.loads(record.decode('utf-8', 'replace'))[column]
      if isinstance(value, str):
        return corpus.valid(value)
    except (KeyError, ValueError, RecursionError):
      pass  # text that begins with a brace
  key = column.encode()
  if record.startswith(b'\n') and bytes([len(key) % 256]) + key in record:
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    try:
      example = tf_example_pb2.Example.FromString(record)
      value = example.features.feature[column].bytes_list.value
      if len(value) == 1:
        return value[0].decode('utf-8', 'replace')
    except message.DecodeError:
      pass  # text that happens to begin like one
  return record.decode('utf-8', 'replace')


def tfds(spec: str, column: str = '') -> Iterator[corpus.Document]:
  """A document for each example of a TFDS data set on this disk.

  The folder is $TFDS_DATA_DIR or ~/tensorflow_datasets, the files in it are
  ArrayRecord. The text is the feature `column`, by default `text` or the only
  text feature there is.
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
  folder = _tfds_folder(spec, name, config, version)

  import tensorflow_datasets as library

  builder = library.builder_from_directory(folder)
  split_name = split.partition('[')[0]
  if split_name not in builder.info.splits:
    raise ValueError(
      f'tfds:{spec}: no split {split_name!r}; there are '
      f'{", ".join(builder.info.splits)}.'
    )
  features = {
    key: isinstance(feature, library.features.Text)
    for key, feature in builder.info.features.items()
  }
  text_column = text_files.choose_column(features, column, f'tfds:{spec}')
  rows = builder.as_data_source(split=split)
  _refuse_missing_examples(folder, builder.info, split, len(rows))
  prefix = '/'.join(filter(None, (name, config, folder.name, split)))
  for start in range(0, len(rows), _READ_AT_ONCE):
    block = range(start, min(len(rows), start + _READ_AT_ONCE))
    for i, row in zip(block, rows.__getitems__(block), strict=True):
      value = row[text_column]
      if isinstance(value, bytes):
        value = value.decode('utf-8', 'replace')
      yield corpus.Document(f'{prefix}#{i}', corpus.valid(value))


def _tfds_folder(
  spec: str, name: str, config: str | None, version: str | None
) -> pathlib.Path:
  """The folder of a data set's version (the newest) in ArrayRecord files."""
  data = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  folder = pathlib.Path(os.path.expanduser(data)) / name / (config or '')
  if version is None:
    names = [path.name for path in folder.glob('*.*.*') if _version(path.name)]
    version = max(names, key=_version, default='')
  folder = folder / version
  if not version or not (folder / 'dataset_info.json').is_file():
    raise ValueError(
      f'tfds:{spec} is not under {folder}; prepare it there with '
      'file_format="array_record", or set TFDS_DATA_DIR to where it lies.'
    )
  info = files.read_json(folder / 'dataset_info.json')
  file_format = info.get('fileFormat', 'tfrecord')
  if file_format != 'array_record':
    raise ValueError(
      f'{folder} holds {file_format} files; only array_record is read (TFDS '
      'loses examples when it writes parquet, and tfrecord needs TensorFlow): '
      'prepare it again with file_format="array_record".'
    )
  return folder


def _refuse_missing_examples(
  folder: pathlib.Path, info: Any, split: str, rows: int
) -> None:
  """Counts the examples in the files: the data source believes the metadata."""
  split_name = split.partition('[')[0]
  files = info.splits[split_name].filepaths
  in_files = sum(_num_records(pathlib.Path(path)) for path in files)
  for count, expected in (
    (in_files, info.splits[split_name].num_examples),
    (rows, info.splits[split].num_examples),
  ):
    if count != expected:
      raise ValueError(
        f'{folder} holds {count} examples of {split!r} and its metadata says '
        f'{expected}; it is incomplete: prepare it again.'
      )


def _version(name: str) -> tuple[int, ...] | None:
  match = re.fullmatch(r'(\d+)\.(\d+)\.(\d+)', name)
  return tuple(map(int, match.groups())) if match else None
