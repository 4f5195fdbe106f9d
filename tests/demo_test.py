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


def demo(tmp_path, arguments, *, stop: bool):
  """Runs the demo with stand-ins for the set-up and Python that note calls.

  Training writes a release, or nothing if it is to `stop`, as after SIGTERM.

  Returns:
    The calls, and the demo's finished process.
  """
  launch = tmp_path / 'project' / 'launch'
  launch.mkdir(parents=True)
  (launch / 'demo.sh').write_text((ROOT / 'launch/demo.sh').read_text())
  (launch / 'setup.sh').write_text('echo "setup $*" >> "$CALLS"\n')
  fake = tmp_path / 'venv' / 'bin' / 'python'
  fake.parent.mkdir(parents=True)
  released = (
    '' if stop else '[[ $1 != *train.py ]] || mkdir -p "${3#*=}/release"'
  )
  fake.write_text(
    f'#!/usr/bin/env bash\necho "python $*" >> "$CALLS"\n{released}\n'
  )
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
  return (tmp_path / 'calls').read_text().splitlines(), done


@pytest.mark.parametrize(
  'arguments, words, folder',
  [
    ([], 'bash launch/demo.sh gemma3-270m', 'runs/tiny'),
    (['out'], 'trains on the embedded model', 'out'),
    (['gemma3-270m', 'out'], 'Gemma Terms of Use', 'out'),
    (['gemma3-270m:layers=9', 'out'], 'Gemma Terms of Use', 'out'),
  ],
)
def test_it_says_what_it_trains_on_and_runs_every_stage(
  arguments, words, folder, tmp_path
):
  (setup, train, build), done = demo(tmp_path, arguments, stop=False)
  assert done.returncode == 0, done.stderr
  assert words in done.stdout
  name, *_ = arguments or ['']
  real = name.startswith('gemma3-270m')
  assert setup == f'setup {"gemma3-270m" if real else ""}'
  config = 'gemma3_270m.py' if real else 'tiny.py'
  config += name.removeprefix('gemma3-270m') if real else ''
  where = tmp_path / (folder if arguments else f'project/{folder}')
  assert train.endswith(f'--config=configs/{config} --workdir={where}')
  assert f'microscope.py build --workdir={where}' in build


def test_a_run_that_was_stopped_ends_the_demo_with_a_sentence(tmp_path):
  (_, train), done = demo(tmp_path, ['out'], stop=True)
  assert 'train.py' in train
  assert done.returncode == 130
  assert done.stderr == (
    f'demo: stopped and saved in {tmp_path}/out; the same command continues\n'
  )
