"""Paths that a user gives."""

from __future__ import annotations

import pytest

from gemma_scope import path_values


@pytest.mark.parametrize(
  'path, words',
  [
    ('a/b\0c', "--out: 'a/b.x00c' holds a null character"),
    ('a/' + 'x' * 300, 'has 300 bytes, and a file may have 255'),
    ('語' * 86, 'has 258 bytes'),
  ],
)
def test_what_can_be_no_path_is_a_sentence(path, words):
  with pytest.raises(ValueError, match=words) as refusal:
    path_values.check(path, '--out')
  assert len(str(refusal.value)) < 400


def test_any_other_path_may_be():
  for path in ('', '/', '~/a b/ü', 'gs://bucket/x', '/'.join('x' * 99)):
    path_values.check(path, '--out')


def test_a_message_with_a_long_word_is_readable():
  message = f'There is no {"x" * 5000}. It is {"word " * 40}'
  short = path_values.readable(message)
  assert len(short) < 400 and short.endswith('word ') and 'xxx...xxx' in short
