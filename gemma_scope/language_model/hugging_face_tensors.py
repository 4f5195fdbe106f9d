"""Tensors as Hugging Face lays them out -> the model's parameters.

  embed_tokens [V, D]                 embedder/input_embedding [V, D]
  q_proj [N H, D]                     attn/q_einsum/w          [N, D, H]
  k_proj, v_proj [K H, D] each        attn/kv_einsum/w         [2, K, D, H]
  o_proj [D, N H]                     attn/attn_vec_einsum/w   [N, H, D]
  gate_proj, up_proj [F, D] each      mlp/gating_einsum        [2, F, D]
  down_proj [D, F]                    mlp/linear               [F, D]
  norms [D], [H]                      .../scale, the same numbers

and in Gemma 4

  k_proj [K H, D]                     attn/k_einsum/w          [K, D, H]
  layer_scalar [1]                    skip_scale               [1]
  embed_tokens_per_layer [V, L P]     per_layer_embeddings     [V, L, P]
  per_layer_model_projection [L P, D] .../w                    [D, L, P]
  per_layer_input_gate [P, D]         .../w                    [D, P]
  per_layer_projection [D, P]         .../w                    [P, D]
  experts.gate_up_proj [E, 2 F, D]    mlp/gating_einsum/w      [E, 2, F, D]
  experts.down_proj [E, D, F]         mlp/linear/w             [E, F, D]
  router.proj [E, D]                  mlp/router_logits/w      [D, E]

(F is the MLP's width here, P that of the per-layer inputs of L layers, E the
number of experts; with as many key heads as heads, q, k and v of Gemma 2 and 3
are one qkv_einsum. Beside experts `mlp` is called mlp2 and its norms *_ffw2.)

Every tensor's name and shape is checked before one is read. Then each device's
part of each parameter is cut out of its tensor, cast and put there: what is
held beside the parameters is one part of one.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_HEAD = 'lm_head.weight'
_ROWS = 8192  # rows of an embedding that are compared at once
_INDEX = 'model.safetensors.index.json'
# What comes before `layers.0...`, by version and kind of model.
_PREFIX = r'^(model\.language_model\.|language_model\.model\.|model\.)'
_NOT_TEXT = (
  r'^(model\.)?(vision_tower|multi_modal_projector|audio_tower|embed_vision|'
  r'embed_audio)\.'
)
_DTYPES = 'F64', 'F32', 'F16', 'BF16'

_NORMS = {
  'pre_attention_norm': 'input_layernorm',
  'post_attention_norm': 'post_attention_layernorm',
  'pre_ffw_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
  'attn/_query_norm': 'self_attn.q_norm',
  'attn/_key_norm': 'self_attn.k_norm',
  'attn/query_norm': 'self_attn.q_norm',
  'attn/key_norm': 'self_attn.k_norm',
  'post_per_layer_input_norm': 'post_per_layer_input_norm',
}
_MATRICES = {
  'attn/q_einsum/w': ('self_attn.q_proj',),
  'attn/k_einsum/w': ('self_attn.k_proj',),
  'attn/kv_einsum/w': ('self_attn.k_proj', 'self_attn.v_proj'),
  'attn/qkv_einsum/w': (
    'self_attn.q_proj',
    'self_attn.k_proj',
    'self_attn.v_proj',
  ),
  'attn/attn_vec_einsum/w': ('self_attn.o_proj',),
  'mlp/gating_einsum': ('mlp.gate_proj', 'mlp.up_proj'),
  'mlp/linear': ('mlp.down_proj',),
  'per_layer_input_gate/w': ('per_layer_input_gate',),
  'per_layer_projection/w': ('per_layer_projection',),
}
_LAYER = {  # parameter of a layer -> tensors
  **{f'{name}/scale': (f'{norm}.weight',) for name, norm in _NORMS.items()},
  **{
    name: tuple(f'{each}.weight' for each in found)
    for name, found in _MATRICES.items()
  },
  'skip_scale': ('layer_scalar',),
}
_MIXTURE = {  # the same beside experts, where it is another
  'pre_ffw2_norm/scale': ('pre_feedforward_layernorm.weight',),
  'post_ffw2_norm/scale': ('post_feedforward_layernorm_1.weight',),
  'pre_ffw_norm/scale': ('pre_feedforward_layernorm_2.weight',),
  'post_ffw1_norm/scale': ('post_feedforward_layernorm_2.weight',),
  'mlp2/gating_einsum': ('mlp.gate_proj.weight', 'mlp.up_proj.weight'),
  'mlp2/linear': ('mlp.down_proj.weight',),
  'mlp/gating_einsum/w': ('experts.gate_up_proj',),
  'mlp/linear/w': ('experts.down_proj',),
  'mlp/router_logits/w': ('router.proj.weight',),
  'mlp/router_scale': ('router.scale',),
  'mlp/per_expert_scale': ('router.per_expert_scale',),
}
_WHOLE = {  # of no layer
  'embedder/input_embedding': 'embed_tokens.weight',
  'embedder/per_layer_embeddings': 'embed_tokens_per_layer.weight',
  'embedder/per_layer_model_projection/w': 'per_layer_model_projection.weight',
  'embedder/per_layer_projection_norm/scale': (
    'per_layer_projection_norm.weight'
  ),
  'final_norm/scale': 'norm.weight',
}
# Matrices that these files have the other way round.
_TRANSPOSED = (
  'mlp/linear',
  'mlp2/linear',
  'router_logits/w',
  'per_layer_input_gate/w',
  'per_layer_projection/w',
)
# Keys and values that some files have of layers that attend to another's.
_UNREAD = r'layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight'


def read(
  folder: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  needed: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """The parameters, each in its dtype and sharding.

  Args:
    folder: with safetensors files, and an index where they are several.
    shapes: of all parameters of the model, by their path with slashes.
    needed: those to read, with dtype and sharding.

  Raises:
    ValueError: a file or a tensor is missing, damaged, unknown or of another
      shape; nothing was read.
  """
  from safetensors import SafetensorError, safe_open

  tensors = {}
  try:
    for path in _files(folder):
      file = safe_open(path, framework='np')
      for full_name in file.keys():  # noqa: SIM118 - not a dict
        name = re.sub(_PREFIX, '', full_name)
        if re.match(_NOT_TEXT, full_name):
          continue
        if full_name.endswith(_HEAD):
          name = _HEAD
        if name in tensors:
          raise ValueError(f'{str(folder)!r} has {name} twice.')
        tensors[name] = file.get_slice(full_name)
        if (dtype := tensors[name].get_dtype()) not in _DTYPES:
          raise ValueError(
            f'{full_name} in {str(folder)!r} is of type {dtype}, which is '
            'quantised or unknown; take the unquantised model or a GGUF file.'
          )
    _drop_head(str(folder), tensors)
    return assemble(str(folder), tensors, shapes, needed)
  except SafetensorError as error:
    raise ValueError(
      f'{str(folder)!r} has a safetensors file that is not whole ({error}); '
      'download it again.'
    ) from error


def _drop_head(path: str, tensors: dict[str, Any]) -> None:
  """Drops a head that is a copy of the embedding; refuses any other."""
  head, embedding = tensors.pop(_HEAD, None), tensors.get('embed_tokens.weight')
  if head is None or embedding is None:
    return
  shape = tuple(head.get_shape())
  is_copy = shape == tuple(embedding.get_shape()) and all(
    np.array_equal(head[start:stop], embedding[start:stop])
    for start in range(0, shape[0], _ROWS)
    for stop in [min(start + _ROWS, shape[0])]
  )
  if not is_copy:
    raise ValueError(
      f'{path!r} has {_HEAD} that differs from the embedding: such an untied '
      'head cannot be run here.'
    )


def assemble(
  source: str,
  tensors: Mapping[str, Any],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  needed: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """Parameters from tensors in this layout, which are checked before a read.

  Args:
    source: what holds the tensors, for errors.
    tensors: by name, without what stands before `layers`: each has
      `get_shape()` and gives a part of itself, `tensor[rows, columns]`.
    shapes, needed: as in `read`.
  """
  names = {key: _names(key, shapes) for key in shapes}
  _check(source, tensors, shapes, names)
  return {
    key: jax.make_array_from_callback(
      target.shape,
      target.sharding,
      lambda index, key=key, target=target: _part(
        [tensors[name] for name in names[key]], key, target.shape, index
      ).astype(target.dtype, copy=False),
    )
    for key, target in needed.items()
  }


def _check(source, tensors, shapes, names) -> None:
  """Refuses tensors that are missing, unknown or of another shape."""
  expected = {}
  for key, shape in shapes.items():
    expected |= dict.fromkeys(names[key], _source_shape(key, shape.shape))
  for name, shape in expected.items():
    if name not in tensors:
      raise ValueError(f'{source!r} has no tensor {name}: is it another model?')
    actual = tuple(tensors[name].get_shape())
    if actual != shape:
      raise ValueError(
        f'{name} in {source!r} has shape {actual}, and the model wants {shape}.'
      )
  unread = {
    name
    for name in set(tensors) - set(expected)
    if (layer := re.fullmatch(_UNREAD, name))
    and f'layers.{layer[1]}.self_attn.q_proj.weight' in expected
    and f'layers.{layer[1]}.self_attn.k_proj.weight' not in expected
  }
  if extra := sorted(set(tensors) - set(expected) - unread):
    raise ValueError(
      f'{source!r} has tensors that the model has not: '
      f'{", ".join(extra[:3])}{", ..." if len(extra) > 3 else ""}.'
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold the tensors, all of them there."""
  index = folder / _INDEX
  names = sorted(path.name for path in folder.glob('*.safetensors'))
  if index.is_file():
    try:
      names = sorted(
        set(json.loads(index.read_text('utf-8'))['weight_map'].values())
      )
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


def _names(key: str, shapes: Mapping[str, Any]) -> tuple[str, ...]:
  """The tensors that a parameter is made of."""
  if key in _WHOLE:
    return (_WHOLE[key],)
  layer, parameter = re.fullmatch(r'layer_(\d+)/(.*)', key).groups()
  mixture = f'layer_{layer}/mlp/router_logits/w' in shapes
  table = {**_LAYER, **_MIXTURE} if mixture else _LAYER
  return tuple(f'layers.{layer}.{name}' for name in table[parameter])


def _source_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that each of those tensors must have."""
  if key.endswith(('q_einsum/w', 'k_einsum/w', 'kv_einsum/w')):
    heads, width, head_dim = shape[-3:]
    return heads * head_dim, width
  if key.endswith('attn_vec_einsum/w'):
    return shape[2], shape[0] * shape[1]
  if key.endswith('mlp/gating_einsum/w'):  # of experts
    return shape[0], shape[1] * shape[2], shape[3]
  if key.endswith('mlp/linear/w'):
    return shape[0], shape[2], shape[1]
  if key.endswith('gating_einsum'):
    return shape[1:]
  if key.endswith('per_layer_embeddings'):
    return shape[0], shape[1] * shape[2]
  if key.endswith('per_layer_model_projection/w'):
    return shape[1] * shape[2], shape[0]
  return shape[::-1] if key.endswith(_TRANSPOSED) else shape


def _part(tensors, key, shape, index) -> np.ndarray:
  """A device's part of a parameter.

  Args:
    tensors: those that it is made of.
    index: a slice an axis.
  """
  index = tuple(
    slice(*s.indices(size)) for s, size in zip(index, shape, strict=True)
  )
  first_tensor = tensors[0]
  if key.endswith(('q_einsum/w', 'k_einsum/w', 'kv_einsum/w')):
    if len(shape) == 3:
      return _heads(first_tensor, shape[-1], index)
    return np.stack(
      [_heads(tensor, shape[-1], index[1:]) for tensor in tensors[index[0]]]
    )
  if key.endswith('attn_vec_einsum/w'):
    heads, inside, outputs = index
    size = shape[1]
    w = first_tensor[outputs, heads.start * size : heads.stop * size]
    return w.T.reshape(-1, size, w.shape[0])[:, inside]
  if key.endswith('mlp/gating_einsum/w'):  # of experts
    of_experts, halves, inside, columns = index
    w = first_tensor[of_experts, :, columns]
    return w.reshape(w.shape[0], *shape[1:3], -1)[:, halves, inside]
  if key.endswith('mlp/linear/w'):
    return first_tensor[index[0], index[2], index[1]].swapaxes(1, 2)
  if key.endswith('gating_einsum'):
    return np.stack([tensor[index[1:]] for tensor in tensors[index[0]]])
  if key.endswith('per_layer_embeddings'):
    w = first_tensor[index[0], :]
    return w.reshape(-1, *shape[1:])[:, index[1], index[2]]
  if key.endswith('per_layer_model_projection/w'):
    w = first_tensor[:, index[0]]
    return w.T.reshape(-1, *shape[1:])[:, index[1], index[2]]
  if key.endswith(_TRANSPOSED):
    return first_tensor[index[::-1]].T
  return first_tensor[index]


def _heads(tensor, size: int, index: tuple[slice, ...]) -> np.ndarray:
  """[N H, D] -> [N, D, H], a part of it."""
  heads, columns, inside = index
  w = tensor[heads.start * size : heads.stop * size, columns]
  return w.reshape(-1, size, w.shape[1]).transpose(0, 2, 1)[..., inside]
