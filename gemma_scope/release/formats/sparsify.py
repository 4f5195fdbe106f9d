"""EleutherAI's sparsify: cfg.json beside sae.safetensors, in a module's folder.

  encoder.weight [F, D]  encoder.bias [F]  W_dec [F, D_out]  b_dec [D_out]
  W_skip [D_out, D_in]   layers.12/, layers.12.mlp/: the module's output

The k largest of relu(encoder(x)) are kept; an SAE takes b_dec off its input, a
transcoder (`transcode`), which reads the module's input, does not. Compared
with eai-sparsify 1.3.3.
"""

from __future__ import annotations

import pathlib
import re

import numpy as np

from gemma_scope.release import npz, sae_folder
from gemma_scope.release.formats import hook_points, tensors

CONFIG, WEIGHTS = 'cfg.json', 'sae.safetensors'
_KEYS = ('encoder.weight', 'encoder.bias', 'W_dec', 'b_dec')


def is_there(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: pathlib.Path, path: str) -> tuple[sae_folder.Params, dict]:
  """Reads one coder; `path` names it, its last part the module."""
  config = tensors.read_json(folder / CONFIG)
  k, transcodes = config.get('k'), bool(config.get('transcode'))
  if config.get('activation', 'topk') != 'topk' or type(k) is not int:
    raise npz.Refused(
      f'{npz.show(folder / CONFIG)} has activation '
      f'{npz.show(config.get("activation"))} and k = {npz.show(k)}; only '
      'topk can be read.'
    )
  try:
    site = hook_points.parse(re.split(r'[/\\]', path.rstrip('/'))[-1])
    reads = site
    if transcodes:
      reads = hook_points.parse(f'model.layers.{site.layer}.mlp.input')
      if site.kind != 'mlp_raw':
        raise npz.Refused(f'is a transcoder of {site}; only those of MLPs')
  except npz.Refused as error:
    raise npz.Refused(f'{npz.show(path)} {error}.') from None
  p = tensors.read(folder / WEIGHTS, required=_KEYS, optional=['W_skip'])
  try:
    W_enc, b_enc = p['encoder.weight'].T, p['encoder.bias']
    if not transcodes:
      b_enc = b_enc - p['b_dec'] @ W_enc
  except ValueError as error:
    raise npz.Refused(
      f'{npz.show(folder / WEIGHTS)} has shapes that do not fit ({error}).'
    ) from None
  params = {
    'W_enc': np.ascontiguousarray(W_enc),
    'b_enc': b_enc,
    'W_dec': p['W_dec'],
    'b_dec': p['b_dec'],
    'threshold': np.zeros_like(b_enc),
  }
  if 'W_skip' in p:
    params['W_skip'] = np.ascontiguousarray(p['W_skip'].T)
  params['k'] = np.float32(k)
  return params, {
    'name': path,
    'type': 'transcoder' if transcodes else 'sae',
    'sites': [str(reads)],
    'targets': [str(site)],
    'model': '',
    'architecture': 'topk',
    'sparsity': {'kind': 'k', 'value': k},
  }
