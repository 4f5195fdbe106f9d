"""Meshes of fewer than the eight devices of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest

from gemma_scope import mesh


@contextlib.contextmanager
def only(count: int) -> Iterator[None]:
  """Meshes are of the first devices: every device computes what is not split.

  For tests of something else than meshes.
  """
  make = mesh.make
  few = jax.devices()[:count]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh, 'make', lambda axes, devices=few: make(axes, devices))
    yield
