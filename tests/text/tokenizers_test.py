"""SentencePiece: exact round trips, control tokens, damaged files."""

from __future__ import annotations

import pathlib
import pickle

import numpy as np
import pytest

from gemma_scope.text import corpus as corpus_lib
from gemma_scope.text import (
  sources,
  tokenizers,
)
from tests.helpers.texts import ODD, lines


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
