"""A run in a bucket: killed, resumed, refused, released, indexed.

Real processes, a server of each kind on this machine, no shared disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
import uuid
from typing import NamedTuple

import jax
import numpy as np
import pytest

from gemma_scope import release
from gemma_scope.runtime import objects, remote
from gemma_scope.training import trained
from tests.helpers import object_servers, processes
from tests.helpers import runs as run_helpers

NEEDED = ('gcp_storage_emulator', 'moto')
if any(importlib.util.find_spec(name) is None for name in NEEDED):
  pytest.skip('needs gcp-storage-emulator and moto', allow_module_level=True)
STEPS = 24


def small(folder):
  """One SAE, 24 steps, four chunks, a checkpoint each 4 steps."""
  return run_helpers.small(
    folder,
    **{
      'collection.layers': (0,),
      'collection.sites': ('resid_post',),
      'activations.chunk_rows': 384,
      'train.steps': STEPS,
      'checkpoint.every': 4,
      'evaluation.sequences': 4,
      'evaluation.batch': 2,
    },
  )


@pytest.fixture
def server(request, monkeypatch):
  with object_servers.started(request.param) as (proxy, environment):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    yield Server(request.param, proxy, environment)


class Server(NamedTuple):
  """A bucket's server on this machine, and how processes find it."""

  scheme: str
  proxy: object_servers.Proxy
  environment: dict[str, str]

  def start(self, command: list[str], cache) -> processes.Script:
    """A command on a host of its own: its copies of the bucket are its own."""
    log = cache.with_suffix('.log')
    own = {'GEMMA_SCOPE_CACHE': str(cache)}
    return processes.Script(log, *command, **self.environment, **own)


def finished(process: processes.Script) -> str:
  code, output = process.end()
  assert code == 0, output
  return output


def states(config, workdir) -> dict[str, np.ndarray]:
  one = config.copy_and_resolve_references()
  one.mesh.data = jax.device_count()
  with remote.folder(workdir) as local:
    result = trained.load(one, local)
  leaves = jax.tree_util.tree_leaves_with_path(
    (result.step, result.states, result.normalisation)
  )
  return {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}


def address_at(server: Server) -> str:
  """A folder of its own in the server's bucket."""
  return f'{server.scheme}://{object_servers.BUCKET}/{uuid.uuid4().hex}/run'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run on the disk: its config and its state."""
  folder = tmp_path_factory.mktemp('whole')
  config = small(folder)
  command = run_helpers.flags_of(config, folder / 'run')[1:]
  finished(Server('', None, {}).start(command, folder / 'cache'))
  return config, states(config, folder / 'run')


def killed_in(server: Server, command, cache, part: str) -> str:
  """Runs a command until it sends `part`, and kills it in that request."""
  reached, killed = threading.Event(), threading.Event()

  def fault(method, path):
    if method != 'GET' and part in path.replace('%2F', '/'):
      reached.set()
      killed.wait(60)
      return '503'
    return ''

  server.proxy.fault = fault
  process = server.start(command, cache)
  for _ in range(2400):
    if reached.wait(0.1) or not process.is_alive():
      break
  process.send(signal.SIGKILL)
  _, output = process.end()
  killed.set()
  server.proxy.fault = object_servers.no_fault
  assert reached.is_set(), output
  return output


# Each kind of server once: the runs take a minute.
@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_a_run_in_a_bucket_ends_as_one_on_the_disk(server, whole, tmp_path):
  proxy, (config, expected) = server.proxy, whole
  address = address_at(server)
  command = run_helpers.flags_of(config, address)[1:]
  store = objects.Objects(address)
  # Killed in the middle of a checkpoint, and just before the commit of one.
  killed_in(server, command, tmp_path / 'a', '/checkpoints/8/')
  assert store.names('checkpoints/8/commit.json') == []
  output = killed_in(
    server, command, tmp_path / 'b', '/checkpoints/16/commit.json'
  )
  assert 'continuing at step 4' in output
  # The third is held at its first step, and another one is refused.
  holds, seen = threading.Event(), threading.Event()

  def hold(method, path):
    if method != 'GET' and '/checkpoints/16/' in path.replace('%2F', '/'):
      seen.set()
      holds.wait(60)
    return ''

  proxy.fault = hold
  process = server.start(command, tmp_path / 'c')
  assert seen.wait(240), process.output()
  code, output = server.start(command, tmp_path / 'd').end()
  assert code == 1 and 'is in use by process' in output, output
  assert f'on host {os.uname().nodename}' in output
  holds.set()
  proxy.fault = object_servers.no_fault
  output = finished(process)
  assert 'continuing at step 12' in output
  assert f'release  {address}/release' in output
  # All of it is in the bucket, and nothing on the disks.
  for cache in 'abcd':
    left = list((tmp_path / cache).rglob('*.json*'))
    assert not left or cache in 'ab', left  # the killed ones' copies
  found = states(config, address)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(value, found[name], err_msg=name)
  names = set(store.names())
  assert {'config.json', 'evaluation.json', 'frontier.png'} <= names
  assert 'run.lease' not in names
  lines = store.read('metrics.jsonl').splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == list(range(1, STEPS + 1))
  assert 'is done' in finished(server.start(command, tmp_path / 'e'))
  # Other commands read and write it there.
  check_commands(server, address, store, tmp_path)


def check_commands(server, address, store, tmp_path):
  released = [
    'launch/release.py',
    f'--workdir={address}',
    f'--out={tmp_path}/copy',
  ]
  finished(server.start(released, tmp_path / 'f'))
  (one,) = release.load_all(tmp_path / 'copy')
  with remote.folder(address) as local:
    remote.fetch(local / 'release')
    (other,) = release.load_all(local / 'release')
    for name, value in one.load().items():
      np.testing.assert_array_equal(value, other.load()[name])
  build = [
    'launch/microscope.py',
    'build',
    f'--workdir={address}',
    '--sequences=4',
    '--batch=2',
  ]
  output = finished(server.start(build, tmp_path / 'g'))
  assert 'microscope/pages.complete.json' in store.names('microscope/'), output
  assert 'already built' in finished(server.start(build, tmp_path / 'h'))


@pytest.mark.parametrize('server', ['s3'], indirect=True)
def test_bad_answers_do_not_change_a_run(server, whole, tmp_path):
  """One request in five is refused, slow, cut off, or its answer is lost."""
  proxy, (config, expected) = server.proxy, whole
  config = config.copy_and_resolve_references()
  config.evaluation.sequences = 0
  address = address_at(server)
  kinds, count = ('503', 'slow', 'cut', 'lost'), [0]

  def fault(method, path):
    count[0] += 1
    return kinds[count[0] // 5 % 4] if count[0] % 5 == 0 else ''

  proxy.fault, proxy.spoiled = fault, 0
  began = time.monotonic()
  command = run_helpers.flags_of(config, address)[1:]
  finished(server.start(command, tmp_path / 'a'))
  proxy.fault = object_servers.no_fault
  assert proxy.spoiled > 10, (proxy.spoiled, time.monotonic() - began)
  found = states(config, address)
  for name, value in expected.items():
    np.testing.assert_array_equal(value, found[name], err_msg=name)
