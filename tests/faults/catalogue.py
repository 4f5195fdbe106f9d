"""All faults, by name."""

from __future__ import annotations

from tests.faults import (
  buckets,
  damage,
  disk,
  environment,
  flags,
  foreign,
  hostile,
  kills,
  several,
  soak,
  storage,
)
from tests.faults.registry import FAULTS

__all__ = [
  'FAULTS',
  'buckets',
  'damage',
  'disk',
  'environment',
  'flags',
  'foreign',
  'hostile',
  'kills',
  'several',
  'soak',
  'storage',
]
