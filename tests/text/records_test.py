"""Documents of ArrayRecord files and TFDS data sets."""

from __future__ import annotations

import json
import pathlib

import pytest

from gemma_scope.text import (
  sources,
)
from tests.helpers.texts import run_python


def write_records(path: pathlib.Path, records: list[bytes]) -> None:
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


def test_array_record_of_text_json_and_examples(tmp_path):
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example()
  example.features.feature['text'].bytes_list.value.append(b'an example')
  example.features.feature['label'].int64_list.value.append(3)
  records = ['plain é'.encode(), b'{"text": "json"}', b'{ brace', b'\n\xff']
  records += [example.SerializeToString(), b'\nplain \n\x04text\x12 trap']
  write_records(tmp_path / 'a.array_record', records * 300)
  found = [d.text for d in sources.documents(f'arrayrecord:{tmp_path}/a.*')]
  assert found[:4] == ['plain é', 'json', '{ brace', '\n\ufffd']
  assert found[4:6] == ['an example', '\nplain \n\x04text\x12 trap']
  assert found == found[:6] * 300


def test_damaged_array_record_is_named(tmp_path):
  write_records(tmp_path / 'a.array_record', [b'x' * 9000] * 200)
  data = bytearray((tmp_path / 'a.array_record').read_bytes())
  (tmp_path / 'b.array_record').write_bytes(data[: len(data) // 2])
  (tmp_path / 'c.array_record').write_bytes(b'')
  for name in 'bc':
    with pytest.raises(ValueError, match=f'{name}.array_record cannot be'):
      list(sources.documents(f'arrayrecord:{tmp_path}/{name}.*'))


BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.2.0')
  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({
            'text': tfds.features.Text(), 'id': np.int64}))
  def _split_generators(self, manager):
    return {'train': self._generate_examples(120),
            'test': self._generate_examples(7)}
  def _generate_examples(self, count):
    for i in range(count):
      yield i, {'text': f'tfds row {i} \\u00e9', 'id': i}

Tiny(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()
"""


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
  run_python(BUILD, str(tmp_path))
  assert (tmp_path / 'tiny' / '1.2.0' / 'dataset_info.json').is_file()
  code = (
    'import sys; from gemma_scope.text import sources\n'
    'rows = [d.text for s in sys.argv[1:] for d in sources.documents(s)]\n'
    'assert "tensorflow" not in sys.modules\n'
    'print(len(rows), len(set(rows)), rows[-1])'
  )
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  out = run_python(code, 'tfds:tiny:train', 'tfds:tiny:1.2.0:test')
  assert out.startswith('127 120 tfds row ') and out.endswith('é')
  assert len(list(sources.documents('tfds:tiny:train[:10]'))) == 10
  name = next(sources.documents('tfds:tiny:test')).name
  assert name == 'tiny/1.2.0/test#0'
  with pytest.raises(ValueError, match="no split 'validation'"):
    list(sources.documents('tfds:tiny:validation'))
  with pytest.raises(ValueError, match='is not under'):
    list(sources.documents('tfds:other:train'))
  with pytest.raises(ValueError, match='not of the form'):
    list(sources.documents('tfds:tiny'))

  info_path = tmp_path / 'tiny' / '1.2.0' / 'dataset_info.json'
  info = json.loads(info_path.read_text())
  assert info['fileFormat'] == 'array_record'
  for claimed in ('150', '90'):  # metadata and files disagree
    changed = json.loads(json.dumps(info))
    for split in changed['splits']:
      split['shardLengths'] = [claimed]
    info_path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f'holds 120 .* says {claimed}'):
      list(sources.documents('tfds:tiny:train'))
  info_path.write_text(json.dumps(info | {'fileFormat': 'parquet'}))
  with pytest.raises(ValueError, match='holds parquet files'):
    list(sources.documents('tfds:tiny:train'))
