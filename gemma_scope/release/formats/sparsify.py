"""EleutherAI's sparsify: cfg.json beside sae.safetensors, in a module's folder.

  encoder.weight [F, D]  encoder.bias [F]  W_dec [F, D_out]  b_dec [D_out]
  W_skip [D_out, D_in]   layers.12/, layers.12.mlp/: the module's output

Of several seeds each has a folder in the module's, layers.12/seed0/. The run's
own config.json, beside the modules, names the model, where it is there.

The k largest of relu(encoder(x)) are kept; an SAE takes b_dec off its input, a
transcoder (`transcode`), which reads the module's input, does not. `signed`
(June to August 2024) keeps the k largest by absolute value, negative ones too:
refused, as groupmax is. Compared with eai-sparsify 1.3.3.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.release import sae_folder
from gemma_scope.release.formats import hook_points, model_names, tensors

CONFIG, WEIGHTS = 'cfg.json', 'sae.safetensors'
_RUN = 'config.json'
_SEED = re.compile(r'seed\d+')
_KEYS = ('encoder.weight', 'encoder.bias', 'W_dec', 'b_dec')
_FIELDS = frozenset(
  """activation d_in expansion_factor k multi_topk normalize_decoder num_latents
  signed skip_connection transcode""".split()
)


def is_there(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(
  folder: pathlib.Path, path: str
) -> tuple[dict[str, Any], Callable[[], sae_folder.Params]]:
  """One coder: its card, and a function that reads its parameters.

  Args:
    folder: holds cfg.json and the weights.
    path: its name, which ends with the module.
  """
  with tensors.naming(folder / CONFIG):
    config = tensors.read_json(folder / CONFIG)
    k, transcodes = _checked(config), config.get('transcode', False)
  file = folder / WEIGHTS
  shapes = tensors.shapes(file, required=_KEYS, optional=['W_skip'])
  *above, module = re.split(r'[/\\]', path.rstrip('/'))
  run = folder.parent
  if above and _SEED.fullmatch(module):
    module, run = above[-1], run.parent
  model = _model(run)
  with tensors.naming(path):
    reads = site = hook_points.parse(module, model)
    if transcodes:
      reads = hook_points.parse(f'model.layers.{site.layer}.mlp.input')
      if site.kind != 'mlp_raw':
        raise files.Refused(f'is a transcoder of {site}; only those of MLPs')
    sizes = _sizes(shapes, config)
  return {
    'name': path,
    'type': 'transcoder' if transcodes else 'sae',
    'sites': [str(reads)],
    'targets': [str(site)],
    'model': model,
    'architecture': 'topk',
    'sparsity': {'kind': 'k', 'value': k},
    **sizes,
  }, functools.partial(_params, file, k, transcodes)


def _model(run: pathlib.Path) -> str:
  """Name of the model that a run's config names, ours where it is a Gemma."""
  if not (run / _RUN).is_file():
    return ''
  model = tensors.read_json(run / _RUN).get('model')
  return model_names.ours(model[:200]) if isinstance(model, str) else ''


def _checked(config: Mapping[str, Any]) -> int:
  """k, where the config is of a coder that can be read."""
  tensors.check_fields(config, _FIELDS, 'sparsify up to 1.3.3')
  k = config.get('k')
  if config.get('activation', 'topk') != 'topk' or type(k) is not int:
    raise files.Refused(
      f'has activation {files.show(config.get("activation"))} and k = '
      f'{files.show(k)}; only topk can be read'
    )
  for key in ('signed', 'transcode', 'skip_connection'):
    if type(config.get(key, False)) is not bool:
      raise files.Refused(f'has {key} = {files.show(config[key])}')
  if config.get('signed'):
    raise files.Refused(
      'has signed latents: its top-k keeps negative values as well, which no '
      'SAE here has'
    )
  return k


def _sizes(shapes, config: Mapping[str, Any]) -> dict[str, Any]:
  W_enc, W_dec = shapes['encoder.weight'], shapes['W_dec']
  if len(W_enc) != 2 or len(W_dec) != 2 or W_enc[0] != W_dec[0]:
    raise files.Refused(
      f'has shapes that do not fit: encoder.weight {W_enc}, W_dec {W_dec}'
    )
  width, d_in = W_enc
  wanted = config.get('num_latents') or (
    d_in * config.get('expansion_factor', width / d_in)
  )
  if (config.get('d_in', d_in), wanted) != (d_in, width):
    raise files.Refused(
      f'has {width} latents of {d_in} inputs, and {CONFIG} says {wanted} of '
      f'{files.show(config.get("d_in"))}'
    )
  if config.get('skip_connection', 'W_skip' in shapes) != ('W_skip' in shapes):
    raise files.Refused('has a skip_connection that its weights disagree with')
  sizes = {'d_in': d_in, 'd_out': W_dec[1], 'width': width}
  return sizes | ({'affine': True} if 'W_skip' in shapes else {})


def _params(file: pathlib.Path, k: int, transcodes: bool) -> sae_folder.Params:
  arrays = tensors.read(file, required=_KEYS, optional=['W_skip'])
  W_enc, b_enc = arrays['encoder.weight'].T, arrays['encoder.bias']
  try:
    if not transcodes:
      b_enc = b_enc - arrays['b_dec'] @ W_enc
  except ValueError as error:
    raise files.Refused(
      f'{files.show(file)} has shapes that do not fit ({error}).'
    ) from None
  params = {
    'W_enc': np.ascontiguousarray(W_enc),
    'b_enc': b_enc,
    'W_dec': arrays['W_dec'],
    'b_dec': arrays['b_dec'],
    'threshold': np.zeros_like(b_enc),
  }
  if 'W_skip' in arrays:
    params['W_skip'] = np.ascontiguousarray(arrays['W_skip'].T)
  params['k'] = np.float32(k)
  return params
