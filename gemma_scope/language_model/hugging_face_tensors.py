"""Tensors as Hugging Face lays them out -> the model's parameters.

  embed_tokens [V, D]                 embedder/input_embedding [V, D]
  q_proj [N H, D]                     attn/q_einsum/w          [N, D, H]
  k_proj, v_proj [K H, D] each        attn/kv_einsum/w         [2, K, D, H]
  o_proj [D, N H]                     attn/attn_vec_einsum/w   [N, H, D]
  gate_proj, up_proj [F, D] each      mlp/gating_einsum        [2, F, D]
  down_proj [D, F]                    mlp/linear               [F, D]
  norms [D], [H]                      .../scale, gain = 1 + scale in both

(F is the MLP's width here; with as many key heads as heads, q, k and v are one
qkv_einsum.)

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
_NOT_TEXT = r'^(model\.)?(vision_tower|multi_modal_projector)\.'
_DTYPES = 'F64', 'F32', 'F16', 'BF16'

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
    'self_attn.q_proj',
    'self_attn.k_proj',
    'self_attn.v_proj',
  ),
  'attn/attn_vec_einsum/w': ('self_attn.o_proj',),
  'mlp/gating_einsum': ('mlp.gate_proj', 'mlp.up_proj'),
  'mlp/linear': ('mlp.down_proj',),
}


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
        if re.match(_NOT_TEXT, full):
          continue
        if full.endswith(_HEAD):
          name = _HEAD
        if name in tensors:
          raise ValueError(f'{str(folder)!r} has {name} twice.')
        tensors[name] = file.get_slice(full)
        if (dtype := tensors[name].get_dtype()) not in _DTYPES:
          raise ValueError(
            f'{full} in {str(folder)!r} is of type {dtype}, which is quantised '
            'or unknown; take the unquantised model or a GGUF file.'
          )
    _drop_head(str(folder), tensors)
    return assemble(str(folder), tensors, shapes, wanted)
  except SafetensorError as error:
    raise ValueError(
      f'{str(folder)!r} has a safetensors file that is not whole ({error}); '
      'download it again.'
    ) from error


def _drop_head(where: str, tensors: dict[str, Any]) -> None:
  """Drops a head that is a copy of the embedding; refuses any other."""
  head, embedding = tensors.pop(_HEAD, None), tensors.get('embed_tokens.weight')
  if head is None or embedding is None:
    return
  shape = tuple(head.get_shape())
  same = shape == tuple(embedding.get_shape()) and all(
    np.array_equal(head[start:stop], embedding[start:stop])
    for start in range(0, shape[0], _ROWS)
    for stop in [min(start + _ROWS, shape[0])]
  )
  if not same:
    raise ValueError(
      f'{where!r} has {_HEAD} that differs from the embedding: such an untied '
      'head cannot be run here.'
    )


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
    actual = tuple(tensors[name].get_shape())
    if actual != shape:
      raise ValueError(
        f'{name} in {where!r} has shape {actual}, and the model wants {shape}.'
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


def _names(key: str) -> tuple[str, ...]:
  """The tensors that a parameter is made of."""
  if key == 'embedder/input_embedding':
    return ('embed_tokens.weight',)
  if key == 'final_norm/scale':
    return ('norm.weight',)
  layer, rest = re.fullmatch(r'layer_(\d+)/(.*)', key).groups()
  names = _MATRICES.get(rest) or (_NORMS[rest.removesuffix('/scale')],)
  return tuple(f'layers.{layer}.{name}.weight' for name in names)


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
