"""SAELens: cfg.json beside sae_weights.safetensors, of any version.

  standard, topk, jumprelu, gated; transcoder, skip_transcoder,
  jumprelu_transcoder, jumprelu_skip_transcoder
  (batchtopk and matryoshka are saved as jumprelu)

What is folded into the parameters, so that the functions of `sae` act the same:
  scale s of the activations      W_enc s, W_dec / s, b_dec / s
  b_dec off the input             b_enc - b_dec @ W_enc
  top-k by decoder norm n         W_enc n, b_enc n, W_dec / n
  gate                            W_enc e^r, b_enc = b_mag,
                                  threshold = b_mag - e^r b_gate
A skip is W_skip [d_out, d_in] there, x @ W_skip^T.

Before version 6 a top-k is written activation_fn (or activation_fn_str) 'topk'
with activation_fn_kwargs {'k': ...}, and normalize_activations may be a bool.
In every version b_dec comes off the input where the config does not say. Every
field is used, or has no part in what the SAE computes (`_NO_EFFECT`), or is
refused by its name. Compared with sae-lens 6.54.12.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.release import sae_folder
from gemma_scope.release.formats import hook_points, model_names, tensors

CONFIG, WEIGHTS = 'cfg.json', 'sae_weights.safetensors'
VERSION = '6.54.12'  # whose form is written
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
# Norms of a rescaled top-k, and a scale that old versions wrote as all ones.
_OPTIONAL = ('W_dec_norm', 'scaling_factor')
_RENAMED = {
  'hook_point': 'hook_name',
  'hook_point_head_index': 'hook_head_index',
  'hook_point_layer': 'hook_layer',
  'activation_fn_str': 'activation_fn',
}
_USED = frozenset(
  """activation_fn activation_fn_kwargs apply_b_dec_to_input architecture d_in
  d_out d_sae finetuning_scaling_factor hook_head_index hook_head_index_out
  hook_name hook_name_out k metadata model_name norm_scaling_factor
  normalize_activations rescale_acts_by_decoder_norm
  reshape_activations""".split()
)
# Of the text, of training and of files, in versions 0 to 6.
_NO_EFFECT = frozenset(
  """act_store_device adam_beta1 adam_beta2 autocast autocast_lm
  aux_loss_coefficient b_dec_init_method begin_batch_token
  begin_sequence_token buffer_size_gb cached_activations_path
  checkpoint_path column_name compile_llm compile_sae context_size
  data_dir data_files dataset_name dataset_path dataset_trust_remote_code
  dead_feature_threshold dead_feature_window decoder_heuristic_init
  decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init
  device disable_concat_sequences dtype eval_batch_size_prompts
  eval_every_n_wandb_logs exclude_special_tokens expansion_factor
  feature_sampling_window finetuning_method finetuning_tokens
  from_pretrained_path hf_hook_name hf_hook_name_out hf_is_private_repo
  hf_num_shards hf_repo_id hf_revision hook_eval hook_layer hook_layer_out
  hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
  jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode
  jumprelu_ste_to_input jumprelu_tanh_scale k_aux l0_coefficient
  l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode
  log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb
  logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name
  lr_warm_up_steps matryoshka_widths model_batch_size model_class_name
  model_from_pretrained_kwargs model_kwargs mse_loss_normalization
  n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles
  neuronpedia_id new_cached_activations_path noise_scale
  normalize_sae_decoder num_proc output_path pre_act_loss_coefficient
  prepend_bos pretokenize_batch_size resume resume_from_checkpoint
  run_name sae_compilation_mode sae_lens_training_version sae_lens_version
  save_path scale_sparsity_penalty_by_decoder_norm seed seqpos_slice
  sequence_separator_token shuffle shuffle_every_n_buffers split
  store_batch_size store_batch_size_prompts streaming target_l0
  tokenizer_name tokens_per_buffer topk_threshold_lr total_training_steps
  total_training_tokens train_batch_size train_batch_size_samples
  train_batch_size_tokens training_tokens use_cached_activations
  use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose
  wandb_entity wandb_id wandb_log_frequency wandb_project
  warm_up_steps""".split()
)


def is_there(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(
  folder: pathlib.Path, path: str
) -> tuple[dict[str, Any], Callable[[], sae_folder.Params]]:
  """One SAE or transcoder: its card, and a function that reads its parameters.

  Args:
    folder: holds cfg.json and the weights.
    path: its name.
  """
  with tensors.naming(folder / CONFIG):
    config = _config(tensors.read_json(folder / CONFIG))
    kind, card = _card(config, path)
    scale = _scale(folder, config)
  file = folder / WEIGHTS
  shapes = tensors.shapes(file, required=_KEYS[kind], optional=_OPTIONAL)
  with tensors.naming(file):
    card |= _sizes(shapes, config)
  return card, functools.partial(_params, file, kind, config, scale)


def _sizes(shapes, config: Mapping[str, Any]) -> dict[str, Any]:
  """Sizes from the shapes, which the config must agree with."""
  W_enc, W_dec = shapes['W_enc'], shapes['W_dec']
  if len(W_enc) != 2 or len(W_dec) != 2 or W_enc[::-1] != W_dec[:1] + W_enc[:1]:
    transposed = ', transposed' if W_dec[::-1][:1] == W_enc[-1:] else ''
    raise files.Refused(
      f'has W_enc {W_enc} and W_dec {W_dec}{transposed}; expected [d_in, F] '
      'and [F, d_out]'
    )
  sizes = {'d_in': W_enc[0], 'd_out': W_dec[1], 'width': W_enc[1]}
  for saelens_key, own_key in {
    'd_in': 'd_in',
    'd_out': 'd_out',
    'd_sae': 'width',
  }.items():
    if config.get(saelens_key, sizes[own_key]) not in (sizes[own_key], None):
      raise files.Refused(
        f'has {own_key} {sizes[own_key]}, and {CONFIG} says {saelens_key} = '
        f'{files.show(config[saelens_key])}'
      )
  return sizes | ({'affine': True} if 'W_skip' in shapes else {})


def _params(
  file: pathlib.Path, kind: str, config: Mapping[str, Any], scale: float
) -> sae_folder.Params:
  params = tensors.read(file, required=_KEYS[kind], optional=_OPTIONAL)
  params.pop('W_dec_norm', None)
  with tensors.naming(file):
    if np.any(params.pop('scaling_factor', 1) != 1):
      raise files.Refused('has scaling_factor, a finetuning that is not read')
    try:
      return _folded(params, kind, config, scale)
    except files.Refused:
      raise
    except ValueError as error:  # of numpy: shapes that do not go together
      raise files.Refused(f'has shapes that do not fit ({error})') from None


def _folded(params, kind: str, config: Mapping[str, Any], scale: float):
  """Their parameters -> ours."""
  if kind == 'gated':
    gain = np.exp(params.pop('r_mag'))
    b_gate, b_mag = params.pop('b_gate'), params.pop('b_mag')
    # The gate opens where the magnitude's pre-activation is above this one.
    params |= {'W_enc': params['W_enc'] * gain, 'b_enc': b_mag}
    params['threshold'] = b_mag - gain * b_gate
  if kind == 'topk' and config['rescale_acts_by_decoder_norm']:
    norm = np.linalg.norm(params['W_dec'], axis=-1)
    params['W_enc'], params['b_enc'] = (
      params['W_enc'] * norm,
      params['b_enc'] * norm,
    )
    params['W_dec'] = params['W_dec'] / np.maximum(norm, 1e-30)[:, None]
  if scale != 1:
    params['W_enc'] = params['W_enc'] * np.float32(scale)
    params['W_dec'], params['b_dec'] = (
      params[key] / np.float32(scale) for key in ('W_dec', 'b_dec')
    )
  if config['apply_b_dec_to_input']:
    params['b_enc'] = params['b_enc'] - params['b_dec'] @ params['W_enc']
  params['threshold'] = np.maximum(
    params.get('threshold', np.zeros_like(params['b_enc'])), 0
  )
  if 'W_skip' in params:
    params['W_skip'] = params['W_skip'].T
  if kind == 'topk':
    params['k'] = np.float32(config['k'])
  return {
    key: np.array(params[key], order='C')
    for key in (*sae_folder.KEYS, *sae_folder.OPTIONAL_KEYS)
    if key in params
  }


def _config(stored: dict[str, Any]) -> dict[str, Any]:
  """A config of any version -> the names and defaults of version 6."""
  metadata = stored.get('metadata')
  metadata = metadata if isinstance(metadata, dict) else {}
  # Before version 6 there is no metadata: its fields stand beside the others.
  flat = {_RENAMED.get(key, key): value for key, value in stored.items()}
  tensors.check_fields(flat, _USED | _NO_EFFECT, f'SAELens up to {VERSION}')
  config = {
    'architecture': 'standard',
    'apply_b_dec_to_input': True,
    'rescale_acts_by_decoder_norm': False,
    'activation_fn': 'relu',
    **flat,
    **{key: metadata[key] for key in _USED & set(metadata)},
  }
  for key in ('apply_b_dec_to_input', 'rescale_acts_by_decoder_norm'):
    if type(config[key]) is not bool:
      raise files.Refused(f'has {key} = {files.show(config[key])}')
  _activation(config)
  normalisation = config.get('normalize_activations')
  renamed = {True: 'expected_average_only_in', False: 'none', None: 'none'}
  is_name = isinstance(normalisation, str)
  config['normalize_activations'] = (
    normalisation if is_name else renamed.get(normalisation, normalisation)
  )
  if config.get('finetuning_scaling_factor'):
    raise files.Refused('has finetuning_scaling_factor, which is not read')
  for key in ('hook_head_index', 'hook_head_index_out'):
    if config.get(key) is not None:
      raise files.Refused(
        f'has {key} = {files.show(config[key])}: an SAE of one attention head, '
        'and only SAEs of all heads together can be read'
      )
  return config


def _activation(config: dict[str, Any]) -> None:
  """Sets architecture and k where activation_fn names a top-k."""
  name, arguments = (
    config['activation_fn'],
    config.get('activation_fn_kwargs') or {},
  )
  if name == 'topk' and config['architecture'] in ('standard', 'topk'):
    extra = {
      key: value for key, value in arguments.items() if key != 'k' and value
    }
    if extra:
      raise files.Refused(
        f'has activation_fn_kwargs {files.show(extra)}; a TopK with only k can '
        'be read'
      )
    config['architecture'] = 'topk'
    config['k'] = arguments.get('k', config.get('k'))
  elif name not in ('relu', None) or arguments:
    raise files.Refused(
      f'is {files.show(config["architecture"])} with activation_fn '
      f'{files.show(name)} {files.show(arguments) if arguments else ""}; those '
      'that '
      'can be read are relu, and topk with {"k": ...} of a standard SAE'
    )


def _card(config: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
  kind = config['architecture']
  if kind not in _KEYS:
    raise files.Refused(
      f'is of architecture {files.show(kind)}; those that can be read are '
      f'{", ".join(_KEYS)}'
    )
  if kind == 'topk' and type(config.get('k')) is not int:
    raise files.Refused(f'has k = {files.show(config.get("k"))}')
  model = str(config.get('model_name', ''))[:200]
  site_read = hook_points.parse(config.get('hook_name'), model)
  site_written = site_read
  if 'transcoder' in kind:
    site_written = hook_points.parse(config.get('hook_name_out'), model)
  shape = config.get('reshape_activations', 'none')
  if shape != 'none' and (shape != 'hook_z' or site_read.kind != 'attn_out'):
    raise files.Refused(f'has reshape_activations {files.show(shape)}')
  card = {
    'name': path,
    'type': 'sae' if site_read == site_written else 'transcoder',
    'sites': [str(site_read)],
    'targets': [str(site_written)],
    'model': model_names.ours(model),
    'architecture': kind.split('_')[0]
    if site_read == site_written
    else 'jumprelu',
  }
  if kind == 'topk':
    card['sparsity'] = {'kind': 'k', 'value': config['k']}
  return kind, card


def _scale(folder: pathlib.Path, config: Mapping[str, Any]) -> float:
  """The factor on activations that the parameters were trained with."""
  normalisation = config['normalize_activations']
  if normalisation == 'none':
    return 1.0
  if normalisation != 'expected_average_only_in':
    raise files.Refused(
      f'normalises activations by {files.show(normalisation)}, which no affine '
      'map does'
    )
  factor = config.get('norm_scaling_factor')
  if (folder / _SCALER).is_file():
    factor = tensors.read_json(folder / _SCALER).get('scaling_factor')
  if not isinstance(factor, int | float) or not 0 < factor < 1e9:
    raise files.Refused(
      f'scales activations by a factor that is neither in it '
      f'(norm_scaling_factor) nor in {_SCALER}'
    )
  return float(factor)


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
    files.Refused: the format has no such thing: several layers, a top-k
      transcoder, or a site without a name.
  """
  wiring = sites.wiring_of(card)
  if wiring.several:
    raise files.Refused(
      f'is a {wiring.type}, and SAELens has single layers alone'
    )
  writes_input, skip = wiring.type == 'sae', 'W_skip' in params
  if 'k' in params and not writes_input:
    raise files.Refused('is a TopK transcoder, which SAELens has not')
  if 'k' in params and np.any(params['threshold'] > 0):
    raise files.Refused('has both k and thresholds')
  kind = 'topk' if 'k' in params else 'jumprelu'
  if not writes_input:
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
      'model_name': model_names.to_transformer_lens(card.get('model', '')),
      'hook_name': hook_points.of_transformer_lens(wiring.sites[0]),
      'hook_head_index': None,
      'prepend_bos': True,
      'trained_with': 'gemma_scope',
      # Without a version SAELens takes a config for an old one, and drops this.
      'sae_lens_version': VERSION,
      'sae_lens_training_version': None,
    },
  }
  if wiring.sites[0].kind == 'attn_out':
    config['reshape_activations'] = 'hook_z'
  if 'k' in params:
    config |= {'k': int(params['k']), 'rescale_acts_by_decoder_norm': False}
  if not writes_input:
    config['d_out'] = card['d_out']
    config['metadata']['hook_name_out'] = hook_points.of_transformer_lens(
      wiring.targets[0]
    )
  folder.mkdir(parents=True)
  tensors.write(folder / WEIGHTS, arrays)
  tensors.write_json(folder / CONFIG, config)
