"""Sequences cut from a token store, by index."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from gemma_scope import files

_BLOCK = 1 << 24  # tokens that are looked through at once


def dtype_of(vocab_size: int) -> str:
  """The dtype of tokens on disk: uint16 where the vocabulary allows it."""
  return '<u2' if vocab_size <= 1 << 16 else '<i4'


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Random access to the rows of a token file; `[i]` is int32 [T].

  The file is mapped; of one in a bucket those parts are fetched that are read.
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
  def _stream(self) -> Any:
    """The tokens, to be sliced."""
    if files.scheme(self.path):
      from gemma_scope.runtime import host_cache  # JAX

      return host_cache.Array(self.path, self.dtype)
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
    ends = []
    for start in range(0, self.tokens, _BLOCK):
      block = self._stream[start : min(start + _BLOCK, self.tokens)]
      ends.append(start + np.flatnonzero(block == eos_id))
    at_NT = np.asarray(indices)[:, None] * width + np.arange(-1, width)
    at_NT[:, 0] += 1
    return np.searchsorted(np.concatenate(ends), at_NT).astype(np.int32)
