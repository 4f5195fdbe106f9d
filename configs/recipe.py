"""The papers' complete recipes; a suite's file chooses which SAEs to train.

configs/tiny.py documents the fields. Comments mark what is not from the papers.
"""

from __future__ import annotations

from ml_collections import ConfigDict

SITES = ('attn_out', 'mlp_out', 'resid_post')


def gemma_scope_1(model: str) -> ConfigDict:
  """Gemma Scope 1's recipe (arXiv 2408.05147 section 3.2) for `model`."""
  return ConfigDict(
    {
      'seed': 0,
      'lm': {
        'name': model,
        'checkpoint': '',
        'tokenizer': '',
        'dtype': 'bfloat16',
        'second': {'name': '', 'checkpoint': ''},
      },
      'text': {
        'source': '',  # a store by launch/prepare_text.py is expected
        'column': '',
        'store': '',
        'seq_len': 1024,  # not published; the paper evaluates at 1024
      },
      'mesh': {'sae': 0, 'data': 0, 'latent': 0},  # chosen for the devices
      'activations': {
        'store': '',
        'chunk_rows': 10**6,
        'lm_batch': 32,  # not published
        'dtype': 'bfloat16',  # the paper stores float32
        'centre': 'none',
        'scale': 'rms',
        'max_norm': 0.0,
        'memory': 'auto',
        'ahead': 'auto',
      },
      'collection': {
        'layers': (0,),
        'sites': SITES,
        'widths': (2**14,),
        'type': 'sae',
        'skip': False,
        'architectures': ('jumprelu',),
        'penalty': 'target_l0',  # the paper's is l0, its coefficients unknown
        'sparsity': (20.0, 40.0, 80.0, 160.0, 320.0),
        'seeds': (0,),
        'nulls': (),
      },
      'sae': {
        'bandwidth': 0.001,
        'initial_threshold': 0.001,
        'log_threshold': True,
        'ste_to_input': False,
        'pre_encoder_bias': True,
        'unit_decoder': True,
        'matryoshka': (0.0625, 0.125, 0.25, 0.5, 1.0),  # not published
        'matmul_dtype': 'float32',
      },
      'objective': {
        'strength': 1.0,
        'prefactor': 2.0,
        'p0': 0.01,
        'tanh_scale': 4.0,
        'frequency': 0.0,
        'frequency_limit': 0.1,
        'pre_act': 0.0,
        'auxk': 0.0,
        'auxk_latents': 0,
        'active_set': False,
      },
      'initialise': {'release': '', 'layer': -1, 'whitening': 0.0},
      'end_to_end': {'beta': 0.0, 'sequences': 4},
      'train': {
        'steps': 1_953_125,  # see suites.tokens
        'batch': 4096,
        'learning_rate': 7e-5,
        'warm_up': 1000,
        'decay': 0,
        'sparsity_warm_up': 10_000,
        'initial_l0': 0.0,
        'l0_steps': 0,
        'threshold_rate': 1.0,
        'b1': 0.0,
        'b2': 0.999,
        'eps': 1e-8,
        'clip': 0.0,
        'theta_decay': 0.999,
        'adaptive_rate': 0.001,
        'dead_after': 10_000_000,
        'resample_every': 0,
        'meet_l0': False,
        'refit_decoders': False,
        'closing_batches': 64,
        'active_limit': 0,  # as the papers'; not tried on a TPU
      },
      'checkpoint': {'every': 5_000, 'keep': 3},
      'metrics': {'every': 100, 'tensorboard': True, 'wandb_project': ''},
      'evaluation': {'sequences': 2048, 'batch': 16, 'loss_every': 1},
    }
  )


def gemma_scope_2(model: str) -> ConfigDict:
  """Gemma Scope 2's changes; see configs/gemma_scope_2.py on what is ours."""
  config = gemma_scope_1(model)
  config.collection.architectures = ('matryoshka_jumprelu',)
  config.collection.penalty = 'quadratic_l0'
  config.objective.prefactor = 0.5
  config.objective.strength = 0.1
  config.objective.frequency = 0.01
  config.train.sparsity_warm_up = 50_000
  return config


def batch_topk(config: ConfigDict, prefix: str = '') -> None:
  """Trains BatchTopK, released as JumpReLU: k is the target L0."""
  config.collection.architectures = (f'{prefix}batch_topk',)
  config.collection.penalty = 'target_l0'
  config.objective.frequency = 0.0  # acts on trained thresholds
