"""Checks the fields of a question to the live view; rounds an answer's numbers.

Each check raises a ValueError that says which values are allowed.
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


def integer(question: Mapping, key, least, most, default=None) -> int:
  """A whole number between two, both allowed."""
  return _whole(question.get(key, default), f'"{key}"', least, most)


def _whole(value, name: str, least: int, most: int) -> int:
  if type(value) is not int or not least <= value <= most:
    raise ValueError(
      f'{name} must be a whole number from {least:,} to {most:,}.'
    )
  return value


def number(question: Mapping, key, least, most, default=None) -> float:
  """A number between two, both allowed."""
  value = question.get(key, default)
  if type(value) not in (int, float) or not least <= value <= most:
    raise ValueError(f'"{key}" must be a number from {least:g} to {most:g}.')
  return float(value)


def change(edit) -> Change:
  """A change of a latent."""
  if not isinstance(edit, dict) or not isinstance(edit.get('kind'), str):
    raise ValueError('A change must have "feature", "kind" and "strength".')
  return Change(
    integer(edit, 'feature', 0, 2**31 - 1),
    edit['kind'],
    number(edit, 'strength', -STRONGEST, STRONGEST, 1.0),
  )


def nodes(
  question: Mapping, subjects: Sequence[Subject], length: int
) -> list[Node]:
  """Features of a graph, each [index of its SAE in the graph, feature, token].

  Args:
    subjects: the SAEs of the graph.
    length: tokens of the text.
  """
  listed = question.get('nodes')
  if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_NODES:
    raise ValueError(f'"nodes" must be a list of 1 to {_MOST_NODES} features.')
  checked = []
  for entry in listed:
    if not isinstance(entry, list) or len(entry) != 3:
      raise ValueError('A node must be [SAE, feature, token].')
    member = _whole(entry[0], 'The SAE of a node', 0, len(subjects) - 1)
    most = subjects[member].width - 1
    feature = _whole(entry[1], 'The feature of a node', 0, most)
    token = _whole(entry[2], 'The token of a node', 0, length - 1)
    checked.append(Node(member, feature, token))
  return checked
