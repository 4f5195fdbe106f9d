"""Gemma from Hugging Face's files, held to what `transformers` computes.

The fixtures are written by tests/gemma_fixtures/make.py; where another Python
has torch and transformers, GEMMA_SCOPE_PEER_PYTHON names it and they are made
anew, live.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import hugging_face, weights

FIXTURES = pathlib.Path(__file__).parent / 'gemma_fixtures'
MODELS = 'gemma2', 'gemma3', 'gemma3_multimodal'
PEER = os.environ.get('GEMMA_SCOPE_PEER_PYTHON', '')


def differences(folder: pathlib.Path) -> dict[str, float]:
  """Site or 'logits' -> largest difference over the largest value."""
  gemma, params = weights.load('small', str(folder))
  with np.load(folder / 'expected.npz') as file:
    expected = dict(file)
  tokens_BT = expected.pop('tokens')
  assert tokens_BT.shape[1] > 3 * gemma.config.window
  counts_BT = tokens_BT != 0
  at = [
    sites.Site(layer, kind)
    for layer in range(gemma.config.num_layers)
    for kind in ('attn_out', 'mlp_in', 'mlp_out', 'resid_post')
  ]
  out = jax.jit(lambda p, t: gemma.forward(p, t, taps=at))(params, tokens_BT)
  found = {str(site): out.taps[site] for site in at}
  found['logits'] = out.logits_BTV
  assert set(found) == set(expected)
  return {
    name: float(
      np.abs(np.asarray(x)[counts_BT] - expected[name][counts_BT]).max()
      / np.abs(expected[name][counts_BT]).max()
    )
    for name, x in found.items()
  }


@pytest.mark.parametrize('name', MODELS)
def test_logits_and_sites_are_those_of_transformers(name):
  found = differences(FIXTURES / name)
  assert max(found.values()) < 1e-4, found


@pytest.mark.skipif(
  not PEER, reason='GEMMA_SCOPE_PEER_PYTHON names no Python with transformers'
)
def test_logits_and_sites_are_those_of_transformers_live(tmp_path):
  make = str(FIXTURES / 'make.py')
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  subprocess.run([PEER, make, str(tmp_path)], check=True, env=environment)
  for name in MODELS:
    found = differences(tmp_path / name)
    assert max(found.values()) < 1e-4, found
    print(name, {k: f'{v:.1e}' for k, v in found.items()})


def test_each_device_reads_its_part():
  """Sharded as the model will use them, in another dtype, fewer layers."""
  mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  for name in MODELS:
    folder = str(FIXTURES / name)
    _, expected = weights.load('small', folder, num_layers=2)
    _, found = weights.load(
      'small', folder, num_layers=2, mesh=mesh, dtype='bfloat16'
    )
    assert set(found) == {'embedder', 'final_norm', 'layer_0', 'layer_1'}
    sharded = found['layer_0']['mlp']['linear'].sharding.spec
    assert sharded == jax.sharding.PartitionSpec('latent', 'data')
    for a, b in zip(
      jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
      assert b.dtype == jnp.bfloat16
      np.testing.assert_array_equal(a, np.asarray(b, np.float32))


# As they are published; Gemma 3's leave out what is the default.
PUBLISHED = {
    'gemma2-2b': dict(
        model_type='gemma2', vocab_size=256000, hidden_size=2304,
        num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, intermediate_size=9216, query_pre_attn_scalar=256,
        sliding_window=4096, rope_theta=10000.0, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, hidden_activation='gelu_pytorch_tanh',
    ),
    'gemma2-27b': dict(
        model_type='gemma2', vocab_size=256000, hidden_size=4608,
        num_hidden_layers=46, num_attention_heads=32, num_key_value_heads=16,
        head_dim=128, intermediate_size=36864, query_pre_attn_scalar=144,
    ),
    'gemma3-4b': dict(
        model_type='gemma3', text_config=dict(
            hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
            rope_scaling={'factor': 8.0, 'rope_type': 'linear'},
            sliding_window=1024, model_type='gemma3_text',
        ),
    ),
    'gemma3-27b': dict(
        model_type='gemma3', text_config=dict(
            hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
            num_attention_heads=32, num_key_value_heads=16, head_dim=128,
            query_pre_attn_scalar=168, sliding_window=1024,
            rope_scaling={'factor': 8.0, 'rope_type': 'linear'},
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_the_known_size(name):
  found = hugging_face.config(name, PUBLISHED[name], 'config.json')
  known = lm.SIZES[name]
  assert found.d_model == known.d_model and found.qk_norm == known.qk_norm
  others = [other for other in lm.SIZES if other != name]
  for other in others:
    with pytest.raises(ValueError, match=f'another model than {other}'):
      hugging_face.config(other, PUBLISHED[name], 'config.json')


@pytest.mark.parametrize(
  'change, words',
  [
    ({'model_type': 'llama'}, "describes a 'llama' model"),
    ({'query_pre_attn_scalar': 7}, 'neither head_dim 16 nor'),
    ({'hidden_activation': 'silu'}, "hidden_activation is 'silu'"),
    ({'layer_types': ['full_attention']}, 'layer_types has 1 of 4 layers'),
    ({'hidden_size': 'wide'}, 'does not describe a gemma2 model'),
  ],
)
def test_a_config_that_is_not_computed_here_is_refused(change, words):
  fields = json.loads((FIXTURES / 'gemma2/config.json').read_text())
  with pytest.raises(ValueError, match=words):
    hugging_face.config('small', {**fields, **change}, 'config.json')


def _break(folder, what):
  """Damages a download in one of the ways that happen."""
  first, second = sorted(folder.glob('*.safetensors'))
  index = folder / 'model.safetensors.index.json'
  tensors = load_file(first)
  name = next(iter(tensors))
  if what == 'cut':
    second.write_bytes(second.read_bytes()[:-1000])
  elif what == 'missing file':
    second.unlink()
  elif what == 'no index':
    index.write_text('{}')
  elif what == 'outside':
    index.write_text(json.dumps({'weight_map': {name: '../x.safetensors'}}))
  elif what == 'missing tensor':
    del tensors[name]
  elif what == 'more':
    tensors['model.layers.9.mlp.down_proj.weight'] = tensors[name]
  elif what == 'shape':
    tensors[name] = tensors[name][:-1]
  save_file(tensors, first)


@pytest.mark.parametrize(
  'what, words',
  [
    ('cut', 'not whole'),
    ('missing file', 'lacks model-00002-of-00002.safetensors'),
    ('no index', 'is not an index of tensors'),
    ('outside', 'names the file'),
    ('missing tensor', 'has no tensor'),
    ('more', 'has tensors that the model has not: layers.9.mlp'),
    ('shape', 'and the model wants'),
  ],
)
def test_a_damaged_download_is_refused_in_a_sentence(tmp_path, what, words):
  folder = tmp_path / 'model'
  shutil.copytree(FIXTURES / 'gemma2', folder)
  _break(folder, what)
  with pytest.raises(ValueError, match=words) as refusal:
    weights.load('small', str(folder))
  assert '\n' not in str(refusal.value)


def test_the_tokenizer_beside_the_weights_is_used(tmp_path):
  """No other tokenizer takes its place, whatever the model is called."""
  shutil.copytree(FIXTURES / 'gemma3', tmp_path / 'model')
  (tmp_path / 'model' / 'tokenizer.json').write_text('{}')
  for name in ('small', 'my-fine-tune', 'gemma3-1b'):
    with pytest.raises(ValueError, match=f'{name} needs its tokenizer'):
      weights.tokenizer(name, str(tmp_path / 'model'))
  beside = tmp_path / 'model' / 'tokenizer.model'
  beside.write_bytes(b'')
  assert weights.tokenizer('small', str(tmp_path / 'model')) == beside


@pytest.mark.parametrize('place', ['root', 'text'])
def test_an_untied_head_is_refused_by_the_config(place):
  fields = json.loads((FIXTURES / 'gemma3_multimodal/config.json').read_text())
  part = fields if place == 'root' else fields['text_config']
  part['tie_word_embeddings'] = False
  with pytest.raises(ValueError, match='tie_word_embeddings is False'):
    hugging_face.config('small', fields, 'config.json')


@pytest.mark.parametrize('prefix', ['', 'language_model.'])
def test_a_head_of_its_own_is_refused_and_a_copy_is_not(tmp_path, prefix):
  folder = tmp_path / 'model'
  shutil.copytree(FIXTURES / 'gemma3_multimodal', folder)
  (folder / 'model.safetensors.index.json').unlink()
  tensors = [load_file(path) for path in folder.glob('*.safetensors')]
  embedding = next(
    x for t in tensors for name, x in t.items() if 'embed_tokens' in name
  )
  head = {f'{prefix}lm_head.weight': embedding}
  save_file(head, folder / 'head.safetensors')
  _, copied = weights.load('small', str(folder))
  (folder / 'head.safetensors').unlink()
  _, tied = weights.load('small', str(folder))
  jax.tree.map(np.testing.assert_array_equal, copied, tied)
  head = {f'{prefix}lm_head.weight': embedding[::-1].copy()}
  save_file(head, folder / 'head.safetensors')
  with pytest.raises(ValueError, match='lm_head.weight that differs'):
    weights.load('small', str(folder))


@pytest.mark.parametrize(
  'fields',
  [
    {'rope_scaling': {'type': 'linear', 'factor': 8.0}},
    {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}},
    {
      'rope_parameters': {
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 1e6,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      }
    },
  ],
)
def test_every_spelling_of_rotary_embeddings_is_read(fields):
  found = hugging_face.config(
    'small', {'model_type': 'gemma3_text', **fields}, 'config.json'
  )
  assert (found.global_rope_base, found.global_rope_factor) == (1_000_000, 8)


def test_a_factor_counts_where_the_type_says_so():
  fields = {
    'model_type': 'gemma3_text',
    'rope_scaling': {'rope_type': 'default', 'factor': 8.0},
  }
  found = hugging_face.config('small', fields, 'config.json')
  assert found.global_rope_factor == 1


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "of type 'yarn'"),
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'beta': 1}},
      'beta of its rotary',
    ),
    ({'rope_scaling': {'type': 'linear'}}, "lacks 'factor'"),
    ({'rope_parameters': {'rope_theta': 5e5}}, 'does not tell global'),
    ({'rope_theta': 0.5}, 'rope_theta is 0.5'),
    ({'rope_local_base_freq': 5e4}, 'local rope_theta is 50000'),
    ({'quantization_config': {'quant_method': 'gptq'}}, r'quantised \(gptq\)'),
    ({'altup_num_inputs': 4}, r'altup_num_inputs \(4\) is not known'),
    ({'sliding_window': None}, 'sliding_window is None'),
    ({'num_hidden_layers': 2.5}, 'num_hidden_layers is 2.5'),
    ({'use_bidirectional_attention': True}, 'bidirectional'),
    ({'layer_types': ['chunked_attention'] * 26}, "'chunked_attention'"),
    ({'attention_bias': True}, 'attention_bias is True'),
  ],
)
def test_fields_that_change_the_computation_are_refused(fields, words):
  for kind in ('gemma3_text', 'gemma3'):
    given = {'model_type': kind, **fields}
    if kind == 'gemma3':
      given = {'model_type': kind, 'text_config': fields}
    with pytest.raises(ValueError, match=words) as refusal:
      hugging_face.config('small', given, 'config.json')
    assert '\n' not in str(refusal.value)


def test_scaling_of_all_layers_of_gemma_2_is_refused():
  fields = {'rope_scaling': {'type': 'linear', 'factor': 2.0}}
  with pytest.raises(ValueError, match='with factor 2'):
    hugging_face.config('small', {'model_type': 'gemma2', **fields}, 'c.json')


def test_the_pattern_is_read_in_either_spelling():
  for field in ('sliding_window_pattern', '_sliding_window_pattern'):
    fields = {'model_type': 'gemma3_text', field: 3, 'num_hidden_layers': 7}
    assert hugging_face.config('small', fields, 'c').pattern == 'LLGLLGL'


def test_weights_of_eight_bits_are_refused(tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(FIXTURES / 'gemma3', folder)
  (folder / 'model.safetensors.index.json').unlink()
  path = sorted(folder.glob('*.safetensors'))[0]
  tensors = load_file(path)
  name = next(iter(tensors))
  tensors[name] = tensors[name].astype(np.int8)
  save_file(tensors, path)
  with pytest.raises(ValueError, match='is of type I8, which is quantised'):
    weights.load('small', str(folder))
