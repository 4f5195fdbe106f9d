"""A small corpus, a tokenizer trained on it, a store of its tokens."""

from __future__ import annotations

import pathlib

import pytest

from gemma_scope.text import (
  prepare,
  sources,
  token_store,
  tokenizers,
)
from tests.helpers.texts import lines


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
