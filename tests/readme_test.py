"""The README's Python runs as it stands, on a small run of the real model."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

from gemma_scope.language_model import packages
from tests.helpers import processes
from tests.helpers.readme import ROOT, blocks


def commands() -> list[str]:
  """Lines of the shell blocks that call one of launch/'s commands."""
  text = ''.join(blocks('')).replace('\\\n', ' ')
  return re.findall(r'^\.venv/bin/python (launch/\w+\.py .*)$', text, re.M)


@pytest.mark.parametrize('line', commands())
def test_the_commands_have_these_flags(line, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  script, *arguments = shlex.split(line, comments=True)
  # Paths are looked at before anything else: those of the examples are here.
  for name in ('tokens', 'gemma2-2b', 'text'):
    (tmp_path / name).mkdir()
  (tmp_path / 'tokenizer_gemma2.model').touch()
  arguments = [one.replace('/data/', f'{tmp_path}/') for one in arguments]
  module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
  if script == 'launch/microscope.py':
    flags = module.flags(arguments.pop(0))
  else:
    flags = module.FLAGS
  with flags.parse(arguments) as given:
    assert given is not None


def test_the_python_runs_as_it_stands(tmp_path):
  pytest.importorskip('gguf', reason='gguf is not installed')
  try:
    packages.path('gemma3-270m')
  except packages.PackageNotFound as error:
    pytest.skip(f'the README on Gemma 3 270M: {error}')
  environment = {**os.environ, **processes.one_device()}
  done = subprocess.run(
    [sys.executable, '-m', 'tests.helpers.readme', tmp_path],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert not done.returncode, done.stderr
  assert "' larger'" in done.stdout and "' than'" in done.stdout
