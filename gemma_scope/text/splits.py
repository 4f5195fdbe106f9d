"""Tokens of documents -> the token files of two splits, train and eval.

  stream  ...[ train part 0 |gap| eval part 0 |gap][ train part 1 |gap| ...

Documents are held out by the hash of their names (`corpus`). If that leaves a
split without documents (a single book, three files), the tokens of all
documents are cut into parts, and the end of each part is held out. The gaps
belong to neither split, so that held-out text does not continue training text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from gemma_scope.text import corpus

_LEAST = 200  # tokens: fewer are not worth a cut
_PART = 20_000  # tokens, about
_MOST = 100  # parts
_EVAL, _GAP = 20, 50  # one in so many tokens


def cut(stream_T: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(train, eval) of each part of some tokens."""
  count = min(max(len(stream_T) // _PART, 1), _MOST)
  for part_T in np.array_split(stream_T, count):
    held_out, gap = len(part_T) // _EVAL, len(part_T) // _GAP
    yield (
      part_T[: len(part_T) - held_out - 2 * gap],
      part_T[-held_out - gap : -gap],
    )


class Writer:
  """Writes the token files of two splits, and collects facts about them.

  Documents wait in memory until both splits have one. If that never happens,
  the tokens are cut into parts.
  """

  def __init__(
    self, token_files: Mapping[str, IO[bytes]], dtype: str, eos: int
  ):
    self._files, self._dtype, self._eos_id = token_files, dtype, eos
    self._hashes = {split: hashlib.sha256() for split in corpus.SPLITS}
    self._written = dict.fromkeys(corpus.SPLITS, 0)
    self._counts = dict.fromkeys(corpus.SPLITS, 0)
    self._waiting: list[tuple[str, np.ndarray]] | None = []
    self.documents = self.tokens = 0

  def add(self, split: str, ids: np.ndarray) -> None:
    """Adds a document, followed by EOS."""
    self.documents, self.tokens = self.documents + 1, self.tokens + len(ids) + 1
    if self._waiting is None:
      self._write(split, ids)
      return
    self._waiting.append((split, ids))
    if len({split for split, _ in self._waiting}) == 2:
      self._write_waiting()

  def finish(self) -> dict[str, Any]:
    """Writes the documents that wait; returns facts for the manifest."""
    facts = {}
    if self._waiting is not None and self.tokens >= _LEAST:
      with_eos = [np.append(ids, self._eos_id) for _, ids in self._waiting]
      for pair in cut(np.concatenate(with_eos)):
        for split, ids in zip(corpus.SPLITS, pair, strict=True):
          ends = len(ids) > 0 and ids[-1] == self._eos_id
          self._write(split, ids[:-1] if ends else ids)
      facts['held_out'] = {
        'by': 'parts',
        'documents': self.documents,
        'parts': self._counts['eval'],
      }
    elif self._waiting is not None:
      self._write_waiting()
    return facts | {
      'dtype': self._dtype,
      'tokens': self._written,
      'documents': self._counts,
      'sha256': {
        split: digest.hexdigest() for split, digest in self._hashes.items()
      },
    }

  def _write_waiting(self) -> None:
    for split, ids in self._waiting:
      self._write(split, ids)
    self._waiting = None

  def _write(self, split: str, ids: np.ndarray) -> None:
    data = np.append(ids, self._eos_id).astype(self._dtype).tobytes()
    self._files[split].write(data)
    self._hashes[split].update(data)
    self._written[split] += len(ids) + 1
    self._counts[split] += 1
