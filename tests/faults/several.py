"""Several processes: two writers of one folder, a peer that is silent."""

from __future__ import annotations

import pathlib
import random
import shutil
import signal
import time
from collections.abc import Iterator

from gemma_scope.runtime import lease as lease_lib
from tests.faults import kills
from tests.faults.registry import Trial, fault
from tests.helpers import cluster, processes


def _hold(folder: pathlib.Path, at: float, seconds: float) -> None:
  """Takes the lease at a moment, and notes when it had it."""
  time.sleep(max(0.0, at - time.time()))
  try:
    with lease_lib.Lease(folder):
      print('from', time.time(), flush=True)
      time.sleep(seconds)
      print('to', time.time(), flush=True)
  except lease_lib.LeaseError as error:
    print('refused', error, flush=True)


@fault(
  'race-lease',
  'three processes take a folder at the same moment: one has it at a time',
  full=100,
  quick=0,  # tests/runtime/lease_test.py
)
def race_lease(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  dice = random.Random(0)
  for number in range(times):
    place = folder / str(number)
    place.mkdir()
    if number % 2:  # one that is gone held it
      gone = processes.start(place / 'gone.log', _hold, place, 0, 300)
      while 'from' not in _text(place / 'gone.log'):
        time.sleep(0.01)
      gone.kill()
      gone.join()
    at, logs = time.time() + 0.3, [place / f'{i}.log' for i in range(3)]
    three = [
      processes.start(
        log, _hold, place, at + dice.uniform(0, 0.002), dice.uniform(0, 0.05)
      )
      for log in logs
    ]
    for process in three:
      process.join()
    said = [
      ''.join(
        line
        for line in _text(log).splitlines(keepends=True)
        if not line.startswith('WARNING')  # that it takes over
      )
      for log in logs
    ]
    held = sorted(
      tuple(float(line.split()[1]) for line in text.splitlines())
      for text in said
      if text.startswith('from')
    )
    apart = all(a[1] <= b[0] for a, b in zip(held, held[1:], strict=False))
    well = held and all(t.startswith(('from', 'refused')) for t in said)
    where = 'after one that is gone' if number % 2 else 'at once'
    outcome = 'survived' if apart and well else 'wrong'
    yield Trial(outcome, where, '' if outcome == 'survived' else str(said))


def _text(log: pathlib.Path) -> str:
  return log.read_text() if log.exists() else ''


def _both(folder: pathlib.Path, times: int, job: kills.Job) -> Iterator[Trial]:
  """A command twice at once; one of them may refuse."""
  seconds, wanted = job.clean(folder)
  dice = random.Random(1)
  for number in range(times):
    run = folder / f'run{number}'
    job.before(run)
    logs = [folder / f'{number}.{i}.log' for i in range(2)]
    two = []
    for log in logs:
      two.append(processes.start(log, processes.command, job.command(run)))
      time.sleep(dice.choice((0, seconds * dice.random() / 2)))
    for process in two:
      process.join(300)
    codes = [process.exitcode for process in two]
    said = [kills.last_line(_text(log)) for log in logs]
    if None in codes or any('Traceback' in _text(log) for log in logs):
      yield Trial('broken', '', f'{codes}: {said}')
    elif codes[0] and codes[1]:
      yield Trial('broken', '', f'both refused: {said}')
    else:
      same = job.digest(run) == wanted
      refused = next((s for c, s in zip(codes, said, strict=True) if c), '')
      good = 'refused' if refused else 'survived'
      yield Trial(good if same else 'wrong', '', refused)
    shutil.rmtree(run)


def _tokenising(folder: pathlib.Path) -> kills.Job:
  config = kills.tiny_run(folder)
  return kills.Job(
    lambda run: [
      'prepare-text',
      f'--source={config.text.source}',
      f'--out={run}',
    ],
    kills.tree_digest,
  )


def _twice(name: str, job) -> None:
  fault(
    f'twice-{name}', f'{name}: the same command twice at once', full=4, quick=0
  )(lambda folder, times: _both(folder, times, job(folder)))


_twice('train', lambda folder: kills.training(kills.tiny_run(folder)))
_twice('harvest', kills.harvesting)
_twice('build', kills.building)
_twice('text', _tokenising)


@fault(
  'hung-peer',
  'one of two processes stops (SIGSTOP): the other names it and ends',
  full=5,
  quick=0,
)
def hung_peer(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config, silence_s = kills.tiny_run(folder), 10.0
  for number in range(times):
    run, victim = folder / f'run{number}', number % 2
    logs = folder / f'logs{number}'
    logs.mkdir()
    words = kills.train_words(config, run)
    with cluster.Cluster(
      logs, 2, processes.command, words, silence_s=silence_s
    ) as two:
      two.wait_for(lambda run=run: (run / 'metrics.jsonl').exists())
      two.send(signal.SIGSTOP, victim)
      stopped = time.monotonic()
      (code,) = two.codes([1 - victim], 8 * silence_s)
      delay = time.monotonic() - stopped
      said = two.outputs()[1 - victim]
      name = two.name(victim)
    where = f'process {victim}'
    if code and name in said:
      yield Trial('refused', where, kills.last_line(said), delay)
    else:
      yield Trial('broken', where, f'exit code {code}: {said[-300:]}', delay)


@fault(
  'kill-one-of-two',
  'kill -9 of one of two processes: both end, and both go on bitwise',
  full=10,
  quick=0,
  may_refuse=False,
)
def kill_one_of_two(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  config = kills.tiny_run(folder, **{'train.steps': 40})
  silence_s = 10.0

  def both(run, name):
    (folder / name).mkdir()
    return cluster.Cluster(
      folder / name,
      2,
      processes.command,
      kills.train_words(config, run),
      silence_s=silence_s,
    )

  def run_to_end(run, name):
    started = time.monotonic()
    with both(run, name) as two:
      if two.codes(range(2), 300) != [0, 0]:
        raise RuntimeError('\n'.join(two.outputs())[-2000:])
    return time.monotonic() - started

  run_to_end(folder / 'whole', 'warm')
  wanted = kills.state_digest(config, folder / 'whole')
  seconds = run_to_end(folder / 'again', 'second')
  if kills.state_digest(config, folder / 'again') != wanted:
    yield Trial('wrong', 'no kill', 'two runs without a kill differ')
    return
  dice = random.Random(2)
  for number in range(times):
    run, victim = folder / f'run{number}', number % 2
    with both(run, f'kill{number}') as two:
      two.processes[1 - victim].join(dice.uniform(seconds / 4, seconds))
      if not two.processes[victim].is_alive():
        continue  # it was done
      two.send(signal.SIGKILL, victim)
      killed = time.monotonic()
      (code,) = two.codes([1 - victim], 8 * silence_s)
      delay = time.monotonic() - killed
      said = two.outputs()[1 - victim]
      where = (
        f'process {victim}, {kills.phase(kills.last_line(two.outputs()[0]))}'
      )
    if not code:
      what = 'the other hung' if code is None else 'the other ended as if well'
      if code is None or f'{two.name(victim)} is gone' in said:
        yield Trial('broken', where, what, delay)
        continue
    try:
      run_to_end(run, f'end{number}')
      same = kills.state_digest(config, run) == wanted
      yield Trial('survived' if same else 'wrong', where, '', delay)
    except (RuntimeError, ValueError, OSError) as error:
      yield Trial('broken', where, str(error), delay)
    shutil.rmtree(run)
