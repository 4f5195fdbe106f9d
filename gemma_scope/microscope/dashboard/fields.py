"""The fields of a question to the live view, checked; numbers of an answer.

Each raises a ValueError that says what the field may hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope.microscope.circuits.intervene import (
  STRONGEST,
  Change,
  Subject,
)
from gemma_scope.microscope.circuits.supernodes import Node

_MOST_NODES = 256  # of a supernode


def short(value) -> float | None:
  """A number to four digits; None where it is not finite."""
  return float(f'{value:.4g}') if np.isfinite(value) else None


def integer(asked: Mapping, key, least, most, default=None) -> int:
  """A whole number between two, both allowed."""
  return _whole(asked.get(key, default), f'"{key}"', least, most)


def _whole(value, name: str, least: int, most: int) -> int:
  if type(value) is not int or not least <= value <= most:
    raise ValueError(f'{name} is a whole number from {least:,} to {most:,}.')
  return value


def number(asked: Mapping, key, least, most, default=None) -> float:
  """A number between two, both allowed."""
  value = asked.get(key, default)
  if type(value) not in (int, float) or not least <= value <= most:
    raise ValueError(f'"{key}" is a number from {least:g} to {most:g}.')
  return float(value)


def change(given) -> Change:
  """A change of a latent."""
  if not isinstance(given, dict) or not isinstance(given.get('kind'), str):
    raise ValueError('A change has "feature", "kind" and "strength".')
  return Change(
    integer(given, 'feature', 0, 2**31 - 1),
    given['kind'],
    number(given, 'strength', -STRONGEST, STRONGEST, 1.0),
  )


def nodes(
  asked: Mapping, subjects: Sequence[Subject], length: int
) -> list[Node]:
  """Features of a graph, each [index of its SAE in the graph, feature, token].

  Args:
    subjects: the SAEs of the graph.
    length: tokens of the text.
  """
  given = asked.get('nodes')
  if not isinstance(given, list) or not 0 < len(given) <= _MOST_NODES:
    raise ValueError(f'"nodes" is a list of 1 to {_MOST_NODES} features.')
  found = []
  for one in given:
    if not isinstance(one, list) or len(one) != 3:
      raise ValueError('A node is [SAE, feature, token].')
    member = _whole(one[0], 'The SAE of a node', 0, len(subjects) - 1)
    most = subjects[member].width - 1
    feature = _whole(one[1], 'The feature of a node', 0, most)
    token = _whole(one[2], 'The token of a node', 0, length - 1)
    found.append(Node(member, feature, token))
  return found
