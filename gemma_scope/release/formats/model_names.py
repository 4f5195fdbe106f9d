"""Names of models in other tools <-> ours.

gemma2-2b-it     google/gemma-2-2b-it       gemma-2-2b-it
gemma3-1b        google/gemma-3-1b-pt       gemma-3-1b-pt
gemma4-e2b       google/gemma-4-E2B         gemma-4-E2B
ours             Hugging Face               TransformerLens
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_OURS = r'gemma(\d)-((?:\d+[bm]|e\d+b)(?:-a\d+b)?)(-it)?'
_THEIRS = r'gemma-?(\d)-((?:\d+[bm]|e\d+b)(?:-a\d+b)?)(-it)?'


def of_hugging_face(name: str) -> str:
  """'google/gemma-4-26B-A4B-it' -> 'gemma4-26b-a4b-it'; '' for no Gemma."""
  match = re.search(_THEIRS, name.lower())
  return f'gemma{match[1]}-{match[2]}{match[3] or ""}' if match else ''


def ours(name: str) -> str:
  """'google/gemma-4-E2B' -> 'gemma4-e2b'; another name is left as it is.

  Unlike `of_hugging_face` it takes no name of a model made from Gemma.
  """
  match = re.fullmatch(rf'(?:google/)?{_THEIRS}(?:-pt)?', name.lower())
  return of_hugging_face(name) if match else name


def note_of_others(cards: Iterable[Mapping[str, Any]], model: str) -> str:
  """Names the models of SAEs that run on another one; '' if there are none.

  Not an error: SAEs of a pretrained model are used on its tuned versions.
  """
  others = sorted({ours(card.get('model') or model) for card in cards})
  others = [other for other in others if other != ours(model)]
  if not others:
    return ''
  return f'note: SAEs of {", ".join(others)} run on {model}'


def to_transformer_lens(name: str) -> str:
  """'gemma3-1b' -> 'gemma-3-1b-pt'; another name is left as it is."""
  match = re.fullmatch(_OURS, name)
  if not match:
    return name
  generation, size, tuning = match.groups()
  if generation == '3':
    tuning = tuning or '-pt'
  if generation == '4':
    size = size.upper()
  return f'gemma-{generation}-{size}{tuning or ""}'


def to_hugging_face(name: str) -> str:
  """'gemma3-1b' -> 'google/gemma-3-1b-pt'; another name is left as it is."""
  theirs = to_transformer_lens(name)
  return name if theirs == name else f'google/{theirs}'


def has_experts(name: str) -> bool:
  """Whether a model's name, ours or theirs, is that of a mixture."""
  return re.search(r'-a\d+b(-|$)', name.lower()) is not None
