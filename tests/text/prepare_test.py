"""Documents, tokens and rows: exact, by index, held out by document."""

import gzip
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import files
from gemma_scope.language_model import weights
from gemma_scope.text import corpus as corpus_lib
from gemma_scope.text import (
  prepare,
  sources,
  standard_library,
  token_store,
  tokenizers,
)

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
ODD = (
  'def f(x):\n\n\tif x:  # tab\n' + ' ' * 37 + 'y = 1234567\r\n\n\n\n\n\n\n'
  '  "héllo ✓ 日本 \U0001f600 \x00 \x7f"\n \n\t\t \n' + ' ' * 9
)


def run_python(code: str, *arguments: str) -> str:
  done = subprocess.run(
    [sys.executable, '-c', code, *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '3'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def lines(n: int) -> str:
  return ''.join(f'line {i} of text, {i * i} squared\n' for i in range(n))


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
  """300 small text files: enough for both splits."""
  folder = tmp_path_factory.mktemp('corpus')
  for i in range(300):
    (folder / f'{i:03}.txt').write_text(f'File {i}.\n' + lines(3 + i % 5))
  return folder


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory, corpus) -> tokenizers.Tokenizer:
  path = tmp_path_factory.mktemp('tokenizer') / 'tiny.model'
  found = sources.documents(f'files:{corpus}/*.txt', 'train')
  return tokenizers.train_tokenizer(found, path, 440)


@pytest.fixture(scope='session')
def store(tmp_path_factory, corpus, tokenizer) -> token_store.Tokens:
  folder = tmp_path_factory.mktemp('stores') / 'store'
  return prepare.prepare(f'files:{corpus}/*.txt', tokenizer, folder)


@pytest.fixture(scope='session')
def library() -> dict[str, corpus_lib.Document]:
  """All of `python`, with the docstrings (seconds to parse) of 100 modules."""
  whole, parsed = standard_library.docstrings, []

  def docstrings(code: str, module: str) -> str:
    parsed.append(module)
    return whole(code, module) if len(parsed) <= 100 else ''

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(standard_library, 'docstrings', docstrings)
    found = list(sources.documents('python'))
  assert len(parsed) > 300
  assert len({d.name for d in found}) == len(found)
  return {d.name: d for d in found}


def copy_of(store: token_store.Tokens, folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  for file in store.folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return folder


# Tokenizer.


def test_round_trip_is_exact_on_code(tokenizer):
  assert tokenizer.decode(tokenizer.encode(ODD)) == ODD
  assert tokenizer.encode('').shape == (0,)
  assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a?b'
  ids = tokenizer.encode(ODD)
  assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
  assert not np.isin(ids, [0, 1, 2, 3]).any()  # no specials, nothing unknown


def test_layout_is_gemma2s(tokenizer):
  special = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id)
  assert special == (0, 1, 2)
  names = tokenizer.pieces([0, 1, 2, 3, 4, 106, 107, 108])
  assert names[:5] == ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']
  assert names[5:] == ['<start_of_turn>', '<end_of_turn>', '\n']


def test_indentation_and_digits_have_pieces_of_their_own(tokenizer):
  pieces = tokenizer.pieces(tokenizer.encode('        x = 120\n\n    y'))
  assert pieces[0] == '▁' * 8 and '\n\n' in pieces and '▁' * 4 in pieces
  assert [p for p in pieces if p.isdigit()] == ['1', '2', '0']


def test_long_documents_are_cut_at_lines_and_come_back(tokenizer):
  long = lines(40_000)
  assert len(long) > 1 << 20
  ids = tokenizer.encode(long)
  assert tokenizer.decode(ids) == long
  unbroken = '7' * ((1 << 20) + 5)
  assert tokenizer.decode(tokenizer.encode(unbroken)) == unbroken


def test_training_is_deterministic(tmp_path, tokenizer, corpus):
  found = sources.documents(f'files:{corpus}/*.txt', 'train')
  again = tokenizers.train_tokenizer(found, tmp_path / 'elsewhere.model', 440)
  assert again.sha256 == tokenizer.sha256


def test_too_little_text_for_a_vocabulary_is_a_sentence(tmp_path):
  with pytest.raises(ValueError, match='No tokenizer of 9999 pieces'):
    tokenizers.train_tokenizer(
      [corpus_lib.Document('a', 'abc')], tmp_path / 'a.model', 9999
    )


def test_tokenizer_pickles_by_path_and_notices_a_change(tmp_path, tokenizer):
  path = tmp_path / 'a.model'
  path.write_bytes(pathlib.Path(tokenizer.path).read_bytes())
  saved = pickle.dumps(tokenizers.Tokenizer(path))
  assert len(saved) < 1000
  np.testing.assert_array_equal(
    pickle.loads(saved).encode(ODD), tokenizer.encode(ODD)
  )
  path.write_bytes(path.read_bytes() + b'\x0a\x00')
  with pytest.raises(ValueError, match=r'changed|not a SentencePiece'):
    pickle.loads(saved)


def test_missing_and_damaged_tokenizers_are_sentences(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'tokenizer_gemma2\.model'):
    tokenizers.Tokenizer(tmp_path / 'no.model')
  for i, data in enumerate([b'', b'not a model', bytes(range(256))]):
    (tmp_path / f'{i}.model').write_bytes(data)
    with pytest.raises(ValueError, match=f'{i}.model is not a Sentence'):
      tokenizers.Tokenizer(tmp_path / f'{i}.model')


# Sources.


def test_python_is_code_docstrings_and_topics(library):
  assert 'import' in library['json/decoder.py'].text
  assert 'abc.ABCMeta\n\n' in library['abc.py#docstrings'].text
  assert 'def ' in library['pydoc_data/topics#function'].text
  names = list(library)
  assert not any('/tests/' in n or 'site-packages' in n for n in names)
  assert not any(n.startswith(('test/', '/', 'encodings/')) for n in names)
  assert not any('sysconfigdata' in n for n in names)
  code = [n for n in names if '#' not in n]
  assert code == sorted(code) and code == names[: len(code)]
  assert sum(len(library[n].text) for n in code) > 5e6


def test_docstrings_of_nested_definitions():
  code = (
    '"""Top."""\nclass A:\n  """  A.\n\n    more\n  """\n'
    '  async def f(self):\n    """F."""\n    def g(): "G."\n'
    'if True:\n  def h():\n    """H."""\n  def empty(): ""\n'
  )
  prose = standard_library.docstrings(code, 'm')
  sections = ['m\n\nTop.', 'm.A\n\nA.\n\nmore', 'm.A.f\n\nF.']
  sections += ['m.A.f.g\n\nG.', 'm.h\n\nH.']
  assert prose == '\n\n\n'.join(sections) + '\n'
  assert standard_library.docstrings('def (', 'm') == ''


def test_splits_are_disjoint_by_document_and_near_two_per_cent(corpus, library):
  found = [corpus_lib.Document(f'document {i}', 'x') for i in range(20_000)]
  held_out = sum(d.split == 'eval' for d in found)
  assert 300 < held_out < 500
  source = f'files:{corpus}/*.txt'
  train = {d.name for d in sources.documents(source, 'train')}
  held = {d.name for d in sources.documents(source, 'eval')}
  assert train and held and not train & held and len(train | held) == 300
  # A module and its docstrings are on the same side.
  sides = {}
  for name, document in library.items():
    if '/topics#' not in name:
      sides.setdefault(name.partition('#')[0], set()).add(document.split)
  assert all(len(side) == 1 for side in sides.values())
  assert {'train'} in sides.values() and {'eval'} in sides.values()


def test_odd_files(tmp_path_factory, tmp_path, tokenizer):
  out = tmp_path_factory.mktemp('out') / 'store'
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'a.txt').write_bytes(b'')
  (tmp_path / 'b.txt').write_bytes(b'ok \xff\xfe\x00 end')
  (tmp_path / 'c.py').write_bytes('# coding: latin-1\ns = "é"\n'.encode('l1'))
  (tmp_path / 'd.py').write_bytes(b'# coding: nonsense\n\xff\n')
  (tmp_path / 'e.md').write_bytes('\ufeff# Title\r\n'.encode())
  (tmp_path / 'sub' / 'f.txt').write_text('\n')
  found = {d.name: d.text for d in sources.documents(f'files:{tmp_path}/**')}
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


@pytest.mark.parametrize(
  'source', ['', 'wiki', 'files:', 'tfds', 'http://x', 'python:3', 'Python']
)
def test_unknown_sources_list_the_kinds(source):
  with pytest.raises(ValueError, match='python, prose, files:GLOB, hf:'):
    sources.documents(source)


def test_what_matches_nothing_or_is_no_text_is_a_sentence(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'x')
  with pytest.raises(ValueError, match='matches no file'):
    list(sources.documents(f'files:{tmp_path}/*.txt'))
  with pytest.raises(ValueError, match=r'a\.png'):
    list(sources.documents(f'files:{tmp_path}/*'))
  with pytest.raises(ValueError, match="split is 'test'"):
    sources.documents('python', 'test')


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


# The store.


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


def test_rows_are_bos_and_the_stream(store, tokenizer):
  stream = np.fromfile(store.path('train'), '<u2')
  rows = store.sequences(17)
  assert len(rows) == len(stream) // 16
  rows_NT = np.stack([rows[i] for i in range(len(rows))])
  assert rows_NT.dtype == np.int32 and rows_NT.shape[1] == 17
  assert (rows_NT[:, 0] == tokenizer.bos_id).all()
  np.testing.assert_array_equal(
    rows_NT[:, 1:].ravel(), stream[: len(rows) * 16]
  )
  for bad in (len(rows), -1):
    with pytest.raises(IndexError):
      rows[bad]


def test_a_text_store_is_no_chat(store):
  assert not store.is_chat and store.reply == ()
  # What older checkpoints and cards hold of a store.
  assert set(store.fingerprint) == {
      'source', 'source_sha256', 'tokenizer_sha256', 'vocab_size',
      'limit_tokens', 'tokens', 'documents', 'sha256',
  }  # fmt: skip


def test_too_short_a_text_is_a_sentence(store):
  with pytest.raises(ValueError, match='too few for one sequence'):
    store.sequences(10**6, 'eval')
  with pytest.raises(ValueError, match='at least 2'):
    store.sequences(1)
  with pytest.raises(ValueError, match='split is'):
    store.sequences(8, 'test')


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


def test_a_flipped_bit_is_found(tmp_path, store):
  rng = np.random.default_rng(0)
  folder = copy_of(store, tmp_path / 'copy')
  for file in sorted(folder.iterdir()):
    whole = file.read_bytes()
    for at in rng.integers(0, 8 * len(whole), 40):
      data = bytearray(whole)
      data[at // 8] ^= 1 << at % 8
      file.write_bytes(data)
      if file.name == 'manifest.json' and data[at // 8] in b' \n\t\r':
        continue  # white space for white space
      with pytest.raises(ValueError, match=file.name.replace('.', r'\.')):
        token_store.Tokens(folder).verify()
    file.write_bytes(whole)
  token_store.Tokens(folder).verify()


def test_missing_and_cut_files_are_named(tmp_path, store):
  folder = copy_of(store, tmp_path / 'copy')
  with open(folder / 'eval.tokens', 'ab') as file:
    file.write(b'\0')
  with pytest.raises(ValueError, match=r'eval\.tokens should have'):
    token_store.Tokens(folder)
  (folder / 'eval.tokens').unlink()
  with pytest.raises(ValueError, match=r'eval\.tokens .* is missing'):
    token_store.Tokens(folder)
  (folder / 'manifest.json').unlink()
  with pytest.raises(FileNotFoundError, match='prepare_text'):
    token_store.Tokens(folder)


@pytest.mark.parametrize(
  'change',
  [
    {'format': 2},
    {'dtype': '|O'},
    {'vocab_size': 1 << 40},
    {'bos_id': True},
    {'bos_id': 10**6},
    {'tokens': {'train': -4, 'eval': 0}},
    {'tokens': [1, 2]},
    {'sha256': {'train': 'x', 'eval': 'y'}},
    {'source': ['python']},
    {'sha256': None},
    {'extra': 1},
  ],
)
def test_hostile_manifests_are_refused(tmp_path, store, change):
  folder = copy_of(store, tmp_path / 'copy')
  path = folder / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match='not the manifest of a token store'):
    token_store.Tokens(folder)


@pytest.mark.parametrize('data', [b'', b'[]', b'\xff', b'[' * 60000, b'{}'])
def test_odd_manifests_are_refused(tmp_path, store, data):
  folder = copy_of(store, tmp_path / 'copy')
  (folder / 'manifest.json').write_bytes(data)
  with pytest.raises(ValueError, match='not the manifest of a token store'):
    token_store.Tokens(folder)


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
def test_no_text_is_refused_and_leaves_nothing(tmp_path, tokenizer, name):
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'empty.jsonl').write_text('{"text": ""}\n')
  (tmp_path / 'null.jsonl').write_text('{"text": null}\n\n')
  flags = (
    f'--source=files:{tmp_path}/{name}',
    f'--tokenizer={tokenizer.path}',
    f'--out={tmp_path / "store"}',
  )
  done = prepare_text(*flags)
  assert done.returncode == 1 and 'holds no text' in done.stderr
  assert not (tmp_path / 'store').exists()


@pytest.mark.parametrize('count', [1, 3])
def test_few_documents_are_held_out_by_parts_with_gaps(
  tmp_path, tokenizer, count
):
  # In no such text does a split have a document of its own.
  numbers = [' '.join(map(str, range(i, 30_000, 7))) for i in range(count)]
  for i, text in enumerate(numbers):
    (tmp_path / f'{i}.txt').write_text(text)
  source = f'files:{tmp_path}/*.txt'
  sides = {d.split for d in sources.documents(source)}
  assert len(sides) == 1
  store = prepare.prepare(source, tokenizer, tmp_path / 'store')
  store.verify()
  few = {1: 'a single document', 3: 'only 3 documents'}[count]
  assert f'The source has {few}, too few' in store.note
  assert store.documents_read == count
  whole = np.concatenate([
    np.append(tokenizer.encode(text), tokenizer.eos_id) for text in numbers
  ])  # fmt: skip
  text = ' '.join(map(str, whole))
  kept = 0
  for split in ('train', 'eval'):
    stream = np.fromfile(store.path(split), '<u2')
    # Every piece stands in the text as it is, and no two overlap.
    places = []
    start = 0
    pieces = store.manifest['documents'][split]
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    assert len(ends) >= pieces
    for end in ends:
      piece = ' '.join(map(str, stream[start:end]))
      assert piece in text
      places.append(text.index(piece))
      start = end + 1
    assert places == sorted(places)
    kept += len(stream)
    if split == 'eval':
      assert 0.04 * len(whole) < len(stream) < 0.06 * len(whole)
      assert store.sequences(32, 'eval')[0].shape == (32,)
  assert 0.03 * len(whole) < len(whole) - kept < 0.05 * len(whole)
  train, held = (
    {row[1:].tobytes() for row in _rows(store, split)}
    for split in ('train', 'eval')
  )
  assert not train & held
  again = prepare.prepare(source, tokenizer, tmp_path / 'store')
  assert again.fingerprint == store.fingerprint
  assert store.fingerprint['held_out']['by'] == 'parts'


def _rows(store, split):
  sequences = store.sequences(9, split)
  return [sequences[i] for i in range(len(sequences))]


def test_the_command_says_that_parts_were_held_out(tmp_path, tokenizer):
  (tmp_path / 'book.txt').write_text(lines(900))
  done = prepare_text(
    f'--source=files:{tmp_path}/book.txt',
    f'--tokenizer={tokenizer.path}',
    f'--out={tmp_path / "store"}',
  )
  assert done.returncode == 0, done.stderr
  assert 'too few to hold some out' in done.stdout


def test_a_store_is_hashed_once_a_process(tmp_path, store, monkeypatch):
  folder = copy_of(store, tmp_path / 'copy')
  read, whole = [], files.sha256
  monkeypatch.setattr(
    files, 'sha256', lambda path: read.append(path) or whole(path)
  )
  for _ in range(3):
    token_store.Tokens(folder).verify()
  assert len(read) == 2  # one for each split
  data = bytearray((folder / 'train.tokens').read_bytes())
  data[0] ^= 1
  (folder / 'train.tokens').write_bytes(data)
  with pytest.raises(ValueError, match=r'train\.tokens does not have'):
    token_store.Tokens(folder).verify()


# The tokenizer and the model.


def run_config(name: str, checkpoint: str, tokenizer: str, **text):
  return ConfigDict({
    'lm': {'name': name, 'checkpoint': checkpoint, 'tokenizer': tokenizer},
    'text': {'source': 'python', 'store': '', 'column': ''} | text,
  })  # fmt: skip


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


# Control tokens that are typed.


def test_control_tokens_typed_in_a_text_are_read_by_one_rule(tokenizer):
  pieces = lambda text: tokenizer.pieces(tokenizer.encode(text))
  assert pieces('<bos><start_of_turn>x') == ['<start_of_turn>', 'x']
  assert pieces('<bos>') == []
  assert pieces('a<eos><bos>x') == ['a', '<eos>', '<bos>', 'x']
  assert '<pad>' not in pieces('<pad>')
  assert tokenizer.decode(tokenizer.encode('<pad> x')) == '<pad> x'
  plain = tokenizer.encode('line 3 of text')
  both = tokenizer.encode_all(['<bos>line 3 of text<eos>', 'line 3 of text'])
  assert both[0].tolist() == [*plain, tokenizer.eos_id]
  assert both[1].tolist() == plain.tolist()
  for text in ('<bos>x<eos>', '<end_of_turn>', 'a<start_of_turn>b', '<<bos>'):
    letters = tokenizer.encode_literally(text)
    assert tokenizer.decode(letters) == text
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.start_of_turn}
    assert not control & set(letters.tolist())


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


# The order.


def test_every_epoch_is_another_permutation(store):
  rows = store.sequences(33)
  n = len(rows)
  order = prepare.shuffled(rows, 7)
  every = {rows[i].tobytes() for i in range(n)}
  epochs = [[order[e * n + i].tobytes() for i in range(n)] for e in range(3)]
  assert len(every) > 30
  for epoch in epochs:
    assert sorted(epoch) == sorted(rows[i].tobytes() for i in range(n))
  assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
  assert epochs[0] != [rows[i].tobytes() for i in range(n)]
  # Seeds are unrelated: seed 8 does not begin with seed 7's next epoch.
  other = prepare.shuffled(rows, 8)
  assert [other[i].tobytes() for i in range(n)] not in epochs


def test_single_row_and_far_indices(store):
  longest = store.manifest['tokens']['eval'] + 1
  order = prepare.shuffled(store.sequences(longest, 'eval'), 0)
  np.testing.assert_array_equal(order[0], order[10**12])
  with pytest.raises(ValueError, match='seed is -1'):
    prepare.shuffled(store.sequences(9), -1)


def test_same_row_in_another_process(store):
  order = prepare.shuffled(store.sequences(20), 3)
  wanted = prepare.batch(order, 5, 400)
  assert wanted.shape == (400, 20) and wanted.dtype == np.int32
  np.testing.assert_array_equal(wanted[7], order[12])
  code = (
    'import sys; from gemma_scope.text import prepare, token_store\n'
    'store = token_store.Tokens(sys.argv[1])\n'
    'o = prepare.shuffled(store.sequences(20), 3)\n'
    'print(prepare.batch(o, 5, 400).tolist())'
  )
  assert json.loads(run_python(code, str(store.folder))) == wanted.tolist()


def test_sequences_pickle_small_and_equal(store):
  rows = store.sequences(12)
  rows[0]  # the mapped file does not travel
  data = pickle.dumps(rows)
  assert len(data) < 500
  np.testing.assert_array_equal(pickle.loads(data)[3], rows[3])


def test_import_is_light():
  heavy = ('jax', 'grain', 'sentencepiece', 'tensorflow', 'gemma')
  code = (
    'import sys; from gemma_scope.text import prepare; '
    f'print([m for m in {heavy} if m in sys.modules])'
  )
  assert run_python(code) == '[]'


# The command.


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


def test_command_answers_an_unknown_source_in_one_sentence(tmp_path, tokenizer):
  started = time.monotonic()
  done = prepare_text(
    '--source=c4', f'--tokenizer={tokenizer.path}', f'--out={tmp_path / "x"}'
  )
  assert done.returncode == 1 and 'tfds:NAME' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert time.monotonic() - started < 20
