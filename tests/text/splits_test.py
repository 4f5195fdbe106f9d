"""Held-out parts of a text that has few documents."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope.text import (
  prepare,
  sources,
)
from tests.helpers import commands
from tests.helpers.texts import lines


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
  whole = np.concatenate(
    [np.append(tokenizer.encode(text), tokenizer.eos_id) for text in numbers]
  )
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
    {row[1:].tobytes() for row in rows_of(store, split)}
    for split in ('train', 'eval')
  )
  assert not train & held
  again = prepare.prepare(source, tokenizer, tmp_path / 'store')
  assert again.fingerprint == store.fingerprint
  assert store.fingerprint['held_out']['by'] == 'parts'


def rows_of(store, split):
  sequences = store.sequences(9, split)
  return [sequences[i] for i in range(len(sequences))]


def test_the_command_says_that_parts_were_held_out(tmp_path, tokenizer, capsys):
  (tmp_path / 'book.txt').write_text(lines(900))
  done = commands.run(
    capsys,
    'prepare-text',
    f'--source=files:{tmp_path}/book.txt',
    f'--tokenizer={tokenizer.path}',
    f'--out={tmp_path / "store"}',
  )
  assert done.code == 0, done.err
  assert 'too few to hold some out' in done.out
