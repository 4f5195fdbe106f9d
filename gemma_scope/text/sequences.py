"""Sequences cut from a token store, by index."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np


def dtype_of(vocab_size: int) -> str:
  """The dtype of tokens on disk: uint16 where the vocabulary allows it."""
  return '<u2' if vocab_size <= 1 << 16 else '<i4'


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Random access to the rows of a token file; `[i]` is int32 [T].

  Pickled as its fields: a worker process maps the file itself.
  """

  path: str
  dtype: str
  bos_id: int
  seq_len: int
  tokens: int

  def __post_init__(self):
    if self.seq_len < 2:
      raise ValueError(
        f'seq_len is {self.seq_len}; BOS and one token need at least 2.'
      )
    if self.tokens < self.seq_len - 1:
      raise ValueError(
        f'{self.path} holds {self.tokens} tokens, too few for one sequence of '
        f'{self.seq_len}; use a longer text or a shorter sequence.'
      )

  def __getstate__(self) -> dict[str, Any]:
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  @functools.cached_property
  def _stream(self) -> np.ndarray:
    return np.memmap(self.path, self.dtype, 'r', shape=(self.tokens,))

  def __len__(self) -> int:
    return self.tokens // (self.seq_len - 1)

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f'{self.path} has no sequence {index} of {len(self)}.')
    width = self.seq_len - 1
    row_T = np.empty(self.seq_len, np.int32)
    row_T[0] = self.bos_id
    row_T[1:] = self._stream[index * width : (index + 1) * width]
    return row_T

  def documents(self, indices: np.ndarray, eos_id: int) -> np.ndarray:
    """The number of each token's document, int32 [N, T], for some rows.

    EOS ends a document; BOS counts to the document of the token after it.
    """
    width = self.seq_len - 1
    ends = np.flatnonzero(self._stream == eos_id)
    at_NT = np.asarray(indices)[:, None] * width + np.arange(-1, width)
    at_NT[:, 0] += 1
    return np.searchsorted(ends, at_NT).astype(np.int32)
