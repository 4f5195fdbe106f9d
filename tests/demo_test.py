"""What launch/demo.sh says before it does anything."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

import gemma_scope

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['gemma3-270m', 'a', 'b'], 'it takes a model (gemma3-270m) and a folder'),
    (['a', 'b'], 'it takes a model (gemma3-270m) and a folder'),
    (['gemma3-1b'], 'there is no demo on gemma3-1b'),
  ],
)
def test_wrong_arguments_are_a_sentence(arguments, words, tmp_path):
  done = subprocess.run(
    ['bash', ROOT / 'launch/demo.sh', *arguments],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 1 and words in done.stderr, done
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'arguments, words, folder',
  [
    ([], 'bash launch/demo.sh gemma3-270m', 'runs/tiny'),
    (['out'], 'trains on the embedded model', 'out'),
    (['gemma3-270m', 'out'], 'Gemma Terms of Use', 'out'),
  ],
)
def test_it_says_what_it_trains_on_and_runs_every_stage(
  arguments, words, folder, tmp_path
):
  """With programs in place of the set-up and of Python that only note calls."""
  launch = tmp_path / 'project' / 'launch'
  launch.mkdir(parents=True)
  (launch / 'demo.sh').write_text((ROOT / 'launch/demo.sh').read_text())
  (launch / 'setup.sh').write_text('echo "setup $*" >> "$CALLS"\n')
  fake = tmp_path / 'venv' / 'bin' / 'python'
  fake.parent.mkdir(parents=True)
  fake.write_text('#!/usr/bin/env bash\necho "python $*" >> "$CALLS"\n')
  fake.chmod(0o755)
  done = subprocess.run(
    ['bash', launch / 'demo.sh', *arguments],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
    env={
      'PATH': '/usr/bin:/bin',
      'CALLS': str(tmp_path / 'calls'),
      'GEMMA_SCOPE_VENV': str(fake.parents[1]),
    },
  )
  assert done.returncode == 0, done.stderr
  assert words in done.stdout
  setup, train, build = (tmp_path / 'calls').read_text().splitlines()
  real = arguments[:1] == ['gemma3-270m']
  assert setup == f'setup {"gemma3-270m" if real else ""}'
  config = 'gemma3_270m' if real else 'tiny'
  where = tmp_path / (folder if arguments else f'project/{folder}')
  assert train.endswith(f'--config=configs/{config}.py --workdir={where}')
  assert f'microscope.py build --workdir={where}' in build
