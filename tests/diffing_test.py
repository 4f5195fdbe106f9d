"""A model against itself: nothing differs, and what was stopped continues."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil

import pytest

from gemma_scope import config as config_lib
from gemma_scope import diffing, release
from gemma_scope.runtime import interrupt, objects, remote
from tests.helpers import cluster, object_servers, processes, runs

PAIR = {
  'lm.second.name': 'tiny', 'collection.type': 'crosscoder',
  'collection.layers': (1,), 'collection.sites': ('resid_post',),
  'collection.widths': (64,), 'train.resample_every': 0,
  'activations.max_norm': 4.0, 'evaluation.batch': 8,
  'mesh.data': 4, 'mesh.latent': 2,
}  # fmt: skip


@pytest.fixture(scope='module')
def itself(tmp_path_factory):
  """Two crosscoders of the embedded model against itself, stopped between."""
  folder = tmp_path_factory.mktemp('itself')
  config = runs.small(folder, **PAIR, **{'collection.sparsity': (3.0, 6.0)})
  compared, lines = [], []
  of, patch = diffing.Comparison.of, pytest.MonkeyPatch()

  def stopped(self, each):
    if compared:
      raise interrupt.Interrupted
    compared.append(each.name)
    return of(self, each)

  with patch.context() as patched:
    patched.setattr(diffing.Comparison, 'of', stopped)
    done = diffing.run(config, folder / 'run', 2, lines.append)
  assert not done and not (folder / 'run' / diffing.RESULT).exists()
  assert 'stopped in the comparison' in lines[-1]

  def counted(self, each):
    compared.append(each.name)
    return of(self, each)

  with patch.context() as patched:
    patched.setattr(diffing.Comparison, 'of', counted)
    assert diffing.run(config, folder / 'run', 2, lines.append)
  return config, folder / 'run', compared, lines


def test_a_model_differs_in_nothing_from_itself(itself):
  _, folder, _, lines = itself
  result = json.loads((folder / diffing.RESULT).read_text())
  assert result['same_parameters'] and 'a control' in lines[-2]
  for each in result['crosscoders']:
    assert each['share_specific'] <= 0.05
    assert each['shared'] > 0.9 * each['fired'] > 0
    assert each['fvu']['first'] == pytest.approx(
      each['fvu']['second'], abs=0.05
    )
    assert each['nu']['shared']['error'][1] == pytest.approx(1, abs=0.1)
    assert sum(each['relative_norms']) == each['fired']


def test_what_was_stopped_continues(itself):
  config, folder, compared, lines = itself
  saes = release.load_all(folder / 'release')
  assert compared == [each.name for each in saes] and len(saes) == 2
  assert not (folder / 'diffing').exists()
  written = (folder / diffing.RESULT).read_bytes()
  shown = lines[-2]
  assert diffing.run(config, folder, 2, lines.append)
  assert (
    lines[-2] == shown and (folder / diffing.RESULT).read_bytes() == written
  )


def test_its_release_says_that_it_is_of_two_models(itself):
  _, folder, _, _ = itself
  for each in release.load_all(folder / 'release'):
    assert each.card['second_model'] == 'tiny' and each.wiring.pair
    assert each.load()['W_enc'].shape == (256, 64)
    assert each.metrics is None
    assert set(each.card['scales']) == {'resid_post/1', 'second:resid_post/1'}
    bounds = each.card['outliers']['norm_bounds']
    assert set(bounds) == set(each.card['scales'])


def on_its_own_disk(folder: pathlib.Path, environment, *flags: str) -> None:
  """One process of a comparison, that shares nothing but the bucket."""
  cache = str(folder / os.environ['PROCESS_ID'])
  os.environ.update(environment, GEMMA_SCOPE_CACHE=cache)
  processes.script('launch/diffing.py', *flags)


@pytest.mark.skipif(
  importlib.util.find_spec('gcp_storage_emulator') is None,
  reason='needs gcp-storage-emulator',
)
def test_two_processes_compare_in_a_bucket(itself, tmp_path, monkeypatch):
  """The training is done; the comparison is that of one process on a disk."""
  config, trained, _, _ = itself
  two = config.copy_and_resolve_references()
  two.mesh.data, two.mesh.latent = 2, 1
  monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path / 'here'))
  with object_servers.started('gs') as (_, environment):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    address = f'gs://{object_servers.BUCKET}/run'
    with remote.folder(address) as local:
      for name in ('tokens', 'release'):
        shutil.copytree(trained / name, local / name)
        remote.publish(local / name)
      shutil.copy(trained / 'config.json', local)
      remote.publish(local / 'config.json')
    flags = [
      flag
      for flag in runs.flags_of(two, address)[2:]
      if not flag.startswith('--config.lm.second=')
    ] + ['--config.lm.second.name=tiny', '--ablate=2']
    with cluster.Cluster(
      tmp_path, 2, on_its_own_disk, tmp_path, environment, *flags
    ) as both:
      assert both.codes(range(2), 300) == [0, 0], both.outputs()
      report, silence = both.outputs()
    assert f'result   {address}/{diffing.RESULT}' in report
    assert 'crosscoder' not in silence  # one reports for all
    store, lines = objects.Objects(address), []
    assert not store.names('diffing/') and not store.names('run.lease')
    assert diffing.run(config, address, 2, lines.append)
    found = json.loads(store.read(diffing.RESULT))
  wanted = json.loads((trained / diffing.RESULT).read_text())
  assert found['same_parameters'] and lines[-2] in report
  for one, other in zip(
    found['crosscoders'], wanted['crosscoders'], strict=True
  ):
    for name in ('name', 'tokens', 'fired', 'relative_norms'):
      assert one[name] == other[name]
    assert one['fvu'] == pytest.approx(other['fvu'], rel=1e-4)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'lm.second.name': ''}, 'names no second model'),
    ({'evaluation.sequences': 0}, 'held-out text'),
    ({'collection.type': 'sae'}, 'collection.type to crosscoder'),
  ],
)
def test_a_comparison_of_nothing_is_refused(changes, words, tmp_path):
  config = runs.small(tmp_path, **PAIR | changes)
  with pytest.raises(config_lib.ConfigError, match=words):
    diffing.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
