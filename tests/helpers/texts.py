"""Text to tokenize, token stores to damage, a fresh Python."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import gemma_scope
from gemma_scope.text import (
  token_store,
)

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]


ODD = (
  'def f(x):\n\n\tif x:  # tab\n' + ' ' * 37 + 'y = 1234567\r\n\n\n\n\n\n\n'
  '  "héllo ✓ 日本 \U0001f600 \x00 \x7f"\n \n\t\t \n' + ' ' * 9
)


def run_python(code: str, *arguments: str) -> str:
  done = subprocess.run(
    [sys.executable, '-c', code, *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '3'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def lines(n: int) -> str:
  return ''.join(f'line {i} of text, {i * i} squared\n' for i in range(n))


def copy_of(store: token_store.Tokens, folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  for file in store.folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return folder
