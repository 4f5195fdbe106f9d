"""circuit-tracer's sets of transcoders: config.yaml, and a file for each layer.

  model_name, feature_input_hook, feature_output_hook   which, and where
  transcoders   a path or hf:// address for each layer from 0 on; an early form
                has id, layer and filepath. Without it: layer_{i}.safetensors
                beside the config
  activation    relu or jump_relu; by default jump_relu where there are
                thresholds

  W_enc [F, d_in]  b_enc [F]  W_dec [F, d_out]  b_dec [d_out]
  activation_function.threshold [F] or []    W_skip [d_out, d_in]

A file may also be one of Gemma Scope 1 (.npz) or 2 (w_enc). Nothing comes off
the input. TopK is refused: circuit-tracer's keeps negative values where fewer
than k are positive. scan, scan_name, repo_id, revision and subfolder say where
the set is shown and came from; nothing is computed from them. Source: the code
of circuit-tracer 0.5.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import yaml

from gemma_scope import files, sites
from gemma_scope.release import npz, sae_folder
from gemma_scope.release.formats import (
  gemma_scope_2,
  hook_points,
  hub,
  model_names,
  tensors,
)

CONFIG = 'config.yaml'
_BYTES = 1 << 20
_KIND = 'transcoder_set'
_ORIGIN = ('scan', 'scan_name', 'repo_id', 'revision', 'subfolder')
_FIELDS = frozenset(
  ('model_name', 'model_kind', 'feature_input_hook', 'feature_output_hook',
   'transcoders', 'activation', 'k', *_ORIGIN)
)  # fmt: skip
_EARLY = frozenset(('id', 'layer', 'filepath'))
_THRESHOLD = 'activation_function.threshold'
_KEYS = ('W_enc', 'b_enc', 'W_dec', 'b_dec')
_OPTIONAL = (_THRESHOLD, 'W_skip', 'k')
_TURNED = ('W_enc', 'W_skip')  # [out, in] there
_GEMMA_SCOPE_2 = ('w_enc', 'w_dec', 'threshold', 'affine_skip_connection')
_LAYER = re.compile(r'layer_(\d{1,3})')
_MOST_LAYERS = 256

Params = sae_folder.Params
Member = tuple[dict[str, Any], Callable[[], Params]]


def is_there(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).is_file()


def layer_of(name: str) -> int | None:
  """The layer that a last part of a path such as layer_3 names."""
  match = _LAYER.fullmatch(name)
  return int(match[1]) if match else None


def layers(folder: pathlib.Path) -> list[int]:
  """The layers of a set; reads no weights.

  Raises:
    files.Refused: the config is of no set that can be read.
  """
  return sorted(_paths(folder, _config(folder)))


def read(folder: pathlib.Path, path: str, layer: int) -> Member:
  """One transcoder: its card, and a function that reads its parameters.

  Args:
    folder: holds config.yaml.
    path: name of the set; the transcoder's is `path`/layer_`layer`.
    layer: the layer.

  Raises:
    files.Refused: as of `layers`, or the file cannot be read.
  """
  config = _config(folder)
  paths = _paths(folder, config)
  with tensors.naming(folder / CONFIG):
    if layer not in paths:
      raise files.Refused(f'has no transcoder of layer {layer}')
    card = {
      'name': f'{path.rstrip("/")}/layer_{layer}',
      'type': 'transcoder',
      'sites': [str(_site(config, 'feature_input_hook', layer))],
      'targets': [str(_site(config, 'feature_output_hook', layer))],
      'model': _model(config),
    }
  file = _file(folder, paths[layer])
  activation = config.get('activation')
  with tensors.naming(file):
    shapes = _shapes(file)
    card['architecture'] = 'jumprelu' if 'threshold' in shapes else 'relu'
    if (
      activation is not None and _activation(activation) != card['architecture']
    ):
      raise files.Refused(
        f'has {"" if "threshold" in shapes else "no "}thresholds, and {CONFIG} '
        f'says activation {files.show(activation)}'
      )
    shapes.setdefault('threshold', shapes['b_enc'])
    card |= sae_folder.sizes_of(shapes)
  return card, functools.partial(_params, file)


def _config(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / CONFIG
  try:
    with tensors.naming(path), files.open_plain(path, _BYTES) as (file, _):
      config = yaml.safe_load(file.read())
  except files.Refused:
    raise
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:120]
    raise files.Refused(f'{files.show(path)} is not YAML ({reason}).') from None
  with tensors.naming(path):
    if not isinstance(config, dict):
      raise files.Refused('is no set of transcoders of circuit-tracer')
    _check(config)
  return config


def _check(config: Mapping[str, Any]) -> None:
  tensors.check_fields(map(str, config), _FIELDS, 'circuit-tracer up to 0.5')
  kind = config.get('model_kind', _KIND)
  if kind != _KIND:
    raise files.Refused(
      f'is of the kind {files.show(kind)}; only {_KIND} can be read'
    )
  for key in _ORIGIN:
    value = config.get(key)
    texts = value if key.startswith('scan') and type(value) is list else [value]
    if not all(isinstance(text, str | None) for text in texts):
      raise files.Refused(f'has {key} = {files.show(value)}; expected text')
  if config.get('activation') is not None:
    _activation(config['activation'])
  if config.get('k') is not None:
    raise files.Refused(f'has k = {files.show(config["k"])}; {_NO_TOPK}')
  _model(config)


_NO_TOPK = (
  "circuit-tracer's TopK keeps negative values where fewer than k latents are "
  'positive, which no SAE here does'
)


def _activation(name) -> str:
  """The architecture of an activation's name."""
  if name == 'topk':
    raise files.Refused(f'has activation topk; {_NO_TOPK}')
  if name not in ('relu', 'jump_relu'):
    raise files.Refused(
      f'has activation {files.show(name)}; expected relu or jump_relu'
    )
  return name.replace('_', '')


def _model(config: Mapping[str, Any]) -> str:
  name = config.get('model_name')
  if not (model := model_names.of_hugging_face(str(name))):
    raise files.Refused(
      f'is of the model {files.show(name)}, which is no Gemma'
    )
  return model


def _site(config: Mapping[str, Any], key: str, layer: int) -> sites.Site:
  hook = str(config.get(key))
  if hook == 'mlp.hook_in':  # its name for what TransformerLens has no name
    return sites.Site(layer, 'mlp_in')
  return hook_points.parse(f'blocks.{layer}.{hook}', _model(config))


def _paths(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[int, str]:
  """The path or address of each layer's file."""
  listed = config.get('transcoders')
  if listed is None:
    path_of_layer = {
      layer_of(path.stem): path for path in folder.glob('layer_*')
    }
    path_of_layer = {
      layer: path.name
      for layer, path in path_of_layer.items()
      if layer is not None and path.suffix == '.safetensors'
    }
  elif not isinstance(listed, list) or len(listed) > _MOST_LAYERS:
    raise files.Refused(
      f'{files.show(folder / CONFIG)} has transcoders that are no list.'
    )
  else:
    with tensors.naming(folder / CONFIG):
      path_of_layer = dict(_entry(i, entry) for i, entry in enumerate(listed))
      if len(path_of_layer) < len(listed):
        raise files.Refused('names a layer twice')
  if not path_of_layer:
    hint = '' if listed is not None else ' and has no layer_0.safetensors'
    raise files.Refused(
      f'{files.show(folder / CONFIG)} lists no transcoders{hint}.'
    )
  return path_of_layer


def _entry(number: int, entry) -> tuple[int, str]:
  """An element of `transcoders`: its layer, and its path."""
  if isinstance(entry, dict):
    tensors.check_fields(map(str, entry), _EARLY, 'circuit-tracer')
    number, entry = entry.get('layer'), entry.get('filepath')
  if type(number) is not int or not isinstance(entry, str) or number < 0:
    raise files.Refused(
      f'has {files.show(entry)} in transcoders; expected a path'
    )
  return number, entry


def _file(folder: pathlib.Path, path: str) -> pathlib.Path:
  """The local file of a path, or of an hf:// address.

  A copy of a repository's file below the folder, under its own path, is used
  before it is fetched.
  """
  if not path.startswith('hf://'):
    return folder / path
  inside = path.partition('?')[0].split('/', 4)[-1]
  if '..' not in inside.split('/') and (folder / inside).is_file():
    return folder / inside
  return hub.file(path)


def _is_gemma_scope_2(file: pathlib.Path) -> bool:
  names = tensors.shapes(
    file,
    required=('b_enc', 'b_dec'),
    optional=(*_KEYS, *_OPTIONAL, *_GEMMA_SCOPE_2),
    integers=('k',),
  )
  return 'w_enc' in names


def _shapes(file: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters, under our names and with our order of axes."""
  if file.suffix == '.npz':
    return npz.shapes(
      file, required=sae_folder.KEYS, max_bytes=tensors.MAX_BYTES
    )
  if _is_gemma_scope_2(file):
    return gemma_scope_2.shapes(file)
  shapes = tensors.shapes(
    file, required=_KEYS, optional=_OPTIONAL, integers=('k',)
  )
  if 'k' in shapes:
    raise files.Refused(f'has k; {_NO_TOPK}')
  own_shapes = {
    key: shape[::-1] if key in _TURNED else shape
    for key, shape in shapes.items()
  }
  if _THRESHOLD in own_shapes:
    own_shapes['threshold'] = own_shapes.pop(_THRESHOLD)
    if own_shapes['threshold'] not in ((), (1,), own_shapes['b_enc']):
      raise files.Refused(
        f'has thresholds {own_shapes["threshold"]} for b_enc '
        f'{own_shapes["b_enc"]}'
      )
    own_shapes['threshold'] = own_shapes['b_enc']
  return own_shapes


def _params(file: pathlib.Path) -> Params:
  if file.suffix == '.npz':
    return npz.read(
      file,
      required=sae_folder.KEYS,
      check=lambda shapes: sae_folder.check_shapes(shapes, None),
      max_bytes=tensors.MAX_BYTES,
    )
  if _is_gemma_scope_2(file):
    return gemma_scope_2.of_file(file)
  params = tensors.read(file, required=_KEYS, optional=(_THRESHOLD, 'W_skip'))
  for key in _TURNED:
    if key in params:
      params[key] = np.ascontiguousarray(params[key].T)
  threshold = params.pop(_THRESHOLD, np.zeros((), np.float32))
  if (threshold < 0).any():
    raise files.Refused(
      f'{files.show(file)} has negative thresholds, with which latents would '
      'be negative.'
    )
  params['threshold'] = threshold + np.zeros_like(params['b_enc'])
  return params
