"""The embedded model for graphs."""

from __future__ import annotations

import functools

from gemma_scope.language_model import weights


@functools.cache
def tiny():
  return weights.load('tiny')
