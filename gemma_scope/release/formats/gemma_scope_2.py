"""Gemma Scope 2: config.json beside params.safetensors, or a file a layer.

  resid_post/layer_12_width_16k_l0_medium/params.safetensors
  clt/width_262k_l0_big_affine/params_layer_{i}.safetensors, i from 0

  w_enc [d_in, F]  b_enc, threshold [F]  w_dec [F, d_out]  b_dec [d_out]
  affine_skip_connection [d_in, d_out], which adds x @ it, not transposed

File i of several has the latents of the i-th layer: w_dec is [F, L, d_out], of
which the part for earlier layers means nothing and is set to zero.
config.json names the hook points; a crosscoder's and a CLT's stand for several
layers in one name (`model.layers.{7,13,17,22}.output`). Source: the files and
the tutorial of Gemma Scope 2.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.release import sae_folder
from gemma_scope.release.formats import hook_points, model_names, tensors

_KEYS = {
  'W_enc': 'w_enc',
  'b_enc': 'b_enc',
  'W_dec': 'w_dec',
  'b_dec': 'b_dec',
  'threshold': 'threshold',
  'W_skip': 'affine_skip_connection',
}
_TENSORS = {
  'required': [_KEYS[key] for key in sae_folder.KEYS],
  'optional': [_KEYS['W_skip']],
}
_FIELDS = frozenset(
  """affine_connection architecture hf_hook_point_in hf_hook_point_out l0
  model_name type width""".split()
)
_LAYERS = re.compile(r'params_layer_(\d{1,3})\.safetensors')


def is_there(folder: pathlib.Path) -> bool:
  return bool(_files(folder)) and (folder / 'config.json').is_file()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The file of parameters, or one for each layer, in order."""
  if (folder / 'params.safetensors').is_file():
    return [folder / 'params.safetensors']
  layers = [
    (int(match[1]), path)
    for path in folder.glob('params_layer_*.safetensors')
    if (match := _LAYERS.fullmatch(path.name))
  ]
  return [path for _, path in sorted(layers)]


def read(
  folder: pathlib.Path, path: str
) -> tuple[dict[str, Any], Callable[[], sae_folder.Params]]:
  """One SAE, transcoder, crosscoder or CLT; `path` names it."""
  config, parts = tensors.read_json(folder / 'config.json'), _files(folder)
  with tensors.naming(folder / 'config.json'):
    card = _card(config, path, len(parts))
  sizes = shapes(parts[0])
  if any(shapes(part) != sizes for part in parts):
    raise files.Refused(f'{files.show(folder)} has layers of different shapes.')
  several = card['type'] in sites.SEVERAL
  lead = (len(parts),) * several
  ours = {key: (*lead, *size) for key, size in sizes.items()}
  with tensors.naming(parts[0]):
    card |= sae_folder.sizes_of(ours)
    _check_sizes(config, card, len(parts) if several else 1)
  return card, functools.partial(_params, parts, several)


def _check_sizes(config: Mapping[str, Any], card, layers: int) -> None:
  """Holds the config's width and affine skip to the parameters."""
  width, latents = config.get('width', card['width']), card['width']
  # Of several layers together or of each, and then a round number.
  near = [latents, latents // layers] if layers > 1 else []
  if type(width) is not int or not (
    width == latents or any(abs(width - n) <= n // 50 for n in near)
  ):
    raise files.Refused(
      f'has {latents} latents, and config.json says width = {files.show(width)}'
    )
  affine = config.get('affine_connection')
  if affine not in (None, card.get('affine', False)):
    raise files.Refused(
      f'has {"an" if "affine" in card else "no"} affine skip, and config.json '
      f'says affine_connection = {files.show(affine)}'
    )


def of_file(part: pathlib.Path) -> sae_folder.Params:
  """The parameters in one file, of a single layer or of one of several."""
  read = tensors.read(part, **_TENSORS)
  return {
    ours: read[theirs] for ours, theirs in _KEYS.items() if theirs in read
  }


def shapes(part: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Their shapes, from the file's header."""
  shape_of = tensors.shapes(part, **_TENSORS)
  return {
    key: shape_of[name] for key, name in _KEYS.items() if name in shape_of
  }


def _params(parts: Sequence[pathlib.Path], several: bool) -> sae_folder.Params:
  read = [of_file(part) for part in parts]
  if not several:
    return read[0]
  params = {key: np.stack([part[key] for part in read]) for key in read[0]}
  for layer in range(len(parts)):
    params['W_dec'][layer, :, :layer] = 0
  return params


def _card(config: Mapping[str, Any], path: str, count: int) -> dict[str, Any]:
  tensors.check_fields(config, _FIELDS, 'Gemma Scope 2')
  kind = config.get('type')
  if config.get('architecture') != 'jump_relu' or kind not in sites.TYPES:
    raise files.Refused(
      f'describes a {files.show(kind)} of architecture '
      f'{files.show(config.get("architecture"))}; expected jump_relu and one '
      f'of {", ".join(sites.TYPES)}'
    )
  reads = _sites(config, 'hf_hook_point_in', count)
  writes = _sites(config, 'hf_hook_point_out', count)
  card = {
    'name': path,
    'type': kind,
    'sites': reads,
    'targets': writes,
    'model': _model(config),
    'architecture': 'jumprelu',
  }
  l0 = config.get('l0')
  if isinstance(l0, bool) or not isinstance(l0, int | float | None):
    raise files.Refused(f'has l0 = {files.show(l0)}; expected a number')
  if l0 is not None:
    card['sparsity'] = {'kind': 'target_l0', 'value': l0}
  return card


def _sites(config: Mapping[str, Any], key: str, count: int) -> list[str]:
  name = str(config.get(key))
  several = re.fullmatch(r'(.*)\{([\w, -]+)\}(.*)', name)
  layers = [''] if several is None else several[2].split(',')
  if several and several[2] == 'all':
    layers = list(map(str, range(count)))
  if len(layers) != count:
    raise files.Refused(
      f'names {len(layers)} layers in {key}, beside {count} files of parameters'
    )
  names = [
    name if several is None else f'{several[1]}{layer.strip()}{several[3]}'
    for layer in layers
  ]
  model = _model(config)
  return [str(hook_points.parse(hook_point, model)) for hook_point in names]


def _model(config: Mapping[str, Any]) -> str:
  name = config.get('model_name')
  if not (model := model_names.of_hugging_face(str(name))):
    raise files.Refused(
      f'is of the model {files.show(name)}, which is no Gemma'
    )
  return model


def write(
  folder: pathlib.Path,
  params: Mapping[str, np.ndarray],
  card: Mapping[str, Any],
  l0: float | None,
) -> None:
  """Writes one SAE, transcoder, crosscoder or CLT into a new folder.

  Args:
    folder: made here, with those above it.
    params, card: in this project's form.
    l0: measured, or that of the training target.

  Raises:
    files.Refused: the format has no such thing: a TopK, or a site without a
      name.
  """
  if 'k' in params:
    raise files.Refused(
      'is a TopK, and Gemma Scope 2 has thresholds alone: train a BatchTopK'
    )
  place, several = sites.wiring_of(card), sites.wiring_of(card).several
  folder.mkdir(parents=True)
  for i in range(len(place.sites) if several else 1):
    name = f'params_layer_{i}' if several else 'params'
    part = {
      _KEYS[key]: value[i] if several else value
      for key, value in params.items()
    }
    tensors.write(folder / f'{name}.safetensors', part)
  config = {
    'hf_hook_point_in': _hook(place.sites, card['model']),
    'hf_hook_point_out': _hook(place.targets, card['model']),
    'width': card['width'],
    'model_name': model_names.to_hugging_face(card['model']),
    'architecture': 'jump_relu',
    'l0': l0,
    'affine_connection': 'W_skip' in params,
    'type': place.type,
  }
  tensors.write_json(folder / 'config.json', config)


def _hook(sites_read, model: str) -> str:
  first = hook_points.of_transformers(sites_read[0], model)
  if len(sites_read) == 1:
    return first
  layers = ','.join(str(site.layer) for site in sites_read)
  return first.replace(
    f'layers.{sites_read[0].layer}.', f'layers.{{{layers}}}.'
  )
