"""dictionary_learning: config.json beside ae.pt, which is a pickle.

A pickle can run any code, so none is read. Convert its tensors once:

  import torch, safetensors.torch
  tensors = torch.load('ae.pt', weights_only=True)
  tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
  safetensors.torch.save_file(tensors, 'ae.safetensors')

Of config.json, `trainer` says class, layer and submodule. Linear layers have
[out, in] weights; the input's bias comes off before the encoder:

  AutoEncoder            f = relu(W (x - bias) + b), decoder.weight [D, F],
                         then latents in units of decoders of norm 1
  AutoEncoderTopK        the same with b_dec, and the k largest
  BatchTopKSAE           the same with b_dec, and a threshold
  MatryoshkaBatchTopKSAE the same, with W_enc [D, F] and W_dec [F, D]
  JumpReluAutoEncoder    W_enc [D, F], nothing off the input
  GatedAutoEncoder       a gate and a magnitude: folded into thresholds
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.release import sae_folder
from gemma_scope.release.formats import model_names, tensors

PICKLE, WEIGHTS, CONFIG = 'ae.pt', 'ae.safetensors', 'config.json'
_LINEAR = ('encoder.weight', 'encoder.bias', 'decoder.weight')
_PLAIN = ('W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold')
_KEYS = {
  'AutoEncoder': (*_LINEAR, 'bias'),
  'AutoEncoderTopK': (*_LINEAR, 'b_dec'),
  'BatchTopKSAE': (*_LINEAR, 'b_dec', 'threshold'),
  'MatryoshkaBatchTopKSAE': _PLAIN,
  'JumpReluAutoEncoder': _PLAIN,
  'GatedAutoEncoder': (
    'encoder.weight',
    'decoder.weight',
    'decoder_bias',
    'r_mag',
    'gate_bias',
    'mag_bias',
  ),
}
_OPTIONAL = ('k', 'threshold', 'group_sizes')
_WHOLE = ('k', 'group_sizes')
_ALIASES = {'MatroyshkaBatchTopKSAE': 'MatryoshkaBatchTopKSAE'}  # once misspelt
# Class, model, place and k are used; norm_factor is in the biases already; all
# else is of training.
_FIELDS = frozenset(
  """activation_dim activation_queue_length adaptive_sparsity_penalty
  anneal_end anneal_start auxk_alpha bandwidth compile dead_neuron_threshold
  decay_start device dict_class dict_size group_fractions group_sizes
  group_weights initial_sparsity_penalty k k_anneal_steps l1_penalty lambda
  lambda_warm_steps layer lm_name lr n_sparsity_updates next_p norm_factor p
  p_end p_start resample_steps seed sparsity_coeff sparsity_coefficient
  sparsity_function sparsity_loss_queue_length sparsity_penalty
  sparsity_queue_length sparsity_warmup_steps steps steps_before_annealing
  submodule_name target_l0 threshold_beta threshold_start_step top_k_aux
  trainer_class wandb_name warmup_steps weights_temperature""".split()
)
_KINDS = {
  'resid_post': 'resid_post',
  'mlp_out': 'mlp_raw',
  'attention_out': 'attn_raw',
}


def is_there(folder: pathlib.Path) -> bool:
  return (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file()


def read(
  folder: pathlib.Path, path: str
) -> tuple[dict[str, Any], Callable[[], sae_folder.Params]]:
  """One dictionary: its card, and a function that reads its parameters.

  Args:
    folder: holds config.json and the weights.
    path: its name.
  """
  file = folder / WEIGHTS
  if not file.is_file():
    raise files.Refused(
      f'{files.show(folder / PICKLE)} is a pickle, which can run any code and '
      f'is not read; write its tensors as {WEIGHTS} beside it (how: the head '
      'of gemma_scope/release/formats/dictionaries.py).'
    )
  config = tensors.read_json(folder / CONFIG)
  trainer = config.get('trainer')
  trainer = trainer if isinstance(trainer, dict) else {}
  kind = _ALIASES.get(trainer.get('dict_class'), trainer.get('dict_class'))
  with tensors.naming(folder / CONFIG):
    if kind not in _KEYS:
      raise files.Refused(
        f'has dict_class {files.show(kind)}; those that can be read are '
        f'{", ".join(_KEYS)}'
      )
    tensors.check_fields(trainer, _FIELDS, 'dictionary_learning')
    site = _site(trainer)
  optional = [key for key in _OPTIONAL if key not in _KEYS[kind]]
  arrays_wanted = {
    'required': _KEYS[kind],
    'optional': optional,
    'integers': _WHOLE,
  }
  shapes = tensors.shapes(file, **arrays_wanted)
  card = {
    'name': path,
    'type': 'sae',
    'sites': [str(site)],
    'targets': [str(site)],
    'model': model_names.ours(str(trainer.get('lm_name', ''))[:200]),
    'architecture': {'AutoEncoder': 'relu', 'AutoEncoderTopK': 'topk'}.get(
      kind, 'jumprelu'
    ),
    **_sizes(file, shapes),
  }
  return card, functools.partial(
    _params, file, kind, arrays_wanted, trainer.get('k')
  )


def _sizes(file: pathlib.Path, shapes) -> dict[str, int]:
  encoder = shapes.get('W_enc') or shapes['encoder.weight'][::-1]
  if len(encoder) != 2:
    raise files.Refused(f'{files.show(file)} has an encoder {encoder}.')
  return {'d_in': encoder[0], 'd_out': encoder[0], 'width': encoder[1]}


def _params(
  file: pathlib.Path, kind: str, arrays_wanted: Mapping[str, Any], k: Any
) -> sae_folder.Params:
  arrays = tensors.read(file, **arrays_wanted)
  if kind == 'AutoEncoderTopK':
    # Early files have no k; its place was the config alone.
    stored_k = arrays.setdefault('k', k)
    if (
      type(k) not in (int, type(None))
      or stored_k is None
      or k not in (None, stored_k)
    ):
      raise files.Refused(
        f'{files.show(file)} has k = {files.show(arrays.get("k"))}, and '
        f'{CONFIG} says {files.show(k)}.'
      )
    arrays['k'] = np.float32(stored_k)
  try:
    return _folded(kind, arrays)
  except ValueError as error:
    raise files.Refused(
      f'{files.show(file)} has shapes that do not fit ({error}).'
    ) from None


def _folded(kind: str, arrays: Mapping[str, np.ndarray]) -> sae_folder.Params:
  """Their parameters -> ours."""
  if kind in ('JumpReluAutoEncoder', 'MatryoshkaBatchTopKSAE'):
    params = {key: arrays[key] for key in _PLAIN}
    if kind == 'MatryoshkaBatchTopKSAE':
      params['b_enc'] = arrays['b_enc'] - arrays['b_dec'] @ arrays['W_enc']
  else:
    b_dec = arrays.get('b_dec', arrays.get('bias', arrays.get('decoder_bias')))
    params = {
      'W_enc': np.ascontiguousarray(arrays['encoder.weight'].T),
      'b_enc': arrays.get('encoder.bias'),
      'W_dec': np.ascontiguousarray(arrays['decoder.weight'].T),
      'b_dec': b_dec,
      'threshold': arrays['threshold']
      if kind == 'BatchTopKSAE'
      else np.zeros(()),
    }
    if kind == 'GatedAutoEncoder':
      gain = np.exp(arrays['r_mag'])
      params['W_enc'] = params['W_enc'] * gain
      params['b_enc'] = arrays['mag_bias']
      # The gate opens where the magnitude's pre-activation is above this one.
      params['threshold'] = arrays['mag_bias'] - gain * arrays['gate_bias']
    params['b_enc'] = params['b_enc'] - b_dec @ params['W_enc']
    if kind == 'AutoEncoder':  # its own loader gives decoders norm 1
      norm_F = np.linalg.norm(params['W_dec'], axis=1)
      params['W_enc'] = params['W_enc'] * norm_F
      params['b_enc'] = params['b_enc'] * norm_F
      params['W_dec'] = params['W_dec'] / np.maximum(norm_F, 1e-30)[:, None]
  threshold = np.maximum(params['threshold'], 0)
  params['threshold'] = threshold + np.zeros_like(params['b_enc'])
  if kind == 'AutoEncoderTopK':
    params['k'] = arrays['k']
  return params


def _site(trainer: Mapping[str, Any]) -> sites.Site:
  layer, name = trainer.get('layer'), str(trainer.get('submodule_name'))
  model = str(trainer.get('lm_name', ''))
  if name.startswith('mlp_out') and model_names.has_experts(model):
    raise files.Refused(
      f'is of the MLP of {files.show(model)}, which has experts beside it: the '
      'output of that branch alone is no site here'
    )
  for start, kind in _KINDS.items():
    if name.startswith(start) and type(layer) is int and 0 <= layer < 1024:
      return sites.Site(layer, kind)
  raise files.Refused(
    f'names the submodule {files.show(name)} of layer {files.show(layer)}; '
    f'expected {", ".join(_KINDS)} of a number'
  )
