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
  """One trial: the memory and open files of a process over so many minutes."""
  log = folder / f'{what}.log'
  process = processes.start(log, run, *arguments)
  samples, started = [], time.monotonic()
  try:
    while time.monotonic() - started < 60 * minutes:
      time.sleep(1)
      if not process.is_alive():
        yield Trial('broken', what, log.read_text()[-300:])
        return
      samples.append(_measure(process))
    rounds = log.read_text().count('\nround ')
    yield _verdict(what, np.array(samples), f'{minutes} min, {rounds} rounds')
  finally:
    process.kill()
    process.join()


def _verdict(what: str, samples: np.ndarray, length: str) -> Trial:
  """Whether the second half is flat; before it, programs are compiled.

  Args:
    what: the name of the work.
    samples: [N, 2], a row each second: memory in MiB, open files.
    length: how long it ran, in words.
  """
  half = samples[len(samples) // 2 :]
  quarter = max(1, len(half) // 4)
  memory, files = half.T
  grown = memory[-quarter:].mean() - memory[:quarter].mean()
  more = files[-quarter:].max() - files[:quarter].max()
  slopes = np.polyfit(np.arange(len(half)) / 3600, half, 1)[0]
  detail = (
    f'{length}: {memory.mean():.0f} MiB and {files.mean():.1f} open files in '
    f'the second half, {grown:+.1f} MiB and {more:+.0f} from its first quarter '
    f'to its last; slopes {slopes[0]:+.1f} MiB and {slopes[1]:+.2f} files an '
    'hour'
  )
  flat = grown < max(20, 0.03 * memory.mean()) and more <= 3
  return Trial('survived' if flat else 'wrong', what, detail)


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
