"""Gemma 4 from files of every layout, held to what `transformers` computes.

The fixtures are written by gemma_fixtures/make_gemma4.py; where another Python
has torch and transformers, GEMMA_SCOPE_PEER_PYTHON names it and they are made
anew, live.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import gemma4, hugging_face, weights
from tests.helpers import random_models

FIXTURES = pathlib.Path(__file__).parent / 'gemma_fixtures'
MODELS = 'gemma4_e', 'gemma4_dense', 'gemma4_moe'
PEER = os.environ.get('GEMMA_SCOPE_PEER_PYTHON', '')
runs = random_models.needs_gemma4
each = pytest.mark.parametrize('name', MODELS)


@functools.cache
def loaded(name):
  return weights.load('small', str(FIXTURES / name))


def differences(folder: pathlib.Path, load) -> dict[str, float]:
  """Site or 'logits' -> largest difference over the largest value."""
  gemma, params = load
  with np.load(folder / 'expected.npz') as file:
    expected = dict(file)
  tokens_BT = expected.pop('tokens')
  assert tokens_BT.shape[1] > 3 * gemma.config.window
  counts_BT = tokens_BT != 0
  at = [sites.parse(name) for name in expected if name != 'logits']
  out = jax.jit(lambda p, t: gemma.forward(p, t, taps=at))(params, tokens_BT)
  found = {str(site): out.taps[site] for site in at}
  found['logits'] = out.logits_BTV
  every = {
    f'{kind}/{layer}'
    for layer in range(gemma.config.num_layers)
    for kind in gemma.config.site_widths(layer)
  }
  unnamed = {name for name in every if name.startswith('mlp_in_ungained')}
  assert every - unnamed <= set(found)  # transformers has no module for it
  return {
    name: float(
      np.abs(np.asarray(x)[counts_BT] - expected[name][counts_BT]).max()
      / np.abs(expected[name][counts_BT]).max()
    )
    for name, x in found.items()
  }


@runs
@each
def test_logits_and_every_site_are_those_of_transformers(name):
  found = differences(FIXTURES / name, loaded(name))
  print(name, max(found.values()), found['logits'])
  assert max(found.values()) < 1e-4, found


@runs
@pytest.mark.skipif(
  not PEER, reason='GEMMA_SCOPE_PEER_PYTHON names no Python with transformers'
)
def test_logits_and_every_site_are_those_of_transformers_live(tmp_path):
  make = str(FIXTURES / 'make_gemma4.py')
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  subprocess.run([PEER, make, str(tmp_path)], check=True, env=environment)
  for name in MODELS:
    folder = tmp_path / name
    found = differences(folder, weights.load('small', str(folder)))
    assert max(found.values()) < 1e-4, found
    print(name, {k: f'{v:.1e}' for k, v in found.items()})


@runs
@each
def test_each_device_reads_its_part(name):
  mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  gemma, found = weights.load(
    'small', str(FIXTURES / name), num_layers=2, mesh=mesh, dtype='bfloat16'
  )
  assert {'layer_0', 'layer_1'} == {k for k in found if 'layer_' in k}
  if gemma.config.experts:
    experts = found['layer_0']['mlp']['linear']['w'].sharding.spec
    assert experts == jax.sharding.PartitionSpec('latent', None, 'data')
  expected = {k: loaded(name)[1][k] for k in found}
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    assert b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, np.asarray(b, np.float32))


@runs
def test_keys_of_layers_that_share_are_left_alone_and_others_are_not(tmp_path):
  """Published files have them; they are read by nobody."""
  folder = tmp_path / 'model'
  shutil.copytree(FIXTURES / 'gemma4_e', folder)
  (path,) = folder.glob('*.safetensors')
  tensors = load_file(path)
  prefix = 'model.language_model.layers'
  tensors[f'{prefix}.8.self_attn.k_proj.weight'] = np.ones(3, np.float32)
  save_file(tensors, path)
  _, params = weights.load('small', str(folder))
  jax.tree.map(np.testing.assert_array_equal, params, loaded('gemma4_e')[1])
  tensors[f'{prefix}.8.self_attn.x_proj.weight'] = np.ones(3, np.float32)
  save_file(tensors, path)
  with pytest.raises(ValueError, match='has not: layers.8.self_attn.x_proj'):
    weights.load('small', str(folder))
  del tensors[f'{prefix}.8.self_attn.x_proj.weight']
  del tensors[f'{prefix}.1.self_attn.k_proj.weight']
  save_file(tensors, path)
  with pytest.raises(ValueError, match='no tensor layers.1.self_attn.k_proj'):
    weights.load('small', str(folder))


def release(params, period: int):
  """Google's layout: flat keys, or layers of a kind stacked."""
  flat = {}
  for key, value in traverse_util.flatten_dict(params, sep='/').items():
    module, _, leaf = key.rpartition('/')
    if leaf in ('linear', 'gating_einsum'):
      module, leaf = key, 'w'
    flat.setdefault(f'transformer/{module}', {})[leaf] = np.asarray(value)
  if not period:
    return flat
  stacked, layers = {}, [k for k in flat if '/layer_' in k]
  for key in sorted(layers, key=lambda k: int(k.split('/')[1][6:])):
    i, _, rest = key.removeprefix('transformer/layer_').partition('/')
    name = f'transformer/stacked_layers/attention_type_{int(i) % period}/{rest}'
    for leaf, value in flat.pop(key).items():
      stacked.setdefault(name.rstrip('/'), {}).setdefault(leaf, []).append(
        value
      )
  return flat | {
    name: {leaf: np.stack(rows) for leaf, rows in leaves.items()}
    for name, leaves in stacked.items()
  }


@runs
@pytest.mark.parametrize('period', [0, 2])
@pytest.mark.parametrize('place', ['one device', 'mesh'])
def test_googles_checkpoints_are_read(tmp_path, period, place):
  from orbax import checkpoint as ocp

  gemma, params = loaded('gemma4_moe')
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'model', release(params, period))
  weights.save_safetensors(tmp_path / 'shape', gemma.config, {}, {})
  shutil.copy(tmp_path / 'shape' / 'config.json', tmp_path / 'model')
  mesh = None
  if place == 'mesh':
    mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  read, found = weights.load('small', str(tmp_path / 'model'), mesh=mesh)
  assert read.config == gemma.config
  jax.tree.map(np.testing.assert_array_equal, found, params)


_ROPE = {
  'full_attention': {
    'partial_rotary_factor': 0.25,
    'rope_theta': 1000000.0,
    'rope_type': 'proportional',
  },
  'sliding_attention': {'rope_theta': 10000.0, 'rope_type': 'default'},
}


def described(layers, every, **text):
  kinds = ['sliding_attention'] * (every - 1) + ['full_attention']
  return {
    'model_type': 'gemma4',
    'architectures': ['Gemma4ForConditionalGeneration'],
    'image_token_id': 258880,
    'vision_config': {'model_type': 'gemma4_vision'},
    'text_config': {
      'model_type': 'gemma4_text',
      'vocab_size': 262144,
      'head_dim': 256,
      'global_head_dim': 512,
      'num_hidden_layers': layers,
      'layer_types': kinds * (layers // every),
      'rope_parameters': _ROPE,
      'vocab_size_per_layer_input': 262144,
      'final_logit_softcapping': 30.0,
      'tie_word_embeddings': True,
      'hidden_activation': 'gelu_pytorch_tanh',
      **text,
    },
  }


PUBLISHED = {
    'gemma4-e2b': described(
        35, 5, hidden_size=1536, intermediate_size=6144, num_attention_heads=8,
        num_key_value_heads=1, num_global_key_value_heads=None,
        sliding_window=512, num_kv_shared_layers=20, use_double_wide_mlp=True,
        hidden_size_per_layer_input=256,
    ),
    'gemma4-e4b': described(
        42, 6, hidden_size=2560, intermediate_size=10240, num_attention_heads=8,
        num_key_value_heads=2, sliding_window=512, num_kv_shared_layers=18,
        hidden_size_per_layer_input=256,
    ),
    'gemma4-31b': described(
        60, 6, hidden_size=5376, intermediate_size=21504, sliding_window=1024,
        num_attention_heads=32, num_key_value_heads=16, attention_k_eq_v=True,
        num_global_key_value_heads=4, hidden_size_per_layer_input=0,
        use_bidirectional_attention='vision',
    ),
    'gemma4-26b-a4b': described(
        30, 6, hidden_size=2816, intermediate_size=2112, sliding_window=1024,
        num_attention_heads=16, num_key_value_heads=8, attention_k_eq_v=True,
        num_global_key_value_heads=2, hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704, use_bidirectional_attention='vision',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_the_known_size(name):
  found = hugging_face.config(name, PUBLISHED[name], 'config.json')
  assert found.d_model == lm.SIZES[name].d_model
  for other in lm.SIZES:
    if other != name:
      with pytest.raises(ValueError, match=f'another model than {other}'):
        hugging_face.config(other, PUBLISHED[name], 'config.json')


@pytest.mark.parametrize('name', PUBLISHED)
def test_newer_versions_spell_global_layers_another_way(name):
  fields = json.loads(json.dumps(PUBLISHED[name]))
  text = fields['text_config']
  of_global = {'head_dim': text.pop('global_head_dim')}
  if heads := text.pop('num_global_key_value_heads', None):
    of_global['num_key_value_heads'] = heads
  text['per_layer_config'] = {
    str(i): of_global
    for i, kind in enumerate(text['layer_types'])
    if kind == 'full_attention'
  }
  found = hugging_face.config(name, fields, 'config.json')
  assert found == hugging_face.config(name, PUBLISHED[name], 'config.json')


@pytest.mark.parametrize(
  'change, words',
  [
    ({'use_bidirectional_attention': 'all'}, 'bidirectional'),
    ({'hidden_activation': 'silu'}, "hidden_activation is 'silu'"),
    ({'vocab_size_per_layer_input': 7}, 'vocab_size_per_layer_input 7'),
    ({'num_kv_shared_layers': 33}, 'num_kv_shared_layers is 33'),
    ({'layer_types': ['full_attention']}, 'layer_types has 1 of 35 layers'),
    ({'head_dim': None}, 'head_dim is None'),
    ({'rope_parameters': {'rope_theta': 1e6}}, 'does not tell global'),
    (
      {
        'rope_parameters': {
          **_ROPE,
          'sliding_attention': {'rope_type': 'default', 'rope_theta': 5e4},
        }
      },
      'local rope_theta is 50000',
    ),
    (
      {
        'rope_parameters': {
          **_ROPE,
          'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e6},
        }
      },
      "of type 'yarn'",
    ),
    ({'per_layer_config': {'4': {'head_dim': 8}}}, 'config has layers 4; exp'),
    ({'laurel_rank': 64}, r'laurel_rank \(64\) is not known'),
    ({'quantization_config': {'quant_method': 'gptq'}}, r'quantised \(gptq\)'),
  ],
)
def test_what_is_not_computed_here_is_refused(change, words):
  fields = PUBLISHED['gemma4-e2b']
  fields = {**fields, 'text_config': {**fields['text_config'], **change}}
  with pytest.raises(ValueError, match=words) as refusal:
    hugging_face.config('small', fields, 'config.json')
  assert '\n' not in str(refusal.value)


def test_a_config_of_ours_is_read_back(tmp_path):
  config = random_models.GEMMA4_E
  weights.save_safetensors(tmp_path, config, {}, {'made': 1})
  assert weights.read_config(config.name, str(tmp_path)) == config
  assert isinstance(config, gemma4.Config)
  fields = json.loads((tmp_path / 'config.json').read_text())
  assert fields['family'] == 'gemma4'


@pytest.mark.skipif(random_models.HAS_GEMMA4, reason='this Python has Gemma 4')
def test_older_pythons_get_a_sentence():
  with pytest.raises(ImportError, match='Gemma 4 needs version 4 of the gemma'):
    lm.Gemma(lm.SIZES['gemma4-e2b'])
