"""Anthropic's recipe of January 2025 for JumpReLU, on Gemma 2 2B.

  .venv/bin/python launch/train.py --workdir=/shared/anthropic \
      --config='configs/anthropic_jan_2025.py:layers=12' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-2b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

  set    SAEs  chip-hours     GB
  16k       3          15      3

For comparison with Gemma Scope's SAEs at several L0; not a published suite.
Chip-hours and GB of state: configs/suites.py; the model's pass adds 58 h.
For v5p:2x2x1 (gemma-scope compile-check --suites=anthropic_jan_2025).

  L' = |x' - x_hat'|^2 + A sum_i tanh(4 f'_i n_i)
       + B sum_i max(theta'_i - z'_i, 0) n_i          n_i = |W_dec[i]|, free

Their x' has the mean norm sqrt(n), n = 2304 here; ours is x = x' / sqrt(n).
With the same weights, f, z, theta and the biases are sqrt(n) times smaller, so
  L = L' / n = |x - x_hat|^2 + (A / n) sum_i tanh(4 sqrt(n) f_i n_i)
               + (B / sqrt(n)) sum_i max(theta_i - z_i, 0) n_i
  theta_0 = 0.1 / sqrt(n)    bandwidth = 2 / sqrt(n)    clip and eps: / n
(a gradient in the weights is n times smaller, and Adam's step the same).

Published: A = 10 to 20, rising over the whole run, B = 3e-6, the constants
above, a straight-through gradient to all parameters, learning rate 2e-4 without
warm-up and linear to 0 over the last 20 %, batch 32,768, gradients clipped at
norm 1. Taken from excerpts and from others' code beside the original.
Guesses: 8 B tokens, no b_dec in the encoder, Adam's eps, sites, widths.
Not known: their Adam's beta1 and beta2 (0 and 0.999 here). Not implemented: the
initial values (W_dec uniform within 1 / sqrt(n), W_enc = n / F of it, b_enc set
from data so that each latent fires on 10,000 / F of rows; here unit decoders,
tied, and 0), the mean norm as the scale (here its root mean square). Relative
to the other parameters, biases move sqrt(n) times faster than theirs.
"""

import math

from ml_collections import ConfigDict

from configs import recipe, suites

SETS = ('16k',)
N = 2304  # of the sites that have the width of Gemma 2 2B's residual stream


def get_config(argument: str | None = None) -> ConfigDict:
  _, argument = suites.choose(argument, 'set', SETS)
  config = recipe.gemma_scope_1('gemma2-2b')
  config.collection.layers = (12,)
  config.collection.sites = ('resid_post',)
  config.collection.widths = (2**14,)
  config.collection.penalty = 'tanh'
  config.collection.sparsity = (10 / N, 14 / N, 20 / N)
  config.sae.initial_threshold = 0.1 / math.sqrt(N)
  config.sae.bandwidth = 2 / math.sqrt(N)
  config.sae.ste_to_input = True
  config.sae.pre_encoder_bias = False
  config.sae.unit_decoder = False
  config.objective.tanh_scale = 4 * math.sqrt(N)
  config.objective.pre_act = 3e-6 / math.sqrt(N)
  config.train.batch = 32_768
  suites.tokens(config, 8)
  config.train.learning_rate = 2e-4
  config.train.warm_up = 0
  config.train.decay = config.train.steps // 5
  config.train.sparsity_warm_up = config.train.steps
  config.train.clip = 1 / N
  config.train.eps = 1e-8 / N
  return suites.finish(config, argument)
