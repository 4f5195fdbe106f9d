"""Reads chat prompts from a file and assigns each to train or eval."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from gemma_scope.text import corpus, json_lines

_USER = ('user', 'prompter', 'human')


def read(path: str | os.PathLike[str]) -> list[str]:
  """Reads the prompts of a file; empty ones are left out.

  .txt: one prompt a line. .jsonl: a JSON object a line, with one of
    prompt: a string, or a tree of messages (oasst1);
    text: a string; of a flat oasst1 file, only messages that begin a tree;
    messages, conversation: a list of turns (LMSYS), of which the first by the
      user is the prompt.

  Raises:
    ValueError: says which line is not of that kind; no prompt at all.
  """
  path = pathlib.Path(path)
  name = path.name.removesuffix('.gz').removesuffix('.zst')
  if not name.endswith(('.txt', '.jsonl')):
    raise ValueError(
      f'{path} is no file of prompts: its name must end in .txt (a prompt a '
      'line) or .jsonl, and then may end in .gz or .zst.'
    )
  if not path.is_file():
    raise FileNotFoundError(f'There is no file of prompts at {path}.')
  if name.endswith('.txt'):
    prompts = [text for _, text in json_lines.lines(path)]
  else:
    prompts = list(_of_records(path))
  prompts = [corpus.valid(prompt).strip() for prompt in prompts]
  prompts = [prompt for prompt in prompts if prompt]
  if not prompts:
    raise ValueError(f'{path} holds no prompts.')
  return prompts


def _of_records(path: pathlib.Path) -> Iterator[str]:
  for number, record in json_lines.records(path):
    try:
      yield _first_user_turn(record)
    except TypeError as error:
      raise ValueError(
        f'{path}, line {number}: expected a JSON object with `prompt`, `text`, '
        f'`messages` or `conversation` ({error}).'
      ) from error


def _first_user_turn(record: Any) -> str:
  """The prompt of a JSON record; '' for a message inside a conversation."""
  if not isinstance(record, dict):
    raise TypeError(f'it is a {type(record).__name__}')
  for key in ('messages', 'conversation', 'prompt', 'text'):
    value = record.get(key)
    if isinstance(value, str):
      begins = record.get('role', 'user') in _USER
      begins &= not record.get('parent_id')
      return value if begins or key != 'text' else ''
    if isinstance(value, dict):
      return _string(value)
    if isinstance(value, list):
      for turn in value:
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
