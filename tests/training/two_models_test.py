"""Two models that cannot be compared are refused before anything is read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope import specs
from gemma_scope.language_model import weights
from gemma_scope.text import sources, tokenizers
from gemma_scope.training import loop, setup, two_models
from tests.helpers import runs

MESH = {'mesh.data': 4, 'mesh.latent': 2}


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """Makes a folder of a model like the embedded one, but for some fields."""

  def make(params=None, **changes) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('other')
    config = dataclasses.replace(weights.read_config('tiny'), **changes)
    params = params or {'nothing': np.zeros(1, np.float32)}
    weights.save_safetensors(folder, config, params, {})
    return folder

  return make


def pair(checkpoint: str, name: str = '', **changes):
  config = tiny.get_config('type=crosscoder;layers=1,2;sites=resid_post')
  config.lm.second.name, config.lm.second.checkpoint = name, str(checkpoint)
  config.update_from_flattened_dict(changes)
  return config


def test_a_crosscoder_of_two_models_reads_each_site_of_both():
  config = pair(
    '',
    'tiny',
    **{'collection.sparsity': (8.0,), 'collection.widths': (512,)},
  )
  config_lib.check(config, setup.dimensions(config))
  names = [str(site) for site in specs.site_list(config)]
  assert names == [
    'resid_post/1', 'resid_post/2', 'second:resid_post/1',
    'second:resid_post/2',
  ]  # fmt: skip
  members = specs.members(config)
  assert [m.name for m in members] == [
    f'crosscoder/resid_post/{layer}/jumprelu/width_512/target_l0_8/seed_0'
    for layer in (1, 2)
  ]
  (stack, *_), _ = setup.make_stacks(config, setup.dimensions(config))
  assert (stack.module.d_in, stack.module.layers) == (256, 0)
  assert stack.setting.reads.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'vocab_size': 4000}, 'has 4,000 tokens in its vocabulary, and tiny'),
    ({'num_layers': 6}, 'has 6 layers, and tiny has 4'),
    ({'d_model': 64}, 'has 64 dimensions at resid_post/1, and tiny has 128'),
  ],
)
def test_models_of_another_shape_are_refused(other, changes, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    two_models.check(pair(other(**changes)))


def test_a_missing_checkpoint_is_refused(tmp_path):
  with pytest.raises(weights.CheckpointNotFound, match='nowhere'):
    two_models.check(pair(tmp_path / 'nowhere'))
  with pytest.raises(weights.CheckpointNotFound, match='lm.checkpoint'):
    two_models.check(pair('', 'gemma2-2b'))


def test_another_tokenizer_is_refused(other, tmp_path):
  folder = other()
  two_models.check(pair(folder))  # the embedded one, as none lies beside it
  shutil.copy(weights.TINY / 'tokenizer.model', folder)
  two_models.check(pair(folder))
  corpus = [f'{i} zorb quix {i * i}' for i in range(3000)]
  (tmp_path / 'words.txt').write_text('\n'.join(corpus))
  found = sources.documents(f'files:{tmp_path}/words.txt')
  (folder / 'tokenizer.model').unlink()
  tokenizers.train_tokenizer(found, folder / 'tokenizer.model', 420)
  with pytest.raises(ValueError, match='gives other ids: it has 420 pieces'):
    two_models.check(pair(folder))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'collection.type': 'sae'}, "collection.type to crosscoder; found 'sae'"),
    ({'activations.store': '/store'}, 'rows of one model'),
    ({'initialise.release': '/release'}, 'start at random'),
  ],
)
def test_a_config_of_two_models_that_cannot_run_is_refused(changes, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    config_lib.check(pair('', 'tiny', **changes))


def test_the_loop_refuses_a_second_model_before_work(other, tmp_path):
  config = runs.small(
    tmp_path,
    **{
      **MESH,
      'collection.type': 'crosscoder',
      'lm.second.checkpoint': str(other(num_layers=6)),
    },
  )
  with pytest.raises(config_lib.ConfigError, match='has 6 layers'):
    loop.check_config(config, tmp_path / 'run')


def test_rows_of_both_models_are_of_the_same_tokens(other, tmp_path):
  """The second half of a batch is what the second model does with them."""
  gemma, params = weights.load('tiny')
  params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
  params['layer_1']['mlp']['linear'] = 1.7 * params['layer_1']['mlp']['linear']
  config = runs.small(
    tmp_path,
    **{
      **MESH,
      'collection.type': 'crosscoder',
      'collection.layers': (0, 1),
      'collection.sites': ('resid_post',),
      'lm.second.checkpoint': str(other(params)),
      'activations.max_norm': 0.0,
    },
  )
  mesh = loop.auto_mesh.make(config)
  source, facts = setup.make_source(config, tmp_path / 'run', mesh, print)
  assert facts['second_model'] == 'tiny'
  assert facts['second_parameters'] != facts['parameters']
  part = {
    str(site): np.asarray(x) for site, x in next(source.passes(0)).items()
  }
  assert set(part) == {
    'resid_post/0', 'resid_post/1', 'second:resid_post/0',
    'second:resid_post/1',
  }  # fmt: skip
  tokens_BT = source.text.sequences(0, 4)
  for model, prefix in ((None, ''), (params, 'second:')):
    taps = gemma.forward(
      model or weights.load('tiny')[1], tokens_BT, taps=('resid_post/1',)
    ).taps
    np.testing.assert_allclose(
      part[f'{prefix}resid_post/1'], taps['resid_post/1'][:, 1:],
      rtol=1e-4, atol=1e-4,
    )  # fmt: skip
  np.testing.assert_allclose(
    part['resid_post/0'], part['second:resid_post/0'], rtol=1e-5
  )


def test_a_run_of_an_older_version_has_no_second_model(tmp_path):
  described = json.loads(tiny.get_config().to_json())
  del described['lm']['second']
  (tmp_path / 'config.json').write_text(json.dumps(described))
  config = config_lib.read(tmp_path / 'config.json')
  assert specs.second_model(config) is None
  assert json.loads(config.to_json()) == json.loads(tiny.get_config().to_json())
