"""Other environments: the same bytes come out, whatever the machine is set to.

Each variant runs the whole command, train -> evaluate -> release, in a process
of its own interpreter.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from tests.faults import kills
from tests.faults.registry import Trial, fault
from tests.helpers import processes

# Variables, and what the shell does before it becomes the command.
VARIANTS: dict[str, tuple[dict[str, str], str]] = {
  'LC_ALL=C': ({'LC_ALL': 'C', 'LANG': 'C', 'PYTHONUTF8': '0'}, ''),
  'LC_ALL=tr_TR.UTF-8': ({'LC_ALL': 'tr_TR.UTF-8'}, ''),
  'TZ=Pacific/Kiritimati': ({'TZ': 'Pacific/Kiritimati'}, ''),
  'PYTHONHASHSEED=1': ({'PYTHONHASHSEED': '1'}, ''),
  'PYTHONHASHSEED=12345': ({'PYTHONHASHSEED': '12345'}, ''),
  'umask 077': ({}, 'umask 077'),
  'umask 0': ({}, 'umask 0'),
  'no home': ({'HOME': '/nowhere'}, ''),
  'read-only home': ({'HOME': '/proc'}, ''),
  'a terminal of 10 columns': ({'COLUMNS': '10'}, ''),
  'no terminal, no HOME': ({'TERM': 'dumb'}, 'unset HOME'),
  '256 open files at most': ({}, 'ulimit -n 256'),
  'no core, low priority': ({}, 'ulimit -c 0; renice -n 19 $$ >/dev/null'),
}
PATHS = {
  'spaces and Unicode': 'a folder, ünïcödé 語 $HOME',
  'a leading dash and a quote': "-d 'q' %s {x} #1",
  'a long path': '/'.join(['x' * 60] * 6),
}


@fault(
  'environment',
  'locale, time zone, hash seed, umask, home, limits: the same bytes',
  full=len(VARIANTS) + len(PATHS),
  quick=0,
  may_refuse=False,
)
def environments(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config = kills.tiny_run(folder, **{'evaluation.sequences': 8})

  def run(name: str, variables, before: str, run_folder: pathlib.Path):
    words = kills.train_words(config, run_folder)
    script = f'{before}\nexec "$@"'
    arguments = [sys.executable, '-m', 'launch.train', *words[1:]]
    done = subprocess.run(
      ['bash', '-c', script, 'run', *arguments],
      cwd=processes.ROOT,
      env=os.environ
      | {'PYTHONPATH': str(processes.ROOT)}
      | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('count=8', 'count=1')}
      | variables,
      capture_output=True,
    )
    if done.returncode:
      raise RuntimeError(f'{name}: {done.stderr[-500:]!r}')
    return kills.state_digest(config, run_folder) + kills.tree_digest(
      run_folder / 'release', ('.png', 'manifest.json')
    )

  wanted = run('plain', {}, '', folder / 'plain')
  trials = [
    (n, v, b, folder / f'run{i}')
    for i, (n, (v, b)) in enumerate(VARIANTS.items())
  ]
  trials += [(n, {}, '', folder / path) for n, path in PATHS.items()]
  for name, variables, before, place in trials[:times]:
    try:
      same = run(name, variables, before, place) == wanted
      yield Trial('survived' if same else 'wrong', name)
    except (RuntimeError, ValueError, OSError) as error:
      yield Trial('broken', name, str(error))
    shutil.rmtree(place, ignore_errors=True)


def _with_clock(words) -> None:
  """A command whose clock goes back by a day again and again."""
  import time

  real, calls = time.time, [0]

  def jumping():
    calls[0] += 1
    return real() - 86400 * (calls[0] // 7)

  time.time = jumping
  processes.command(words)


@fault(
  'clock',
  'the clock goes back by a day again and again while it trains',
  full=2,
  quick=0,
  may_refuse=False,
)
def clock(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config = kills.tiny_run(folder)
  kills.whole(kills.train_words(config, folder / 'plain'), folder / 'log')
  wanted = kills.state_digest(config, folder / 'plain')
  for number in range(times):
    run, log = folder / f'run{number}', folder / f'{number}.log'
    words = kills.train_words(config, run)
    process = processes.start(log, _with_clock, words)
    process.join(300)
    if process.exitcode:
      yield Trial('broken', '', log.read_text()[-300:])
    else:
      same = kills.state_digest(config, run) == wanted
      yield Trial('survived' if same else 'wrong')
