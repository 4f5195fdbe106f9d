"""Tokens and logits to explain, parsed from text or predicted by the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_scope.language_model import gemma as lm
from gemma_scope.microscope.circuits import effects
from gemma_scope.microscope.index.store import Indexed
from gemma_scope.text import tokenizers

Logit = tuple[int, int | None]  # (a, b): logit a - logit b; b None: logit a


def with_bos(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  """The token ids of a text, with BOS in front."""
  return [tokenizer.bos_id, *map(int, tokenizer.encode(text))]


def one_token(tokenizer: tokenizers.Tokenizer, text: str) -> int:
  """The id of a text that is one token; ValueError if it is not one."""
  ids = list(map(int, tokenizer.encode(text)))
  if len(ids) != 1:
    pieces = tokenizer.pieces(ids)
    raise ValueError(f'{text!r} is not one token but {len(ids)}: {pieces}.')
  return ids[0]


def different(first: int, second: int | None) -> Logit:
  """A logit or a logit difference; ValueError if both tokens are the same."""
  if first == second:
    raise ValueError(
      'The two tokens are the same, so their logit difference is 0; give two '
      'different tokens, or one.'
    )
  return first, second


def likeliest(gemma: lm.Gemma, lm_params: lm.Params, ids: Sequence[int]):
  """The two likeliest tokens after a text, as a logit difference."""
  prediction = effects.predict(gemma, lm_params, ids, 2)
  return tuple(map(int, prediction.token_TK[-1]))


def logit_pieces(tokenizer: tokenizers.Tokenizer, logit: Logit) -> list[str]:
  """The tokens of a logit, or of a difference, as text."""
  return tokenizer.pieces([token for token in logit if token is not None])


def together(saes: Sequence[Indexed], first: int) -> list[int]:
  """Indices of the SAEs of one graph: a CLT, or one transcoder per layer.

  At each other layer, the transcoder closest in width and L0 to `first`.
  """
  place = saes[first].sae.wiring
  if place.type != 'transcoder':
    return [first]
  size = lambda i: np.log(
    [saes[i].sae.card['width'], float(saes[i].index.density_F.sum()) + 1e-9]
  )
  best = {place.sites[0].layer: (-1.0, first)}
  for i, indexed in enumerate(saes):
    wiring = indexed.sae.wiring
    if (wiring.type, wiring.kind) == (place.type, place.kind):
      distance = float(np.abs(size(i) - size(first)).sum())
      layer = wiring.sites[0].layer
      best[layer] = min(best.get(layer, (np.inf, i)), (distance, i))
  return [i for _, (_, i) in sorted(best.items())]
