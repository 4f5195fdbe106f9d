"""Gemma 4 in a GGUF file -> the words of Hugging Face's config.json and names.

How llama.cpp's converter changes a Gemma 4, besides the names:

  - heads of sliding layers are described by `key_length_swa`, those of global
    layers by `key_length`; numbers of key heads and widths of MLPs are lists
    with an entry a layer where they differ;
  - `rope_freqs` holds a factor for each pair of a global layer's heads, 1 where
    it is rotated and 1e30 where not: the share of the pairs is read from it;
  - norms are stored as they are, without the 1 that Gemma 2 and 3 add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope.language_model import gguf_file

ARCHITECTURE = 'gemma4'
ROPE = 'rope_freqs.weight'
_ROTATED, _STILL = 1.0, 1e20
# Metadata (after `gemma4.`) -> field of a config.json.
_FIELDS = {
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'attention.head_count': 'num_attention_heads',
  'attention.key_length': 'global_head_dim',
  'attention.key_length_swa': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'attention.sliding_window': 'sliding_window',
  'attention.shared_kv_layers': 'num_kv_shared_layers',
  'embedding_length_per_layer_input': 'hidden_size_per_layer_input',
}
_OPTIONAL = {
  'final_logit_softcapping': 'final_logit_softcapping',
  'expert_count': 'num_experts',
  'expert_used_count': 'top_k_experts',
  'expert_feed_forward_length': 'moe_intermediate_size',
}
_BY_LAYER = (
  'feed_forward_length',
  'attention.head_count_kv',
  'attention.sliding_window_pattern',
)
_EQUAL = {
  'attention.value_length': 'attention.key_length',
  'attention.value_length_swa': 'attention.key_length_swa',
  'rope.dimension_count': 'attention.key_length',
  'rope.dimension_count_swa': 'attention.key_length_swa',
}
_BASES = 'rope.freq_base', 'rope.freq_base_swa'
_FREE = 'context_length', 'vocab_size'
# Tensors -> those of Hugging Face, beside the names of Gemma 2 and 3.
NAMES = {
  'per_layer_token_embd': 'embed_tokens_per_layer',
  'per_layer_model_proj': 'per_layer_model_projection',
  'per_layer_proj_norm': 'per_layer_projection_norm',
  'inp_gate': 'per_layer_input_gate',
  'proj': 'per_layer_projection',
  'post_norm': 'post_per_layer_input_norm',
  'layer_output_scale': 'layer_scalar',
  'ffn_gate_inp': 'router.proj',
  'pre_ffw_norm_2': 'pre_feedforward_layernorm_2',
  'post_ffw_norm_1': 'post_feedforward_layernorm_1',
  'post_ffw_norm_2': 'post_feedforward_layernorm_2',
  'ffn_gate_up_exps': 'experts.gate_up_proj',
  'ffn_down_exps': 'experts.down_proj',
}
SCALES = {
  'ffn_gate_inp': 'router.scale',
  'ffn_down_exps': 'router.per_expert_scale',
}
BARE = 'layer_scalar', 'experts.gate_up_proj', 'experts.down_proj'


def fields(
  file: gguf_file.File, own_metadata: Mapping[str, Any]
) -> dict[str, Any]:
  """The metadata in the words of a config.json.

  Args:
    own_metadata: the metadata after `gemma4.`.

  Raises:
    gguf_file.BadFile: something is missing, unknown or contradicts another.
  """
  path, needed = str(file.path), (*_FIELDS, *_BY_LAYER)
  gguf_file.check_metadata(
    file,
    own_metadata,
    needed=needed,
    known=(*needed, *_OPTIONAL, *_EQUAL, *_BASES, *_FREE),
    equal=_EQUAL,
  )
  layers = own_metadata['block_count']
  local = np.broadcast_to(
    own_metadata['attention.sliding_window_pattern'], layers
  )
  shared = (
    np.arange(layers) >= layers - own_metadata['attention.shared_kv_layers']
  )
  widths = np.broadcast_to(own_metadata['feed_forward_length'], layers)
  kv_heads = np.broadcast_to(own_metadata['attention.head_count_kv'], layers)
  d_ff = _only(path, 'feed_forward_length', widths[~shared])
  fields_found = {
    field: own_metadata[key]
    for key, field in {**_FIELDS, **_OPTIONAL}.items()
    if key in own_metadata
  }
  double_wide = shared.any() and (widths[shared] == 2 * d_ff).all()
  if shared.any() and not double_wide:
    _only(path, 'feed_forward_length', widths)
  keys_alone = [
    f'blk.{i}.attn_v.weight' not in file.tensors
    for i in np.flatnonzero(~local & ~shared)
  ]
  rows = file.tensors.get('token_embd.weight')
  if rows is None:
    raise gguf_file.BadFile(f'{path!r} has no tensor token_embd.weight.')
  return {
    **fields_found,
    'model_type': 'gemma4_text',
    'rms_norm_eps': float(f'{fields_found["rms_norm_eps"]:.6g}'),  # was float32
    'vocab_size': rows.shape[0],
    'vocab_size_per_layer_input': rows.shape[0],
    'layer_types': np.where(
      local, 'sliding_attention', 'full_attention'
    ).tolist(),
    'intermediate_size': d_ff,
    'use_double_wide_mlp': bool(double_wide),
    'num_key_value_heads': _only(path, 'head_count_kv', kv_heads[local]),
    'num_global_key_value_heads': _only(
      path, 'head_count_kv', kv_heads[~local]
    ),
    'attention_k_eq_v': bool(keys_alone) and all(keys_alone),
    'enable_moe_block': bool(fields_found.get('num_experts')),
    'rope_parameters': _rope(file, own_metadata),
  }


def _only(path: str, name: str, values: np.ndarray) -> int:
  """The one value of some layers."""
  if len(set(values.tolist())) != 1:
    raise gguf_file.BadFile(
      f'{path!r}: {name} has {sorted(set(values.tolist()))} in layers that are '
      'alike in Gemma 4.'
    )
  return int(values[0])


def _rope(
  file: gguf_file.File, own_metadata: Mapping[str, Any]
) -> dict[str, Any]:
  base, local_base = (own_metadata.get(key) for key in _BASES)
  share, factors = 1.0, file.tensors.get(ROPE)
  if factors is not None:
    values = factors[slice(None)]
    rotated = np.flatnonzero(values == _ROTATED)
    if len(rotated) + np.count_nonzero(values > _STILL) != len(values):
      raise gguf_file.BadFile(
        f'{str(file.path)!r} has {ROPE} with values that are neither 1 nor '
        'those of pairs that are not rotated.'
      )
    share = len(rotated) / len(values)
  return {
    'full_attention': {
      'rope_type': 'proportional',
      'rope_theta': float(base if base is not None else 1e6),
      'partial_rotary_factor': share,
    },
    'sliding_attention': {
      'rope_type': 'default',
      'rope_theta': float(local_base if local_base is not None else 1e4),
    },
  }
