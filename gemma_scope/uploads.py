"""What is told when a file or folder was written whole (`files`).

The copy of a bucket's folder is uploaded by this (`runtime.remote`).
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import pathlib
from collections.abc import Callable, Iterator

# Folder -> what is called with the folder and a path below it.
published: dict[pathlib.Path, Callable[[pathlib.Path, pathlib.Path], None]] = {}
_quiet = contextvars.ContextVar('quiet', default=False)


def publish(path: str | os.PathLike[str]) -> None:
  """Tells whose folder `path` lies in that it was written whole."""
  if not published or _quiet.get():
    return
  path = pathlib.Path(os.path.realpath(path))
  for root, call in list(published.items()):
    # Not the files of a draft: the folder is published when it is whole.
    if path.is_relative_to(root) and not any(
      '.partial-' in part for part in path.relative_to(root).parts
    ):
      call(root, path)


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """A block in which what is written is not published."""
  token = _quiet.set(True)
  try:
    yield
  finally:
    _quiet.reset(token)
