"""Shell scripts run with stand-ins for what they call."""

from __future__ import annotations

import os
import pathlib
import subprocess

import gemma_scope

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]


LAUNCH = ROOT / 'launch'


def run(command, cwd=ROOT, path=None, **environment):
  """Runs with only what a login shell has, and `path` before the rest."""
  keep = {k: os.environ[k] for k in ('HOME', 'PATH', 'LANG') if k in os.environ}
  if path is not None:
    keep['PATH'] = f'{path}:{keep["PATH"]}'
  return subprocess.run(
    [str(part) for part in command],
    cwd=cwd,
    env=keep | {k: str(v) for k, v in environment.items()},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def script(path: pathlib.Path, body: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(body)
  path.chmod(0o755)
  return path
