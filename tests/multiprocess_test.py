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


def alone(config, workdir: pathlib.Path, lines: list[str]):
  """The same in this process, on two of its devices."""
  workdir.mkdir(exist_ok=True)
  two = functools.partial(mesh_lib.make, devices=jax.devices()[:2])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, 'make', two)
    with (
      opened.exclusive(workdir) as lease,
      interrupt_lib.Interrupt() as interrupt,
    ):
      loop.keep_config(config, workdir)
      loop.train(config, workdir, lease, interrupt, lines.append)
  rows = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  steps = list(range(1, config.train.steps + 1))
  assert [row['step'] for row in rows] == steps
  return [row['mean/loss'] for row in rows]


def test_a_signal_to_one_stops_all_and_a_silent_one_is_named(tmp_path, caplog):
  """Two processes, then four, then one: the losses are those of one."""
  config, run = small(tmp_path), tmp_path / 'run'
  flags = ['launch/train.py', *run_helpers.flags_of(config, run)[2:]]
  with Cluster(tmp_path, 2, processes.script, *flags) as two:
    two.wait_for(lambda: run_helpers.last_step(run) >= 2)
    two.send(signal.SIGTERM, 1)
    assert two.codes(range(2)) == [0, 0], two.outputs()
    report, silence = two.outputs()
  (step,) = map(int, re.findall(r'stopped and saved at step (\d+)', report))
  assert step == run_helpers.last_step(run)
  assert 'step' not in silence  # one reports for all

  with Cluster(tmp_path, 4, processes.script, *flags) as four:
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

  with jax.log_compiles(), caplog.at_level('WARNING'):
    lines, expected = [], alone(config, tmp_path / 'alone', [])
  compiled = re.findall(r'Finished XLA compilation of jit\((\w+)', caplog.text)
  assert compiled.count('harvest') == compiled.count('take_step') == 1, compiled
  found = alone(config, run, lines)
  assert any('processes: was 4, is 1' in line for line in lines), lines
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  np.testing.assert_allclose(found[:step], expected[:step], rtol=1e-6)


# Processes: the step at which they stop, and how they split rows and latents.
LEGS = {4: (6, 4, 1), 2: (12, 1, 2), 8: (18, 4, 2)}


def leg(folder: pathlib.Path, stop: int, *flags: str) -> None:
  """Runs to a step; keeps the state at both ends, and every batch.

  Each is copied whole to every process, which moves bits and rounds nothing.
  """
  start, run, at = loop._Loop.start, loop._Loop.run, chunks.Feed.at
  at_step, kept = interrupt_lib.Interrupt.at_step, {}

  def copied(mesh, tree):
    whole = jax.jit(lambda x: x, out_shardings=mesh_lib.sharding(mesh))(tree)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(whole))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

  def starting(self):
    start(self)
    kept.update(mesh=list(self.mesh.shape.values()), first=self.step)
    kept.update(loaded=copied(self.mesh, self.states))

  def running(self, interrupt):
    run(self, interrupt)
    kept.update(saved=copied(self.mesh, self.states))
    if jax.process_index() == 0:
      with open(folder / f'{stop}.pickle', 'wb') as file:
        pickle.dump(kept, file)

  def reading(self, step, *arguments):
    batch = at(self, step, *arguments)
    (x_BD,) = copied(self.chunks._mesh, batch).values()
    kept.setdefault('batches', []).append(x_BD)
    return batch

  loop._Loop.start, loop._Loop.run, chunks.Feed.at = starting, running, reading
  interrupt_lib.Interrupt.at_step = lambda self, step: (
    at_step(self, step) or step == stop
  )
  processes.script('launch/train.py', *flags)


def test_four_processes_then_two_then_eight_are_one_run(tmp_path):
  """What is loaded is what was saved; after that only rounding differs.

  docs/pods.md has the differences that were measured.
  """
  config, run = small(tmp_path, 18), tmp_path / 'run'
  legs = []
  for count, (stop, data, latent) in LEGS.items():
    config.mesh.data, config.mesh.latent = data, latent
    flags = run_helpers.flags_of(config, run)[2:]
    with cluster_helper.Cluster(
      tmp_path, count, leg, tmp_path, stop, *flags, silence_s=60
    ) as several:
      assert several.codes(range(count), 240) == [0] * count, several.outputs()
    legs.append(pickle.loads((tmp_path / f'{stop}.pickle').read_bytes()))
    assert legs[-1]['mesh'] == [1, data, latent]
  assert [part['first'] for part in legs] == [0, 6, 12]
  for before, after in itertools.pairwise(legs):
    assert before['saved'].keys() == after['loaded'].keys()
    for name, value in before['saved'].items():
      np.testing.assert_array_equal(value, after['loaded'][name], name)

  batches, states = [], []
  at, ran = chunks.Feed.at, loop._Loop.run
  config.mesh.data, config.mesh.latent = 2, 1

  def reading(self, *arguments):
    batch = at(self, *arguments)
    batches.extend(map(np.asarray, batch.values()))
    return batch

  def running(self, interrupt):
    ran(self, interrupt)
    states.extend(map(np.asarray, jax.tree.leaves(self.states[0].params)))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunks.Feed, 'at', reading)
    patch.setattr(loop._Loop, 'run', running)
    losses = alone(config, tmp_path / 'alone', [])
  rows = (run / 'metrics.jsonl').read_text().splitlines()
  saved = legs[-1]['saved'].items()
  differences = {
    'batches': apart(sum((part['batches'] for part in legs), []), batches),
    'losses': apart([json.loads(row)['mean/loss'] for row in rows], losses),
    'parameters': apart([v for k, v in saved if '.params' in k], states),
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
  config = small(tmp_path)
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
      time.sleep(1)  # the others wait for it
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


VARIABLES = (
  'COORDINATOR_ADDRESS',
  'NUM_PROCESSES',
  'PROCESS_ID',
  'SLURM_NTASKS',
  'SLURM_PROCID',
  'TPU_WORKER_HOSTNAMES',
  'MEGASCALE_NUM_SLICES',
)


@pytest.fixture
def lone(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


def test_a_cluster_is_given_by_hand(lone):
  assert cluster.find() is None
  lone.setenv('COORDINATOR_ADDRESS', 'host:1')
  with pytest.raises(cluster.ClusterError, match='NUM_PROCESSES'):
    cluster.find()
  lone.setenv('NUM_PROCESSES', '4')
  lone.setenv('PROCESS_ID', '2')
  assert cluster.find() == {
    'coordinator_address': 'host:1',
    'num_processes': 4,
    'process_id': 2,
  }
  lone.setenv('NUM_PROCESSES', '1')
  assert cluster.find() is None


@pytest.mark.parametrize(
  'variables, several',
  [
    ({'SLURM_NTASKS': '8'}, False),  # salloc's shell: not a task
    ({'SLURM_NTASKS': '8', 'SLURM_PROCID': '3'}, True),
    ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 't0,t1'}, True),
    ({'TPU_WORKER_HOSTNAMES': 't0', 'MEGASCALE_NUM_SLICES': '2'}, True),
  ],
)
def test_jax_is_asked_where_there_are_several_processes(
  variables, several, lone
):
  for name, value in variables.items():
    lone.setenv(name, value)
  assert cluster.find() == ({} if several else None)


def test_a_pods_metadata_is_asked_only_where_there_are_chips(lone):
  said = {'worker-network-endpoints': 'a:1:10.0.0.2,b:2:10.0.0.3'}
  lone.setattr(cluster, '_metadata', said.get)
  assert cluster.find() is None
  lone.setattr(cluster, '_has_tpu', lambda: True)
  assert cluster.find() == {}
  said['worker-network-endpoints'] = 'unknown:unknown:10.0.0.2'
  assert cluster.find() is None


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
