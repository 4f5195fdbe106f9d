"""Writes the fixtures beside it: small random SAEs, by the peers themselves.

  python tests/format_fixtures/make.py [FOLDER]      # sae-lens, eai-sparsify,
                                                     # dictionary-learning
  python tests/format_fixtures/make.py --apply FOLDER ...

Each folder is what a peer writes for an SAE, and expected.npz: x, and what the
peer makes of it, latents f and reconstruction y. With --apply, SAELens loads
each FOLDER (cfg.json, its weights, x.npz) and writes expected.npz there.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

import numpy as np
import torch

D, F, K, ROWS = 12, 32, 5, 64


def _randomise(module, generator):
  """Weights, biases and thresholds that all matter."""
  for name, p in module.named_parameters():
    scale = 0.5 if p.ndim == 2 else 0.2
    p.data = scale * torch.randn(p.shape, generator=generator)
    if 'threshold' in name:
      p.data = p.data.abs()


def saelens(folder, generator):
  from sae_lens import saes

  def places(kind):
    into = 'blocks.3.ln2.hook_normalized' if 'transcoder' in kind else None
    out = 'blocks.3.hook_mlp_out' if into else None
    return saes.sae.SAEMetadata(
      model_name='gemma-2-2b',
      hook_name=into or 'blocks.3.hook_resid_post',
      hook_name_out=out,
      hook_head_index=None,
    )

  transcoders = {
    'transcoder': (saes.Transcoder, saes.TranscoderConfig),
    'skip_transcoder': (saes.SkipTranscoder, saes.SkipTranscoderConfig),
    'jumprelu_transcoder': (
      saes.JumpReLUTranscoder,
      saes.JumpReLUTranscoderConfig,
    ),
    'jumprelu_skip_transcoder': (
      saes.transcoder.JumpReLUSkipTranscoder,
      saes.transcoder.JumpReLUSkipTranscoderConfig,
    ),
  }
  of = {
    'standard': (saes.StandardSAE, saes.StandardSAEConfig, {}),
    'jumprelu': (saes.JumpReLUSAE, saes.JumpReLUSAEConfig, {}),
    'gated': (saes.GatedSAE, saes.GatedSAEConfig, {}),
    'topk': (saes.TopKSAE, saes.TopKSAEConfig, {'k': K}),
    'topk_rescaled': (
      saes.TopKSAE,
      saes.TopKSAEConfig,
      {'k': K, 'rescale_acts_by_decoder_norm': True},
    ),
    'jumprelu_plain_input': (
      saes.JumpReLUSAE,
      saes.JumpReLUSAEConfig,
      {'apply_b_dec_to_input': False},
    ),
    **{
      name: (sae, config, {'d_out': D + 2, 'apply_b_dec_to_input': False})
      for name, (sae, config) in transcoders.items()
    },
  }
  for name, (sae_class, config_class, more) in of.items():
    config = config_class(d_in=D, d_sae=F, metadata=places(name), **more)
    sae = sae_class(config)
    _randomise(sae, generator)
    sae.save_model(folder / f'saelens_{name}')
    x = 2 * torch.randn(ROWS, D, generator=generator)
    _expected(folder / f'saelens_{name}', x, sae.encode(x), sae(x))


# cfg.json as SAELens wrote it before version 6, but for the sizes.
OLD = {
  'model_name': 'gemma-2-2b',
  'hook_name': 'blocks.3.hook_resid_post',
  'hook_layer': 3,
  'hook_head_index': None,
  'prepend_bos': True,
  'dataset_path': 'monology/pile-uncopyrighted',
  'context_size': 1024,
  'd_in': D,
  'd_sae': F,
  'device': 'cpu',
  'finetuning_scaling_factor': False,
}
LEGACY = {
  'v2_standard': {  # a runner's config; nothing on b_dec
    'model_name': 'gemma-2-2b',
    'hook_point': 'blocks.3.hook_resid_post',
    'hook_point_layer': 3,
    'hook_point_head_index': None,
    'd_in': D,
    'd_sae': F,
    'expansion_factor': 4,
    'l1_coefficient': 0.001,
    'lr': 0.0003,
    'use_ghost_grads': True,
    'normalize_activations': False,
    'dtype': 'torch.float32',
    'device': 'cpu',
  },
  'v3_standard': OLD
  | {
    'activation_fn_str': 'relu',
    'apply_b_dec_to_input': False,
    'normalize_activations': None,
    'sae_lens_training_version': '3.0.0',
    'dtype': 'float32',
  },
  'v3_topk': OLD
  | {
    'architecture': 'standard',
    'activation_fn_str': 'topk',
    'activation_fn_kwargs': {'k': K},
    'apply_b_dec_to_input': True,
    'normalize_activations': 'none',
    'sae_lens_training_version': '3.14.0',
    'dtype': 'float32',
  },
  'v5_topk': OLD
  | {
    'architecture': 'topk',
    'activation_fn': 'topk',
    'activation_fn_kwargs': {'k': K},
    'sae_lens_training_version': '5.0.0',
    'seqpos_slice': [None],
    'neuronpedia_id': None,
    'model_from_pretrained_kwargs': {},
    'dataset_trust_remote_code': True,
    'dtype': 'float32',
  },
  'v5_jumprelu': OLD
  | {
    'architecture': 'jumprelu',
    'activation_fn_str': 'relu',
    'activation_fn_kwargs': {},
    'apply_b_dec_to_input': False,
    'normalize_activations': 'none',
    'dtype': 'float32',
  },
  'v4_gated': OLD
  | {
    'architecture': 'gated',
    'activation_fn_str': 'relu',
    'activation_fn_kwargs': {},
    'apply_b_dec_to_input': True,
    'normalize_activations': 'none',
    'dtype': 'float32',
  },
}


def saelens_of_old(folder, generator):
  """Folders of past versions, as SAELens reads them today."""
  from sae_lens import SAE
  from safetensors.torch import save_file

  for name, config in LEGACY.items():
    at = folder / f'saelens_{name}'
    at.mkdir(parents=True)
    random = lambda *shape: torch.randn(shape, generator=generator)
    p = {'W_enc': 0.5 * random(D, F), 'W_dec': 0.5 * random(F, D)}
    p['b_dec'] = random(D)
    if 'gated' in name:
      p |= {key: 0.2 * random(F) for key in ('b_gate', 'b_mag', 'r_mag')}
    else:
      p['b_enc'] = 0.2 * random(F)
    if 'jumprelu' in name:
      p['threshold'] = random(F).abs()
    if name.startswith('v2'):
      p['scaling_factor'] = torch.ones(F)
    save_file(p, at / 'sae_weights.safetensors')
    (at / 'cfg.json').write_text(json.dumps(config))
    x = 2 * random(ROWS, D)
    sae = SAE.load_from_disk(at)
    _expected(at, x, sae.encode(x), sae(x))


def sparsify(folder, generator):
  os.environ['SPARSIFY_DISABLE_TRITON'] = '1'  # it needs a GPU
  from sparsify import SparseCoder, SparseCoderConfig

  for name, module, more in (
    ('sae', 'layers.3', {}),
    ('transcoder', 'layers.3.mlp', {'transcode': True}),
    ('skip', 'layers.3.mlp', {'transcode': True, 'skip_connection': True}),
  ):
    config = SparseCoderConfig(num_latents=F, k=K, **more)
    coder = SparseCoder(D, config)
    _randomise(coder, generator)
    at = folder / f'sparsify_{name}' / module
    coder.save_to_disk(at)
    x = 2 * torch.randn(ROWS, D, generator=generator)
    values, index, _ = coder.encode(x)
    f = torch.zeros(ROWS, F).scatter(1, index, values)
    y = coder.decode(values, index)
    _expected(at, x, f, y if coder.W_skip is None else y + x @ coder.W_skip.mT)


def dictionaries(folder, generator):
  from dictionary_learning import dictionary
  from dictionary_learning.trainers import (
    batch_top_k,
    matryoshka_batch_top_k,
    top_k,
  )
  from dictionary_learning.utils import load_dictionary
  from safetensors.torch import save_file

  for made in (
    dictionary.AutoEncoder(D, F),
    dictionary.GatedAutoEncoder(D, F),
    dictionary.JumpReluAutoEncoder(D, F),
    top_k.AutoEncoderTopK(D, F, K),
    batch_top_k.BatchTopKSAE(D, F, K),
    matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, F, K, [8, 8, 16]),
  ):
    _randomise(made, generator)
    if hasattr(made, 'threshold') and not made.threshold.ndim:
      made.threshold.fill_(0.4)
    name = type(made).__name__
    at = folder / f'dictionary_{name}'
    at.mkdir(parents=True)
    tensors = {k: v.contiguous() for k, v in made.state_dict().items()}
    save_file(tensors, at / 'ae.safetensors')
    trainer = {
      'dict_class': name,
      'layer': 3,
      'lm_name': 'google/gemma-2-2b',
      'submodule_name': 'resid_post_layer_3',
    }
    if hasattr(made, 'k'):
      trainer['k'] = K
    (at / 'config.json').write_text(json.dumps({'trainer': trainer}))
    torch.save(made.state_dict(), at / 'ae.pt')
    loaded, _ = load_dictionary(at, 'cpu')
    (at / 'ae.pt').unlink()
    x = 2 * torch.randn(ROWS, D, generator=generator)
    f = loaded.encode(x)
    _expected(at, x, f, loaded.decode(f))


def apply(folder):
  """What SAELens makes of x with the SAE in a folder, and its evaluation."""
  from sae_lens import SAE

  with np.load(folder / 'x.npz') as file:
    x = torch.from_numpy(file['x'])
  sae = SAE.load_from_disk(folder)
  _expected(folder, x, sae.encode(x), sae(x))
  found = {'metadata': sae.cfg.metadata.to_dict()}
  if sae.cfg.metadata.hook_name_out is None:  # its evals replace one site
    found['evals'] = _evals(sae)
  (folder / 'loaded.json').write_text(json.dumps(found))


def _evals(sae):
  """SAELens' own evaluation of an SAE in a small random model."""
  import types

  from datasets import Dataset
  from sae_lens import ActivationsStore, HookedSAETransformer
  from sae_lens.evals import EvalConfig, run_evals
  from sae_lens.training.activation_scaler import ActivationScaler
  from transformer_lens import HookedTransformerConfig

  model = HookedSAETransformer(
    HookedTransformerConfig(
      n_layers=4,
      d_model=D,
      n_ctx=16,
      d_head=4,
      n_heads=3,
      d_mlp=16,
      d_vocab=50,
      act_fn='relu',
      device='cpu',
    )
  )
  model.tokenizer = types.SimpleNamespace(
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    sep_token_id=None,
    cls_token_id=None,
    all_special_ids=[0, 1, 2],
    padding_side='right',
    model_max_length=16,
    name_or_path='small',
  )
  tokens = torch.randint(3, 50, (200, 16)).tolist()
  store = ActivationsStore.from_sae(
    model,
    sae,
    dataset=Dataset.from_list([{'tokens': row} for row in tokens]),
    streaming=False,
    store_batch_size_prompts=4,
    n_batches_in_buffer=4,
    train_batch_size_tokens=16,
    device='cpu',
    context_size=16,
  )
  config = EvalConfig(
    batch_size_prompts=4,
    n_eval_reconstruction_batches=3,
    n_eval_sparsity_variance_batches=3,
    compute_ce_loss=True,
    compute_sparsity_metrics=True,
  )
  return run_evals(
    sae, store, model, eval_config=config, activation_scaler=ActivationScaler()
  )[0]


def _expected(folder, x, f, y):
  arrays = {'x': x, 'f': f, 'y': y}
  arrays = {k: a.detach().numpy() for k, a in arrays.items()}
  np.savez_compressed(folder / 'expected.npz', **arrays)


def main(arguments):
  torch.manual_seed(0)
  with torch.no_grad():
    if arguments[:1] == ['--apply']:
      for folder in arguments[1:]:
        apply(pathlib.Path(folder))
      return
    folder = pathlib.Path(arguments[0] if arguments else __file__)
    folder = folder if folder.is_dir() else folder.parent
    generator = torch.Generator().manual_seed(0)
    for make in (saelens, sparsify, dictionaries, saelens_of_old):
      make(folder, generator)


if __name__ == '__main__':
  main(sys.argv[1:])
