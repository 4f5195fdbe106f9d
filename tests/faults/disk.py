"""Disks that are full, and storage whose calls fail or are slow."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import pathlib
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator

from tests.faults import damage, kills
from tests.faults.registry import Trial, attempt, fault
from tests.helpers import processes

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
CALLS = ('open', 'fsync', 'replace', 'rename', 'mkdir')


@contextlib.contextmanager
def failing(number: int, error: int) -> Iterator[list[str]]:
  """The call of this number that writes fails, and each after it.

  Yields:
    The names of the calls so far.
  """
  made = []

  def failing_call(name, real):
    def call(*args, **kwargs):
      if name != 'open' or _writes(*args, **kwargs):
        made.append(name)
        if len(made) > number:
          path = str(args[0]) if name != 'fsync' else None
          raise OSError(error, os.strerror(error), path)
      return real(*args, **kwargs)

    return call

  real = {name: getattr(os, name) for name in CALLS if name != 'open'}
  real_open = builtins.open
  try:
    for name, function in real.items():
      setattr(os, name, failing_call(name, function))
    builtins.open = failing_call('open', real_open)
    yield made
  finally:
    builtins.open = real_open
    for name, function in real.items():
      setattr(os, name, function)


def _writes(file, mode='r', *unused, **options) -> bool:
  return isinstance(mode, str) and bool(set(mode) & set('wxa+'))


def _drafts(folder: pathlib.Path) -> list[str]:
  """Half-written files that were left behind."""
  words = '.partial-', 'orbax-checkpoint-tmp', '.replaced'
  return [p.name for p in folder.rglob('*') if any(w in p.name for w in words)]


def written(
  kept: damage.Kept, folder: pathlib.Path, where: str, broken
) -> Trial:
  """Writes something while `broken()` holds, then again without.

  Survived: the first try ends well all the same, or nothing is lost and the
  second try ends well. Refused: the first try said so, and the second is well.
  """
  target = folder / 'target'
  target.mkdir()

  def write():
    with broken():
      kept.make(target)

  first = attempt(write, lambda _: True, where)
  if first.outcome == 'broken':
    shutil.rmtree(target, ignore_errors=True)
    return first
  if first.outcome == 'refused' and (left := _drafts(target)):
    shutil.rmtree(target)
    return Trial('broken', where, f'left behind: {left}')
  try:
    if first.outcome == 'refused':
      target.mkdir(exist_ok=True)
      kept.make(target)
    second = attempt(lambda: kept.use(target), kept.right, where)
  except Exception as error:
    second = Trial('broken', where, f'the second try: {error!r}')
  shutil.rmtree(target)
  return first if second.outcome == 'survived' else second


def _register(what: str, kept: damage.Kept) -> None:
  def fails(folder: pathlib.Path, times: int) -> Iterator[Trial]:
    (folder / 'count').mkdir()
    kept.make(folder / 'count')  # what is made once
    shutil.rmtree(folder / 'count')
    (folder / 'count').mkdir()
    with failing(10**9, errno.EIO) as calls:
      kept.make(folder / 'count')
    dice = random.Random(what)
    for _ in range(times):
      number, error = dice.randrange(len(calls)), dice.choice(ERRORS)
      where = f'{calls[number]}: {errno.errorcode[error]}'
      yield written(
        kept, folder, where, lambda n=number, e=error: failing(n, e)
      )

  fault(
    f'fail-{what}',
    f'a call that writes a {what} fails (no space, quota, I/O error, ...)',
    full=100,
    quick=0 if what == 'checkpoint' else 25,
  )(fails)


for _what, _kept in damage.KEPT.items():
  _register(_what, _kept)


# Commands on a file system that is too small: it is mounted, which needs root.


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kib: int):
  """A tmpfs of so many KiB at `folder`; yields a function that enlarges it."""
  folder.mkdir(exist_ok=True)
  _call('mount', '-t', 'tmpfs', '-o', f'size={kib}k', 'tmpfs', str(folder))
  try:
    yield lambda new: _call('mount', '-o', f'remount,size={new}k', str(folder))
  finally:
    _call('umount', '-l', str(folder))


def _call(*words: str) -> None:
  subprocess.run(words, check=True, capture_output=True)


def _size_kib(folder: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) >> 10


SHARES = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)


def full_disks(
  folder: pathlib.Path, times: int, job: kills.Job
) -> Iterator[Trial]:
  """A command on disks of shares of what it needs; then with room enough."""
  _, wanted = job.clean(folder)
  need = _size_kib(folder / 'whole')
  at_start = folder / 'start'
  job.before(at_start)
  begin = _size_kib(at_start) if at_start.exists() else 0
  for number, share in enumerate(SHARES[:times]):
    where = f'{share:.0%} of {need:,} KiB'
    disk = folder / f'disk{number}'
    with small_disk(
      disk, int(begin * 1.3 + 64 + share * (need - begin))
    ) as grow:
      run, log = disk / 'run', folder / f'disk{number}.log'
      job.before(run)
      process = processes.start(log, processes.command, job.command(run))
      yield _judged(
        process, job, disk, wanted, where, lambda: grow(16 * need + 65536)
      )


def filling_disks(
  folder: pathlib.Path, times: int, job: kills.Job
) -> Iterator[Trial]:
  """Another program fills the disk at a random moment; then it has room."""
  job.clean(folder, 'warm')  # compiles into the cache
  seconds, wanted = job.clean(folder)
  dice = random.Random(folder.name)
  for number in range(times):
    disk = folder / f'disk{number}'
    with small_disk(disk, 65536):
      run, log = disk / 'run', folder / f'disk{number}.log'
      job.before(run)
      process = processes.start(log, processes.command, job.command(run))
      process.join(dice.uniform(0, seconds))
      said = log.read_text() if log.exists() else ''
      where = kills.phase(kills.last_line(said))
      with contextlib.suppress(OSError), open(disk / 'other', 'wb') as file:
        while True:
          file.write(bytes(65536))
      yield _judged(process, job, disk, wanted, where, (disk / 'other').unlink)


def _judged(
  process, job: kills.Job, disk: pathlib.Path, wanted: str, where, make_room
) -> Trial:
  """What came of a command on a full disk, and of the same with room."""
  run, log = disk / 'run', disk.with_name(f'{disk.name}.log')
  process.join(300)
  code, said = process.exitcode, log.read_text() if log.exists() else ''
  process.kill()
  process.join()
  if code is None:
    return Trial('broken', where, f'hangs: {said[-300:]}')
  if 'Traceback' in said or code < 0:
    return Trial('broken', where, f'exit code {code}: {said[-400:]}')
  make_room()
  try:
    kills.whole(job.command(run), log)
    same = job.digest(run) == wanted
  except (RuntimeError, ValueError, OSError) as error:
    return Trial('broken', where, f'with room again: {error}')
  good = 'refused' if code else 'survived'
  detail = kills.last_line(said) if code else ''
  return Trial(good if same else 'wrong', where, detail)


def _disks(name: str, what: str, job: Callable[[pathlib.Path], kills.Job]):
  fault(
    f'disk-{name}',
    f'a full disk during {what}: a sentence, and later the same end',
    full=len(SHARES),
    quick=0,
  )(lambda folder, times: full_disks(folder, times, job(folder)))
  fault(
    f'fill-{name}',
    f'a disk that another program fills during {what}; later the same end',
    full=8,
    quick=0,
  )(lambda folder, times: filling_disks(folder, times, job(folder)))


_disks('train', 'training', lambda f: kills.training(kills.tiny_run(f)))
_disks('harvest', 'a harvest', kills.harvesting)
_disks('evaluate', 'evaluation and release', kills.evaluating)
_disks('build', 'microscope build', kills.building)


@contextlib.contextmanager
def largest_file(num_bytes: int):
  """Files may not grow beyond this (RLIMIT_FSIZE)."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@fault(
  'short-write',
  'a write that ends in the middle (RLIMIT_FSIZE), of all that is kept',
  full=60,
  quick=16,
)
def short_write(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  dice = random.Random(0)
  names = [name for name in damage.KEPT if name != 'checkpoint']
  damage._texts()
  for number in range(times):
    name = names[number % len(names)]
    place = folder / f'{number}'
    place.mkdir()
    size = dice.choice((0, 10, 100, 400, 1000, 3000))
    yield written(
      damage.KEPT[name], place, name, lambda size=size: largest_file(size)
    )
