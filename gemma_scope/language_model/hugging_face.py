"""Hugging Face's config.json of Gemma 2, 3 and 4 -> the model's shape.

Every field that changes what a model computes is used or refused by name, in
the spellings of all versions of `transformers`; a field that is unknown here is
refused unless it is empty. For a multimodal model, the text part is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import hugging_face_gemma4

_TYPES = 'gemma2', 'gemma3_text', 'gemma3', 'gemma4_text', 'gemma4'
_MULTIMODAL = 'gemma3', 'gemma4'
_BASE = 10_000  # of local RoPE
# What a config.json leaves out where it is so: those published for Gemma 3 do.
_DEFAULTS = dict(
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  query_pre_attn_scalar=256,
  sliding_window=4096,
  hidden_activation='gelu_pytorch_tanh',
  rms_norm_eps=1e-6,
  attention_bias=False,
  tie_word_embeddings=True,
  use_bidirectional_attention=False,
)
_DEFAULTS_OF = {
  'gemma2': dict(
    vocab_size=256_000,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window_pattern=2,
  ),
  'gemma3': dict(
    vocab_size=262_208,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    sliding_window_pattern=6,
  ),
}
# What this project's forward pass computes, and no other.
_FIXED = (
  'hidden_activation',
  'rms_norm_eps',
  'attention_bias',
  'tie_word_embeddings',
)
_NOT_COUNTS = 'query_pre_attn_scalar', 'sliding_window_pattern'
_ROPE = {
  'rope_theta',
  'rope_local_base_freq',
  'rope_scaling',
  'rope_parameters',
}
_PATTERN = 'layer_types', 'sliding_window_pattern', '_sliding_window_pattern'
# Fields that change nothing that is computed here: of training, of generation,
# of other parts of the model, and of the library that wrote the file.
_FREE = frozenset(
  """architectures attention_dropout boi_token_index bos_token_id
  cache_implementation dtype eoi_token_index eos_token_id hidden_act
  image_token_index initializer_range max_position_embeddings
  mm_tokens_per_image model_type pad_token_id text_config torch_dtype
  transformers_version use_cache vision_config num_image_tokens
  mm_soft_tokens_per_image task_specific_params problem_type id2label
  label2id chunk_size_feed_forward return_dict is_encoder_decoder""".split()
)
_FREE |= {  # of Gemma 4
  'audio_config',
  'audio_token_id',
  'boa_token_id',
  'boi_token_id',
  'eoa_token_id',
  'eoa_token_index',
  'eoi_token_id',
  'image_token_id',
  'video_token_id',
  'vision_soft_tokens_per_image',
}
_FREE_START = '_', 'unsloth'  # the writing library's own notes


def is_described_by(fields: Any) -> bool:
  """Whether a config.json's content is Hugging Face's."""
  return isinstance(fields, dict) and 'model_type' in fields


def config(name: str, fields: Mapping[str, Any], path: str) -> lm.AnyConfig:
  """The shape that a config.json describes.

  Args:
    name: what this project calls the model; one of `lm.SIZES` must be of the
      shape known by that name.
    fields: the file's content.
    path: its path, for errors.

  Raises:
    ValueError: it is no Gemma 2 to 4, computes something that this forward pass
      does not, or is another model than its name says.
  """
  kind = fields.get('model_type')
  if kind not in _TYPES:
    raise ValueError(
      f'{path!r} describes a {kind!r} model; expected one of '
      f'{", ".join(_TYPES)}.'
    )
  try:
    text = fields
    if kind in _MULTIMODAL:
      text = dict(fields['text_config'])
      # What the whole model says of its head holds for the text's.
      if fields.get('tie_word_embeddings') is False:
        text['tie_word_embeddings'] = False
      _refuse_unknown(fields, {'tie_word_embeddings'})
    parsed = _config(name, kind, text)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    reason = error.args[0] if error.args else repr(error)
    if isinstance(error, KeyError):
      reason = f'it lacks {reason!r}'
    raise ValueError(
      f'{path!r} does not describe a {kind} model that can be run here: '
      f'{reason}.'
    ) from error
  if name in lm.SIZES:
    _refuse_another(parsed, lm.SIZES[name], path)
  return parsed


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
  """Refuses a field that might change what the model computes."""
  if quantised := fields.get('quantization_config'):
    method = quantised.get('quant_method')
    raise ValueError(
      f'its weights are quantised ({method}); take the unquantised model or a '
      'GGUF file'
    )
  for field, value in fields.items():
    if field in known or field in _FREE or field.startswith(_FREE_START):
      continue
    if value not in (None, False, [], {}):
      raise ValueError(f'the field {field} ({value!r}) is not known here')


def _config(name: str, kind: str, fields: Mapping[str, Any]) -> lm.AnyConfig:
  if kind.startswith('gemma4'):
    return hugging_face_gemma4.config(name, fields, _refuse_unknown)
  defaults = {**_DEFAULTS, **_DEFAULTS_OF[kind[:6]]}
  _refuse_unknown(fields, {*defaults, *_ROPE, *_PATTERN})
  text = {**defaults, **fields}
  for field, default in defaults.items():
    if type(default) is int and field not in _NOT_COUNTS:
      if type(text[field]) is not int or text[field] < 1:
        raise ValueError(f'{field} is {text[field]!r}, not a whole number')
  heads, head_dim = text['num_attention_heads'], text['head_dim']
  scalar, by_heads = text['query_pre_attn_scalar'], text['hidden_size'] / heads
  if scalar not in (head_dim, by_heads):
    raise ValueError(
      f'query_pre_attn_scalar {scalar} is neither head_dim {head_dim} nor '
      f'hidden_size / num_attention_heads {by_heads:g}'
    )
  for field in _FIXED:
    if text[field] != _DEFAULTS[field]:
      raise ValueError(f'{field} is {text[field]!r}, not {_DEFAULTS[field]!r}')
  if text['use_bidirectional_attention']:
    raise ValueError('its attention is bidirectional')
  base, factor = _rope(text, kind == 'gemma2')
  return lm.Config(
    name=name,
    vocab_size=text['vocab_size'],
    d_model=text['hidden_size'],
    num_layers=text['num_hidden_layers'],
    num_heads=heads,
    num_kv_heads=text['num_key_value_heads'],
    head_dim=head_dim,
    d_ff=text['intermediate_size'],
    window=text['sliding_window'],
    pattern=_pattern(text),
    attn_softcap=text['attn_logit_softcapping'],
    final_softcap=text['final_logit_softcapping'],
    transpose_gating=True,  # the layout of these files
    qk_norm=kind != 'gemma2',
    query_scale_by_heads=scalar != head_dim,
    global_rope_base=base,
    global_rope_factor=factor,
  )


def _pattern(text: Mapping[str, Any]) -> str:
  """A letter a layer: every so many is global, unless all are listed."""
  layers = text['num_hidden_layers']
  if listed := text.get('layer_types'):
    letters = {'sliding_attention': 'L', 'full_attention': 'G'}
    if unknown := set(listed) - set(letters):
      raise ValueError(f'layer_types has {unknown.pop()!r}')
    if len(listed) != layers:
      raise ValueError(f'layer_types has {len(listed)} of {layers} layers')
    return ''.join(letters[kind] for kind in listed)
  every = text.get('_sliding_window_pattern', text['sliding_window_pattern'])
  if type(every) is not int or every < 1:
    raise ValueError(f'sliding_window_pattern is {every!r}')
  return ''.join('LG'[(i + 1) % every == 0] for i in range(layers))


def _rope(text: Mapping[str, Any], is_2: bool) -> tuple[int, float]:
  """Base and factor of the global layers, in any version's spelling.

  Versions before 5 have rope_theta, rope_local_base_freq and rope_scaling (of
  the global layers in Gemma 3, of all in Gemma 2); version 5 has
  rope_parameters, for each kind of layer in Gemma 3.
  """
  usual = _BASE if is_2 else 1_000_000
  named = text.get('rope_parameters') or {}
  before_5 = {
    'rope_theta': text.get('rope_theta', usual),
    **(text.get('rope_scaling') or {}),
  }
  if 'full_attention' in named:
    glob, local = named['full_attention'], named['sliding_attention']
  elif is_2:
    glob = local = {**before_5, **named}
  elif named:
    raise ValueError('rope_parameters does not tell global from local layers')
  else:
    glob = before_5
    local = {'rope_theta': text.get('rope_local_base_freq', _BASE)}
  base, factor = _base_and_factor(glob, usual)
  local_base, local_factor = _base_and_factor(local, _BASE)
  if (local_base, local_factor) != (_BASE, 1.0):
    raise ValueError(
      f'the local rope_theta is {local_base} with factor {local_factor:g}, not '
      f'{_BASE} with 1'
    )
  return base, factor


def _base_and_factor(rope: Mapping[str, Any], usual: int) -> tuple[int, float]:
  """Of rotary embeddings, plain or with positions divided by a factor."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'linear'):
    raise ValueError(f'its rotary embeddings are of type {kind!r}')
  known = 'rope_theta', 'rope_type', 'type', 'factor'
  for field, value in rope.items():
    if field not in known and value is not None:
      raise ValueError(f'the field {field} of its rotary embeddings is unknown')
  base = rope.get('rope_theta', usual)
  if base != int(base):
    raise ValueError(f'rope_theta is {base}, not a whole number')
  # A factor counts where the type says so, as in `transformers`.
  return int(base), float(rope['factor']) if kind == 'linear' else 1.0


def _refuse_another(config: lm.AnyConfig, known: lm.AnyConfig, source: str):
  """Refuses a model whose shape is not that of its name."""

  def facts(c):
    letters = [c.pattern[i % len(c.pattern)] for i in range(c.num_layers)]
    return {**vars(c), 'pattern': ''.join(letters)}

  # The vocabulary has 128 more rows in Google's checkpoints of Gemma 2, 64 less
  # in those of Gemma 3; one of them has the gating matrices transposed.
  free = 'vocab_size', 'transpose_gating'
  ours, theirs = facts(known), facts(config)
  wrong = [
    f'{field} {theirs.get(field)} (in {known.name} {value})'
    for field, value in ours.items()
    if theirs.get(field) != value and field not in free
  ]
  if wrong:
    raise ValueError(
      f'{source!r} is another model than {known.name}: {", ".join(wrong)}; set '
      'lm.name to the model that it is.'
    )
