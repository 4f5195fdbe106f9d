"""Objects, the lease and checkpoints in buckets, on real servers here."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import files
from gemma_scope.runtime import (
  bucket_checkpoints,
  bucket_lease,
  checkpoints,
  lease,
  objects,
  remote,
)
from tests.helpers import object_servers

NEEDED = ('gcp_storage_emulator', 'moto')
if any(importlib.util.find_spec(name) is None for name in NEEDED):
  pytest.skip('needs gcp-storage-emulator and moto', allow_module_level=True)


@pytest.fixture(scope='module', params=['gs', 's3'])
def server(request):
  with object_servers.started(request.param) as (proxy, environment):
    before = dict(os.environ)
    os.environ.update(environment)
    yield request.param, proxy
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def proxy(server):
  yield server[1]
  server[1].fault = object_servers.no_fault


@pytest.fixture
def address(server):
  return f'{server[0]}://{object_servers.BUCKET}/{uuid.uuid4().hex}'


@pytest.fixture
def store(address):
  return objects.Objects(address)


def first_of(*faults):
  """A fault for each of the first requests."""
  left = list(faults)
  return lambda method, path: left.pop(0) if left else ''


def test_an_object_is_replaced_only_in_its_generation(store):
  assert store.read_generation('a') == (None, objects.ABSENT)
  one = store.replace('a', b'one', objects.ABSENT)
  assert one and store.read_generation('a') == (b'one', one)
  assert not store.replace('a', b'other', objects.ABSENT)
  two = store.replace('a', b'two', one)
  assert two and not store.replace('a', b'other', one)
  assert not store.replace('a', None, one)
  assert store.read('a') == b'two'
  assert store.replace('a', None, two)
  assert store.read('a') is None


def test_names_are_those_below(store):
  store.write_all((name, b'x') for name in ('a/1', 'a/2', 'ab', 'b'))
  assert store.names() == ['a/1', 'a/2', 'ab', 'b']
  assert store.names('a/') == ['a/1', 'a/2']
  store.delete_below('a/')
  assert store.names() == ['ab', 'b']


@pytest.mark.parametrize('fault', ['503', 'lost', 'cut', 'slow'])
def test_a_bad_answer_is_asked_for_again(store, proxy, fault):
  data = np.random.default_rng(0).bytes(1 << 20)
  proxy.spoiled, proxy.fault = 0, first_of(fault)
  store.write('a', data)
  proxy.fault = first_of(fault)
  assert store.read('a') == data
  assert proxy.spoiled == 2


def test_what_is_no_bucket_is_refused():
  for wrong in ('memory://a', 'gs://', 'gs://B/a', 'file:///a', 'az://a/b'):
    with pytest.raises(ValueError, match='is no address of a bucket'):
      objects.Objects(wrong)


# ----------------------------------------------------------- copies of folders


def test_what_is_written_below_a_copy_is_uploaded(
  address, monkeypatch, tmp_path
):
  monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path))
  with remote.folder(address) as here:
    files.write_text(here / 'a.txt', 'a')
    with files.whole_folder(here / 'f') as draft:
      (draft / 'in').mkdir()
      files.write_text(draft / 'in' / 'b', 'b')
      files.write_text(draft / 'empty', '')
  assert list((tmp_path / 'buckets').iterdir()) == []
  with remote.folder(address) as here:
    assert not list(here.iterdir())
    remote.fetch(here)
    assert (here / 'a.txt').read_text() == 'a'
    assert (here / 'f' / 'in' / 'b').read_text() == 'b'
    assert (here / 'f' / 'empty').read_text() == ''
    assert remote.shown(here / 'f' / 'in') == f'{address}/f/in'
    remote.delete(here / 'f')
    remote.delete(here / 'a.txt')
  assert objects.Objects(address).names() == []


def test_large_files_are_several_objects(address, store, monkeypatch, tmp_path):
  monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path))
  monkeypatch.setattr(remote, 'PART', 1000)
  data = np.random.default_rng(0).bytes(2500)
  with remote.folder(address) as here, files.whole_folder(here / 'f') as draft:
    (draft / 'data').write_bytes(data)
  assert [n for n in store.names('f/')] == [
    f'f/data.part-{i:05d}' for i in range(3)
  ]
  with remote.folder(address) as here:
    remote.fetch(here / 'f')
    assert (here / 'f' / 'data').read_bytes() == data


def test_half_an_upload_is_no_folder(
  address, store, proxy, monkeypatch, tmp_path
):
  """A folder without its list does not exist; nor does a replaced one."""
  monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path))
  with remote.folder(address) as here:
    for text in ('old', 'new'):
      with files.whole_folder(here / 'f', replace=True) as draft:
        (draft / 'a').write_text(text)
        (draft / text).write_text(text)
  assert store.names() == ['f.complete.json', 'f/a', 'f/new']
  store.delete('f.complete.json')  # as an upload that was killed leaves it
  with remote.folder(address) as here:
    remote.fetch(here / 'f')
    assert not (here / 'f').exists() or not (here / 'f.complete.json').exists()


def test_damaged_bytes_are_refused_by_name(
  address, store, monkeypatch, tmp_path
):
  monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path))
  with remote.folder(address) as here, files.whole_folder(here / 'f') as draft:
    (draft / 'a').write_text('good')
  store.write('f/a', b'evil')
  with remote.folder(address) as here:
    with pytest.raises(
      objects.BucketError, match='f/a does not have the check'
    ):
      remote.fetch(here)
    assert not (here / 'f').exists()


# ------------------------------------------------------------------- the lease


def another(store, monkeypatch, **times):
  """A lease as another host would take it."""
  monkeypatch.setattr(lease, 'is_of_this_boot', lambda holder: False)
  return bucket_lease.BucketLease(store, report=lambda line: None, **times)


def test_a_living_holder_is_never_replaced(store, monkeypatch):
  with bucket_lease.BucketLease(store, beat_s=0.1) as held:
    with pytest.raises(lease.LeaseError, match='on this machine'):
      bucket_lease.BucketLease(store).__enter__()
    with pytest.raises(lease.LeaseError, match='seen alive'):
      another(store, monkeypatch, beat_s=0.1, stale_s=20).__enter__()
    held.check()
  assert store.read('run.lease') is None


def test_a_holder_that_is_gone_is_replaced_and_notices(store, monkeypatch):
  asleep = bucket_lease.BucketLease(store, beat_s=1000).__enter__()
  began = time.monotonic()
  with another(store, monkeypatch, beat_s=0.1, stale_s=0.5) as awake:
    assert time.monotonic() - began >= 0.5
    awake.check()
    with pytest.raises(lease.LeaseError, match='took over'):
      asleep.check()
    asleep.__exit__()
    awake.check()


def test_of_many_that_start_at_once_one_wins(store):
  wins, refused = [], []
  every = [bucket_lease.BucketLease(store, beat_s=1000) for _ in range(8)]

  def take(one):
    try:
      one.__enter__()
      wins.append(one)
    except lease.LeaseError:
      refused.append(one)

  threads = [threading.Thread(target=take, args=(one,)) for one in every]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(wins) == 1 and len(refused) == 7
  wins[0].__exit__()


def test_a_write_whose_answer_was_lost_is_ours(store, proxy):
  proxy.fault = lambda method, path: (
    'lost'
    if method != 'GET' and not proxy.spoiled and 'run.lease' in path
    else ''
  )
  proxy.spoiled = 0
  with bucket_lease.BucketLease(store) as held:
    assert proxy.spoiled == 1
    held.check()


# ----------------------------------------------------------------- checkpoints


def state():
  key = jax.random.key(0)
  return {
    'W': jax.random.normal(key, (64, 40)),
    'b': jnp.arange(8, dtype=jnp.bfloat16),
    'step': jnp.int32(7),
    'empty': jnp.zeros((0, 3)),
  }


def equal(a, b) -> bool:
  same = jax.tree.map(
    lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
  )
  return all(jax.tree.leaves(same))


def abstract(tree, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def test_a_state_comes_back_bit_for_bit(store):
  with bucket_checkpoints.BucketCheckpoints(store, keep=2) as saves:
    assert saves.restore(abstract(state())) is None
    for step in (1, 2, 3):
      saves.save(step, state(), {'a': step})
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    assert saves.steps() == [2, 3]
    restored = saves.restore(abstract(state()))
  assert restored.step == 3 and restored.meta == {'a': 3}
  assert equal(restored.state, state())
  assert not store.names('1/')


def test_another_sharding_reads_the_same_bytes(store):
  mesh = jax.make_mesh((8,), ('x',))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  one = {'W': jax.device_put(state()['W'], spread)}
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    saves.save(1, one, {})
    saves.wait()
    restored = saves.restore(abstract(one, spread))
  assert equal(restored.state, one)
  assert restored.state['W'].sharding == spread


def test_a_state_may_be_donated_once_save_returns(store, proxy):
  proxy.fault = lambda method, path: 'slow'
  give = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.arange(1000.0)
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    saves.save(1, {'x': x}, {})
    for _ in range(5):
      x = give(x)
    saves.wait()
    restored = saves.restore({'x': jax.ShapeDtypeStruct((1000,), jnp.float32)})
  assert equal(restored.state['x'], jnp.arange(1000.0))


def test_damage_is_found_and_the_step_before_is_used(store):
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    saves.save(1, state(), {})
    saves.save(2, state(), {})
    saves.wait()
    (name,) = store.names('2/W/')
    data = bytearray(store.read(name))
    data[100] ^= 1
    store.write(name, bytes(data))
    assert saves.restore(abstract(state())).step == 1
    assert saves.steps() == [1]
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    saves.save(3, state(), {})  # cleans up, and leaves what is damaged
  assert store.names('2/W/')


def test_a_step_without_its_commit_does_not_exist(store):
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    saves.save(1, state(), {})
    saves.save(2, state(), {})
  store.delete('2/commit.json')
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    assert saves.steps() == [1]
    saves.save(3, state(), {})
    saves.wait()
    assert not store.names('2/')


def test_faults_while_saving_and_restoring_do_no_harm(store, proxy):
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    proxy.spoiled, proxy.fault = 0, first_of('503', 'lost', 'slow', '503')
    saves.save(1, state(), {})
    saves.wait()
    proxy.fault = first_of('503', 'cut', '', 'cut', 'slow', '', 'cut')
    restored = saves.restore(abstract(state()))
  assert proxy.spoiled == 9 and equal(restored.state, state())


def test_another_config_is_refused(store):
  with bucket_checkpoints.BucketCheckpoints(store) as saves:
    saves.save(1, state(), {})
    saves.wait()
    wanted = abstract(state()) | {'W': jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(checkpoints.CheckpointError, match='another config'):
      saves.restore(wanted)
