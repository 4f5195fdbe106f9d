"""Subscribers to the files and folders that `files` has written whole.

`runtime.remote` subscribes to upload what is written into its local copy of a
folder in a bucket.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import pathlib
from collections.abc import Callable, Iterator

# Folder -> its subscriber, which is called with the folder and a path below.
published: dict[pathlib.Path, Callable[[pathlib.Path, pathlib.Path], None]] = {}
_quiet = contextvars.ContextVar('quiet', default=False)


def publish(path: str | os.PathLike[str]) -> None:
  """Tells the subscribers of folders above `path` that it was written."""
  if not published or _quiet.get():
    return
  path = pathlib.Path(os.path.realpath(path))
  for root, call in list(published.items()):
    # Files of a draft do not count: its folder is published when it is whole.
    if path.is_relative_to(root) and not any(
      '.partial-' in part for part in path.relative_to(root).parts
    ):
      call(root, path)


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """A block in which writes are not published."""
  token = _quiet.set(True)
  try:
    yield
  finally:
    _quiet.reset(token)
