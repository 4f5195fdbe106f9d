"""Prompts: from a file, one for each conversation; which are held out."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pathlib
from typing import Any

from gemma_scope.text import corpus

_USER = ('user', 'prompter', 'human')


def read(path: str | os.PathLike[str]) -> list[str]:
  """The prompts of a file; empty ones are left out.

  .txt: one a line. .jsonl, .jsonl.gz: an object a line, with a string or a
  tree (oasst1) under `prompt`, a string under `text` (of a flat oasst1 file,
  only messages that begin a tree), or a list of turns under `messages` or
  `conversation` (LMSYS), whose first user turn counts.

  Raises:
    ValueError: says which line is not of that kind; no prompt at all.
  """
  path = pathlib.Path(path)
  if not path.name.endswith(('.txt', '.jsonl', '.jsonl.gz')):
    raise ValueError(
      f'{path} is no file of prompts: its name must end in .txt (a prompt a '
      'line), .jsonl or .jsonl.gz.'
    )
  if not path.is_file():
    raise FileNotFoundError(f'There is no file of prompts at {path}.')
  opener = gzip.open if path.name.endswith('.gz') else open
  prompts, number = [], 0
  try:
    with opener(path, 'rb') as lines:
      for line in lines:
        number += 1
        text = line.decode('utf-8', 'replace').removeprefix('\ufeff').strip()
        if text and not path.name.endswith('.txt'):
          text = _first_user_turn(json.loads(text))
        prompts.append(corpus.valid(text).strip())
  except (ValueError, TypeError, EOFError, OSError, RecursionError) as error:
    raise ValueError(
      f'{path}, line {number}: expected a JSON object with `prompt`, `text`, '
      f'`messages` or `conversation` ({error}).'
    ) from error
  prompts = [prompt for prompt in prompts if prompt]
  if not prompts:
    raise ValueError(f'{path} holds no prompt.')
  return prompts


def _first_user_turn(record: Any) -> str:
  """The prompt of one JSON record; '' for a message that begins no tree."""
  if not isinstance(record, dict):
    raise TypeError(f'it is a {type(record).__name__}')
  for key in ('messages', 'conversation', 'prompt', 'text'):
    found = record.get(key)
    if isinstance(found, str):
      begins = record.get('role', 'user') in _USER
      begins &= not record.get('parent_id')
      return found if begins or key != 'text' else ''
    if isinstance(found, dict):
      return _string(found)
    if isinstance(found, list):
      for turn in found:
        if isinstance(turn, dict) and (
          turn.get('role', turn.get('from')) in _USER
        ):
          return _string(turn)
      raise TypeError(f'no user turn under `{key}`')
  raise TypeError(f'it has {", ".join(map(repr, record)) or "nothing"}')


def _string(turn: dict[str, Any]) -> str:
  for key in ('content', 'text', 'value'):
    if isinstance(turn.get(key), str):
      return turn[key]
  raise TypeError('a turn without a string under `content`')


def held_out(prompt: str, share: float) -> bool:
  """Whether a prompt is held out: by its hash, the same in every store."""
  digest = hashlib.sha256(prompt.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < share * 2**64
