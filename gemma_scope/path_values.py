"""Paths that a user gives: what they may be, and what is published of them."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import tempfile

from gemma_scope import files

_MOST_BYTES = 255  # of a name; what Linux and macOS allow
_LONG = re.compile(r'\S{200,}')


def check(path: str, name: str) -> None:
  """Refuses what cannot be a path on any machine.

  Args:
    path: what was given.
    name: of the flag or field, for the message.

  Raises:
    ValueError: it holds a null character, or a name that is too long.
  """
  if '\0' in path:
    raise ValueError(f'{name}: {files.show(path)} holds a null character.')
  for part in path.split('/'):
    num_bytes = len(part.encode('utf-8', 'surrogateescape'))
    if num_bytes > _MOST_BYTES:
      raise ValueError(
        f'{name}: the name {files.show(part)} has {num_bytes:,} bytes, and a '
        f'file may have {_MOST_BYTES}.'
      )


def check_target(path: str, name: str, target: str = '') -> None:
  """Refuses, before the work, a path of which the command can make nothing.

  Args:
    path: what was given; it need not exist.
    name: of the flag, for the message.
    target: 'folder' if it names one; 'file' if a file will be written there.

  Raises:
    ValueError: a file is where a folder must be, or the other way round, or
      nothing can be written there.
  """
  whole = pathlib.Path(os.path.abspath(path))
  nearest = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
  if nearest != whole or target == 'folder':
    if not os.path.isdir(nearest):
      raise ValueError(f'{name}: {files.show(nearest)} is not a folder.')
  elif target == 'file' and not os.path.isfile(path):
    raise ValueError(f'{name}: {files.show(path)} is not a plain file.')
  if target == 'file':
    folder = whole.parent if nearest == whole else nearest
    try:
      with tempfile.TemporaryFile(dir=folder):
        pass
    except OSError as error:
      raise ValueError(
        f'{name}: no file can be written in {files.show(folder)} '
        f'({error.strerror}).'
      ) from None


def existing(given: files.PathLike, flag: str) -> pathlib.Path:
  """The path that a flag gives, which must exist.

  Raises:
    ValueError: it does not, with a suggestion.
  """
  path = pathlib.Path(given)
  if not path.exists():
    raise ValueError(
      f'--{flag}: there is no file or folder {str(given)!r}.{files.near(given)}'
    )
  return path


def sentence(error: BaseException) -> str:
  """An error as a command shows it: its kind and its text.

  One of the system, '[Errno 20] Not a directory', names its file first.
  """
  text = str(error)
  if isinstance(error, OSError) and error.filename and error.strerror:
    if text.startswith('[Errno'):
      text = f'{files.show(error.filename)} cannot be used: {error.strerror}.'
  return f'{type(error).__name__}: {text}'


def readable(message: str) -> str:
  """A message whose words of hundreds of characters are shortened."""
  return _LONG.sub(lambda word: f'{word[0][:60]}...{word[0][-30:]}', message)


def shortened(source: str) -> str:
  """A source of text without the folders of this machine, to be published.

  'files:/home/me/texts/*.txt' -> 'files:*.txt (path sha256 1a2b3c4d)'. The
  hash tells two paths apart and does not give them away; sources that name no
  path stay as they are.
  """
  kind, colon, argument = source.partition(':')
  path = argument
  if kind == 'hf':
    path = argument.partition(':')[0]
    if not path.startswith(('./', '../', '/', '~')):
      return source
  elif kind not in ('files', 'arrayrecord'):
    return source
  name, space, digest = shortened_path(path).partition(' (')
  return f'{kind}{colon}{name}{argument[len(path) :]}{space}{digest}'


def shortened_path(path: str) -> str:
  """A path without its folders: '/home/me/a.txt' -> 'a.txt (path sha256 ...)'.

  A bare name stays as it is.
  """
  name = pathlib.PurePath(path).name
  if path == name:
    return path
  digest = hashlib.sha256(path.encode('utf-8', 'replace')).hexdigest()
  return f'{name} (path sha256 {digest[:8]})'
