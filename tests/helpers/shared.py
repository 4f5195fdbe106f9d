"""What the processes of a run of the tests make once and all read."""

from __future__ import annotations

import fcntl
import os
import pathlib
from collections.abc import Callable


def folder(
  tmp_path_factory, name: str, make: Callable[[pathlib.Path], object]
) -> pathlib.Path:
  """A folder of this run; `make` fills it in the first process that asks."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:  # each has a folder in the run's
    root = root.parent
  path, done = root / name, root / f'{name}.done'
  with open(root / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      path.mkdir()
      make(path)
      done.touch()
  return path
