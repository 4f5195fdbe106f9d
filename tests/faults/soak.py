"""Long work in one process: memory and open files stay flat."""

from __future__ import annotations

import os
import pathlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np

from tests.faults import kills
from tests.faults.registry import Trial, fault
from tests.helpers import processes

PAGE = resource.getpagesize()


def _measure(process) -> tuple[float, int]:
  """(resident memory in MiB, open files) of a process."""
  folder = pathlib.Path(f'/proc/{process.pid}')
  pages = int((folder / 'statm').read_text().split()[1])
  return pages * PAGE / 2**20, len(os.listdir(folder / 'fd'))


def _again_and_again(work: Callable[[int], None]) -> None:
  number = 0
  while True:
    work(number)
    number += 1
    print('round', number, flush=True)


def _train(words: list[str]) -> None:
  processes.command(words)


def _evaluate(words: list[str], run: pathlib.Path) -> None:
  def work(number):
    (run / 'evaluation.json').unlink(missing_ok=True)
    shutil.rmtree(run / 'release', ignore_errors=True)
    processes.command(words)

  _again_and_again(work)


def _build(words: list[str], out: pathlib.Path) -> None:
  def work(number):
    shutil.rmtree(out, ignore_errors=True)
    processes.command([*words, f'--out={out}'])

  _again_and_again(work)


def _rounds(words: list[str], run: pathlib.Path) -> None:
  """Train, evaluate, release and build, each time in a new folder."""

  def work(number):
    shutil.rmtree(run, ignore_errors=True)
    processes.command(words)
    processes.command(_build_words(run))

  _again_and_again(work)


def _build_words(run: pathlib.Path) -> list[str]:
  words = ['microscope', 'build', f'--workdir={run}']
  return [*words, '--sequences=32', '--batch=4']


def _watched(
  folder: pathlib.Path, minutes: int, what: str, run, *arguments
) -> Iterator[Trial]:
  """A trial a minute: growth over the second half of the time so far.

  The first minute compiles. A line through the second half gives the slopes.
  """
  log = folder / f'{what}.log'
  process = processes.start(log, run, *arguments)
  samples, started = [], time.monotonic()
  try:
    for minute in range(minutes):
      while time.monotonic() - started < 60 * (minute + 1):
        time.sleep(1)
        if not process.is_alive():
          break
        samples.append(_measure(process))
      if not process.is_alive():
        text = log.read_text()
        if process.exitcode or 'Traceback' in text:
          yield Trial('broken', what, text[-300:])
        return
      if minute == 0:
        continue  # compiling
      half = samples[len(samples) // 2 :]
      memory, files = np.transpose(half)
      quarter = max(1, len(half) // 4)
      grown = memory[-quarter:].mean() - memory[:quarter].mean()
      more = files[-quarter:].max() - files[:quarter].max()
      hours = np.arange(len(half)) / 3600  # a sample a second
      slopes = np.polyfit(hours, half, 1)[0]
      done = [x for x in log.read_text().splitlines() if x.startswith('round ')]
      detail = (
        f'{minute + 1} min, {len(done)} rounds: {memory.mean():.0f} MiB and '
        f'{files.mean():.1f} open files in the second half, {grown:+.1f} MiB '
        f'and {more:+.0f} from its first quarter to its last; slopes '
        f'{slopes[0]:+.1f} MiB and {slopes[1]:+.2f} files an hour'
      )
      flat = grown < max(20, 0.03 * memory.mean()) and more <= 3
      yield Trial('survived' if flat else 'wrong', what, detail)
  finally:
    process.kill()
    process.join()


@fault(
  'soak-train',
  'training for minutes: memory and open files stay flat',
  full=10,
  quick=0,
  may_refuse=False,
)
def soak_train(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config = kills.tiny_run(
    folder, **{'train.steps': 10**7, 'metrics.every': 10, 'train.decay': 10}
  )
  words = kills.train_words(config, folder / 'run')
  yield from _watched(folder, times, 'train', _train, words)


@fault(
  'soak-evaluate',
  'evaluation and release in one process again and again',
  full=10,
  quick=0,
  may_refuse=False,
)
def soak_evaluate(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config, run = kills.trained_run(folder)
  config.evaluation.sequences = 8
  words = kills.train_words(config, run)
  yield from _watched(folder, times, 'evaluate', _evaluate, words, run)


@fault(
  'soak-build',
  'microscope build in one process again and again',
  full=10,
  quick=0,
  may_refuse=False,
)
def soak_build(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  _, run = kills.trained_run(folder)
  words = _build_words(run)
  yield from _watched(folder, times, 'build', _build, words, folder / 'out')


@fault(
  'soak-all',
  'train, evaluate and build in one process again and again',
  full=180,
  quick=0,
  may_refuse=False,
)
def soak_all(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  run, config = folder / 'run', kills.tiny_run(folder)
  config.evaluation.sequences = 8
  words = kills.train_words(config, run)
  yield from _watched(folder, times, 'all', _rounds, words, run)
