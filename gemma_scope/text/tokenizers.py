"""Text <-> token ids, by SentencePiece models of Gemma's layout.

`Tokenizer(path)` opens Gemma's own model file or one that `train_tokenizer`
made. Ids come without BOS and EOS; the token store adds these. sentencepiece
is imported when the first model is opened.

Control tokens that are typed in a text are read by one rule, in documents,
prompts and questions alike:
  - `<bos>` at the start is removed, because each sequence has its own;
  - `<bos>` and `<eos>` elsewhere are those control tokens, as in transformers;
  - user-defined pieces, such as `<start_of_turn>` (`<|turn>` in Gemma 4), are
    one token each;
  - `<pad>` stays text: the language model does not read padding.
The turns of a chat are the exception (`encode_literally`): a user's text cannot
end the user's turn.

`Special` defines the tokens of a sequence whose activations count.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.text import corpus

# What opens a turn of a chat -> what ends it.
_TURNS = {
  '<start_of_turn>': '<end_of_turn>',  # Gemma 2 and 3
  '<|turn>': '<turn|>',  # Gemma 4
}
_PART_CHARS = 1 << 20  # longer documents are encoded in parts, cut at lines
# Gemma 2's first ids: pad, eos, bos, unk, then these (see gm.text).
_GEMMA2_SYMBOLS = (
  ['<mask>', '<2mass>', '[@BOS@]']
  + [f'<unused{i}>' for i in range(99)]
  + ['<start_of_turn>', '<end_of_turn>']
)
# Runs that are one token each, so that indentation reads as one number.
_RUNS = (
  ['\n' * n for n in range(1, 5)] + ['▁' * n for n in range(2, 25)] + ['\t']
)


def readable(piece: str) -> str:
  """A piece as text: the vocabulary writes a space as '▁'."""
  return piece.replace('▁', ' ')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A SentencePiece model file. Pickles as its path and hash."""

  path: str

  def __post_init__(self):
    object.__setattr__(self, 'path', str(self.path))
    if not os.path.isfile(self.path):
      raise FileNotFoundError(
        f'No tokenizer at {self.path}: expected a SentencePiece model. For '
        'Gemma 2 it is tokenizer_gemma2.model from gs://gemma-data/tokenizers/ '
        '(tokenizer.model in the Kaggle and Hugging Face downloads), for '
        'Gemma 3 and 4 tokenizer_gemma3.model and tokenizer_gemma4.model.'
      )
    self._processor  # noqa: B018  a damaged file is refused here

  def __getstate__(self) -> dict[str, str]:
    return {'path': self.path, 'sha256': self.sha256}

  def __setstate__(self, state: dict[str, str]) -> None:
    object.__setattr__(self, 'path', state['path'])
    self.__post_init__()
    if self.sha256 != state['sha256']:
      raise ValueError(f'{self.path} changed since this tokenizer was saved.')

  @functools.cached_property
  def _processor(self) -> Any:
    import sentencepiece

    try:
      processor = sentencepiece.SentencePieceProcessor()
      processor.LoadFromSerializedProto(pathlib.Path(self.path).read_bytes())
    except RuntimeError as error:
      raise ValueError(
        f'{self.path} is not a SentencePiece model ({error}).'
      ) from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
      raise ValueError(f'{self.path} defines no BOS or no EOS.')
    return processor

  @functools.cached_property
  def sha256(self) -> str:
    return files.sha256(self.path)

  @property
  def pad_id(self) -> int:
    return self._processor.pad_id()

  @property
  def bos_id(self) -> int:
    return self._processor.bos_id()

  @property
  def eos_id(self) -> int:
    return self._processor.eos_id()

  @property
  def start_of_turn(self) -> int:
    """106 in Gemma 2, 105 in Gemma 3 and 4; ValueError if there is none."""
    return self.id_of(self.turn_markers[0])

  @property
  def end_of_turn(self) -> int:
    """107 in Gemma 2, 106 in Gemma 3 and 4; ValueError if there is none."""
    return self.id_of(self.turn_markers[1])

  @functools.cached_property
  def turn_markers(self) -> tuple[str, str]:
    """The pieces that open and end a turn; ValueError if it has none."""
    for markers in _TURNS.items():
      if all(map(self._has, markers)):
        return markers
    raise ValueError(
      f'{self.path} has neither {" nor ".join(_TURNS)}, with which a turn of a '
      'chat begins; use the tokenizer that belongs to the model.'
    )

  @property
  def vocab_size(self) -> int:
    return self._processor.vocab_size()

  def id_of(self, piece: str) -> int:
    """The id of one piece of the vocabulary, spelt as `pieces` spells it."""
    if not self._has(piece):
      raise ValueError(
        f'{self.path} has no piece {piece!r}; use the tokenizer that belongs '
        'to the model.'
      )
    return self._processor.piece_to_id(piece)

  def _has(self, piece: str) -> bool:
    token = self._processor.piece_to_id(piece)
    return self._processor.id_to_piece(token) == piece

  def encode(self, text: str) -> np.ndarray:
    """int32 [tokens], without BOS or EOS; a lone surrogate reads as '?'."""
    return self.encode_all([text])[0]

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 [tokens] per text, as `encode` gives them, on all cores."""
    return self._encode([list(self._parts(text)) for text in texts])

  def encode_literally(self, text: str) -> np.ndarray:
    """int32 [tokens] of a text in which control tokens are just letters.

    The text is cut after the first character of each; no part then holds a
    whole one.
    """
    text = corpus.valid(text)
    matches = self._markers.finditer(text)
    cuts = [0, *(marker.start() + 1 for marker in matches), len(text)]
    pairs = zip(cuts, cuts[1:], strict=False)
    return self._encode(
      [[piece for start, stop in pairs for piece in _pieces(text[start:stop])]]
    )[0]

  def _parts(self, text: str) -> Iterator[str | int]:
    """Texts to encode, and the ids of control tokens between them."""
    text = corpus.valid(text).removeprefix(self._control[self.bos_id])
    ids = {piece: token for token, piece in self._control.items()}
    start = 0
    for match in self._typed.finditer(text):
      yield from _pieces(text[start : match.start()])
      yield ids[match.group()]
      start = match.end()
    yield from _pieces(text[start:])

  @functools.cached_property
  def _control(self) -> dict[int, str]:
    """BOS and EOS, as the vocabulary spells them."""
    ids = (self.bos_id, self.eos_id)
    return {i: self._processor.id_to_piece(i) for i in ids}

  @functools.cached_property
  def _markers(self) -> re.Pattern[str]:
    """The control tokens that a user must not be able to type in a turn."""
    markers = *self._control.values(), *self.turn_markers
    return re.compile('|'.join(map(re.escape, markers)))

  @functools.cached_property
  def _typed(self) -> re.Pattern[str]:
    return re.compile('|'.join(map(re.escape, self._control.values())))

  def _encode(self, documents: list[list[str | int]]) -> list[np.ndarray]:
    """int32 [tokens] of each document's parts; ids stay as they are."""
    flat = [
      piece for parts in documents for piece in parts if isinstance(piece, str)
    ]
    ids = iter(self._processor.encode(flat, num_threads=os.cpu_count() or 1))
    return [
      np.concatenate(
        [
          np.zeros(0, np.int32),
          *(
            np.asarray(
              next(ids) if isinstance(piece, str) else [piece], np.int32
            )
            for piece in parts
          ),
        ]
      )
      for parts in documents
    ]

  def decode(self, ids: Iterable[int]) -> str:
    return self._processor.decode([int(i) for i in ids])

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """The pieces as the vocabulary spells them: '▁' is a space."""
    return [self._processor.id_to_piece(int(i)) for i in ids]


@dataclasses.dataclass(frozen=True)
class Special:
  """Which tokens count: those whose activations SAEs see and metrics average.

  Attributes:
    ids: tokens that never count: padding, BOS, EOS (arXiv 2408.05147, 3).
    reply: the ids that open the model's turn in a chat. Then nothing counts up
      to and including their first occurrence: the user's turn and the opening
      (section 4.5). Everything after them counts, including the token with
      which the model ends its reply.
  """

  ids: tuple[int, ...]
  reply: tuple[int, ...] = ()

  def keep(self, tokens_NT: np.ndarray) -> np.ndarray:
    """bool [N, T]; a row of a chat without a reply keeps nothing."""
    tokens_NT = np.asarray(tokens_NT)
    keep_NT = ~np.isin(tokens_NT, self.ids)
    if not self.reply:
      return keep_NT
    length = tokens_NT.shape[1]
    starts = max(length - len(self.reply) + 1, 0)
    opens_NT = np.zeros(tokens_NT.shape, bool)
    opens_NT[:, :starts] = True
    for i, token in enumerate(self.reply):
      opens_NT[:, :starts] &= tokens_NT[:, i : i + starts] == token
    # The last start of a turn (first id of an opening) up to a token decides
    # whose turn the token belongs to.
    position_T = np.arange(length)
    turn_NT = np.where(tokens_NT == self.reply[0], position_T, -1)
    turn_NT = np.maximum.accumulate(turn_NT, 1)
    model_NT = np.take_along_axis(opens_NT, np.maximum(turn_NT, 0), 1)
    model_NT &= turn_NT >= 0
    return keep_NT & model_NT & (position_T - turn_NT >= len(self.reply))


def _pieces(text: str) -> Iterator[str]:
  """Cuts at line ends, so that one huge document does not fill the memory."""
  start = 0
  while start < len(text):
    stop = start + _PART_CHARS
    if stop < len(text):
      line_end = text.rfind('\n', start, stop)
      stop = line_end + 1 if line_end > start else stop
    yield text[start:stop]
    start = stop


def train_tokenizer(
  documents: Iterable[corpus.Document],
  path: str | os.PathLike[str],
  vocab_size: int,
) -> Tokenizer:
  """Trains a byte-pair SentencePiece model in Gemma 2's layout of ids.

  pad 0, eos 1, bos 2, unk 3, Gemma 2's named symbols up to id 107, then runs
  of newlines and spaces as pieces of their own, the 256 bytes, learned pieces.
  Text comes back exactly (but U+2581, which SentencePiece reads as a space).
  The same documents give the same file. Written atomically.
  """
  import sentencepiece

  path = pathlib.Path(path)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_training_lines(documents),
      model_writer=model,  # not a path, which the file would then contain
      vocab_size=vocab_size,
      model_type='bpe',
      byte_fallback=True,
      character_coverage=0.9995,  # rarer characters are spelt in bytes
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      pad_piece='<pad>',
      eos_piece='<eos>',
      bos_piece='<bos>',
      user_defined_symbols=_GEMMA2_SYMBOLS + _RUNS,
      split_digits=True,
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      normalization_rule_name='identity',
      allow_whitespace_only_pieces=True,
      max_sentence_length=1 << 16,
      num_threads=os.cpu_count() or 1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise ValueError(
      f'No tokenizer of {vocab_size} pieces could be trained on this text '
      f'({error}).'
    ) from error
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_bytes(path, model.getvalue())
  return Tokenizer(str(path))


def _training_lines(documents: Iterable[corpus.Document]) -> Iterator[str]:
  """Lines, as newlines are pieces of their own and never part of another."""
  for document in documents:
    for line in document.text.split('\n'):
      for start in range(0, len(line), 4096):
        yield line[start : start + 4096]
