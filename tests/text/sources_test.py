"""Sources of text: odd but legal files, columns, data sets of Hugging Face."""

import gzip
import json
import pathlib
import sys

import pytest

import gemma_scope
from configs import tiny
from gemma_scope import path_values
from gemma_scope.evaluation.saebench import probe_inputs
from gemma_scope.text import (
  hub_datasets,
  json_lines,
  prepare,
  prompts,
  sources,
  text_files,
  tokenizers,
)


def texts(source: str, **options) -> list[str]:
  return [d.text for d in sources.documents(source, **options)]


def needs(name: str):
  """The module, or a skip that says which tests do not run without it."""
  return pytest.importorskip(name, reason=f'{name} is not installed')


# Lines.

ODD = {
  'a byte order mark': b'\xef\xbb\xbf{"text": "a", "label": true}\n',
  'U+2028 in a string': '{"text": "a\u2028b\x85c", "label": 1}\n'.encode(),
  'CRLF and blank lines': b'\r\n{"text": "a", "label": 0}\r\n \t\r\n\r\n',
  'no last line end': b'{"text": "a", "label": 0}',
  'Unicode in a string': '{"text": "日本 \U0001f600", "label": 1}'.encode(),
  'escapes': b'{"text": "\\ud83d\\ude00 \\n", "label": 1}\n',
}


@pytest.mark.parametrize('name', ODD)
def test_odd_but_legal_lines_are_read_alike_by_all_commands(tmp_path, name):
  path = tmp_path / 'odd é.jsonl'
  last = b'{"text": "the last", "label": false}\n'
  path.write_bytes(ODD[name].rstrip(b'\n') + b'\n' + last)
  rows = [value['text'] for _, value in json_lines.records(path)]
  assert len(rows) == 2 and rows[1] == 'the last'
  assert rows[0][0] in 'a日\U0001f600'
  assert texts(f'files:{path}') == rows
  assert prompts.read(path) == [row.strip() for row in rows]
  assert probe_inputs.read_prompts(path).texts == rows


def test_bytes_that_are_not_utf_8_are_read_with_a_warning_that_says_where(
  tmp_path,
):
  path = tmp_path / 'latin.jsonl'
  lines = ['{"text": "x", "label": 1}', '{"text": "caf\xe9", "label": 0}'] * 2
  path.write_bytes('\n'.join(lines).encode('latin-1'))
  for read in (
    lambda: texts(f'files:{path}'),
    lambda: prompts.read(path),
    lambda: probe_inputs.read_prompts(path).texts,
  ):
    with pytest.warns(UserWarning, match=r'latin\.jsonl, line 2 is') as warned:
      assert read() == ['x', 'caf\ufffd'] * 2
    assert len(warned) == 1
  path.write_bytes('\n'.join(lines).encode('utf-16'))
  for read in (lambda: texts(f'files:{path}'), lambda: prompts.read(path)):
    with pytest.raises(ValueError, match='UTF-16 text; convert'):
      read()


def test_compressed_lines_and_files_that_are_cut(tmp_path):
  zstandard = needs('zstandard')
  data = b''.join(b'{"text": "row %d"}\n' % i for i in range(50_000))
  frames = zstandard.compress(data[:70_000]) + zstandard.compress(data[70_000:])
  (tmp_path / 'a.jsonl.zst').write_bytes(frames)
  (tmp_path / 'b.txt.zst').write_bytes(zstandard.compress('é text'.encode()))
  (tmp_path / 'c.md.gz').write_bytes(gzip.compress(b'# gz'))
  found = texts(f'files:{tmp_path}/*')
  assert found == [f'row {i}' for i in range(50_000)] + ['é text', '# gz']
  (tmp_path / 'p.txt.zst').write_bytes(zstandard.compress(b'one\ntwo\n'))
  assert prompts.read(tmp_path / 'p.txt.zst') == ['one', 'two']
  for name, wrong in {
    'cut': frames[:-9],
    'frame': frames[: len(frames) // 2],
    'no': b'no zstd at all',
  }.items():
    (tmp_path / f'{name}.jsonl.zst').write_bytes(wrong)
    with pytest.raises(ValueError, match=rf'{name}\.jsonl\.zst cannot be read'):
      texts(f'files:{tmp_path}/{name}.jsonl.zst')


@pytest.mark.parametrize(
  'name, module',
  [('a.jsonl.zst', 'zstandard'), ('a.parquet', 'pyarrow'), ('', 'datasets')],
)
def test_a_missing_library_is_a_sentence_with_the_command(
  tmp_path, monkeypatch, name, module
):
  (tmp_path / 'a').write_bytes(b'')
  if name:
    (tmp_path / name).write_bytes(b'x')
  monkeypatch.setitem(sys.modules, module, None)
  source = f'files:{tmp_path}/{name}' if name else f'hf:{tmp_path}:train'
  with pytest.raises(ValueError, match=f'pip install {module}'):
    texts(source)


# Columns.


def test_the_column_of_json_lines(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [{'id': 1, 'body': 'one', 'title': 't'}, {'body': None}]
  path.write_text('\n'.join(map(json.dumps, rows)))
  assert texts(f'files:{path}', column='body') == ['one']
  with pytest.raises(ValueError, match=r"line 1: .*'text'.*'body', 'title'"):
    texts(f'files:{path}')
  with pytest.raises(ValueError, match="line 2: expected a string under 'tit"):
    texts(f'files:{path}', column='title')


@pytest.mark.parametrize(
  'columns, column, found',
  [
    ({'id': False, 'body': True}, '', 'body'),
    ({'text': True, 'body': True}, '', 'text'),
    ({'text': True, 'body': True}, 'body', 'body'),
    ({'a': True, 'b': True}, '', None),
    ({'a': True}, 'b', None),
    ({'text': False}, 'text', None),
  ],
)
def test_the_choice_of_a_column(columns, column, found):
  if found:
    assert text_files.choose_column(columns, column, 'x') == found
    return
  with pytest.raises(ValueError, match='x has no column of text'):
    text_files.choose_column(columns, column, 'x')


def test_sources_without_columns_refuse_one(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  for source in ('python', 'prose', f'files:{tmp_path}/a.txt'):
    with pytest.raises(ValueError, match='no column'):
      texts(source, column='text')


def test_parquet(tmp_path):
  pyarrow = needs('pyarrow')
  parquet = needs('pyarrow.parquet')
  rows = [f'row {i} é' for i in range(600)]
  table = pyarrow.table({'id': range(600), 'body': rows, 'other': rows[::-1]})
  parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=100)
  source = f'files:{tmp_path}/*.parquet'
  assert texts(source, column='body') == rows
  names = [d.name for d in sources.documents(source, column='body')]
  assert names[:2] == ['a.parquet#0', 'a.parquet#1'] and len(names) == 600
  with pytest.raises(ValueError, match=r"'text'\. Choose .* 'body', 'other'"):
    texts(source)
  table = pyarrow.table({'n': [1, 2], 'only': ['x', None]})
  parquet.write_table(table, tmp_path / 'a.parquet')
  assert texts(source) == ['x']
  data = (tmp_path / 'a.parquet').read_bytes()
  (tmp_path / 'a.parquet').write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match=r'a\.parquet cannot be read as parquet'):
    texts(source)


def test_the_column_is_part_of_a_store(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [{'text': f'text {i}', 'body': f'body {i}'} for i in range(200)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  tokenizer = tiny_tokenizer()
  folder = tmp_path / 'store'
  made = prepare.prepare(f'files:{path}', tokenizer, folder, column='body')
  stream = made.sequences(9)[0]
  assert tokenizer.decode(stream[1:]).startswith('body 0')
  again = prepare.prepare(f'files:{path}', tokenizer, folder, column='body')
  assert again.fingerprint == made.fingerprint
  assert made.fingerprint['column'] == 'body'
  with pytest.raises(ValueError, match="column is 'body' there and None here"):
    prepare.prepare(f'files:{path}', tokenizer, folder)


def test_a_run_reads_the_column_that_its_config_names(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [{'text': f'text {i}', 'body': f'body {i}'} for i in range(200)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  config = tiny.get_config()
  config.text.source, config.text.column = f'files:{path}', 'body'
  said = []
  _, store = prepare.open_text(config, tmp_path / 'run', said.append)
  assert store.fingerprint['column'] == 'body'
  assert any('200 documents' in line for line in said)  # how far it is


def tiny_tokenizer() -> tokenizers.Tokenizer:

  package = pathlib.Path(gemma_scope.__file__).parent
  return tokenizers.Tokenizer(
    str(package / 'language_model/tiny/tokenizer.model')
  )


# Hugging Face.


@pytest.mark.parametrize(
  'spec, fields',
  [
    ('imdb:train', ('imdb', '', '', 'train', '')),
    ('a/b:train:body', ('a/b', '', '', 'train', 'body')),
    ('a/b/20231101.en:test', ('a/b', '20231101.en', '', 'test', '')),
    ('a/b@v1.0:train[:10%]', ('a/b', '', 'v1.0', 'train[:10%]', '')),
    ('./x/y:train[5:9]:t', ('./x/y', '', '', 'train[5:9]', 't')),
    ('/data/set:all', ('/data/set', '', '', 'all', '')),
  ],
)
def test_specs_of_data_sets(spec, fields):
  parsed = hub_datasets.Spec.parse(spec)
  assert fields == (
    parsed.name,
    parsed.config,
    parsed.revision,
    parsed.split,
    parsed.column,
  )


@pytest.mark.parametrize('spec', ['a/b', 'a/b/c/d:train', 'a b:train', ':x'])
def test_specs_of_another_form_are_refused_at_the_call(spec):
  with pytest.raises(ValueError, match='hf:'):
    sources.documents(f'hf:{spec}')


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
  """A DatasetDict on this disk: 300 rows of train, 5 of test."""
  datasets = needs('datasets')
  splits = {'train': 300, 'test': 5}
  datasets.DatasetDict(
    {
      split: datasets.Dataset.from_dict(
        {
          'text': [f'{split} {i}' for i in range(n)],
          'title': [f'title {i}' for i in range(n)],
          'n': list(range(n)),
        }
      )
      for split, n in splits.items()
    }
  ).save_to_disk(tmp_path / 'saved')
  return tmp_path / 'saved'


def test_a_data_set_that_was_saved_to_disk(saved):
  wanted = [f'train {i}' for i in range(300)]
  assert texts(f'hf:{saved}:train') == wanted
  assert texts(f'hf:{saved}:test') == [f'test {i}' for i in range(5)]
  assert texts(f'hf:{saved}:train[10:12]') == wanted[10:12]
  assert texts(f'hf:{saved}:train[:1%]') == wanted[:3]
  assert texts(f'hf:{saved}:test:title') == [f'title {i}' for i in range(5)]
  assert texts(f'hf:{saved}:test', column='title')[0] == 'title 0'
  assert texts(f'hf:{saved / "train"}:train') == wanted
  names = [d.name for d in sources.documents(f'hf:{saved}:test')]
  assert names == [f'saved/test#{i}' for i in range(5)]
  assert sources.revision(f'hf:{saved}:train') is None
  for source, message in {
    f'hf:{saved}:validation': 'no split .validation.; there are train, test',
    f'hf:{saved}:train:n': r"no column of text 'n'. Choose .* 'text', 'title'",
    f'hf:{saved}/none:train': 'cannot be read',
  }.items():
    with pytest.raises(ValueError, match=message):
      texts(source)
  with pytest.raises(ValueError, match='name different columns'):
    texts(f'hf:{saved}:train:title', column='text')


def test_a_local_folder_of_parquet_files(tmp_path, monkeypatch):
  datasets = needs('datasets')
  monkeypatch.setattr(
    datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache', raising=True
  )
  rows = [f'row {i}' for i in range(20)]
  (tmp_path / 'files').mkdir()
  datasets.Dataset.from_dict({'body': rows}).to_parquet(
    tmp_path / 'files' / 'train-00000.parquet'
  )
  monkeypatch.chdir(tmp_path)
  assert texts('hf:./files:train') == rows
  assert texts('hf:./files:train[15:]') == rows[15:]


def test_a_store_of_the_hub_keeps_the_commit_that_it_was_made_from(
  tmp_path, monkeypatch
):
  datasets = needs('datasets')
  loaded, newest = [], ['a' * 40]

  def load(name, config, **options):
    loaded.append((name, config, options))
    rows = datasets.Dataset.from_dict(
      {'text': [f'{options["revision"][0]} {i}' for i in range(200)]}
    )
    return rows.to_iterable_dataset()

  monkeypatch.setattr(datasets, 'load_dataset', load)
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(hub_datasets, '_newest', lambda _: newest[0])
  source, folder = 'hf:me/texts/en:train', tmp_path / 'store'
  tokenizer = tiny_tokenizer()
  store = prepare.prepare(source, tokenizer, folder)
  assert store.manifest['revision'] == {'commit': 'a' * 40}
  [(name, config, options)] = loaded
  assert (name, config) == ('me/texts', 'en')
  assert options['revision'] == 'a' * 40 and options['streaming']
  # The hub moves on: the store stays, and is not read again.
  newest[0] = 'b' * 40
  assert prepare.prepare(source, tokenizer, folder).fingerprint == (
    store.fingerprint
  )
  assert len(loaded) == 1
  given = f'hf:me/texts/en@{"c" * 40}:train[:5]'
  prepare.prepare(given, tokenizer, tmp_path / 'other')
  assert loaded[-1][2]['revision'] == 'c' * 40
  assert not loaded[-1][2]['streaming']


def test_a_hub_that_does_not_answer_is_a_sentence(monkeypatch):
  needs('datasets')
  import huggingface_hub

  def refuse(*_, **__):
    raise ConnectionError('no route\nmore lines')

  monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', refuse)
  with pytest.raises(ValueError, match=r'no route\)\. Check the name') as error:
    sources.revision('hf:a/never:train')
  assert '\n' not in str(error.value)


# What is published.


@pytest.mark.parametrize(
  'source, shown',
  [
    ('python', 'python'),
    ('tfds:wiki40b/en:train', 'tfds:wiki40b/en:train'),
    ('hf:a/b/c:train:text', 'hf:a/b/c:train:text'),
    ('files:book.txt', 'files:book.txt'),
    ('files:/home/me/x/*.jsonl', 'files:*.jsonl (path sha256 '),
    ('files:~/secret/**', 'files:** (path sha256 '),
    ('arrayrecord:data/private/a.ar', 'arrayrecord:a.ar (path sha256 '),
    ('hf:/home/me/set:train', 'hf:set:train (path sha256 '),
  ],
)
def test_a_source_is_shortened_for_what_leaves_the_machine(source, shown):
  short = path_values.shortened(source)
  assert short.startswith(shown)
  assert (short == source) == (shown == source)
  for folder in ('home', 'secret', 'private', '/x', '~'):
    assert folder not in short
  assert path_values.shortened(short) == short
  other = source.replace('me', 'you').replace('secret', 'mine')
  assert other == source or path_values.shortened(other) != short


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
