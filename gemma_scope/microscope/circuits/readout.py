"""What the model predicts at a position: tokens, logits, and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.microscope.circuits import effects
from gemma_scope.microscope.index.store import Index
from gemma_scope.text import tokenizers

Logit = tuple[int, int | None]  # tokens (a, b); b None: a's alone


def with_bos(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  """The ids of a text, BOS before them."""
  return [tokenizer.bos_id, *map(int, tokenizer.encode(text))]


def one_token(tokenizer: tokenizers.Tokenizer, text: str) -> int:
  """The token that a text is; ValueError if it is several."""
  ids = list(map(int, tokenizer.encode(text)))
  if len(ids) != 1:
    pieces = tokenizer.pieces(ids)
    raise ValueError(f'{text!r} is not one token but {len(ids)}: {pieces}.')
  return ids[0]


def different(first: int, second: int | None) -> Logit:
  """A token, or two for a difference; ValueError where they are the same."""
  if first == second:
    raise ValueError(
      'The two tokens are the same, so that their logits do not differ; give '
      'two different ones, or one.'
    )
  return first, second


def likeliest(gemma: lm.Gemma, lm_params: lm.Params, ids: Sequence[int]):
  """The two likeliest tokens after a text, as a logit difference."""
  found = effects.predict(gemma, lm_params, ids, 2)
  return tuple(map(int, found.token_TK[-1]))


def logit_pieces(tokenizer: tokenizers.Tokenizer, logit: Logit) -> list[str]:
  """The tokens of a logit, or of a difference, as text."""
  return tokenizer.pieces([t for t in logit if t is not None])


def together(
  saes: Sequence[tuple[Mapping[str, Any], Index]], first: int
) -> list[int]:
  """What a graph is over: a CLT alone, or a transcoder and its fellows.

  Of each other layer the transcoder that is most like it in width and L0.
  """
  place = sites.wiring_of(saes[first][0])
  if place.type != 'transcoder':
    return [first]
  size = lambda i: np.log(
    [saes[i][0]['width'], float(saes[i][1].density_F.sum()) + 1e-9]
  )
  best = {place.sites[0].layer: (-1.0, first)}
  for i, (card, _) in enumerate(saes):
    other = sites.wiring_of(card)
    if (other.type, other.kind) == (place.type, place.kind):
      away = float(np.abs(size(i) - size(first)).sum())
      layer = other.sites[0].layer
      best[layer] = min(best.get(layer, (np.inf, i)), (away, i))
  return [i for _, (_, i) in sorted(best.items())]
