"""kill -9 at random moments; the same command continues, and ends bitwise."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gemma_scope import files
from gemma_scope.training import trained
from tests.faults.registry import Trial, fault
from tests.helpers import processes, runs


def tiny_run(folder: pathlib.Path, **changes):
  """A config of two SAEs with all state that a checkpoint can hold."""
  return runs.small(
    folder,
    **{
      'collection.layers': (0,),
      'collection.sites': ('resid_post',),
      'collection.sparsity': (4.0, 8.0),
      'train.steps': 80,
      'evaluation.sequences': 0,
      **changes,
    },
  )


def train_words(config, workdir: pathlib.Path) -> list[str]:
  """The words of the train command that makes this config."""
  return ['train', *runs.flags_of(config, workdir)[2:]]


def config_words(config) -> list[str]:
  """The words that any command takes to make this config."""
  flags = runs.flags_of(config, pathlib.Path('x'))[2:]
  return [word for word in flags if not word.startswith('--workdir')]


def state_digest(config, workdir: pathlib.Path) -> str:
  """SHA-256 of all that training changed: parameters, moments, counters."""
  one = config.copy_and_resolve_references()
  one.mesh.data = jax.device_count()
  result = trained.load(one, workdir)
  digest = hashlib.sha256(str(result.step).encode())
  tree = (result.states, result.normalisation)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {value.dtype}'.encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def tree_digest(folder: pathlib.Path, skip: Sequence[str] = ()) -> str:
  """SHA-256 of every file in a folder, with its name."""
  digest = hashlib.sha256()
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    name = str(path.relative_to(folder))
    if not name.endswith(tuple(skip)):
      digest.update(name.encode() + files.sha256(path).encode())
  return digest.hexdigest()


def whole(words: Sequence[str], log: pathlib.Path) -> float:
  """Runs a command to its end; its seconds."""
  started = time.monotonic()
  process = processes.start(log, processes.command, words)
  process.join()
  if process.exitcode:
    raise RuntimeError(log.read_text()[-2000:])
  return time.monotonic() - started


def chain(
  words: Sequence[str],
  folder: pathlib.Path,
  end: End,
  seconds: float,
  dice: random.Random,
) -> Iterator[Trial]:
  """Ends a command again and again, then lets it run to its own end.

  Yields:
    What came of each end: 'survived' if it ended as it should.

  Raises:
    RuntimeError: it does not run to its own end.
  """
  for number in range(end.most):
    log = folder / f'{end.signal.name}{number}.log'
    process = processes.start(log, processes.command, words)
    if end.phases:
      wanted = end.phases[number % len(end.phases)]
      while process.is_alive() and wanted not in phases(_text(log)):
        process.join(0.01)
      seconds = 0.3
    process.join(dice.uniform(0, seconds))
    if not process.is_alive():  # done: there is nothing left to end
      break
    where = phase(last_line(_text(log)))
    if end.signal == signal.SIGKILL:
      process.kill()
      process.join()
      yield Trial('survived', where)
      continue
    started = time.monotonic()
    os.kill(process.pid, end.signal)
    process.join(end.patience_s)
    delay = time.monotonic() - started
    code, said = process.exitcode, _text(log)
    process.kill()
    process.join()
    # Before Python runs the command, the signal ends the process as ever.
    quiet = code == 0 or 'Traceback' not in said and 'opped' in last_line(said)
    early = code == -end.signal and where == 'starting'
    ok = quiet or early
    yield Trial(
      'survived' if ok else 'broken',
      where,
      '' if ok else f'exit code {code}: {said[-300:]}',
      delay,
    )
  whole(words, folder / 'end.log')


class End(NamedTuple):
  """How a process is ended before its time.

  Attributes:
    signal: which signal.
    most: how often at most, one run.
    patience_s: how long it may take to end.
    phases: each end waits for the next of these, over and over; without
      phases it comes at a random moment.
  """

  signal: signal.Signals = signal.SIGKILL
  most: int = 5
  patience_s: float = 60
  phases: tuple[str, ...] = ()


def phase(line: str) -> str:
  """The phase that a command's last line tells."""
  for words, name in (
    ('Taking over', 'starting'),
    ('processes with', 'starting'),
    ('tokenising', 'text'),
    ('documents,', 'text'),
    ('continuing', 'first chunk'),
    ('leaving out', 'first chunk'),
    ('train ', 'steps'),
    ('least squares', 'closing'),
    ('closing', 'closing'),
    ('evaluat', 'evaluation'),
    ('controls', 'evaluation'),
    ('harvest', 'harvest'),
    ('chunks', 'harvest'),
    ('index', 'index'),
    ('labels', 'labels'),
    ('loading', 'loading the model'),
    ('compiling', 'compiling'),
    ('reading', 'store'),
  ):
    if words in line:
      return name
  return 'starting' if not line.strip() else 'other'


def phases(text: str) -> list[str]:
  """The phases that a command's output tells, in their order."""
  return list(dict.fromkeys(map(phase, ['', *text.splitlines()])))


class Job(NamedTuple):
  """A command that is ended, and what must come out in the end.

  Attributes:
    command: output folder -> its words.
    digest: output folder -> a digest of the result.
    before: makes what it continues from, in the output folder.
  """

  command: Callable[[pathlib.Path], Sequence[str]]
  digest: Callable[[pathlib.Path], str]
  before: Callable[[pathlib.Path], None] = lambda run: None

  def clean(
    self, folder: pathlib.Path, name: str = 'whole'
  ) -> tuple[float, str]:
    """Seconds and digest of a run without faults, in `name` below a folder."""
    run = folder / name
    self.before(run)
    seconds = whole(self.command(run), folder / f'{name}.log')
    return seconds, self.digest(run)


def chains(
  folder: pathlib.Path,
  times: int,
  job: Job,
  end: End = End(),  # noqa: B008
) -> Iterator[Trial]:
  """Chains of ends, each chain compared with a run without any.

  SIGTERM comes in one phase after the other, SIGKILL in turns at random moments
  and in one phase after the other.
  """
  _, wanted = job.clean(folder)  # compiles into the cache
  seconds, found = job.clean(folder, 'again')
  if found != wanted:
    yield Trial('wrong', 'nothing injected', 'two whole runs differ')
    return
  dice, left, number = random.Random(folder.name), times, 0
  while left > 0 and number < 2 * times + 5:
    logs, run = folder / f'logs{number}', folder / f'run{number}'
    logs.mkdir()
    job.before(run)
    trials, error, same = [], '', False
    most = end._replace(most=min(left, end.most))
    if end.signal == signal.SIGTERM or number % 2:
      begun = phases(_text(folder / 'again.log'))
      names = [name for name in begun if name != 'other']
      start = number % len(names)
      most = most._replace(phases=(*names[start:], *names[:start]))
    try:
      for trial in chain(job.command(run), logs, most, seconds, dice):
        trials.append(trial)
      same = job.digest(run) == wanted
    except (RuntimeError, ValueError, OSError) as problem:
      error = str(problem)
    for trial in trials:
      if not same and trial.outcome == 'survived':
        outcome = 'broken' if error else 'wrong'
        trial = dataclasses.replace(trial, outcome=outcome, detail=error)
      yield trial
    left, number = left - len(trials), number + 1
    shutil.rmtree(run)


@fault(
  'kill-train',
  'kill -9 of training from the model: bitwise the state without a kill',
  full=50,
  quick=0,  # tests/training/loop_test.py kills a run twice
  may_refuse=False,
)
def kill_train(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config = tiny_run(folder)
  yield from chains(folder, times, training(config))


@fault(
  'kill-store',
  'kill -9 of training from a store of activations',
  full=10,
  quick=0,
  may_refuse=False,
)
def kill_store(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config = tiny_run(folder)
  whole(harvest_words(config, folder, folder / 'store'), folder / 'h.log')
  config.activations.store = str(folder / 'store')
  yield from chains(folder, times, training(config))


def harvest_words(config, folder: pathlib.Path, out: pathlib.Path):
  """The words of the harvest command."""
  words = ['harvest', *config_words(config), f'--workdir={folder / "text"}']
  return [*words, f'--out={out}', '--chunks=4']


@fault(
  'kill-harvest',
  'kill -9 of harvest: every byte of the store',
  full=10,
  quick=0,
  may_refuse=False,
)
def kill_harvest(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  yield from chains(folder, times, harvesting(folder))


def training(config) -> Job:
  """Training, and nothing after it."""
  return Job(
    lambda run: train_words(config, run),
    lambda run: state_digest(config, run),
  )


def harvesting(folder: pathlib.Path) -> Job:
  """Writing a store of activations."""
  config = tiny_run(folder)
  return Job(
    lambda run: harvest_words(config, folder, run),
    lambda run: tree_digest(run, ('run.lock',)),
  )


def trained_run(folder: pathlib.Path):
  """(config, workdir) of a run that is trained and released."""
  config = tiny_run(folder)
  whole(train_words(config, folder / 'trained'), folder / 'trained.log')
  return config, folder / 'trained'


def evaluating(folder: pathlib.Path) -> Job:
  """Evaluation and release of a run that is trained."""
  config, source = trained_run(folder)
  shutil.rmtree(source / 'release')
  config.evaluation.sequences = 8

  def digest(run):
    metrics = json.loads((run / 'evaluation.json').read_text())
    return files.json_sha256(metrics) + tree_digest(run / 'release')

  return Job(
    lambda run: train_words(config, run),
    digest,
    lambda run: shutil.copytree(source, run),
  )


def building(folder: pathlib.Path) -> Job:
  """The indexes and dashboards of a run."""
  _, source = trained_run(folder)
  return Job(
    lambda run: [
      'microscope',
      'build',
      f'--workdir={source}',
      f'--out={run}',
      '--sequences=32',
      '--batch=4',
    ],
    lambda run: tree_digest(run, ('run.lock',)),
  )


@fault(
  'kill-evaluate',
  'kill -9 of evaluation and release: the same metrics and release',
  full=10,
  quick=0,
  may_refuse=False,
)
def kill_evaluate(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  yield from chains(folder, times, evaluating(folder))


@fault(
  'kill-build',
  'kill -9 of microscope build: the same indexes and pages',
  full=10,
  quick=0,
  may_refuse=False,
)
def kill_build(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  yield from chains(folder, times, building(folder))


def _text(log: pathlib.Path) -> str:
  return log.read_text() if log.exists() else ''


def last_line(text: str) -> str:
  """The last line that is not empty."""
  return next((line for line in reversed(text.splitlines()) if line), '')


def _terminations(name: str, what: str, job, full: int) -> None:
  def inject(folder: pathlib.Path, times: int) -> Iterator[Trial]:
    end = End(signal.SIGTERM, 4)
    yield from chains(folder, times, job(folder), end)

  fault(
    f'term-{name}',
    f'SIGTERM during {what}: saved, and continued bitwise',
    full=full,
    quick=0,
    may_refuse=False,
  )(inject)


_terminations('train', 'training', lambda f: training(tiny_run(f)), 20)
_terminations('harvest', 'a harvest', harvesting, 8)
_terminations('evaluate', 'evaluation and release', evaluating, 8)
_terminations('build', 'microscope build', building, 8)
