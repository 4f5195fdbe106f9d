"""Saves are atomic, restores are bitwise or refused, and say why."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pathlib
import shutil
import threading
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import gemma_scope
from gemma_scope.runtime import checkpoints, checksums


@flax.struct.dataclass
class State:
  """As a stack's: parameters, an optimiser's state, counters."""

  params: dict[str, Any]
  opt: Any
  fired: jax.Array


def make_state(step: int) -> State:
  """A pure function of step: every step's bytes differ in every leaf."""
  rng = np.random.default_rng(step)
  params = {
    'W_enc': jnp.asarray(rng.standard_normal((16, 48)), jnp.float32),
    'b_enc': jnp.asarray(rng.standard_normal(48), jnp.bfloat16),
  }
  opt = optax.adam(1e-3).init(params)
  opt = jax.tree.map(lambda x: x + step, opt)
  return State(params, opt, jnp.asarray(rng.integers(0, 9999, 48), jnp.int32))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def same(one, two) -> bool:
  """Bitwise, with structure and dtype."""
  one, a = jax.tree.flatten(one)
  two, b = jax.tree.flatten(two)
  return a == b and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(one, two, strict=True)
  )


def save_all(folder, steps, keep=3):
  with checkpoints.Checkpoints(folder, keep=keep) as saves:
    for step in steps:
      saves.save(step, make_state(step), {'step': step})


def flip(path: pathlib.Path, at: float):
  data = bytearray(path.read_bytes())
  data[int(at * (len(data) - 1))] ^= 0x10
  path.write_bytes(data)


def largest(folder: pathlib.Path) -> pathlib.Path:
  """The file that holds the values."""
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def test_round_trip_keeps_newest_and_meta(tmp_path):
  folder = tmp_path / 'a folder' / 'checkpoints'
  meta = {'config': {'widths': (1, 2)}, 'scales': {'x': 0.1}, 'n': {3: 4}}
  with checkpoints.Checkpoints(folder, keep=2) as saves:
    assert saves.restore(abstract(make_state(0))) is None
    assert saves.steps() == []
    assert not folder.exists()  # a reader makes nothing
    for step in (3, 20, 100):
      saves.save(step, make_state(step), meta)
    saves.wait()
    assert saves.steps() == [20, 100]
    saves.save(100, make_state(1), {})  # already there: stays
    assert saves.steps() == [20, 100]
  with checkpoints.Checkpoints(folder) as saves:
    found = saves.restore(abstract(make_state(0)))
    assert found.step == 100 and same(found.state, make_state(100))
    assert found.meta == json.loads(json.dumps(meta))
    assert isinstance(found.state, State)


def test_leaves_of_every_kind(tmp_path):
  state = {
    'empty': jnp.zeros((0, 3)),
    'none': None,
    'host': np.arange(6, dtype=np.int32)[::2],
    'bool': jnp.array([True, False]),
    'a.b/c': (jnp.float32(1.5), [jnp.uint8(3)]),
    'key': jax.random.key_data(jax.random.key(0)),
  }
  with checkpoints.Checkpoints(tmp_path) as saves:
    saves.save(1, state, {})
    assert same(saves.restore(state).state, state)
    for bad in (3, jax.random.key(0), np.float64(3)):
      with pytest.raises(ValueError, match='The leaf count of the state'):
        saves.save(2, {'count': bad}, {})
    with pytest.raises(checkpoints.CheckpointError, match='must be JSON'):
      saves.save(2, state, {'path': pathlib.Path('x')})


def test_state_may_be_donated_at_once(tmp_path):
  advance = jax.jit(
    lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0
  )
  state = {'x': jnp.arange(500_000, dtype=jnp.float32)}
  with checkpoints.Checkpoints(tmp_path, keep=4) as saves:
    for step in range(4):
      saves.save(step, state, {})
      state = advance(advance(state))
  with checkpoints.Checkpoints(tmp_path) as saves:
    for step in (3, 2, 1, 0):
      found = saves.restore(state)
      assert found.step == step
      np.testing.assert_array_equal(
        found.state['x'], np.arange(500_000, dtype=np.float32) + 2 * step
      )
      shutil.rmtree(tmp_path / str(step))


def test_restores_under_another_sharding(tmp_path):
  assert jax.device_count() == 8
  mesh = jax.make_mesh((4, 2), ('sae', 'latent'))
  rng = np.random.default_rng(0)
  x_SF = rng.standard_normal((8, 16)).astype(np.float32)

  def place(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  layouts = [place('sae', 'latent'), place(None, 'sae'), place(), None]
  saved = {'x': jax.device_put(x_SF, layouts[0]), 'n': jnp.int32(1)}
  with checkpoints.Checkpoints(tmp_path) as saves:
    saves.save(1, saved, {})
    for layout in layouts:
      target = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=layout)
      found = saves.restore({'x': target, 'n': saved['n']}).state['x']
      np.testing.assert_array_equal(found, x_SF)
      assert layout is None or found.sharding == layout
    assert len(saves.restore(saved).state['x'].sharding.device_set) == 8


def test_damage_to_any_file_is_refused_or_harmless(tmp_path):
  """Every file of a step: a bit flipped, cut short, emptied, removed.

  Some files orbax does not need (superseded index nodes, its own dates); then
  the state restored must be right in every bit. Nothing else is accepted.
  """
  want = {'W': make_state(7).params['W_enc'], 'n': jnp.int32(7)}
  with checkpoints.Checkpoints(tmp_path) as saves:
    saves.save(7, want, {'step': 7})
  files, refused = list((tmp_path / '7').rglob('*')), set()
  needed = (largest(tmp_path / '7'), tmp_path / '7' / 'meta' / 'metadata')
  with checkpoints.Checkpoints(tmp_path) as saves:
    for path in filter(pathlib.Path.is_file, files):
      data = path.read_bytes()

      def damages(path=path, data=data):
        for place in (0.03, 0.4, 0.8) if path in needed else (0.4,):
          yield lambda: flip(path, place)  # noqa: B023
        for cut in (data[: len(data) // 2], b''):
          yield lambda: path.write_bytes(cut)  # noqa: B023
        yield path.unlink

      for number, damage in enumerate(damages()):
        damage()
        try:
          found = saves.restore(want)
          assert same(found.state, want) and found.meta == {'step': 7}, path
        except checkpoints.CheckpointError as error:
          assert 'is damaged' in str(error)
          refused.add((path, number))
        path.write_bytes(data)
    assert same(saves.restore(want).state, want)
  for path in needed:
    assert {n for p, n in refused if p == path} == set(range(6)), path


def test_a_flip_names_its_leaf_and_the_step_before_is_used(tmp_path, caplog):
  save_all(tmp_path, [1, 2, 3])
  leaves, _ = checksums.named(make_state(3))
  flip(largest(tmp_path / '3'), 0.5)
  (tmp_path / '2' / 'meta' / 'metadata').write_text('{"body": ')
  with checkpoints.Checkpoints(tmp_path) as saves:
    with caplog.at_level(logging.WARNING):
      found = saves.restore(abstract(make_state(0)))
    assert found.step == 1 and same(found.state, make_state(1))
    warned = [r.getMessage() for r in caplog.records if r.name.endswith('ints')]
    assert any('Step 3 in' in w and any(n in w for n in leaves) for w in warned)
    assert any('Step 2 in' in w and 'metadata' in w for w in warned)
    assert saves.steps() == [1]
    # The damaged ones are kept aside, so that their steps can be saved again.
    saves.save(3, make_state(3), {})
    saves.wait()
    assert {p.name for p in tmp_path.iterdir()} == {
      '1',
      '3',
      '3.damaged',
      '2.damaged',
    }
    flip(largest(tmp_path / '3'), 0.5)
    assert saves.restore(abstract(make_state(0))).step == 1
    assert (tmp_path / '3.damaged-2').exists()


def test_a_step_that_cannot_be_read_once_is_read_again(tmp_path, monkeypatch):
  save_all(tmp_path, [1, 2])
  with checkpoints.Checkpoints(tmp_path) as saves:
    real, errors = saves._read, [OSError(5, 'Input/output error')]

    def read(*given):
      if errors:
        raise errors.pop()
      return real(*given)

    monkeypatch.setattr(saves, '_read', read)
    found = saves.restore(abstract(make_state(0)))
    assert found.step == 2 and same(found.state, make_state(2))
    assert saves.steps() == [1, 2] and not errors


def test_all_damaged_is_an_error_and_moves_nothing(tmp_path):
  save_all(tmp_path, [1, 2])
  for step in '12':
    (tmp_path / step / 'state' / 'manifest.ocdbt').unlink()
  with checkpoints.Checkpoints(tmp_path) as saves:
    for _ in range(2):
      with pytest.raises(
        checkpoints.CheckpointError, match=r'Every .* \(steps 1, 2;'
      ):
        saves.restore(abstract(make_state(0)))
    assert saves.steps() == [1, 2]


def test_a_changed_config_is_an_error_not_a_fallback(tmp_path):
  save_all(tmp_path, [1])
  right = abstract(make_state(1))

  def changed(name, leaf):
    return right.replace(params=right.params | {name: leaf})

  cases = {
    'W_enc has dtype float32, expected bfloat16': changed(
      'W_enc', jax.ShapeDtypeStruct((16, 48), jnp.bfloat16)
    ),
    r'b_enc has shape \[48\], expected \[64\]': changed(
      'b_enc', jax.ShapeDtypeStruct((64,), jnp.bfloat16)
    ),
    'params.b_dec is missing': changed('b_dec', right.fired),
    'opt.0.mu.W_enc is not expected': right.replace(opt=()),
  }
  with checkpoints.Checkpoints(tmp_path) as saves:
    for message, target in cases.items():
      with pytest.raises(checkpoints.CheckpointError, match=message):
        saves.restore(target)
    assert saves.restore(right).step == 1


def test_full_disk_is_a_sentence_and_earlier_steps_stay(tmp_path, monkeypatch):
  save_all(tmp_path, [1])
  real = shutil.disk_usage
  with checkpoints.Checkpoints(tmp_path) as saves:
    monkeypatch.setattr(
      shutil, 'disk_usage', lambda path: real(path)._replace(free=12_345)
    )
    with pytest.raises(
      checkpoints.CheckpointError,
      match=r'Step 2 needs [\d,]+ bytes in .* and 12,345 are free; make room',
    ):
      saves.save(2, make_state(2), {})
    monkeypatch.undo()
    # The disk fills up while orbax writes: the error comes with the next call.
    commit = saves._orbax.wait_until_finished

    def fail():
      commit()
      (tmp_path / '2').rename(tmp_path / '2.orbax-checkpoint-tmp')
      raise OSError(28, 'No space left on device')

    saves.save(2, make_state(2), {})
    monkeypatch.setattr(saves._orbax, 'wait_until_finished', fail)
    with pytest.raises(checkpoints.CheckpointError, match='Step 2 needs'):
      saves.wait()
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {'1'}
    saves.save(2, make_state(2), {})
    saves.wait()
    assert saves.steps() == [1, 2]


def test_a_write_that_fails_is_a_sentence(tmp_path, monkeypatch):
  with checkpoints.Checkpoints(tmp_path) as saves:
    saves.save(1, make_state(1), {})
    saves.wait()
    (tmp_path / '2').write_text('in the way')
    monkeypatch.setattr(saves, 'steps', lambda: [1])
    with pytest.raises(checkpoints.CheckpointError, match='could not be saved'):
      saves.save(2, make_state(2), {})
      saves.wait()
    monkeypatch.undo()
    (tmp_path / '2').unlink()
    saves.save(3, make_state(3), {})
  assert saves.steps() == [1, 3]


@pytest.mark.parametrize('item', ['state', 'meta'])
def test_a_failed_save_leaves_nothing_behind(item, tmp_path, monkeypatch):
  """Neither files nor threads, which would write into the next save."""
  real = os.mkdir

  def mkdir(path, *rest, **more):
    if f'tmp/{item}' in os.fspath(path):
      raise OSError(28, 'No space left on device', os.fspath(path))
    return real(path, *rest, **more)

  with checkpoints.Checkpoints(tmp_path) as saves:
    saves.save(1, make_state(1), {})
    saves.wait()
    monkeypatch.setattr(os, 'mkdir', mkdir)
    with pytest.raises(checkpoints.CheckpointError, match='Step 2 needs'):
      saves.save(2, make_state(2), {})
      saves.wait()
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ['1']
    names = [type(thread).__name__ for thread in threading.enumerate()]
    assert '_SignalingThread' not in names
    saves.save(2, make_state(2), {})
  with checkpoints.Checkpoints(tmp_path) as saves:
    found = saves.restore(abstract(make_state(0)))
  assert found.step == 2 and same(found.state, make_state(2))


def test_a_save_that_ends_without_a_step_is_an_error(tmp_path, monkeypatch):
  with checkpoints.Checkpoints(tmp_path) as saves:
    monkeypatch.setattr(saves._orbax, 'save', lambda *unused, **also: None)
    saves.save(1, make_state(1), {})
    with pytest.raises(checkpoints.CheckpointError, match='wrote no step'):
      saves.wait()


def test_the_close_does_not_hide_the_sentence_of_a_save(tmp_path, monkeypatch):
  def fail(*unused, **also):
    raise OSError(28, 'No space left on device')

  with pytest.raises(checkpoints.CheckpointError, match='Step 1 needs'):
    with checkpoints.Checkpoints(tmp_path) as saves:
      monkeypatch.setattr(saves._orbax, 'save', fail)
      monkeypatch.setattr(saves._orbax, 'close', fail)
      saves.save(1, make_state(1), {})


def test_only_a_writer_clears_leftovers(tmp_path):
  save_all(tmp_path, [1])
  for name in ('2.orbax-checkpoint-tmp', '0.todelete', 'notes', '5.damaged'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'file').write_text('x')
  with checkpoints.Checkpoints(tmp_path) as saves:
    assert saves.restore(abstract(make_state(1))).step == 1
    assert (tmp_path / '2.orbax-checkpoint-tmp').exists()
    saves.save(2, make_state(2), {})
  assert {p.name for p in tmp_path.iterdir()} == {
    '1',
    '2',
    'notes',
    '5.damaged',
  }


def run_forever(folder: str, pipe):
  """The child of the kill test: restore, check, then save without a pause."""
  advance = jax.jit(
    lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0
  )
  with checkpoints.Checkpoints(folder, keep=2) as saves:
    found = saves.restore(abstract(make_state(0)))
    step = found.step if found else 0
    pipe.send(step if not found or same(found.state, make_state(step)) else -1)
    while True:
      step += 1
      state = make_state(step)
      saves.save(step, state, {'step': step})
      advance(state)
      pipe.send(step)


def test_kill_in_the_middle_of_saves_restores_bitwise(tmp_path, monkeypatch):
  # A fork server imports once; each child is a fork of it.
  root = pathlib.Path(gemma_scope.__file__).parents[1]
  monkeypatch.setenv('PYTHONPATH', str(root))
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['tests.helpers.preloaded'])
  last = 0
  for kill, pause in enumerate((0.0, 0.02, 0.05, 0.11)):
    pipe, end = context.Pipe()
    child = context.Process(target=run_forever, args=(str(tmp_path), end))
    child.start()
    end.close()
    # What was committed before is where it goes on, and it is bitwise right.
    assert pipe.recv() == last
    for _ in range(2 + kill):
      said = pipe.recv()
    time.sleep(pause)
    child.kill()
    child.join()
    with contextlib.suppress(EOFError):
      while True:
        said = pipe.recv()
    with checkpoints.Checkpoints(tmp_path) as saves:
      found = saves.restore(abstract(make_state(0)))
    assert same(found.state, make_state(found.step))
    assert found.meta == {'step': found.step}
    # Only the save in flight may be lost.
    assert found.step >= said - 1
    last = found.step
  assert not list(tmp_path.glob('*.damaged*'))
