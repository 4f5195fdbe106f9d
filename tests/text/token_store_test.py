"""Tokens on disk: damaged and hostile stores are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_scope import files
from gemma_scope.text import (
  token_store,
)
from tests.helpers.texts import copy_of


def test_a_text_store_is_no_chat(store):
  assert not store.is_chat and store.reply == ()
  # What older checkpoints and cards hold of a store.
  assert set(store.fingerprint) == {
    'source',
    'source_sha256',
    'tokenizer_sha256',
    'vocab_size',
    'limit_tokens',
    'tokens',
    'documents',
    'sha256',
  }


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
