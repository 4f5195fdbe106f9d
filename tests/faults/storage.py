"""Storage that stumbles, is gone, or is slow: calls that write or read.

A disk or a network file system answers one call with an error, or every call
from a moment on, or late. `disk` has the full disks.
"""

from __future__ import annotations

import errno
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

from tests.faults import calls, damage, disk, kills
from tests.faults.registry import Trial, attempt, fault
from tests.helpers import processes

ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def _of_kept(what: str, kept: damage.Kept) -> None:
  def stumbles(folder: pathlib.Path, times: int) -> Iterator[Trial]:
    count = folder / 'count'
    count.mkdir()
    kept.make(count)  # what is made once
    shutil.rmtree(count)
    count.mkdir()
    with calls.watched(folder, 'w', calls.nothing) as made:
      kept.make(count)
    dice = random.Random(what)
    for _ in range(times):
      number, error = dice.randrange(len(made)), dice.choice(ERRORS)
      where = f'{made[number]}: {errno.errorcode[error]}'
      before = calls.fails(number, error)
      yield disk.written(
        kept,
        folder,
        where,
        lambda before=before: calls.watched(folder, 'w', before),
      )

  def unread(folder: pathlib.Path, times: int) -> Iterator[Trial]:
    dice = random.Random(what)
    whole = folder / 'whole'
    whole.mkdir()
    kept.make(whole)
    with calls.watched(folder, 'r', calls.nothing) as made:
      kept.use(whole)
    for trial in range(times):
      number, error = dice.randrange(len(made)), dice.choice(ERRORS)
      lasting = bool(trial % 2)
      where = f'{"each" if lasting else "one"} {made[number]}'

      def use(before=calls.fails(number, error, lasting)):  # noqa: B008
        with calls.watched(folder, 'r', before):
          return kept.use(whole)

      first = attempt(use, kept.right, where)
      after = attempt(lambda: kept.use(whole), kept.right, where)
      if after.outcome != 'survived':  # what could be read once cannot now
        yield Trial('broken', where, f'afterwards: {after.detail}')
        shutil.rmtree(whole)
        whole.mkdir()
        kept.make(whole)
      else:
        yield first

  slow = what == 'checkpoint'
  fault(
    f'stumble-{what}',
    f'one call that writes a {what} fails, and those after it do not',
    full=40 if slow else 200,
    quick=0 if slow else 8,
  )(stumbles)
  fault(
    f'unread-{what}',
    f'a call that reads a {what} fails, or all from one on; then none does',
    full=40 if slow else 200,
    quick=0 if slow else 8,
  )(unread)


for _what, _kept in damage.KEPT.items():
  _of_kept(_what, _kept)


# Commands, whose every call below their folder may fail or be slow.


def _command(words: Sequence[str], folder: pathlib.Path, before) -> None:
  """A command in a process of its own; prints how many calls it made."""
  made: list[str] = []
  try:
    with calls.watched(folder, 'rw', before) as made:
      processes.command(words)
  finally:
    print(f'\n{len(made)} calls', flush=True)


class _Late:
  """Each call takes up to `most_s` seconds longer."""

  def __init__(self, most_s: float):
    self._most_s, self._dice = most_s, random.Random(0)

  def __call__(self, number: int, path: str | None) -> None:
    time.sleep(self._dice.uniform(0, self._most_s))


class _Fails:
  """As `calls.fails`, for another process."""

  def __init__(self, number: int, error: int, lasting: bool):
    self._given = number, error, lasting

  def __call__(self, number: int, path: str | None) -> None:
    calls.fails(*self._given)(number, path)


def _nothing(number: int, path: str | None) -> None:
  pass


def failing_commands(
  folder: pathlib.Path, times: int, job: kills.Job
) -> Iterator[Trial]:
  """A command with one call that fails, or all from one on; then without."""
  _, wanted = job.clean(folder)
  counted, log = folder / 'counted', folder / 'count.log'
  job.before(counted)
  _ended(log, job.command(counted), counted, _nothing)
  count = int(kills.last_line(log.read_text()).split()[0])
  dice = random.Random(folder.name)
  for trial in range(times):
    number, error = dice.randrange(count), dice.choice(ERRORS)
    lasting = bool(trial % 2)
    run, log = folder / f'run{trial}', folder / f'{trial}.log'
    job.before(run)
    fails = _Fails(number, error, lasting)
    code, said = _ended(log, job.command(run), run, fails)
    where = 'gone' if lasting else 'one call'
    last = kills.last_line(said)
    if code is None or code < 0 or 'Traceback' in said:
      what = f'call {number} of {count}, exit code {code}: {said[-350:]}'
      yield Trial('broken', where, what)
    else:
      yield _again(job, run, wanted, Trial(
        'refused' if code else 'survived', where, last if code else ''
      ))  # fmt: skip
    shutil.rmtree(run, ignore_errors=True)


def _again(
  job: kills.Job, run: pathlib.Path, wanted: str, first: Trial
) -> Trial:
  """What came of a command, once it has run again without faults."""
  try:
    kills.whole(job.command(run), run.with_name(f'{run.name}.again.log'))
    if job.digest(run) == wanted:
      return first
    return Trial('wrong', first.where, 'another result')
  except (RuntimeError, ValueError, OSError) as error:
    return Trial('broken', first.where, f'the second try: {error}')


def _ended(
  log: pathlib.Path, words: Sequence[str], folder: pathlib.Path, before
) -> tuple[int | None, str]:
  """(exit code, output without the line of the count) of a command."""
  process = processes.start(log, _command, words, folder, before)
  process.join(300)
  code = process.exitcode
  process.kill()
  process.join()
  return code, log.read_text()


def slow_commands(
  folder: pathlib.Path, times: int, job: kills.Job
) -> Iterator[Trial]:
  """A command whose every file call takes up to 50 ms longer."""
  job.clean(folder, 'warm')  # compiles into the cache
  quick_s, wanted = job.clean(folder)
  for trial in range(times):
    run, started = folder / f'run{trial}', time.monotonic()
    job.before(run)
    code, said = _ended(
      folder / f'{trial}.log', job.command(run), run, _Late(0.05)
    )
    seconds = time.monotonic() - started
    if code:
      yield Trial('broken', '', f'exit code {code}: {said[-400:]}')
      continue
    same = job.digest(run) == wanted
    what = f'{kills.last_line(said)}, {seconds:.0f} s, {quick_s:.0f} s without'
    yield Trial('survived' if same else 'wrong', '', what, seconds)
    shutil.rmtree(run)


def _of_command(name: str, what: str, job: Callable[[pathlib.Path], kills.Job]):
  fault(
    f'storage-{name}',
    f'a file call of {what} fails, or all from one on; then the same end',
    full=16,
    quick=0,
  )(lambda folder, times: failing_commands(folder, times, job(folder)))
  fault(
    f'slow-{name}',
    f'each file call of {what} takes up to 50 ms longer: the same end',
    full=2,
    quick=0,
    may_refuse=False,
  )(lambda folder, times: slow_commands(folder, times, job(folder)))


_of_command('train', 'training', lambda f: kills.training(kills.tiny_run(f)))
_of_command('harvest', 'a harvest', kills.harvesting)
_of_command('evaluate', 'evaluation and release', kills.evaluating)
_of_command('build', 'microscope build', kills.building)
