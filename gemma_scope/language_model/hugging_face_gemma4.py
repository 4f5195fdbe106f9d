"""Hugging Face's config.json of Gemma 4, its text part -> the model's shape.

Fields and defaults are those of `transformers`; whatever would change what is
computed is used or refused by name, as in `hugging_face`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gemma_scope.language_model import gemma4

_DEFAULTS = dict(
  vocab_size=262_144,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=30,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  global_head_dim=512,
  num_global_key_value_heads=None,
  sliding_window=512,
  layer_types=None,
  final_logit_softcapping=None,
  attention_k_eq_v=False,
  num_kv_shared_layers=0,
  use_double_wide_mlp=False,
  hidden_size_per_layer_input=256,
  vocab_size_per_layer_input=262_144,
  enable_moe_block=False,
  num_experts=None,
  top_k_experts=None,
  moe_intermediate_size=None,
  hidden_activation='gelu_pytorch_tanh',
  rms_norm_eps=1e-6,
  attention_bias=False,
  tie_word_embeddings=True,
  use_bidirectional_attention=None,
  rope_parameters=None,
  per_layer_config=None,
)
# What this project's forward pass computes, and no other.
_FIXED = (
  'hidden_activation',
  'rms_norm_eps',
  'attention_bias',
  'tie_word_embeddings',
)
_COUNTS = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'global_head_dim',
  'sliding_window',
)
_ROPE = {
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000},
  'full_attention': {
    'rope_type': 'proportional',
    'rope_theta': 1_000_000,
    'partial_rotary_factor': 0.25,
  },
}
_OF_GLOBAL = {
  'head_dim': 'global_head_dim',
  'num_key_value_heads': 'num_global_key_value_heads',
}
_LETTERS = {'sliding_attention': 'L', 'full_attention': 'G'}


def config(
  name: str,
  fields: Mapping[str, Any],
  refuse_unknown: Callable[[Mapping[str, Any], set[str]], None],
) -> gemma4.Config:
  """The shape that the text part of a config.json describes.

  Args:
    name: what this project calls the model.
    fields: the fields, those of `text_config` in a multimodal model.
    refuse_unknown: raises ValueError for a field that is not known.

  Raises:
    ValueError: it computes what this forward pass does not.
  """
  refuse_unknown(fields, set(_DEFAULTS))
  text = {**_DEFAULTS, **fields}
  pattern = _pattern(text)
  text |= _of_global_layers(text, pattern)
  for field in _COUNTS:
    if type(text[field]) is not int or text[field] < 1:
      raise ValueError(f'{field} is {text[field]!r}, not a whole number')
  for field in _FIXED:
    if text[field] != _DEFAULTS[field]:
      raise ValueError(f'{field} is {text[field]!r}, not {_DEFAULTS[field]!r}')
  # 'vision' concerns the tokens of images alone.
  if text['use_bidirectional_attention'] not in (None, False, 'vision'):
    raise ValueError('its attention is bidirectional')
  ple_dim = text['hidden_size_per_layer_input'] or 0
  if ple_dim and text['vocab_size_per_layer_input'] != text['vocab_size']:
    raise ValueError(
      f'vocab_size_per_layer_input {text["vocab_size_per_layer_input"]} is not '
      f'vocab_size {text["vocab_size"]}'
    )
  k_is_v = bool(text['attention_k_eq_v'])
  kv_heads = text['num_key_value_heads']
  shared_layers = text['num_kv_shared_layers']
  if set(pattern) - set(pattern[: len(pattern) - shared_layers]):
    raise ValueError(
      f'num_kv_shared_layers is {shared_layers}: layers share keys and values '
      'of a kind of which none are left'
    )
  base, rope_share = _rope(text['rope_parameters'] or _ROPE)
  experts = text['num_experts'] if text['enable_moe_block'] else 0
  return gemma4.Config(
    name=name,
    vocab_size=text['vocab_size'],
    d_model=text['hidden_size'],
    num_layers=text['num_hidden_layers'],
    num_heads=text['num_attention_heads'],
    num_kv_heads=kv_heads,
    head_dim=text['head_dim'],
    d_ff=text['intermediate_size'],
    window=text['sliding_window'],
    pattern=pattern,
    # The number is that of layers whose values are their keys, and no others.
    global_kv_heads=(k_is_v and text['num_global_key_value_heads']) or kv_heads,
    global_head_dim=text['global_head_dim'],
    k_is_v=k_is_v,
    kv_shared=shared_layers,
    shared_d_ff=(
      2 * text['intermediate_size']
      if shared_layers and text['use_double_wide_mlp']
      else 0
    ),
    ple_dim=ple_dim,
    experts=experts,
    top_experts=text['top_k_experts'] if experts else 0,
    expert_d_ff=text['moe_intermediate_size'] if experts else 0,
    final_softcap=text['final_logit_softcapping'],
    global_rope_base=base,
    global_rope_share=rope_share,
  )


def _pattern(text: Mapping[str, Any]) -> str:
  """A letter a layer; every sixth is global unless all are listed."""
  layers, layer_types = text['num_hidden_layers'], text['layer_types']
  if not layer_types:
    letters = ['LG'[(i + 1) % 6 == 0] for i in range(layers)]
    return ''.join([*letters[:-1], 'G'])  # as `transformers` has the last one
  if unknown := set(layer_types) - set(_LETTERS):
    raise ValueError(f'layer_types has {unknown.pop()!r}')
  if len(layer_types) != layers:
    raise ValueError(f'layer_types has {len(layer_types)} of {layers} layers')
  return ''.join(_LETTERS[kind] for kind in layer_types)


def _of_global_layers(text: Mapping[str, Any], pattern: str) -> dict[str, Any]:
  """The fields of global layers, from where newer versions write them.

  Their `per_layer_config` has an entry for each global layer, all alike.
  """
  by_layer = text['per_layer_config'] or {}
  layers = {str(i) for i, letter in enumerate(pattern) if letter == 'G'}
  if not by_layer:
    return {}
  first_entry = next(iter(by_layer.values()))
  if set(by_layer) != layers or any(
    entry != first_entry for entry in by_layer.values()
  ):
    raise ValueError(
      f'per_layer_config has layers {", ".join(map(str, by_layer))}; expected '
      f'the global layers {", ".join(sorted(layers, key=int))}, all alike'
    )
  if unknown := set(first_entry) - set(_OF_GLOBAL):
    raise ValueError(f'per_layer_config has the unknown field {unknown.pop()}')
  return {_OF_GLOBAL[field]: value for field, value in first_entry.items()}


def _rope(parameters: Mapping[str, Any]) -> tuple[int, float]:
  """Base of the global layers, and the share of the pairs that they rotate."""
  if set(parameters) != set(_ROPE):
    raise ValueError('rope_parameters does not tell global from local layers')
  for kind, default in _ROPE.items():
    rope = {'partial_rotary_factor': 1.0, **parameters[kind]}
    if unknown := set(rope) - set(_ROPE['full_attention']):
      raise ValueError(
        f'the field {unknown.pop()} of its rotary embeddings is unknown'
      )
    if rope['rope_type'] != default['rope_type']:
      raise ValueError(
        f'its rotary embeddings are of type {rope["rope_type"]!r}'
      )
  local, glob = (
    {'partial_rotary_factor': 1.0, **parameters[kind]} for kind in _ROPE
  )
  if local != {**_ROPE['sliding_attention'], 'partial_rotary_factor': 1.0}:
    raise ValueError(
      f'the local rope_theta is {local["rope_theta"]}, not 10000, or only a '
      'share of its pairs is rotated'
    )
  if glob['rope_theta'] != int(glob['rope_theta']):
    raise ValueError(f'rope_theta is {glob["rope_theta"]}, not a whole number')
  return int(glob['rope_theta']), glob['partial_rotary_factor']
