"""One run a folder, one owner of the signals, no silent changes."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import gemma_scope
from gemma_scope.runtime import changes
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease as lease_lib

ROOT = str(pathlib.Path(gemma_scope.__file__).parents[1])


def child(code: str, *args: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', code, *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {'PYTHONPATH': ROOT, 'PYTHONDONTWRITEBYTECODE': '1'},
  )


def write_lease(folder, age_s=0.0, **changes):
  """The lease of this very process, changed."""
  with lease_lib.Lease(folder):
    holder = json.loads((folder / 'run.lease').read_text())
  path = folder / 'run.lease'
  path.write_text(json.dumps(holder | changes))
  os.utime(path, (time.time() - age_s,) * 2)


def taken(folder) -> bool:
  try:
    with lease_lib.Lease(folder) as lease:
      lease.check()
      return True
  except lease_lib.LeaseError:
    return False


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
  holder = child(
    'import sys, time\nfrom gemma_scope.runtime import lease\n'
    'with lease.Lease(sys.argv[1]):\n'
    '  print("held", flush=True)\n  time.sleep(60)',
    str(tmp_path),
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(
      lease_lib.LeaseError, match=rf'process {holder.pid} on host \S+, .* ago'
    ):
      lease_lib.Lease(tmp_path).__enter__()
    holder.kill()
    # Not reaped yet: a zombie does not hold a folder.
    deadline = time.monotonic() + 10
    while not taken(tmp_path) and time.monotonic() < deadline:
      time.sleep(0.02)
    assert taken(tmp_path)
  finally:
    holder.kill()
    holder.communicate()
  assert {p.name for p in tmp_path.iterdir()} == {'run.lock'}


@pytest.mark.parametrize(
  'changes, age_s, stale',
  [
    ({}, 9999, False),  # alive here, however long it was asleep
    ({'start': '1'}, 0, True),  # its pid is another process's now
    ({'pid': 2**22 + 5}, 0, True),  # no such process
    ({'host': 'elsewhere'}, 0, False),
    ({'host': 'elsewhere'}, 290, False),
    ({'host': 'elsewhere'}, 310, True),
    ({'host': 'elsewhere'}, -3600, False),  # its clock was set back
    ({'boot': 'another'}, 0, False),  # a machine of the same name
    ({'boot': 'another'}, 310, True),
    ({'pid': None}, 0, False),  # damaged: the heartbeat speaks for it
  ],
)
def test_when_a_lease_is_stale(tmp_path, changes, age_s, stale):
  write_lease(tmp_path, age_s, **changes)
  assert taken(tmp_path) == stale


def test_an_unreadable_lease_is_judged_by_its_age(tmp_path):
  path = tmp_path / 'run.lease'
  path.write_text('{"host": "tor')
  assert not taken(tmp_path)
  os.utime(path, (1, 1))
  assert taken(tmp_path)


def test_a_race_for_a_stale_lease_has_one_winner(tmp_path):
  for _ in range(10):
    write_lease(tmp_path, pid=2**22 + 5)
    leases = [lease_lib.Lease(tmp_path) for _ in range(8)]
    barrier, won = threading.Barrier(8), []

    def take(lease, barrier=barrier, won=won):
      barrier.wait()
      try:
        lease.__enter__()
        won.append(lease)
      except lease_lib.LeaseError:
        pass

    threads = [threading.Thread(target=take, args=(x,)) for x in leases]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(won) == 1
    won[0].check()
    won[0].__exit__(None, None, None)


def test_heartbeat_and_a_lost_lease(tmp_path):
  path = tmp_path / 'run.lease'
  with lease_lib.Lease(tmp_path, beat_s=0.02) as lease:
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert path.stat().st_mtime > 1e9
    lease.check()
    # Another host takes over while this one is suspended.
    thief = json.loads(path.read_text()) | {'token': 'x', 'host': 'elsewhere'}
    path.write_text(json.dumps(thief))
    with pytest.raises(lease_lib.LeaseError, match='must stop without writing'):
      lease.check()
  assert json.loads(path.read_text()) == thief  # not ours to remove


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_handlers_are_put_back(number):
  before = signal.getsignal(number)
  with interrupt_lib.Interrupt() as interrupt:
    assert not interrupt.requested and not interrupt.at_step(0)
    interrupt.check()
    os.kill(os.getpid(), number)
    assert interrupt.requested and interrupt.at_step(1)
    with pytest.raises(interrupt_lib.Interrupted):
      interrupt.check()
    os.kill(os.getpid(), signal.SIGTERM)  # again: still only the flag
  assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
  with interrupt_lib.Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.requested
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)


def test_interrupt_belongs_to_the_main_thread():
  found = []

  def enter():
    with pytest.raises(RuntimeError, match='main thread'):
      interrupt_lib.Interrupt().__enter__()
    found.append(True)

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert found


def test_with_jax_distributed_its_preemption_service_is_the_owner():
  process = child(
    'import os, signal, socket, time, jax\n'
    'from gemma_scope.runtime import interrupt\n'
    's = socket.socket(); s.bind(("localhost", 0)); port = s.getsockname()[1]\n'
    's.close()\n'
    'jax.distributed.initialize(f"localhost:{port}", 1, 0)\n'
    'with interrupt.Interrupt() as interrupt:\n'
    '  for step in range(1000):\n'
    '    if step == 5: os.kill(os.getpid(), signal.SIGINT)\n'
    '    if interrupt.at_step(step): break\n'
    '    time.sleep(0.02)\n'
    '  print("stopped", 5 <= step < 999, interrupt.requested, flush=True)\n'
  )
  try:
    out, _ = process.communicate(timeout=60)
  finally:
    process.kill()
  assert 'stopped True True' in out, out


def test_fingerprint_difference_names_fields():
  old = {
    'seed': 0,
    'train': {'batch': 64, 'rate': 1e-3, 'gone': 1},
    'sites': ('a', 'b'),
    'nan': float('nan'),
  }
  same = json.loads(json.dumps(old))
  assert changes.fingerprint_difference(old, same) == []
  new = same | {
    'train': {'batch': 128, 'rate': 1e-3, 'new': {'x': 1}},
    'sites': ['b'],
    'seed': False,
  }
  assert changes.fingerprint_difference(old, new) == [
    'seed: was 0, is False',
    "sites: was ['a', 'b'], is ['b']",
    'train.batch: was 64, is 128',
    'train.gone: was 1, is absent',
    "train.new: was absent, is {'x': 1}",
  ]
  ignored = changes.fingerprint_difference(old, new, ('train', 'site', 'seed'))
  assert ignored == ["sites: was ['a', 'b'], is ['b']"]


def test_refuse_changes_is_one_sentence():
  changes.refuse_changes({'a': 1, 'b': 2}, {'a': 1, 'b': 3}, ignore=('b',))
  with pytest.raises(
    changes.ChangedError, match=r'a different text \(hash: was'
  ) as e:
    changes.refuse_changes({'hash': 'x' * 200}, {'hash': 'y'}, what='text')
  assert len(str(e.value)) < 250 and '\n' not in str(e.value)


def test_a_lease_that_cannot_be_given_back_hides_no_error(
  tmp_path, monkeypatch, caplog
):
  def fail():
    raise OSError(5, 'Input/output error')

  with pytest.raises(KeyError, match='the first'):
    with lease_lib.Lease(tmp_path) as held:
      monkeypatch.setattr(held, '_read', fail)
      raise KeyError('the first')
  assert 'could not be given back' in caplog.text
