"""The commands of launch/ in this process."""

from __future__ import annotations

import types

import launch


def run(capsys, *words) -> types.SimpleNamespace:
  """What `gemma-scope WORDS...` prints, and the exit code that it leaves."""
  capsys.readouterr()
  code = 0
  try:
    launch.main([str(word) for word in words])
  except SystemExit as end:
    code = end.code or 0
  printed = capsys.readouterr()
  error = printed.err
  if isinstance(code, str):  # the interpreter prints it
    code, error = 1, f'{error}{code}\n'
  return types.SimpleNamespace(code=code, out=printed.out, err=error)
