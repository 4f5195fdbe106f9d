"""Scripts that start runs by other engines, with stand-ins for these."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import stat
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
FIELDS = '--config=configs/gemma_scope_2b.py:set=16k;layers=0-8'


def stand_in(folder: pathlib.Path, name: str, body: str) -> None:
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\n{body}\n')
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
  return {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}', **more}


def test_xpk_gets_a_command_that_keeps_every_flag(tmp_path):
  stand_in(tmp_path, 'xpk', 'printf "%s\\n" "$@"')
  done = subprocess.run(
    ['bash', LAUNCH / 'gke_xpk.sh', 'sae-2b', 'gs://me/2b', FIELDS],
    env=environment(tmp_path, CLUSTER='pods', PROJECT='me', ZONE='us-east5-a'),
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert lines[:3] == ['workload', 'create', '--workload=sae-2b']
  (command,) = (x for x in lines if x.startswith('--command='))
  words = shlex.split(command.removeprefix('--command='))
  # exec: the signal of a preemption reaches Python itself.
  train = words[words.index('exec') :]
  assert train[:3] == ['exec', '.venv/bin/python', 'launch/train.py']
  assert train[3:] == ['--workdir=gs://me/2b', FIELDS]


def slurm(folder: pathlib.Path, srun: str, **more: str) -> subprocess.Popen:
  stand_in(folder, 'srun', srun)
  stand_in(folder, 'scontrol', f'echo "$@" >> {folder}/requeued')
  more = {'WORKDIR': 'gs://me/2b', 'SLURM_JOB_ID': '7', **more}
  return subprocess.Popen(
    ['bash', LAUNCH / 'slurm.sbatch', FIELDS],
    cwd=folder,
    env=environment(folder, **more),
  )


def test_a_run_of_slurm_that_is_done_is_not_queued_again(tmp_path):
  run = slurm(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/asked')
  assert run.wait(30) == 0
  asked = (tmp_path / 'asked').read_text().splitlines()
  assert asked[-2:] == ['--workdir=gs://me/2b', FIELDS]
  assert not (tmp_path / 'requeued').exists()


@pytest.mark.parametrize('restarts, again', [('0', True), ('20', False)])
def test_a_run_of_slurm_that_fell_is_queued_again(tmp_path, restarts, again):
  run = slurm(tmp_path, 'exit 1', SLURM_RESTART_COUNT=restarts)
  assert run.wait(30) == 1
  assert (tmp_path / 'requeued').exists() == again


def test_the_signal_before_the_time_limit_saves_and_queues_again(tmp_path):
  saves = f"trap 'echo > {tmp_path}/saved; exit 0' TERM"
  ready = f'echo > {tmp_path}/ready'
  run = slurm(tmp_path, f'{saves}\n{ready}\nwhile :; do sleep 0.05; done')
  while not (tmp_path / 'ready').exists():
    assert run.poll() is None
    time.sleep(0.02)
  run.send_signal(signal.SIGTERM)
  assert run.wait(30) == 0
  assert (tmp_path / 'saved').exists()
  assert (tmp_path / 'requeued').read_text() == 'requeue 7\n'
