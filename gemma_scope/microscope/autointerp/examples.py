"""Example windows in which a latent fires or is silent, and rules.

  index -> windows of tokens with the latent's values: the top activations, a
           sample from each tenth of its range, and silent windows. Sequences
           are split into two halves: one to make a label, one to score it
  rule     "the token (or the token one or two before it) is one of ...": the
           tokens are chosen on the first half

A rule is a predicate: it can be checked exactly on any text, without a model.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from gemma_scope.microscope.index import store as index_lib
from gemma_scope.text import tokenizers

_SETS = (1, 2, 4, 8)  # numbers of tokens that a rule may name
_OFFSETS = (0, -1, -2)
_GAIN = 0.02  # minimum gain of a rule with more tokens or a larger offset


@dataclasses.dataclass(frozen=True)
class Example:
  """A window of text: token ids [W] and the latent's values [W]."""

  ids: tuple[int, ...]
  values: tuple[float, ...]

  @property
  def fires(self) -> tuple[bool, ...]:
    return tuple(value > 0 for value in self.values)


@dataclasses.dataclass(frozen=True)
class Examples:
  """Windows where a latent fires and where it does not, each in two halves."""

  firing: tuple[Example, ...]
  silent: tuple[Example, ...]
  heldout_firing: tuple[Example, ...]
  heldout_silent: tuple[Example, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """Predicts that a latent fires at t if token t + offset is in `ids`."""

  offset: int
  ids: tuple[int, ...]

  def at(self, example: Example) -> np.ndarray:
    """bool [W]: the tokens where the rule predicts that the latent fires."""
    # Sets of Python: an array function takes longer on so few tokens.
    named_ids, length = set(self.ids), len(example.ids)
    hit = [False] * -self.offset + [token in named_ids for token in example.ids]
    return np.asarray(hit[:length], bool)

  def text(self, pieces: Callable[[Iterable[int]], list[str]]) -> str:
    position_names = {
      0: 'the token',
      -1: 'the token before',
      -2: 'the token two before',
    }
    names = ', '.join(
      repr(tokenizers.readable(piece)) for piece in pieces(self.ids)
    )
    verb = 'is one of' if len(self.ids) > 1 else 'is'
    return f'{position_names[self.offset]} {verb} {names}'


def of(index: index_lib.Index, feature: int, width: int = 32) -> Examples:
  """A latent's windows of at most `width` tokens, split into two halves.

  The split is deterministic and by sequence: no sequence is in both halves.
  """
  firing, silent = [], []
  sources = [
    ('top', index.top_FE, index.top_sequence_FE, index.top_position_FE),
    (
      'sample',
      index.sample_FQR,
      index.sample_sequence_FQR,
      index.sample_position_FQR,
    ),
  ]
  places = set()
  for name, values, sequences, positions in sources:
    windows = index.windows(name, feature)
    window = windows.shape[-1]
    flat = zip(
      values[feature].reshape(-1),
      sequences[feature].reshape(-1),
      positions[feature].reshape(-1),
      windows.reshape(-1, window),
      strict=True,
    )
    for value, sequence, position, values_W in flat:
      place = int(sequence), int(position)
      if value <= 0 or sequence < 0 or place in places:
        continue
      places.add(place)
      start = int(position) - window // 2
      firing.append(
        (int(sequence), _window(index, *place, start, values_W, width))
      )
  # A latent is silent in all of a silent sequence: take every window of it.
  length = index.sequences_NT.shape[1]
  silence = np.zeros(length, np.float32)
  middles = range(min(width, length) // 2, max(length - width // 2, 1), width)
  for sequence in index.silent_FM[feature].tolist():
    if sequence >= 0:
      silent += [
        (sequence, _window(index, sequence, middle, 0, silence, width))
        for middle in middles
      ]

  silent = [(sequence, example) for sequence, example in silent if example.ids]

  def half(windows, parity):
    return tuple(
      e for s, e in windows if zlib.crc32(f'{s}'.encode()) % 2 == parity
    )

  return Examples(
    half(firing, 0), half(silent, 0), half(firing, 1), half(silent, 1)
  )


def _window(index, sequence, middle, start, values_W, width):
  """Up to `width` tokens around `middle`, without tokens that are left out."""
  first = max(middle - width // 2, start, 0)
  end = min(
    middle + width // 2, start + len(values_W), index.sequences_NT.shape[1]
  )
  if end <= first:
    return Example((), ())
  keep_W = index.keep_NT[sequence, first:end]
  ids = index.sequences_NT[sequence, first:end][keep_W]
  values = values_W[first - start : end - start][keep_W]
  return Example(tuple(ids.tolist()), tuple(values.tolist()))


def rule(windows: Examples) -> Rule | None:
  """The rule that fits the first half best; None if the latent never fires.

  Candidates: for each offset, the 1, 2, 4 or 8 most frequent tokens there when
  the latent fires. The score is the balanced accuracy over tokens. A rule with
  more tokens or a larger offset must be better by 0.02.
  """
  if not windows.firing:
    return None
  examples = windows.firing + windows.silent
  fires = np.concatenate([example.fires for example in examples])
  best, best_score = None, -1.0
  for offset in _OFFSETS:
    # The token at this offset from each token; -1 outside the window.
    neighbour = np.concatenate(
      [
        (*[-1] * -offset, *example.ids[: len(example.ids) + offset])
        for example in examples
      ]
    )
    ids, counts = np.unique(
      neighbour[fires & (neighbour >= 0)], return_counts=True
    )
    order = ids[np.lexsort((ids, -counts))].tolist()
    for size in _SETS:
      if size > len(order) and size > 1 or not order:
        break
      predicted = np.isin(neighbour, order[:size])
      score = (predicted[fires].mean() + (~predicted[~fires]).mean()) / 2
      if score > best_score + _GAIN:
        best, best_score = Rule(offset, tuple(order[:size])), score
  return best
