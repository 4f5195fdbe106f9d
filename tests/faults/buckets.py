"""Buckets whose server refuses, loses, cuts off or delays its answers."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import uuid
from collections.abc import Iterator

from gemma_scope import files
from gemma_scope.runtime import bucket_checkpoints, objects, remote
from tests.faults import damage, kills
from tests.faults.registry import Trial, attempt, fault
from tests.helpers import object_servers

SPOILED = ('503', 'lost', 'cut', 'slow')


@contextlib.contextmanager
def _servers(folder: pathlib.Path) -> Iterator[dict[str, object_servers.Proxy]]:
  """A server of each kind, and the environment to use both."""
  before = dict(os.environ)
  with contextlib.ExitStack() as stack:
    proxies = {}
    for scheme in ('gs', 's3'):
      started = stack.enter_context(object_servers.started(scheme))
      proxies[scheme], environment = started
      os.environ.update(environment)
    os.environ['GEMMA_SCOPE_CACHE'] = str(folder)
    try:
      yield proxies
    finally:
      os.environ.clear()
      os.environ.update(before)


def _use(address: str, folder: pathlib.Path) -> str:
  """Two checkpoints and a folder, written and read; a digest of all."""
  store = objects.Objects(f'{address}/checkpoints')
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    for step in (1, 2):
      saves.save(step, damage._state(step), {'step': step})
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    right = damage._right_checkpoint(saves.restore(damage._state(0)))
  with (
    remote.folder(address) as local,
    files.whole_folder(local / 'f', replace=True) as draft,
  ):
    for number in range(4):
      data = random.Random(number).randbytes(10_000)
      files.write_bytes(draft / str(number), data)
  with remote.folder(address) as local:
    remote.fetch(local / 'f')
    return f'{right} {kills.tree_digest(local / "f")}'


def _address(scheme: str) -> str:
  return f'{scheme}://{object_servers.BUCKET}/{uuid.uuid4().hex}'


@fault(
  'bucket-spoiled',
  'one request in four to a bucket is refused, lost, cut off or late',
  full=20,
  quick=0,  # tests/runtime/objects_test.py
  may_refuse=False,
)
def spoiled(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  dice = random.Random(0)
  with _servers(folder) as proxies:
    wanted = _use(_address('gs'), folder)
    for number in range(times):
      scheme = ('gs', 's3')[number % 2]
      proxy = proxies[scheme]
      proxy.spoiled = 0
      proxy.fault = lambda method, path: (
        dice.choice(SPOILED) if dice.random() < 0.25 else ''
      )
      address = _address(scheme)
      trial = attempt(
        lambda address=address: _use(address, folder),
        lambda found: found == wanted,
        scheme,
      )
      proxy.fault = object_servers.no_fault
      if trial.outcome == 'survived':
        detail = f'{proxy.spoiled} answers spoiled'
        trial = Trial('survived', scheme, detail)
      yield trial


@fault(
  'bucket-denied',
  'from some request on a bucket answers 403: a sentence; later all is well',
  full=40,
  quick=0,
)
def denied(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  dice = random.Random(1)
  with _servers(folder) as proxies:
    counts = {}
    for scheme, proxy in proxies.items():
      proxy.requests.clear()
      wanted = _use(_address(scheme), folder)
      counts[scheme] = len(proxy.requests)
    for number in range(times):
      scheme = ('gs', 's3')[number % 2]
      proxy, address = proxies[scheme], _address(scheme)
      first, proxy.requests = dice.randrange(counts[scheme]), []
      proxy.fault = lambda method, path, proxy=proxy, first=first: (
        '403' if len(proxy.requests) > first else ''
      )
      use = lambda address=address: _use(address, folder)
      trial = attempt(use, lambda found: found == wanted, scheme)
      proxy.fault = object_servers.no_fault
      after = attempt(use, lambda found: found == wanted, scheme)
      good = after.outcome == 'survived'
      yield trial if good else Trial('broken', scheme, after.detail)
