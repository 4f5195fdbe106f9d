"""dictionary_learning: config.json beside ae.pt, which is a pickle.

A pickle can run any code, and none is read here. Its tensors alone can:

  python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous()
      for k, v in torch.load('ae.pt', weights_only=True).items()},
      'ae.safetensors')"

Of config.json, `trainer` says class, layer and submodule. Linear layers have
[out, in] weights; the input's bias comes off before the encoder:

  AutoEncoder          f = relu(W (x - bias) + b), decoder.weight [D, F]
  AutoEncoderTopK, BatchTopKSAE    the same with b_dec; k, or a threshold
  JumpReluAutoEncoder  W_enc [D, F], nothing off the input
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope import member, npz, sites
from gemma_scope.formats import tensors

PICKLE, WEIGHTS, CONFIG = 'ae.pt', 'ae.safetensors', 'config.json'
_LINEAR = ('encoder.weight', 'encoder.bias', 'decoder.weight')
_KEYS = {
  'AutoEncoder': (*_LINEAR, 'bias'),
  'AutoEncoderTopK': (*_LINEAR, 'b_dec'),
  'BatchTopKSAE': (*_LINEAR, 'b_dec', 'threshold'),
  'JumpReluAutoEncoder': ('W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold'),
}
_KINDS = {
  'resid_post': 'resid_post', 'mlp_out': 'mlp_raw', 'attention_out': 'attn_raw',
}  # fmt: skip


def is_there(folder: pathlib.Path) -> bool:
  return (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file()


def read(folder: pathlib.Path, path: str) -> tuple[member.Params, dict]:
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
  optional = {'k', 'threshold'} - set(_KEYS[kind])
  p = tensors.read(
    folder / WEIGHTS, required=_KEYS[kind], optional=sorted(optional)
  )
  site = _site(folder, trainer)
  try:
    params = _params(kind, p)
  except ValueError as error:
    raise npz.Refused(
      f'{npz.show(folder / WEIGHTS)} has shapes that do not fit ({error}).'
    ) from None
  if kind == 'AutoEncoderTopK':
    k = trainer.get('k')
    if type(k) is not int:
      raise npz.Refused(f'{npz.show(folder / CONFIG)} has no trainer.k.')
    params['k'] = np.float32(k)
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


def _params(kind: str, p: Mapping[str, np.ndarray]) -> member.Params:
  if kind == 'JumpReluAutoEncoder':
    return {key: p[key] for key in _KEYS[kind]} | {
      'threshold': np.maximum(p['threshold'], 0)
    }
  W_enc, b_dec = p['encoder.weight'].T, p.get('b_dec', p.get('bias'))
  b_enc = p['encoder.bias'] - b_dec @ W_enc
  threshold = np.zeros_like(b_enc)
  if kind == 'BatchTopKSAE':
    threshold = threshold + np.maximum(p['threshold'], 0)
  return {
    'W_enc': np.ascontiguousarray(W_enc),
    'b_enc': b_enc,
    'W_dec': np.ascontiguousarray(p['decoder.weight'].T),
    'b_dec': b_dec,
    'threshold': threshold,
  }


def _site(folder: pathlib.Path, trainer: Mapping[str, Any]) -> sites.Site:
  layer, name = trainer.get('layer'), str(trainer.get('submodule_name'))
  for start, kind in _KINDS.items():
    if name.startswith(start) and type(layer) is int and 0 <= layer < 1024:
      return sites.Site(layer, kind)
  raise npz.Refused(
    f'{npz.show(folder / CONFIG)} names the submodule {npz.show(name)} of '
    f'layer {npz.show(layer)}; expected {", ".join(_KINDS)} of a number.'
  )
