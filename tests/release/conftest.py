"""One released SAE, and releases without their picture."""

from __future__ import annotations

import pytest

from gemma_scope.release import frontier
from tests.helpers import releases
from tests.helpers.releases import MEMBER, metrics_of, params_of


@pytest.fixture
def no_picture(monkeypatch):
  """An empty file for the plot of a release, which takes a second to draw."""
  monkeypatch.setattr(frontier, 'frontier', lambda path, rows: path.touch())


@pytest.fixture
def folder(tmp_path, no_picture):
  """One SAE, released."""
  releases.save(
    tmp_path / 'out', [(params_of(), releases.card(), metrics_of())]
  )
  return tmp_path / 'out' / MEMBER
