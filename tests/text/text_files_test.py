"""Documents of files: text, JSON Lines; odd and damaged ones."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from gemma_scope.text import (
  prepare,
  sources,
)


def test_odd_files(tmp_path_factory, tmp_path, tokenizer):
  out = tmp_path_factory.mktemp('out') / 'store'
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'a.txt').write_bytes(b'')
  (tmp_path / 'b.txt').write_bytes(b'ok \xff\xfe\x00 end')
  (tmp_path / 'c.py').write_bytes('# coding: latin-1\ns = "é"\n'.encode('l1'))
  (tmp_path / 'd.py').write_bytes(b'# coding: nonsense\n\xff\n')
  (tmp_path / 'e.md').write_bytes('\ufeff# Title\r\n'.encode())
  (tmp_path / 'sub' / 'f.txt').write_text('\n')
  with pytest.warns(UserWarning, match=r'b\.txt is not UTF-8') as warned:
    found = {d.name: d.text for d in sources.documents(f'files:{tmp_path}/**')}
  assert len(warned) == 1
  assert list(found) == ['b.txt', 'c.py', 'd.py', 'e.md', 'sub/f.txt']
  assert found['b.txt'] == 'ok \ufffd\ufffd\x00 end'
  assert found['c.py'].endswith('"é"\n') and '\ufffd' in found['d.py']
  assert found['e.md'] == '# Title\r\n'
  (tmp_path / 'sub' / 'g.log').write_text('no text')
  with pytest.raises(ValueError, match=r'sub/g\.log'):
    list(sources.documents(f'files:{tmp_path}/**/*'))
  (tmp_path / 'sub' / 'g.log').unlink()
  store = prepare.prepare(f'files:{tmp_path}/**', tokenizer, out)
  stream = np.fromfile(store.path('train'), '<u2').tolist()
  stream += np.fromfile(store.path('eval'), '<u2').tolist()
  assert stream.count(tokenizer.eos_id) == 5


def test_json_lines_plain_and_gzipped(tmp_path):
  rows = [{'text': f'row {i}', 'id': i} for i in range(3)]
  data = '\n'.join(map(json.dumps, rows)) + '\n\n{"text": "\\ud800!"}\n'
  (tmp_path / 'a.jsonl').write_text(data)
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(data.encode()))
  found = list(sources.documents(f'files:{tmp_path}/*'))
  assert [d.text for d in found] == ['row 0', 'row 1', 'row 2', '?!'] * 2
  assert found[3].name == 'a.jsonl#5' and found[4].name == 'b.jsonl.gz#1'


@pytest.mark.parametrize('name', ['a.txt', 'b.md', 'c.py', 'd.jsonl'])
def test_utf_16_is_refused_by_name(tmp_path, name):
  (tmp_path / name).write_text('{"text": "words"}\n', encoding='utf-16')
  with pytest.raises(ValueError, match=f'{name} is UTF-16 text; convert it'):
    list(sources.documents(f'files:{tmp_path}/*'))


@pytest.mark.parametrize('line', ['{"text": 1}', '[]', '{', '"text"'])
def test_bad_json_line_is_named(tmp_path, line):
  (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n' + line)
  with pytest.raises(ValueError, match=r'a\.jsonl, line 2'):
    list(sources.documents(f'files:{tmp_path}/*'))


def test_cut_gzip_is_named(tmp_path):
  data = gzip.compress(b'{"text": "abc"}\n' * 9999)
  (tmp_path / 'a.jsonl.gz').write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match=r'a\.jsonl\.gz cannot be read'):
    list(sources.documents(f'files:{tmp_path}/*'))
