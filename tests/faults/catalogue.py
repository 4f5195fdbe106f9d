"""All faults, by name."""

from __future__ import annotations

from tests.faults import (
  damage,
  disk,
  environment,
  flags,
  foreign,
  hostile,
  kills,
  several,
  soak,
)
from tests.faults.registry import FAULTS

__all__ = [
  'FAULTS',
  'damage',
  'disk',
  'environment',
  'flags',
  'foreign',
  'hostile',
  'kills',
  'several',
  'soak',
]
