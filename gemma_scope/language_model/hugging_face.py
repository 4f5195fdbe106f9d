"""Gemma 2 and 3 as Hugging Face publishes them: config.json, *.safetensors.

  embed_tokens [V, D]                 embedder/input_embedding [V, D]
  q_proj [N H, D]                     attn/q_einsum/w          [N, D, H]
  k_proj, v_proj [K H, D] each        attn/kv_einsum/w         [2, K, D, H]
  o_proj [D, N H]                     attn/attn_vec_einsum/w   [N, H, D]
  gate_proj, up_proj [F, D] each      mlp/gating_einsum        [2, F, D]
  down_proj [D, F]                    mlp/linear               [F, D]
  norms [D], [H]                      .../scale, gain = 1 + scale in both

(F is the MLP's width here; with as many key heads as heads, q, k and v are one
qkv_einsum.) Of a multimodal Gemma 3 the text part is read.

config.json says the model's shape and is believed only where this project's
forward pass computes the same; every tensor's name and shape is checked before
one is read. Then each device's part of each parameter is cut out of its file,
cast and put there: what is held beside the parameters is one part of one.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_scope.language_model import gemma as lm

_TYPES = 'gemma2', 'gemma3_text', 'gemma3'
_INDEX = 'model.safetensors.index.json'
# What comes before `layers.0...`, by version and kind of model.
_PREFIX = r'^(model\.language_model\.|language_model\.model\.|model\.)'
_NOT_TEXT = r'^(model\.)?(vision_tower|multi_modal_projector)\.'
_BASE = 10_000  # of local RoPE
# What a config.json leaves out where it is so: those published for Gemma 3 do.
_DEFAULTS = dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    query_pre_attn_scalar=256, sliding_window=4096,
    hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
    attention_bias=False, tie_word_embeddings=True,
    use_bidirectional_attention=False,
)  # fmt: skip
_DEFAULTS_OF = {
    'gemma2': dict(
        vocab_size=256_000, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window_pattern=2,
    ),
    'gemma3': dict(
        vocab_size=262_208, attn_logit_softcapping=None,
        final_logit_softcapping=None, sliding_window_pattern=6,
    ),
}  # fmt: skip
# What this project's forward pass computes, and no other.
_FIXED = (
  'hidden_activation', 'rms_norm_eps', 'attention_bias', 'tie_word_embeddings',
)  # fmt: skip

_NORMS = {
  'pre_attention_norm': 'input_layernorm',
  'post_attention_norm': 'post_attention_layernorm',
  'pre_ffw_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
  'attn/_query_norm': 'self_attn.q_norm',
  'attn/_key_norm': 'self_attn.k_norm',
}
_MATRICES = {
  'attn/q_einsum/w': ('self_attn.q_proj',),
  'attn/kv_einsum/w': ('self_attn.k_proj', 'self_attn.v_proj'),
  'attn/qkv_einsum/w': (
    'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj',
  ),
  'attn/attn_vec_einsum/w': ('self_attn.o_proj',),
  'mlp/gating_einsum': ('mlp.gate_proj', 'mlp.up_proj'),
  'mlp/linear': ('mlp.down_proj',),
}  # fmt: skip


def is_described_by(fields: Any) -> bool:
  """Whether a config.json's content is Hugging Face's."""
  return isinstance(fields, dict) and 'model_type' in fields


def config(name: str, fields: Mapping[str, Any], where: str) -> lm.Config:
  """The shape that a config.json describes.

  Args:
    name: what this project calls the model; one of `lm.SIZES` must be of the
      shape known by that name.
    fields: the file's content.
    where: its path, for errors.

  Raises:
    ValueError: it is no Gemma 2 or 3, computes something that this forward pass
      does not, or is another model than its name says.
  """
  kind = fields.get('model_type')
  if kind not in _TYPES:
    raise ValueError(
      f'{where!r} describes a {kind!r} model; expected one of '
      f'{", ".join(_TYPES)}.'
    )
  text = fields.get('text_config', fields) if kind == 'gemma3' else fields
  try:
    found = _config(name, kind, text)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{where!r} does not describe a {kind} model that can be run here: '
      f'{error.args[0] if error.args else error!r}.'
    ) from error
  if name in lm.SIZES:
    _refuse_another(found, lm.SIZES[name], where)
  return found


def _config(name: str, kind: str, given: Mapping[str, Any]) -> lm.Config:
  text = {**_DEFAULTS, **_DEFAULTS_OF[kind[:6]], **given}
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
  layers, every = text['num_hidden_layers'], text['sliding_window_pattern']
  if listed := text.get('layer_types'):
    letters = {'sliding_attention': 'L', 'full_attention': 'G'}
    pattern = ''.join(letters[kind] for kind in listed)
    if len(pattern) != layers:
      raise ValueError(f'layer_types has {len(pattern)} of {layers} layers')
    return pattern
  return ''.join('LG'[(i + 1) % every == 0] for i in range(layers))


def _rope(text: Mapping[str, Any], is_2: bool) -> tuple[int, float]:
  """Base and factor of the global layers, in either spelling."""
  named = text.get('rope_parameters') or {}
  if 'full_attention' in named:
    glob, local = named['full_attention'], named['sliding_attention']
  elif is_2:
    glob = local = {'rope_theta': text.get('rope_theta', _BASE), **named}
  else:
    glob = {
      'rope_theta': text.get('rope_theta', 1_000_000),
      **(text.get('rope_scaling') or {}),
    }
    local = {'rope_theta': text.get('rope_local_base_freq', _BASE)}
  kinds = glob.get('rope_type', 'default'), local.get('rope_type', 'default')
  base, factor = glob['rope_theta'], glob.get('factor', 1.0)
  if kinds[0] not in ('default', 'linear') or kinds[1] != 'default':
    raise ValueError(f'its rotary embeddings are of type {kinds}')
  if local['rope_theta'] != _BASE:
    raise ValueError(
      f'the local rope_theta is {local["rope_theta"]}, not {_BASE}'
    )
  return int(base), float(factor)


def _refuse_another(found: lm.Config, known: lm.Config, where: str) -> None:
  """Refuses a model whose shape is not that of its name."""

  def facts(c):
    letters = [c.pattern[i % len(c.pattern)] for i in range(c.num_layers)]
    return {**vars(c), 'pattern': ''.join(letters)}

  # The vocabulary has 128 more rows in Google's checkpoints of Gemma 2, 64 less
  # in those of Gemma 3; one of them has the gating matrices transposed.
  free = 'vocab_size', 'transpose_gating'
  ours, theirs = facts(known), facts(found)
  wrong = [
    f'{field} {theirs[field]} (in {known.name} {value})'
    for field, value in ours.items()
    if theirs[field] != value and field not in free
  ]
  if wrong:
    raise ValueError(
      f'{where!r} is another model than {known.name}: {", ".join(wrong)}; '
      'set lm.name to the model that it is.'
    )


# ------------------------------------------------------------------ parameters


def read(
  folder: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """The parameters, each in its dtype and sharding.

  Args:
    folder: with safetensors files, and an index where they are several.
    shapes: of all parameters of the model, by their path with slashes.
    wanted: those to read, with dtype and sharding.

  Raises:
    ValueError: a file or a tensor is missing, damaged, unknown or of another
      shape; nothing was read.
  """
  from safetensors import SafetensorError, safe_open

  tensors = {}
  try:
    for path in _files(folder):
      file = safe_open(path, framework='np')
      for full in file.keys():  # noqa: SIM118 - not a dict
        name = re.sub(_PREFIX, '', full)
        if re.match(_NOT_TEXT, full) or full.endswith('lm_head.weight'):
          continue
        if name in tensors:
          raise ValueError(f'{str(folder)!r} has {name} twice.')
        tensors[name] = file.get_slice(full)
    return assemble(str(folder), tensors, shapes, wanted)
  except SafetensorError as error:
    raise ValueError(
      f'{str(folder)!r} has a safetensors file that is not whole ({error}); '
      'download it again.'
    ) from error


def assemble(
  where: str,
  tensors: Mapping[str, Any],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """Parameters from tensors in this layout, which are checked before a read.

  Args:
    where: what holds the tensors, for errors.
    tensors: by name, without what stands before `layers`: each has
      `get_shape()` and gives a part of itself, `tensor[rows, columns]`.
    shapes, wanted: as in `read`.
  """
  _check(where, tensors, shapes)
  return {
    key: jax.make_array_from_callback(
      want.shape,
      want.sharding,
      lambda index, key=key, want=want: _part(
        tensors, key, want.shape, index
      ).astype(want.dtype, copy=False),
    )
    for key, want in wanted.items()
  }


def _check(where, tensors, shapes) -> None:
  """Refuses tensors that are missing, unknown or of another shape."""
  expected = {}
  for key, shape in shapes.items():
    expected |= _sources(key, shape.shape)
  for name, shape in expected.items():
    if name not in tensors:
      raise ValueError(f'{where!r} has no tensor {name}: is it another model?')
    found = tuple(tensors[name].get_shape())
    if found != shape:
      raise ValueError(
        f'{name} in {where!r} has shape {found}, and the model wants {shape}.'
      )
  if more := sorted(set(tensors) - set(expected)):
    raise ValueError(
      f'{where!r} has tensors that the model has not: '
      f'{", ".join(more[:3])}{", ..." if len(more) > 3 else ""}.'
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold the tensors, all of them there."""
  index = folder / _INDEX
  names = sorted(path.name for path in folder.glob('*.safetensors'))
  if index.is_file():
    try:
      names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
      raise ValueError(
        f'{str(index)!r} is not an index of tensors ({error!r}).'
      ) from error
  for name in names:
    if not isinstance(name, str) or not re.fullmatch(r'[\w.-]+', name):
      raise ValueError(f'{str(index)!r} names the file {name!r}.')
    if not (folder / name).is_file():
      raise ValueError(
        f'{str(folder)!r} lacks {name}, which its index names; download it.'
      )
  return [folder / name for name in names]


def _names(key: str) -> tuple[str, ...]:
  """The tensors that a parameter is made of."""
  if key == 'embedder/input_embedding':
    return ('embed_tokens.weight',)
  if key == 'final_norm/scale':
    return ('norm.weight',)
  layer, rest = re.fullmatch(r'layer_(\d+)/(.*)', key).groups()
  found = _MATRICES.get(rest) or (_NORMS[rest.removesuffix('/scale')],)
  return tuple(f'layers.{layer}.{name}.weight' for name in found)


def _sources(key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
  """Those tensors, and the shape that each must have."""
  names = _names(key)
  if key.endswith(('q_einsum/w', 'kv_einsum/w')):
    heads, width, head_dim = shape[-3:]
    of_each = (heads * head_dim, width)
  elif key.endswith('attn_vec_einsum/w'):
    of_each = (shape[2], shape[0] * shape[1])
  elif key.endswith('gating_einsum'):
    of_each = shape[1:]
  elif key.endswith('mlp/linear'):
    of_each = shape[::-1]
  else:
    of_each = shape
  return dict.fromkeys(names, of_each)


def _part(tensors, key, shape, index) -> np.ndarray:
  """A device's part of a parameter: `index` has a slice an axis."""
  index = tuple(
    slice(*s.indices(size)) for s, size in zip(index, shape, strict=True)
  )
  names = _names(key)
  if key.endswith('q_einsum/w') and len(names) == 1:
    return _heads(tensors[names[0]], shape[-1], index)
  if key.endswith('einsum/w') and len(names) > 1:
    return np.stack(
      [_heads(tensors[name], shape[-1], index[1:]) for name in names[index[0]]]
    )
  if key.endswith('attn_vec_einsum/w'):
    heads, inside, outputs = index
    size = shape[1]
    w = tensors[names[0]][outputs, heads.start * size : heads.stop * size]
    return w.T.reshape(-1, size, w.shape[0])[:, inside]
  if key.endswith('gating_einsum'):
    return np.stack([tensors[name][index[1:]] for name in names[index[0]]])
  if key.endswith('mlp/linear'):
    return tensors[names[0]][index[::-1]].T
  return tensors[names[0]][index]


def _heads(tensor, size: int, index: tuple[slice, ...]) -> np.ndarray:
  """[N H, D] -> [N, D, H], a part of it."""
  heads, columns, inside = index
  w = tensor[heads.start * size : heads.stop * size, columns]
  return w.reshape(-1, size, w.shape[1]).transpose(0, 2, 1)[..., inside]
