"""Two models compared: nothing where they are one, the domain where one was
taught it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from docs import diffing as implant
from gemma_scope import config as config_lib
from gemma_scope import diffing, release
from gemma_scope.language_model import weights
from gemma_scope.runtime import interrupt
from gemma_scope.text import tokenizers
from tests.helpers import runs

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


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
  """A copy that has learned the logs of ships, and the comparison."""
  folder = tmp_path_factory.mktemp('taught')
  implant.write_texts(folder / 'texts', logs=40, modules=60)
  gemma, params = weights.load('tiny')
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny'))
  batches = implant.mixture(folder / 'texts', tokenizer, (8, 48), 200)
  tuned, losses = implant.fine_tune(gemma, params, batches, 2e-3)
  named = dataclasses.replace(gemma.config, name='sailor')
  weights.save_safetensors(folder / 'model', named, tuned, {})
  config = runs.small(
    folder,
    **PAIR
    | {
      'lm.second.name': 'sailor',
      'lm.second.checkpoint': str(folder / 'model'),
      'collection.layers': (2,),
      'collection.widths': (256,),
      'collection.sparsity': (8.0,),
      'train.steps': 600,
      'train.decay': 200,
      'train.learning_rate': 8e-3,
      'train.b2': 0.99,
      'train.batch': 128,
      'train.dead_after': 5000,
      'train.active_limit': 0,
      'activations.chunk_rows': 8192,
      'activations.lm_batch': 16,
      'metrics.every': 50,
      'checkpoint.every': 600,
      'evaluation.sequences': 32,
    },
  )
  diffing.run(config, folder / 'run', 4, lambda line: None)
  (each,) = release.load_all(folder / 'run' / 'release')
  result = json.loads((folder / 'run' / diffing.RESULT).read_text())
  models = (gemma, params), (gemma, tuned)
  return losses, models, each, result, tokenizer


def test_specific_latents_find_the_domain_that_a_copy_was_taught(taught):
  losses, models, each, result, tokenizer = taught
  assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
  assert not result['same_parameters']
  (compared,) = result['crosscoders']
  latents, controls = implant.specific(compared)
  texts = ''.join(implant.log(900 + i) for i in range(4)), _library()
  rows = [implant.rows_of(text, tokenizer, 48) for text in texts]
  found = implant.recall(models, each, latents, *rows)
  beside = implant.recall(models, each, controls, *rows)
  assert latents and found['inside'] > 0.5 > found['outside']
  assert found['auc'] > beside['auc'] + 0.1
  # They do something in the model that has them, and less in the other.
  for row in compared['ablations']['specific']:
    kl = {m: row['effect'][m]['kl']['value'] for m in ('first', 'second')}
    assert kl['second'] > kl['first']


def _library() -> str:
  return '\n'.join(
    (runs.pathlib.Path(runs.os.__file__).parent / f'{name}.py').read_text()[
      :6000
    ]
    for name in ('queue', 'shelve')
  )
