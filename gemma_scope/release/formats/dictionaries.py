"""dictionary_learning: config.json beside ae.pt, which is a pickle.

A pickle can run any code, and none is read here. Its tensors alone can:

  import torch, safetensors.torch
  tensors = torch.load('ae.pt', weights_only=True)
  tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
  safetensors.torch.save_file(tensors, 'ae.safetensors')

Of config.json, `trainer` says class, layer and submodule. Linear layers have
[out, in] weights; the input's bias comes off before the encoder:

  AutoEncoder            f = relu(W (x - bias) + b), decoder.weight [D, F]
  AutoEncoderTopK        the same with b_dec, and the k largest
  BatchTopKSAE           the same with b_dec, and a threshold
  MatryoshkaBatchTopKSAE the same, with W_enc [D, F] and W_dec [F, D]
  JumpReluAutoEncoder    W_enc [D, F], nothing off the input
  GatedAutoEncoder       a gate and a magnitude: folded into thresholds
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope import sites
from gemma_scope.release import npz, sae_folder
from gemma_scope.release.formats import tensors

PICKLE, WEIGHTS, CONFIG = 'ae.pt', 'ae.safetensors', 'config.json'
_LINEAR = ('encoder.weight', 'encoder.bias', 'decoder.weight')
_PLAIN = ('W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold')
_KEYS = {
  'AutoEncoder': (*_LINEAR, 'bias'),
  'AutoEncoderTopK': (*_LINEAR, 'b_dec', 'k'),
  'BatchTopKSAE': (*_LINEAR, 'b_dec', 'threshold'),
  'MatryoshkaBatchTopKSAE': _PLAIN,
  'JumpReluAutoEncoder': _PLAIN,
  'GatedAutoEncoder': (
    'encoder.weight', 'decoder.weight', 'decoder_bias', 'r_mag', 'gate_bias',
    'mag_bias',
  ),
}  # fmt: skip
_OPTIONAL = ('k', 'threshold', 'group_sizes')
_KINDS = {
  'resid_post': 'resid_post', 'mlp_out': 'mlp_raw', 'attention_out': 'attn_raw',
}  # fmt: skip


def is_there(folder: pathlib.Path) -> bool:
  return (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file()


def read(folder: pathlib.Path, path: str) -> tuple[sae_folder.Params, dict]:
  """Reads one dictionary; `path` names it."""
  if not (folder / WEIGHTS).is_file():
    raise npz.Refused(
      f'{npz.show(folder / PICKLE)} is a pickle, which can run any code and is '
      f'not read; write its tensors as {WEIGHTS} beside it (how: the head of '
      'gemma_scope/formats/dictionaries.py).'
    )
  config = tensors.read_json(folder / CONFIG)
  trainer = config.get('trainer')
  trainer = trainer if isinstance(trainer, dict) else {}
  kind = trainer.get('dict_class')
  if kind not in _KEYS:
    raise npz.Refused(
      f'{npz.show(folder / CONFIG)} has dict_class {npz.show(kind)}; those '
      f'that can be read are {", ".join(_KEYS)}.'
    )
  optional = [key for key in _OPTIONAL if key not in _KEYS[kind]]
  p = tensors.read(
    folder / WEIGHTS,
    required=_KEYS[kind],
    optional=optional,
    whole=('k', 'group_sizes'),
  )
  site = _site(folder, trainer)
  try:
    params = _params(kind, p)
  except ValueError as error:
    raise npz.Refused(
      f'{npz.show(folder / WEIGHTS)} has shapes that do not fit ({error}).'
    ) from None
  return params, {
    'name': path,
    'type': 'sae',
    'sites': [str(site)],
    'targets': [str(site)],
    'model': str(trainer.get('lm_name', ''))[:200],
    'architecture': {'AutoEncoder': 'relu', 'AutoEncoderTopK': 'topk'}.get(
      kind, 'jumprelu'
    ),
  }


def _params(kind: str, p: Mapping[str, np.ndarray]) -> sae_folder.Params:
  if kind in ('JumpReluAutoEncoder', 'MatryoshkaBatchTopKSAE'):
    params = {key: p[key] for key in _PLAIN}
    if kind == 'MatryoshkaBatchTopKSAE':
      params['b_enc'] = p['b_enc'] - p['b_dec'] @ p['W_enc']
  else:
    b_dec = p.get('b_dec', p.get('bias', p.get('decoder_bias')))
    params = {
      'W_enc': np.ascontiguousarray(p['encoder.weight'].T),
      'b_enc': p.get('encoder.bias'),
      'W_dec': np.ascontiguousarray(p['decoder.weight'].T),
      'b_dec': b_dec,
      'threshold': p['threshold'] if kind == 'BatchTopKSAE' else np.zeros(()),
    }
    if kind == 'GatedAutoEncoder':
      gain = np.exp(p['r_mag'])
      params['W_enc'] = params['W_enc'] * gain
      params['b_enc'] = p['mag_bias']
      # The gate opens where the magnitude's pre-activation is above this one.
      params['threshold'] = p['mag_bias'] - gain * p['gate_bias']
    params['b_enc'] = params['b_enc'] - b_dec @ params['W_enc']
  threshold = np.maximum(params['threshold'], 0)
  params['threshold'] = threshold + np.zeros_like(params['b_enc'])
  if kind == 'AutoEncoderTopK':
    params['k'] = p['k']
  return params


def _site(folder: pathlib.Path, trainer: Mapping[str, Any]) -> sites.Site:
  layer, name = trainer.get('layer'), str(trainer.get('submodule_name'))
  for start, kind in _KINDS.items():
    if name.startswith(start) and type(layer) is int and 0 <= layer < 1024:
      return sites.Site(layer, kind)
  raise npz.Refused(
    f'{npz.show(folder / CONFIG)} names the submodule {npz.show(name)} of '
    f'layer {npz.show(layer)}; expected {", ".join(_KINDS)} of a number.'
  )
