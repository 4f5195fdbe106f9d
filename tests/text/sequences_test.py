"""Fixed-length sequences from a store, by index and in shuffled order."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from gemma_scope.text import (
  prepare,
)
from tests.helpers.texts import run_python


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


def test_too_short_a_text_is_a_sentence(store):
  with pytest.raises(ValueError, match='too few for one sequence'):
    store.sequences(10**6, 'eval')
  with pytest.raises(ValueError, match='at least 2'):
    store.sequences(1)
  with pytest.raises(ValueError, match='split is'):
    store.sequences(8, 'test')


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
