"""File calls of this process on the paths below one folder.

They are counted, and a function is called before each: it may raise the error
that the call will raise, or wait. Seen are the calls that Python makes; those
of C++ (the arrays of a checkpoint) are not.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pathlib
import threading
from collections.abc import Callable, Iterator

# What to do before a call: (its number, its path, or None for an open file).
Before = Callable[[int, str | None], None]
_NAMED = ('replace', 'rename', 'mkdir')


@contextlib.contextmanager
def watched(
  folder: pathlib.Path, kinds: str, before: Before
) -> Iterator[list[str]]:
  """Calls `before` in front of each file call of some kinds.

  Args:
    folder: calls on other paths pass.
    kinds: 'r' for calls that read, 'w' for those that write, 'rw' for both.
    before: see `Before`.

  Yields:
    The names of the calls so far.
  """
  made: list[str] = []
  turn, below = threading.Lock(), os.path.abspath(folder)

  def concerns(file) -> bool:
    if isinstance(file, int):
      with contextlib.suppress(OSError):
        file = os.readlink(f'/proc/self/fd/{file}')
    return os.path.abspath(
      os.fsdecode(str(file) if isinstance(file, int) else file)
    ).startswith(below)

  def tell(name: str, path: str | None) -> None:
    with turn:
      made.append(name)
      number = len(made) - 1
    before(number, path)

  class Raw(io.FileIO):
    def readinto(self, buffer):
      if 'r' in kinds:
        tell('read', None)
      return super().readinto(buffer)

    def read(self, size=-1):
      if 'r' in kinds:
        tell('read', None)
      return super().read(size)

    def readall(self):
      if 'r' in kinds:
        tell('read', None)
      return super().readall()

    def write(self, data):
      if 'w' in kinds:
        tell('write', None)
      return super().write(data)

  real_open = builtins.open

  def opened(
    file, mode='r', buffering=-1, encoding=None, errors=None, newline=None,
    closefd=True, opener=None,
  ):  # fmt: skip
    writes = bool(set(mode) & set('wxa+'))
    if not (concerns(file) and ('w' if writes else 'r') in kinds):
      return real_open(
        file, mode, buffering, encoding, errors, newline, closefd, opener
      )
    if not isinstance(file, int):
      tell('open', os.fspath(file))
    plain = mode.replace('b', '').replace('t', '')
    raw = Raw(file, plain, closefd, opener)
    if buffering == 0:
      return raw
    kind = io.BufferedWriter if writes else io.BufferedReader
    buffer = (io.BufferedRandom if '+' in mode else kind)(raw)
    if 'b' in mode:
      return buffer
    text = io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)
    text.mode = mode
    return text

  def named(name: str, real):
    def call(path, *args, **kwargs):
      if 'w' in kinds and concerns(path):
        tell(name, None if name == 'fsync' else os.fspath(path))
      return real(path, *args, **kwargs)

    return call

  patched = [(builtins, 'open', opened), (io, 'open', opened)]
  for name in (*_NAMED, 'fsync'):
    patched.append((os, name, named(name, getattr(os, name))))
  before_all = [
    (where, name, getattr(where, name)) for where, name, _ in patched
  ]
  try:
    for where, name, function in patched:
      setattr(where, name, function)
    yield made
  finally:
    for where, name, function in before_all:
      setattr(where, name, function)


def fails(number: int, error: int, lasting: bool = False) -> Before:
  """The call of this number fails; if `lasting`, each after it too."""

  def before(at: int, path: str | None) -> None:
    if at == number or (lasting and at > number):
      raise OSError(error, os.strerror(error), path)

  return before


def nothing(number: int, path: str | None) -> None:
  """Before a call that is only counted."""
