"""Several processes are one run: same losses, one checkpoint, one end.

The real command on one machine, joined by hand, one CPU device a process, with
gloo's collectives.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import pickle
import re
import signal
import time

import jax
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunks
from gemma_scope.runtime import cluster, objects, opened, remote
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.training import loop
from tests.helpers import cluster as cluster_helper
from tests.helpers import object_servers, processes
from tests.helpers import runs as run_helpers

STEPS = 96  # enough to be stopped in
LIMIT_S = 5  # a silent process is named after so long


def small(folder: pathlib.Path, steps: int = STEPS):
  """One member; chunks of six steps, each made while the last is used."""
  return run_helpers.small(
    folder,
    **{
      'collection.layers': (0,),
      'collection.sites': ('resid_post',),
      'objective.auxk': 0.0,
      'train.resample_every': 0,
      'activations.chunk_rows': 384,
      'activations.ahead': 'on',
      'train.steps': steps,
      'checkpoint.every': 4,
      'evaluation.sequences': 0,
    },
  )


Cluster = functools.partial(cluster_helper.Cluster, silence_s=LIMIT_S)


def alone(config, workdir, lines, count: int = 2, stop: int = 0):
  """The same in this process, on some of its devices, maybe to a step."""
  workdir.mkdir(exist_ok=True)
  make = functools.partial(mesh_lib.make, devices=jax.devices()[:count])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, 'make', make)
    with (
      opened.exclusive(workdir) as lease,
      interrupt_lib.Interrupt() as interrupt,
    ):
      loop.keep_config(config, workdir)
      loop.train(config, workdir, lease, interrupt, lines.append)
  rows = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  steps = list(range(1, (stop or config.train.steps) + 1))
  assert [row['step'] for row in rows] == steps
  return [row['mean/loss'] for row in rows]


def keep_states(patch: pytest.MonkeyPatch, keep) -> None:
  """Has the loop pass the state that it starts and ends with to `keep`.

  Args:
    patch: of the loop.
    keep: called with 'loaded' or 'saved', the loop, and the arrays by path.
      They are copied whole to every process, which rounds nothing.
  """
  start, run = loop._Loop.start, loop._Loop.run

  def whole(mesh, tree):
    if jax.process_count() > 1:
      tree = jax.jit(lambda x: x, out_shardings=mesh_lib.sharding(mesh))(tree)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

  def starting(self):
    start(self)
    keep('loaded', self, whole(self.mesh, self.states))

  def running(self, interrupt):
    run(self, interrupt)
    keep('saved', self, whole(self.mesh, self.states))

  patch.setattr(loop._Loop, 'start', starting)
  patch.setattr(loop._Loop, 'run', running)


def train_and_keep(folder: pathlib.Path, *flags: str) -> None:
  """Trains; the state at both ends is in `folder`, by number of processes."""

  def keep(name, started, arrays):
    if jax.process_index() == 0:
      sizes = tuple(started.mesh.shape.values())
      path = folder / f'{name}.{jax.process_count()}.pickle'
      path.write_bytes(pickle.dumps((sizes, arrays)))

  keep_states(pytest.MonkeyPatch(), keep)
  processes.script('launch/train.py', *flags)


def same_bits(saved: dict, loaded: dict) -> None:
  assert saved.keys() == loaded.keys()
  for name, value in saved.items():
    np.testing.assert_array_equal(value, loaded[name], name)


def test_a_signal_to_one_stops_all_and_a_silent_one_is_named(tmp_path, caplog):
  """Two processes, then four, then one: the losses are those of one.

  Four split the latents too, and load bit for bit what two have saved.
  """
  config, run = small(tmp_path), tmp_path / 'run'

  def start(count: int, latent: int) -> cluster_helper.Cluster:
    config.mesh.data, config.mesh.latent = count // latent, latent
    flags = run_helpers.flags_of(config, run)[2:]
    return Cluster(tmp_path, count, train_and_keep, tmp_path, *flags)

  with start(2, 1) as two:
    two.wait_for(lambda: run_helpers.last_step(run) >= 2)
    two.send(signal.SIGTERM, 1)
    assert two.codes(range(2)) == [0, 0], two.outputs()
    report, silence = two.outputs()
  (step,) = map(int, re.findall(r'stopped and saved at step (\d+)', report))
  assert step == run_helpers.last_step(run)
  assert 'step' not in silence  # one reports for all

  with start(4, 2) as four:
    saved = [run / 'checkpoints' / str(s) for s in range(step + 1, STEPS)]
    four.wait_for(lambda: any(map(os.path.isdir, saved)))
    four.send(signal.SIGSTOP, 2)
    stopped = time.monotonic()
    assert four.codes((0, 1, 3)) == [1, 1, 1], four.outputs()
    assert time.monotonic() - stopped < 4 * LIMIT_S
    outputs = four.outputs()
  for i in (0, 1, 3):
    assert f'{four.name(2)} has not answered for' in outputs[i], outputs
  assert f'continuing at step {step}' in outputs[0]
  assert 'processes: was 2, is 4' in outputs[0]
  (two_by, saved), (four_by, loaded) = (
    pickle.loads((tmp_path / f'{name}.pickle').read_bytes())
    for name in ('saved.2', 'loaded.4')
  )
  assert two_by == (1, 2, 1) and four_by == (1, 2, 2)
  same_bits(saved, loaded)

  config.mesh.data, config.mesh.latent = 2, 1
  with jax.log_compiles(), caplog.at_level('WARNING'):
    lines, expected = [], alone(config, tmp_path / 'alone', [])
  compiled = re.findall(r'Finished XLA compilation of jit\((\w+)', caplog.text)
  assert compiled.count('harvest') == compiled.count('take_step') == 1, compiled
  found = alone(config, run, lines)
  assert any('processes: was 4, is 1' in line for line in lines), lines
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  np.testing.assert_allclose(found[:step], expected[:step], rtol=1e-6)


# Devices: the step at which they stop, and how they split rows and latents.
LEGS = {4: (6, 4, 1), 2: (12, 1, 2), 8: (18, 4, 2)}


def recorded(config, workdir, count: int, stop: int):
  """`alone` to a step: its losses, batches, and states by name."""
  states, batches = {}, []
  at, at_step = chunks.Feed.at, interrupt_lib.Interrupt.at_step

  def keep(name, started, arrays):
    states.update({name: arrays, f'{name} at': started.step})

  def reading(self, *arguments):
    batch = at(self, *arguments)
    batches.extend(map(np.asarray, batch.values()))
    return batch

  with pytest.MonkeyPatch.context() as patch:
    keep_states(patch, keep)
    patch.setattr(chunks.Feed, 'at', reading)
    patch.setattr(
      interrupt_lib.Interrupt,
      'at_step',
      lambda self, step: at_step(self, step) or step == stop,
    )
    losses = alone(config, workdir, [], count, stop)
  return losses, batches, states


def test_four_devices_then_two_then_eight_are_one_run(tmp_path):
  """What is loaded is what was saved; after that only rounding differs.

  Devices of one process; above it is several. docs/pods.md has the differences
  that were measured between processes.
  """
  config, run = small(tmp_path, 18), tmp_path / 'run'
  batches, parts = [], []
  for count, (stop, data, latent) in LEGS.items():
    config.mesh.data, config.mesh.latent = data, latent
    losses, read, states = recorded(config, run, count, stop)
    batches += read
    parts.append(states)
  assert [states['loaded at'] for states in parts] == [0, 6, 12]
  for before, after in itertools.pairwise(parts):
    same_bits(before['saved'], after['loaded'])

  config.mesh.data, config.mesh.latent = 2, 1
  steady = recorded(config, tmp_path / 'alone', 2, 18)
  parameters = [
    [value for name, value in states['saved'].items() if '.params' in name]
    for states in (parts[-1], steady[2])
  ]
  differences = {
    'batches': apart(batches, steady[1]),
    'losses': apart(losses, steady[0]),
    'parameters': apart(*parameters),
  }
  print(differences)
  assert differences['batches'] < 1e-6
  assert differences['losses'] < 1e-5
  assert differences['parameters'] < 1e-4


def apart(found, expected) -> float:
  """The largest difference of two arrays, relative to the second's norm."""
  return max(
    float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b))
    for a, b in zip(found, expected, strict=True)
  )


def on_its_own_disk(folder: pathlib.Path, *flags: str) -> None:
  os.environ['GEMMA_SCOPE_CACHE'] = str(folder / os.environ['PROCESS_ID'])
  processes.script('launch/train.py', *flags)


@pytest.mark.skipif(
  importlib.util.find_spec('gcp_storage_emulator') is None,
  reason='needs gcp-storage-emulator',
)
def test_hosts_without_a_shared_disk_share_a_bucket(tmp_path, monkeypatch):
  """Two processes are stopped, four go on, one ends: the losses of one."""
  config = small(tmp_path, 48)
  with object_servers.started('gs') as (_, environment):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    start = functools.partial(Cluster, tmp_path, environment=environment)
    address = f'gs://{object_servers.BUCKET}/run'
    store = objects.Objects(address)
    flags = run_helpers.flags_of(config, address)[2:]
    saved = lambda step: store.names(f'checkpoints/{step}/commit.json')
    with start(2, on_its_own_disk, tmp_path, *flags) as two:
      two.wait_for(lambda: saved(4), 400)
      two.send(signal.SIGTERM, 1)
      assert two.codes(range(2)) == [0, 0], two.outputs()
      report, _ = two.outputs()
    (step,) = map(int, re.findall(r'stopped and saved at step (\d+)', report))
    with start(4, on_its_own_disk, tmp_path, *flags) as four:
      four.wait_for(lambda: saved(step // 4 * 4 + 4), 400)
      four.send(signal.SIGKILL, 3)
      four.codes(range(3))
      assert f'continuing at step {step}' in four.outputs()[0]
    monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path / 'last'))
    lines, expected = [], alone(config, tmp_path / 'alone', [])
    with remote.folder(address) as here:
      remote.fetch(here)
      found = alone(config, here, lines)
    assert any('processes: was 4, is 1' in line for line in lines), lines
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  np.testing.assert_allclose(found[:step], expected[:step], rtol=1e-6)


def small_talk(folder: pathlib.Path, end: str) -> None:
  """What a command does that has no model."""
  with cluster.joined():
    me = jax.process_index()
    with cluster.first_goes_ahead():
      assert (folder / 'made').exists() != cluster.first()
      (folder / 'made').touch()
    (folder / str(me)).touch()
    if end == 'error' and me == 1:
      raise ValueError('one sentence.')
    if end != 'well':
      time.sleep(300)
    if cluster.first():
      time.sleep(0.3)  # the others wait for it
    print('over')


def talk(folder: pathlib.Path, end: str) -> cluster_helper.Cluster:
  return Cluster(folder, 2, small_talk, folder, end)


def test_the_first_goes_ahead_and_all_leave_together(tmp_path):
  with talk(tmp_path, 'well') as both:
    assert both.codes(range(2)) == [0, 0], both.outputs()
    assert all('over' in output for output in both.outputs())


def test_a_killed_coordinator_is_named(tmp_path):
  with talk(tmp_path, 'never') as both:
    both.wait_for(lambda: all((tmp_path / n).exists() for n in '01'))
    time.sleep(LIMIT_S / 4)  # a beat, which tells the name
    both.send(signal.SIGKILL, 0)
    killed = time.monotonic()
    assert both.codes(range(2)) == [-signal.SIGKILL, 1], both.outputs()
    assert time.monotonic() - killed < 4 * LIMIT_S
    assert f'{both.name(0)} is gone' in both.outputs()[1], both.outputs()


def test_one_error_ends_all_by_its_own_sentence(tmp_path):
  with talk(tmp_path, 'error') as both:
    assert both.codes(range(2)) == [1, 1], both.outputs()
    found, said = both.outputs()
    assert 'ValueError: one sentence.' in said
    assert f'{both.name(1)} ended with ValueError: one sentence.' in found


def test_who_does_not_come_is_waited_for_so_long(tmp_path):
  with Cluster(tmp_path, 2, in_two_seconds, tmp_path) as both:
    both.send(signal.SIGKILL, 0)
    assert both.codes([1]) == [1]
    (_, said) = both.outputs()
    assert re.search(r'Process 1 of 2 waited 2 s at .*localhost:\d+', said)


def in_two_seconds(folder: pathlib.Path) -> None:
  os.environ['GEMMA_SCOPE_JOIN_SECONDS'] = '2'
  if os.environ['PROCESS_ID'] == '0':
    time.sleep(300)
  small_talk(folder, 'well')


def as_a_task_of_slurm(folder: pathlib.Path) -> None:
  number = os.environ.pop('PROCESS_ID')
  for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES'):
    os.environ.pop(name)
  job = int(folder.stat().st_ino)  # another port for each
  os.environ.update(
    SLURM_JOB_ID=str(job),
    SLURM_NTASKS='2',
    SLURM_PROCID=number,
    SLURM_LOCALID=number,
    SLURM_STEP_NODELIST='localhost',
  )
  small_talk(folder, 'well')


def test_tasks_of_slurm_join_by_jaxs_own_detection(tmp_path):
  with Cluster(tmp_path, 2, as_a_task_of_slurm, tmp_path) as both:
    assert both.codes(range(2)) == [0, 0], both.outputs()
    assert all('over' in output for output in both.outputs())
