"""Gemma 4 from GGUF files that are written as llama.cpp's converter does."""

from __future__ import annotations

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_scope.language_model import gguf_file, gguf_gemma4, weights
from tests.helpers import random_models

gguf = pytest.importorskip('gguf')
pytestmark = random_models.needs_gemma4
FIXTURES = pathlib.Path(__file__).parent / 'gemma_fixtures'
MODELS = 'gemma4_e', 'gemma4_dense', 'gemma4_moe'
# transformers' module -> llama.cpp's, written down independently of the reader.
NAMES = {
  'embed_tokens': 'token_embd',
  'norm': 'output_norm',
  'embed_tokens_per_layer': 'per_layer_token_embd',
  'per_layer_model_projection': 'per_layer_model_proj',
  'per_layer_projection_norm': 'per_layer_proj_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'pre_feedforward_layernorm_2': 'pre_ffw_norm_2',
  'post_feedforward_layernorm': 'post_ffw_norm',
  'post_feedforward_layernorm_1': 'post_ffw_norm_1',
  'post_feedforward_layernorm_2': 'post_ffw_norm_2',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'per_layer_input_gate': 'inp_gate',
  'per_layer_projection': 'proj',
  'post_per_layer_input_norm': 'post_norm',
  'router.proj': 'ffn_gate_inp',
}
WHOLE = {
  'layer_scalar': 'layer_output_scale.weight',
  'router.scale': 'ffn_gate_inp.scale',
  'router.per_expert_scale': 'ffn_down_exps.scale',
  'experts.gate_up_proj': 'ffn_gate_up_exps.weight',
  'experts.down_proj': 'ffn_down_exps.weight',
}


def named(name: str) -> str:
  match = re.fullmatch(r'(?:layers\.(\d+)\.)?(.*)', name)
  theirs = WHOLE.get(match[2])
  if theirs is None:
    theirs = NAMES[match[2].removesuffix('.weight')] + '.weight'
  return f'blk.{match[1]}.{theirs}' if match[1] else theirs


def fixture(name: str):
  """The text part's config and tensors, without what stands before layers."""
  folder = FIXTURES / name
  fields = json.loads((folder / 'config.json').read_text())
  tensors = {}
  for path in folder.glob('*.safetensors'):
    for full, array in load_file(path).items():
      short = re.sub(r'^model\.(language_model\.)?', '', full)
      if re.match(r'layers\.|embed_tokens|norm\.|per_layer', short):
        tensors[short] = np.asarray(array, np.float32)
  return fields.get('text_config', fields), tensors


def write(path, name, kind='F32', change=()):
  """A GGUF file of a fixture; `change` replaces metadata."""
  text, tensors = fixture(name)
  writer, layers = gguf.GGUFWriter(path, 'gemma4'), text['num_hidden_layers']
  local = [kind == 'sliding_attention' for kind in text['layer_types']]
  first = layers - text['num_kv_shared_layers']
  wide = 1 + bool(text['use_double_wide_mlp'])
  d_ff, kv = text['intermediate_size'], text['num_key_value_heads']
  # Where the config leaves it out, llama.cpp writes one number.
  of_global = 1 if text['attention_k_eq_v'] else kv
  writer.add_context_length(128)
  writer.add_embedding_length(text['hidden_size'])
  writer.add_block_count(layers)
  writer.add_head_count(text['num_attention_heads'])
  writer.add_layer_norm_rms_eps(text['rms_norm_eps'])
  writer.add_sliding_window(text['sliding_window'])
  writer.add_final_logit_softcapping(text['final_logit_softcapping'])
  writer.add_rope_freq_base(1e6)
  facts = {
    'feed_forward_length': [
      d_ff * (wide if i >= first else 1) for i in range(layers)
    ],
    'attention.head_count_kv': [kv if l else of_global for l in local],
    'attention.sliding_window_pattern': local,
    'attention.shared_kv_layers': text['num_kv_shared_layers'],
    'embedding_length_per_layer_input': text['hidden_size_per_layer_input'],
    'attention.key_length': 8,
    'attention.value_length': 8,
    'attention.key_length_swa': 4,
    'attention.value_length_swa': 4,
    'rope.dimension_count': 8,
    'rope.dimension_count_swa': 4,
  }
  if text['enable_moe_block']:
    facts |= {
      'expert_count': text['num_experts'],
      'expert_used_count': text['top_k_experts'],
      'expert_feed_forward_length': text['moe_intermediate_size'],
    }
  for key, value in {**facts, **dict(change)}.items():
    add = writer.add_array if isinstance(value, list) else writer.add_uint32
    if value is not None:
      add(f'gemma4.{key}', value)
  factors = np.array([1.0] + [1e30] * 3, np.float32)
  writer.add_tensor('rope_freqs.weight', factors)
  of_matrices = gguf.GGMLQuantizationType[kind]
  for full, array in tensors.items():
    if array.ndim == 1:
      writer.add_tensor(named(full), array)
    else:
      data = gguf.quantize(array, of_matrices)
      writer.add_tensor(named(full), data, raw_dtype=of_matrices)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize('name', MODELS)
def test_a_file_is_the_folder_it_was_made_from(name, tmp_path):
  path = write(tmp_path / 'm.gguf', name, kind='BF16')
  gemma, params = weights.load('small', str(path))
  wanted, expected = weights.load('small', str(FIXTURES / name))
  assert gemma.config == wanted.config
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_parts_of_a_quantised_tensor_of_experts(tmp_path):
  array = np.random.default_rng(0).normal(size=(3, 4, 64)).astype(np.float32)
  kind = gguf.GGMLQuantizationType.Q8_0
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'gemma4')
  writer.add_tensor('x', gguf.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tensor = gguf_file.open_file(tmp_path / 'm.gguf').tensors['x']
  assert tensor.get_shape() == array.shape
  part = tensor[1:3, 2:4, 5:50]
  np.testing.assert_allclose(part, array[1:3, 2:4, 5:50], atol=0.03)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'altup.num_inputs': 4}, 'altup.num_inputs, which this forward pass'),
    ({'attention.key_length_swa': None}, 'lacks the metadata gemma4.attention'),
    ({'attention.value_length': 4}, 'value_length is 4, and attention.key'),
    ({'feed_forward_length': [24] * 8 + [30]}, 'feed_forward_length has'),
    ({'attention.head_count_kv': [2] * 8 + [1]}, r'head_count_kv has \[1, 2\]'),
  ],
)
def test_what_is_not_gemma_4_is_refused(change, words, tmp_path):
  path = write(tmp_path / 'm.gguf', 'gemma4_e', change=change.items())
  with pytest.raises(ValueError, match=words) as refusal:
    weights.load('small', str(path))
  assert '\n' not in str(refusal.value)
  assert gguf_gemma4.ARCHITECTURE == 'gemma4'
