"""What a later stage would refuse is refused before the first step."""

from __future__ import annotations

import json
import shutil

import pytest

from gemma_scope import config as config_lib
from gemma_scope import files, pipeline
from gemma_scope.activations import synthetic
from gemma_scope.evaluation import recovery
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.text import prepare
from gemma_scope.training import loop
from tests.helpers import runs

# What a field set to 0 switches off, or does at once; all together.
ZEROS = {
  'seed': 0, 'objective.strength': 0.0, 'objective.prefactor': 0.0,
  'objective.frequency': 0.0, 'objective.frequency_limit': 0.0,
  'objective.pre_act': 0.0, 'objective.auxk': 0.0, 'objective.auxk_latents': 0,
  'initialise.layer': 0, 'end_to_end.beta': 0.0, 'train.warm_up': 0,
  'train.decay': 0, 'train.sparsity_warm_up': 0, 'train.initial_l0': 0.0,
  'train.l0_steps': 0, 'train.threshold_rate': 0.0, 'train.b2': 0.0,
  'train.b1': 0.0,
  'train.clip': 0.0, 'train.theta_decay': 0.0, 'train.adaptive_rate': 0.0,
  'train.resample_every': 0, 'train.active_limit': 0,
  'evaluation.sequences': 0,
}  # fmt: skip


class Trained(Exception):
  """Training was reached."""


@pytest.fixture
def to_training(monkeypatch):
  """Ends a run where its first step would begin."""

  def stop(*arguments):
    raise Trained

  monkeypatch.setattr(loop, 'train', stop)


def small(folder, **changes):
  changes = {'mesh.data': 4, 'mesh.latent': 2} | changes
  return runs.small(folder, **changes)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'collection.layers': (9,)}, 'has layers 0 to 3'),
    ({'evaluation.batch': 15}, "evaluation.batch .* mesh's data axis"),
    ({'mesh.data': 3}, 'does not fit 8 devices'),
    ({'text.source': 'files:{}/none/*.txt'}, 'none'),
    ({'text.seq_len': 300, 'text.source': 'files:{}/few/*.txt'}, 'eval'),
    ({'collection.widths': (2**30,)}, 'training state of the 4 SAEs needs'),
    ({'initialise.release': '{}/nothing'}, 'nothing'),
  ],
)
def test_a_refused_command_leaves_the_folder_to_another(
  changes, words, tmp_path, to_training
):
  (tmp_path / 'few').mkdir()
  (tmp_path / 'few' / 'a.txt').write_text('some words ' * 100)
  right = small(tmp_path)
  wrong = small(
    tmp_path,
    **{
      name: value.format(tmp_path) if isinstance(value, str) else value
      for name, value in changes.items()
    },
  )
  run = tmp_path / 'run'
  with pytest.raises(ValueError, match=words):
    pipeline.run(wrong, run, lambda line: None)
  assert not (run / 'config.json').exists()
  with pytest.raises(Trained):
    pipeline.run(right, run, lambda line: None)
  kept = json.loads((run / 'config.json').read_text())
  assert kept == json.loads(right.to_json())
  source = json.loads((run / 'tokens' / 'manifest.json').read_text())
  assert source['source'] == right.text.source


def test_a_disk_without_room_is_refused(tmp_path, to_training, monkeypatch):
  def usage(_):
    return shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000)

  monkeypatch.setattr(pipeline.shutil, 'disk_usage', usage)
  with pytest.raises(config_lib.ConfigError, match='needs .*B of disk'):
    pipeline.run(small(tmp_path), tmp_path / 'run', lambda line: None)


def test_all_that_may_be_0_may_be_0_together(tmp_path):
  config = small(
    tmp_path,
    **ZEROS,
    **{'train.steps': 3, 'checkpoint.every': 1, 'metrics.every': 2},
  )
  lines = []
  assert pipeline.run(config, tmp_path / 'run', lines.append)
  assert (tmp_path / 'run' / 'release' / 'manifest.json').exists()


def test_metrics_that_cannot_be_written_are_shown(tmp_path, monkeypatch):
  config = small(tmp_path, **{'lm.name': synthetic.MODEL})
  monkeypatch.setattr(recovery, 'score', lambda *_: {'a': {'l0': 3.0}})

  def full(*arguments, **options):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'write_json', full)
  lines = []
  with pytest.raises(OSError, match='No space left'):
    with interrupt_lib.Interrupt() as interrupt:
      pipeline.evaluate_saes(
        config, tmp_path, [], interrupt, tmp_path / 'x.json', lines.append
      )
  assert json.loads(lines[-1]) == {'members': {'a': {'l0': 3.0}}}


def test_text_that_was_there_is_not_removed(tmp_path, to_training):
  right, run = small(tmp_path), tmp_path / 'run'
  with pytest.raises(Trained):
    pipeline.run(right, run, lambda line: None)
  (run / 'config.json').unlink()
  longer = small(tmp_path, **{'text.seq_len': 30_000})
  with pytest.raises(ValueError):
    pipeline.run(longer, run, lambda line: None)
  prepare.open_text(right, run, print)


def test_metrics_are_sealed(tmp_path):
  scores, path = {'resid_post/1': {'l0': 4.5}}, tmp_path / 'evaluation.json'
  files.write_json(path, {'members': scores})  # as version 0.3.0 did
  assert pipeline.read_scores(path) == scores
  body = {'members': scores}
  sealed = body | {'members_sha256': files.json_sha256(body)}
  for text, well in (
    (json.dumps(sealed), True),
    (json.dumps(sealed).replace('4.5', '4.7'), False),
    (json.dumps(sealed).replace('sha256', 'sha257'), False),
    (json.dumps(sealed)[:-9], False),
    ('[]', False),
  ):
    path.write_text(text)
    if well:
      assert pipeline.read_scores(path) == scores
    else:
      with pytest.raises(files.Refused, match='evaluation.json. is damaged'):
        pipeline.read_scores(path)
