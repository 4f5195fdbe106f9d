"""The suite: a perfect SAE, a random one, and a run that is taken up again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gemma_scope.evaluation.saebench import suite
from gemma_scope.language_model import weights
from gemma_scope.text import tokenizers
from tests.helpers import releases

SETTINGS = suite.Settings(
  length=32,
  train_modules=12,
  train_windows=4,
  test_windows=6,
  core_sequences=8,
  batch=8,
)
CARD = {
  'type': 'sae',
  'sites': ['resid_post/2'],
  'targets': ['resid_post/2'],
  'name': 'perfect',
  'model': 'tiny',
}


@pytest.fixture(scope='module')
def model():
  return weights.load('tiny')


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.Tokenizer(weights.tokenizer('tiny', ''))


@pytest.fixture(scope='module')
def code(tokenizer):
  return suite.read_code(tokenizer, SETTINGS)


def perfect(d=128):
  """x = relu(x) - relu(-x): as many latents as twice the width."""
  eye = np.eye(d, dtype=np.float32)
  return {
    'W_enc': np.concatenate([eye, -eye], 1),
    'b_enc': np.zeros(2 * d, np.float32),
    'W_dec': np.concatenate([eye, -eye]),
    'b_dec': np.zeros(d, np.float32),
    'threshold': np.zeros(2 * d, np.float32),
  }


def test_train_and_held_out_code_are_of_different_modules(code, tokenizer):
  assert not set(code.group_N[code.test_N]) & set(code.group_N[~code.test_N])
  assert len(np.unique(code.group_N[~code.test_N])) == SETTINGS.train_modules
  assert (code.tokens_NT[:, 0] == tokenizer.bos_id).all()
  assert not code.keep_NT[:, 0].any()


def test_a_suite_goes_on_and_refuses_other_settings(
  model, tokenizer, tmp_path, capsys
):
  lines, saes = [], [(perfect(), CARD)]
  measure = lambda settings: suite.run(
    model, releases.saes(saes), tokenizer, tmp_path, settings, lines.append
  )
  (path,) = measure(SETTINGS)
  assert 'suite perfect' in capsys.readouterr().err  # progress
  before = path.read_bytes()
  measure(SETTINGS)
  assert lines == ['perfect: measuring', 'perfect: already measured']
  assert path.read_bytes() == before
  with pytest.raises(ValueError, match='other settings'):
    measure(dataclasses.replace(SETTINGS, seed=1))
  saes[0][0]['b_dec'][0] = 1
  with pytest.raises(ValueError, match='another SAE of this name'):
    measure(SETTINGS)

  found = json.loads(before)['eval_result_metrics']
  core = found['core']
  assert core['fvu']['value'] < 1e-5 and core['l0']['value'] > 120
  assert core['controls']['random']['l0']['value'] == pytest.approx(
    core['l0']['value'], rel=0.1
  )
  assert core['clustered_by'] == 'documents'
  # Its latents are x's coordinates, cut at zero: whatever is written through
  # random directions, concepts cannot be told better than from all of x.
  for one in found['sparse_probing'].values():
    of = {(p['on'], p['k']): p['auc']['value'] for p in one['probes']}
    assert of['activations', None] > of['latents', 1] - 0.05
    assert of['activations', None] > of['shuffled_labels', 1]
  for made in ('sae', 'random_sae'):
    assert set(found[made]['scr']) == {'|'.join(p) for p in suite.PAIRS}
    for one in found[made]['absorption']['by_concept'].values():
      if one['fraction'] is not None:
        assert 0 <= one['fraction']['value'] <= 1
  rows = suite.table([path]).splitlines()
  assert len(rows) == 5 and 'perfect' in rows[2]
  assert len({row.count('|') for row in rows[:3]}) == 1
  # Sparse probing comes first, and what is disputed says so.
  assert rows[0].split(' | ')[1].startswith('AUC')
  assert rows[0].count('disputed') == 2 and '2605.18229' in rows[4]


@pytest.mark.parametrize('sites', [['mlp_in/1'], ['mlp_out/1', 'mlp_out/2']])
def test_what_reads_and_writes_elsewhere_has_no_scores_of_its_decoder(
  model, code, sites, tmp_path
):
  targets = sites if len(sites) > 1 else ['mlp_out/1']
  card = CARD | {'sites': sites, 'targets': targets, 'name': 'other'}
  card['type'] = 'transcoder' if len(sites) == 1 else 'crosscoder'
  params = perfect()
  if len(sites) > 1:
    params = {key: np.stack([a, a]) for key, a in params.items()}
    eye_LL = np.eye(2, dtype=np.float32)[:, None, :, None]
    params['W_dec'] = params['W_dec'][:, :, None] * eye_LL
  (sae,) = releases.saes([(params, card)])
  found = suite.of_one(model, sae, code, SETTINGS)
  assert set(found) == {'core', 'sparse_probing'}
  result = {'sae': card, 'eval_result_metrics': found}
  (tmp_path / 'a.json').write_text(json.dumps(result))
  row = suite.table([tmp_path / 'a.json']).splitlines()[2]
  assert row.endswith('| - (-) | - (-) | - (-) | - (-) |')
