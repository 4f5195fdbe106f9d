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
  """What SAELens makes of x with the SAE in a folder."""
  from sae_lens import SAE

  with np.load(folder / 'x.npz') as file:
    x = torch.from_numpy(file['x'])
  sae = SAE.load_from_disk(folder)
  _expected(folder, x, sae.encode(x), sae(x))


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
    for make in (saelens, sparsify, dictionaries):
      make(folder, generator)


if __name__ == '__main__':
  main(sys.argv[1:])
