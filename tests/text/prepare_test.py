"""From a source to a store of tokens, by the library and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from gemma_scope.language_model import weights
from gemma_scope.text import (
  prepare,
  sources,
  token_store,
  tokenizers,
)
from tests.helpers import commands
from tests.helpers.texts import ROOT, lines, run_python


def test_stream_is_documents_each_followed_by_eos(store, corpus, tokenizer):
  for split in ('train', 'eval'):
    expected = []
    for document in sources.documents(f'files:{corpus}/*.txt', split):
      expected += [*tokenizer.encode(document.text), tokenizer.eos_id]
    assert len(expected) > 100
    found = np.fromfile(store.path(split), store.manifest['dtype'])
    np.testing.assert_array_equal(found, expected)
    assert store.manifest['tokens'][split] == len(expected)
  store.verify()
  assert store.manifest['documents']['train'] < 300
  json.dumps(store.fingerprint)


def test_preparing_again_is_found_done(store, corpus, tokenizer):
  source = f'files:{corpus}/*.txt'
  before = store.path('train').stat().st_mtime_ns
  called = []
  again = prepare.prepare(
    source, tokenizer, store.folder, progress=called.append
  )
  assert not called and again.fingerprint == store.fingerprint
  assert store.path('train').stat().st_mtime_ns == before


def test_another_preparation_is_refused_by_field(tmp_path, corpus, tokenizer):
  for name in ('a.txt', 'b.txt'):
    (tmp_path / name).write_text(lines(9))
  source, folder = f'files:{tmp_path}/*.txt', tmp_path / 'store'
  prepare.prepare(source, tokenizer, folder)
  other = tokenizers.train_tokenizer(
    sources.documents(f'files:{corpus}/*.txt'), tmp_path / 'other.model', 430
  )
  with pytest.raises(ValueError, match='tokenizer_sha256'):
    prepare.prepare(source, other, folder)
  with pytest.raises(ValueError, match='limit_tokens'):
    prepare.prepare(source, tokenizer, folder, limit_tokens=5)
  with pytest.raises(ValueError, match=': source is'):
    prepare.prepare(f'files:{tmp_path}/a.txt', tokenizer, folder)
  (tmp_path / 'b.txt').write_text(lines(9).replace('4', '5'))
  with pytest.raises(ValueError, match='source_sha256'):
    prepare.prepare(source, tokenizer, folder)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').write_text('x')
  with pytest.raises(FileNotFoundError, match='no token store'):
    prepare.prepare(source, tokenizer, tmp_path / 'mine')
  assert (tmp_path / 'mine' / 'thesis.tex').exists()


def test_limit_stops_at_a_document(tmp_path, corpus, tokenizer):
  source = f'files:{corpus}/*.txt'
  limit = 5000
  store = prepare.prepare(source, tokenizer, tmp_path / 's', limit_tokens=limit)
  lengths = [
    len(tokenizer.encode(d.text)) + 1 for d in sources.documents(source)
  ]
  count = int(np.searchsorted(np.cumsum(lengths), limit)) + 1
  assert sum(store.manifest['documents'].values()) == count
  assert sum(store.manifest['tokens'].values()) == sum(lengths[:count])
  again = prepare.prepare(source, tokenizer, tmp_path / 's', limit_tokens=limit)
  assert again.fingerprint == store.fingerprint
  with pytest.raises(ValueError, match='positive'):
    prepare.prepare(source, tokenizer, tmp_path / 't', limit_tokens=0)


def test_interrupted_preparation_leaves_nothing(tmp_path, corpus, tokenizer):
  def stop(_):
    raise KeyboardInterrupt

  (tmp_path / 'store').mkdir()  # an empty folder is no obstacle
  source = f'files:{corpus}/*.txt'
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(source, tokenizer, tmp_path / 'store', progress=stop)
  assert [p.name for p in tmp_path.rglob('*')] == ['store']
  prepare.prepare(source, tokenizer, tmp_path / 'store').verify()


def test_killed_preparation_is_cleared_and_made_anew(
  tmp_path, corpus, tokenizer, store
):
  code = (
    'import sys, time; from gemma_scope.text import prepare, tokenizers\n'
    'tokenizer = tokenizers.Tokenizer(sys.argv[2])\n'
    'prepare.prepare(sys.argv[1], tokenizer, sys.argv[3],\n'
    '             progress=lambda _: (print("x", flush=True), time.sleep(60)))'
  )
  source = f'files:{corpus}/*.txt'
  process = subprocess.Popen(
    [sys.executable, '-c', code, source, tokenizer.path, tmp_path / 'store'],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
  )
  assert process.stdout.read(1) == b'x'
  (left,) = tmp_path.iterdir()
  assert left.name.startswith('.store.partial-')
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  made = prepare.prepare(source, tokenizer, tmp_path / 'store')
  assert [p.name for p in tmp_path.iterdir()] == ['store']
  assert made.fingerprint == store.fingerprint


def test_a_text_of_one_token(tmp_path, tokenizer):
  (tmp_path / 'a.txt').write_text('x')
  store = prepare.prepare(
    f'files:{tmp_path}/a.txt', tokenizer, tmp_path / 'one'
  )
  split = max(store.manifest['tokens'], key=store.manifest['tokens'].get)
  assert store.manifest['tokens'][split] == 2
  row_T = store.sequences(3, split)[0]
  assert row_T.tolist() == [2, *tokenizer.encode('x'), 1]


@pytest.mark.parametrize('name', ['empty.txt', 'empty.jsonl', 'null.jsonl'])
def test_no_text_is_refused_and_leaves_nothing(
  tmp_path, tokenizer, name, capsys
):
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'empty.jsonl').write_text('{"text": ""}\n')
  (tmp_path / 'null.jsonl').write_text('{"text": null}\n\n')
  flags = (
    f'--source=files:{tmp_path}/{name}',
    f'--tokenizer={tokenizer.path}',
    f'--out={tmp_path / "store"}',
  )
  done = commands.run(capsys, 'prepare-text', *flags)
  assert done.code == 1 and 'holds no text' in done.err
  assert not (tmp_path / 'store').exists()


def run_config(name: str, checkpoint: str, tokenizer: str, **text):
  return ConfigDict(
    {
      'lm': {'name': name, 'checkpoint': checkpoint, 'tokenizer': tokenizer},
      'text': {'source': 'python', 'store': '', 'column': ''} | text,
    }
  )


def test_a_tokenizer_of_another_model_is_refused_before_a_token_is_read(
  tmp_path, tokenizer, store, monkeypatch
):
  monkeypatch.setattr(prepare, 'prepare', lambda *_, **__: 1 / 0)
  config = run_config('tiny', '', tokenizer.path)
  with pytest.raises(ValueError) as error:
    prepare.open_text(config, tmp_path, print)
  for part in ('has 440 pieces', 'tiny has 4,096', 'set lm.tokenizer'):
    assert part in str(error.value)
  config = run_config('tiny', '', tokenizer.path, store=str(store.folder))
  with pytest.raises(ValueError, match='has 440 pieces'):
    prepare.open_text(config, tmp_path, print)
  # A model of few rows: ids past the embedding would be clamped.
  monkeypatch.setattr(
    weights, 'read_config', lambda *_: weights.lm.SIZES['gemma2-2b']
  )
  config = run_config('mine', '', str(weights.TINY / 'tokenizer.model'))
  with pytest.raises(ValueError, match='has 4,096 pieces.* 256,128'):
    prepare.open_text(config, tmp_path, print)


def test_special_ids_of_a_checkpoint_are_compared(tmp_path, monkeypatch):
  tiny = tokenizers.Tokenizer(str(weights.TINY / 'tokenizer.model'))
  prepare.check_tokenizer(tiny, 'tiny', '')
  (tmp_path / 'config.json').write_text('{"bos_token_id": 2}')
  same = weights.read_config('tiny')
  monkeypatch.setattr(weights, 'read_config', lambda *_: same)
  prepare.check_tokenizer(tiny, 'mine', str(tmp_path))
  (tmp_path / 'config.json').write_text('{"bos_token_id": 5}')
  with pytest.raises(ValueError, match=r'<bos> at id 2, mine at 5: set lm\.'):
    prepare.check_tokenizer(tiny, 'mine', str(tmp_path))


def test_documents_and_questions_read_typed_control_tokens_alike(
  tmp_path, tokenizer
):
  from gemma_scope.microscope.circuits import readout

  typed = '<bos><start_of_turn>user line 3<eos>'
  (tmp_path / 'a.txt').write_text(typed)
  store = prepare.prepare(
    f'files:{tmp_path}/a.txt', tokenizer, tmp_path / 'store'
  )
  split = max(store.manifest['tokens'], key=store.manifest['tokens'].get)
  stream = np.fromfile(store.path(split), '<u2').tolist()
  asked = readout.with_bos(tokenizer, typed)
  assert asked == [tokenizer.bos_id, *stream[:-1]]
  assert tokenizer.pieces(asked)[:2] == ['<bos>', '<start_of_turn>']


def test_import_is_light():
  heavy = ('jax', 'grain', 'sentencepiece', 'tensorflow', 'gemma')
  code = (
    'import sys; from gemma_scope.text import prepare; '
    f'print([m for m in {heavy} if m in sys.modules])'
  )
  assert run_python(code) == '[]'


def prepare_text(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, 'launch/prepare_text.py', *flags],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_command_writes_then_finds_it_done(tmp_path, corpus, tokenizer, store):
  flags = (
    f'--source=files:{corpus}/*.txt',
    f'--tokenizer={tokenizer.path}',
    f'--out={tmp_path / "store"}',
  )
  first, second = prepare_text(*flags), prepare_text(*flags)
  assert first.returncode == second.returncode == 0, first.stderr
  assert 'store written: train ' in first.stdout and 'MB/s' in first.stderr
  assert 'was already done: train ' in second.stdout and not second.stderr
  assert token_store.Tokens(tmp_path / 'store').fingerprint == store.fingerprint


def test_command_answers_an_unknown_source_in_one_sentence(
  tmp_path, tokenizer, capsys
):
  done = commands.run(
    capsys,
    'prepare-text',
    '--source=c4',
    f'--tokenizer={tokenizer.path}',
    f'--out={tmp_path / "x"}',
  )
  assert done.code == 1 and 'tfds:NAME' in done.err
  assert len(done.err.strip().splitlines()) == 1
