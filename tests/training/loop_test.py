"""A run that is killed, stopped or refused loses nothing: real processes."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import tiny
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import store
from gemma_scope.runtime import changes
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease as lease_lib
from gemma_scope.training import loop, setup, trained
from gemma_scope.training import optimizer as optimizer_lib
from tests.helpers import processes, shared
from tests.helpers.runs import STEPS, flags_of, last_step, small


def start(config, workdir) -> processes.Script:
  """The command that trains by this config, as its own process."""
  log = workdir.with_name(f'{workdir.name}.{time.monotonic_ns()}.log')
  return processes.Script(log, *flags_of(config, workdir)[1:])


def wait_for_step(process: processes.Script, workdir, step: int) -> None:
  process.wait_for(lambda: last_step(workdir) >= step)


def states(config: ConfigDict, workdir: pathlib.Path):
  """Everything that training changed, as one dict of arrays."""
  one = config.copy_and_resolve_references()
  one.mesh.data = jax.device_count()
  result = trained.load(one, workdir)
  leaves = jax.tree_util.tree_leaves_with_path(
    (result.states, result.normalisation)
  )
  return result.step, {
    jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves
  }


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run: its config, folder, output, step and state."""

  def make(folder):
    done = processes.Script(
      folder / 'output', *flags_of(small(folder), folder / 'run')[1:]
    )
    code, output = done.end()
    assert code == 0, output

  folder = shared.folder(tmp_path_factory, 'whole_run', make)
  config = small(folder)
  output = (folder / 'output').read_text()
  return config, folder, output, *states(config, folder / 'run')


def test_the_whole_job_ends_in_a_release_a_table_and_a_picture(whole):
  config, folder, output, step, _ = whole
  run = folder / 'run'
  assert step == STEPS
  assert (run / 'frontier.png').stat().st_size > 1000
  assert (run / 'release' / 'manifest.json').exists()
  for word in ('resid_post', 'control', 'delta loss', 'tokens/s'):
    assert word in output, output
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == list(
    range(1, STEPS + 1)
  )
  assert json.loads(lines[-1])['rows_outliers'] > 0
  for path in (run / 'release').rglob('config.json'):
    assert json.loads(path.read_text())['outliers']['max_norm'] == 1.5
  code, output = start(config, run).end()
  assert code == 0 and 'is done' in output, output


def unevaluated(config: ConfigDict) -> ConfigDict:
  """The same training; evaluation takes longer than it and changes nothing."""
  config = config.copy_and_resolve_references()
  config.evaluation.sequences = 0
  return config


def test_kill_9_and_the_same_command_end_bitwise_where_no_kill_would(
  whole, tmp_path
):
  config, _, _, _, expected = whole
  config, run = unevaluated(config), tmp_path / 'run'
  for step in (3, 25):  # before the first checkpoint, and between two
    process = start(config, run)
    wait_for_step(process, run, step)
    process.send(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
  code, output = start(config, run).end()
  assert code == 0, output
  assert 'continuing at step' in output
  step, found = states(config, run)
  assert step == STEPS
  assert_same(found, expected)


def test_sigterm_saves_the_last_whole_step_and_exits_cleanly(whole, tmp_path):
  config, _, _, _, expected = whole
  config, run = unevaluated(config), tmp_path / 'run'
  process = start(config, run)
  wait_for_step(process, run, 10)
  process.send(signal.SIGTERM)
  code, output = process.end()
  assert code == 0, output
  assert 'stopped and saved at step' in output
  step, _ = states(config, run)
  assert step == last_step(run) >= 10  # no whole step is lost
  code, output = start(config, run).end()
  assert code == 0, output
  assert_same(states(config, run)[1], expected)


def test_a_signal_before_the_first_step_exits_cleanly(tmp_path):
  process = start(unevaluated(small(tmp_path)), tmp_path / 'run')
  process.wait_for(lambda: 'loading' in process.output())
  process.send(signal.SIGINT)
  code, output = process.end()
  assert code == 0, output


def test_a_second_run_on_the_folder_is_refused_by_the_holders_name(tmp_path):
  run = tmp_path / 'run'
  run.mkdir()
  with lease_lib.Lease(run):
    code, output = start(small(tmp_path), run).end()
  assert code == 1
  assert str(os.getpid()) in output and len(output.strip().splitlines()) == 1


@pytest.mark.parametrize(
  'field, value', [('train.batch', 32), ('sae.bandwidth', 0.5), ('seed', 3)]
)
def test_a_changed_config_is_refused_by_field(tmp_path, field, value):
  config = small(tmp_path, **{'mesh.data': 4, 'mesh.latent': 2})
  loop.keep_config(config, tmp_path)
  loop.keep_config(config, tmp_path)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(changes.ChangedError, match=field):
    loop.keep_config(config, tmp_path)


def one_sae(tmp_path, **changes) -> ConfigDict:
  """Half as long, one SAE, and nothing that is costly to compile.

  As one program, which the tests that use it compile once.
  """
  return small(
    tmp_path,
    **{
      'collection.layers': (0,),
      'collection.sites': ('resid_post',),
      'objective.auxk': 0.0,
      'train.resample_every': 0,
      'train.active_limit': 0,
      'train.steps': 20,
      **changes,
    },
  )


def in_process(config, workdir):
  workdir.mkdir(exist_ok=True)
  config = config.copy_and_resolve_references()
  config.mesh.data, config.mesh.latent = 4, 2
  with (
    lease_lib.Lease(workdir) as lease,
    interrupt_lib.Interrupt() as interrupt,
  ):
    loop.keep_config(config, workdir)
    return config, loop.train(config, workdir, lease, interrupt, print)


def test_another_text_is_refused_on_resume(tmp_path):
  config = one_sae(tmp_path)
  run = tmp_path / 'run'
  _, result = in_process(config, run)
  assert result.done
  for path in sorted((tmp_path / 'texts').glob('abc*')):
    path.write_text('other ' * 2000)
  for path in (run / 'tokens').iterdir():
    path.unlink()
  (run / 'tokens').rmdir()
  with pytest.raises(changes.ChangedError, match='text'):
    in_process(config, run)


def test_training_from_a_store_is_training_from_the_model(tmp_path):
  config = one_sae(tmp_path)
  config, from_model = in_process(config, tmp_path / 'model')
  source, facts = setup.make_source(
    config, tmp_path / 'model', mesh_lib.make(config.mesh), print
  )
  store.write_store(tmp_path / 'store', source, 3, facts)
  config.activations.store = str(tmp_path / 'store')
  _, from_store = in_process(config, tmp_path / 'run')
  for a, b in zip(
    jax.tree.leaves((from_model.states, from_model.normalisation)),
    jax.tree.leaves((from_store.states, from_store.normalisation)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_a_short_run_meets_its_target_l0(tmp_path):
  """Within 10 %, on the tiny model; the paper's constants need 10^9 tokens."""
  config = small(tmp_path)
  default = tiny.get_config()
  for section in ('sae', 'objective', 'train'):
    config[section] = default[section].copy_and_resolve_references()
  config.update_from_flattened_dict(
    {
      'collection.layers': (2,),
      'collection.sites': ('resid_post',),
      'collection.widths': (128,),
      'collection.architectures': ('jumprelu',),
      'collection.sparsity': (8.0, 24.0),
      'text.seq_len': 65,
      'activations.chunk_rows': 4096,
      'activations.lm_batch': 16,
      'train.steps': 200,
      'train.batch': 64,
      'train.decay': 80,
      'checkpoint.every': 200,
    }
  )

  in_process(config, tmp_path / 'run')
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-20:]
  for target in config.collection.sparsity:
    key = f'resid_post/2/jumprelu/width_128/target_l0_{target:g}/seed_0/l0'
    l0 = np.mean([json.loads(line)[key] for line in lines])
    assert l0 == pytest.approx(target, rel=0.1)


def test_the_closing_phase_is_done_again_where_it_was_stopped(tmp_path):
  """The same end, and a release whose decoders have norm 1."""
  config = one_sae(
    tmp_path,
    **{
      'train.meet_l0': True,
      'train.refit_decoders': True,
      'train.closing_batches': 5,
    },
  )
  config, whole = in_process(config, tmp_path / 'whole')
  norms = np.linalg.norm(whole.states[0].params['W_dec'], axis=-1)
  assert np.abs(norms - 1).max() > 0.01
  for released in whole.saes(config):
    params = released.load()
    np.testing.assert_allclose(
      np.linalg.norm(params['W_dec'], axis=1), 1, rtol=1e-5
    )

  class Stop(interrupt_lib.Interrupt):
    """Stops the run when the closing phase has had a batch."""

    closing = 0

    def check(self):
      if 'least squares' in ''.join(lines):
        self.closing += 1
      if self.closing > 2:
        raise interrupt_lib.Interrupted

  run, lines = tmp_path / 'run', []
  run.mkdir()
  with lease_lib.Lease(run) as lease, Stop() as stop:
    loop.keep_config(config, run)
    stopped = loop.train(config, run, lease, stop, lines.append)
  assert not stopped.done and 'closing phase' in lines[-1], lines
  _, again = in_process(config, run)
  assert again.done
  for a, b in zip(
    jax.tree.leaves(whole.states), jax.tree.leaves(again.states), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_run_that_is_no_longer_finite_stops_and_keeps_a_checkpoint(tmp_path):
  config = one_sae(
    tmp_path,
    **{'train.steps': 400, 'train.learning_rate': 1e-3, 'checkpoint.every': 50},
  )
  run = tmp_path / 'run'
  config.train.decay = 0

  # A learning rate that breaks the parameters at step 60.
  ordinary = optimizer_lib.Optimizer.rate_factor

  def rate_factor(self, step):
    return ordinary(self, step) * jax.numpy.where(step < 60, 1, 1e38)

  optimizer_lib.Optimizer.rate_factor = rate_factor
  try:
    with pytest.raises(loop.NotFiniteError, match='resid_post/0/batch_topk'):
      in_process(config, run)
  finally:
    optimizer_lib.Optimizer.rate_factor = ordinary
  step, found = states(config, run)
  assert step == 50
  assert all(np.isfinite(value).all() for value in found.values())
