"""SAELens: cfg.json beside sae_weights.safetensors.

  standard, topk, jumprelu, gated; transcoder, skip_transcoder,
  jumprelu_transcoder, jumprelu_skip_transcoder
  (batchtopk and matryoshka are saved as jumprelu)

What is folded into the parameters, so that the functions of `sae` act the same:
  scale s of the activations      W_enc s, W_dec / s, b_dec / s
  b_dec off the input             b_enc - b_dec @ W_enc
  top-k by decoder norm n         W_enc n, b_enc n, W_dec / n
  gate                            W_enc e^r, b_enc = b_mag,
                                  threshold = b_mag - e^r b_gate
A skip is W_skip [d_out, d_in] there, x @ W_skip^T. Normalisation by each row's
own norm is not affine and is refused. Compared with sae-lens 6.54.12.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope import sites
from gemma_scope.release import npz, sae_folder
from gemma_scope.release.formats import hook_points, tensors

CONFIG, WEIGHTS = 'cfg.json', 'sae_weights.safetensors'
_SCALER = 'activation_scaler.json'
_AFFINE = ('W_enc', 'b_enc', 'W_dec', 'b_dec')
_KEYS = {
  'standard': _AFFINE,
  'topk': _AFFINE,
  'jumprelu': (*_AFFINE, 'threshold'),
  'gated': ('W_enc', 'W_dec', 'b_dec', 'b_gate', 'b_mag', 'r_mag'),
  'transcoder': _AFFINE,
  'skip_transcoder': (*_AFFINE, 'W_skip'),
  'jumprelu_transcoder': (*_AFFINE, 'threshold'),
  'jumprelu_skip_transcoder': (*_AFFINE, 'threshold', 'W_skip'),
}
_OPTIONAL = ('W_dec_norm',)


def is_there(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: pathlib.Path, path: str) -> tuple[sae_folder.Params, dict]:
  """Reads one SAE or transcoder; `path` names it."""
  config = tensors.read_json(folder / CONFIG)
  try:
    kind, card = _card(config, path)
    scale = _scale(folder, config)
  except npz.Refused as error:
    raise npz.Refused(f'{npz.show(folder / CONFIG)} {error}.') from None
  p = tensors.read(folder / WEIGHTS, required=_KEYS[kind], optional=_OPTIONAL)
  p.pop('W_dec_norm', None)
  try:
    return _folded(p, kind, config, scale), card
  except ValueError as error:  # of numpy: shapes that do not go together
    raise npz.Refused(
      f'{npz.show(folder / WEIGHTS)} has shapes that do not fit ({error}).'
    ) from None


def _folded(p, kind: str, config: Mapping[str, Any], scale: float):
  """Their parameters -> ours."""
  if kind == 'gated':
    gain = np.exp(p.pop('r_mag'))
    b_gate, b_mag = p.pop('b_gate'), p.pop('b_mag')
    # The gate opens where the magnitude's pre-activation is above this one.
    p |= {'W_enc': p['W_enc'] * gain, 'b_enc': b_mag}
    p['threshold'] = b_mag - gain * b_gate
  if kind == 'topk' and config.get('rescale_acts_by_decoder_norm'):
    norm = np.linalg.norm(p['W_dec'], axis=-1)
    p['W_enc'], p['b_enc'] = p['W_enc'] * norm, p['b_enc'] * norm
    p['W_dec'] = p['W_dec'] / np.maximum(norm, 1e-30)[:, None]
  if scale != 1:
    p['W_enc'] = p['W_enc'] * np.float32(scale)
    p['W_dec'], p['b_dec'] = (
      p[key] / np.float32(scale) for key in ('W_dec', 'b_dec')
    )
  if config.get('apply_b_dec_to_input', False):
    p['b_enc'] = p['b_enc'] - p['b_dec'] @ p['W_enc']
  p['threshold'] = np.maximum(p.get('threshold', np.zeros_like(p['b_enc'])), 0)
  if 'W_skip' in p:
    p['W_skip'] = p['W_skip'].T
  if kind == 'topk':
    p['k'] = np.float32(config['k'])
  return {
    key: np.array(p[key], order='C')
    for key in (*sae_folder.KEYS, *sae_folder.OPTIONAL_KEYS)
    if key in p
  }


def _card(config: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
  kind = config.get('architecture')
  if kind not in _KEYS:
    raise npz.Refused(
      f'is of architecture {npz.show(kind)}; those that can be read are '
      f'{", ".join(_KEYS)}'
    )
  if kind == 'topk' and type(config.get('k')) is not int:
    raise npz.Refused(f'has k = {npz.show(config.get("k"))}')
  of = config.get('metadata')
  of = {**config, **(of if isinstance(of, dict) else {})}  # before version 6
  reads = hook_points.parse(of.get('hook_name'))
  writes = reads
  if 'transcoder' in kind:
    writes = hook_points.parse(of.get('hook_name_out'))
  return kind, {
    'name': path,
    'type': 'sae' if reads == writes else 'transcoder',
    'sites': [str(reads)],
    'targets': [str(writes)],
    'model': str(of.get('model_name', ''))[:200],
    'architecture': kind.split('_')[0] if reads == writes else 'jumprelu',
  }


def _scale(folder: pathlib.Path, config: Mapping[str, Any]) -> float:
  """The factor on activations that the parameters were trained with."""
  how = config.get('normalize_activations', 'none')
  if how in ('none', None):
    return 1.0
  if how != 'expected_average_only_in':
    raise npz.Refused(
      f'normalises activations by {npz.show(how)}, which no affine map does'
    )
  found = config.get('norm_scaling_factor')
  if (folder / _SCALER).is_file():
    found = tensors.read_json(folder / _SCALER).get('scaling_factor')
  if not isinstance(found, int | float) or not 0 < found < 1e9:
    raise npz.Refused(
      f'scales activations by a factor that is neither in it '
      f'(norm_scaling_factor) nor in {_SCALER}'
    )
  return float(found)


def write(
  folder: pathlib.Path,
  params: Mapping[str, np.ndarray],
  card: Mapping[str, Any],
) -> None:
  """Writes one SAE or transcoder as jumprelu or topk.

  Args:
    folder: made here, with those above it.
    params, card: in this project's form.

  Raises:
    npz.Refused: the format has no such thing: several layers, a top-k
      transcoder, or a site without a name.
  """
  place = sites.wiring_of(card)
  if place.several:
    raise npz.Refused(f'is a {place.type}, and SAELens has single layers alone')
  itself, skip = place.type == 'sae', 'W_skip' in params
  if 'k' in params and not itself:
    raise npz.Refused('is a TopK transcoder, which SAELens has not')
  if 'k' in params and np.any(params['threshold'] > 0):
    raise npz.Refused('has both k and thresholds')
  kind = 'topk' if 'k' in params else 'jumprelu'
  if not itself:
    kind = 'jumprelu_skip_transcoder' if skip else 'jumprelu_transcoder'
  arrays = {key: params[key] for key in _KEYS[kind]}
  if skip:
    arrays['W_skip'] = params['W_skip'].T
  config = {
    'architecture': kind,
    'd_in': card['d_in'],
    'd_sae': card['width'],
    'dtype': 'float32',
    'device': 'cpu',
    'apply_b_dec_to_input': False,
    'normalize_activations': 'none',
    'reshape_activations': 'none',
    'metadata': {
      'model_name': card.get('model', ''),
      'hook_name': hook_points.of_transformer_lens(place.sites[0]),
      'hook_head_index': None,
      'prepend_bos': True,
      'trained_with': 'gemma_scope',
    },
  }
  if place.sites[0].kind == 'attn_out':
    config['reshape_activations'] = 'hook_z'
  if 'k' in params:
    config |= {'k': int(params['k']), 'rescale_acts_by_decoder_norm': False}
  if not itself:
    config['d_out'] = card['d_out']
    config['metadata']['hook_name_out'] = hook_points.of_transformer_lens(
      place.targets[0]
    )
  folder.mkdir(parents=True)
  tensors.write(folder / WEIGHTS, arrays)
  tensors.write_json(folder / CONFIG, config)
