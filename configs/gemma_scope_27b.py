"""Gemma Scope 1 on Gemma 2 27B (PT): arXiv 2408.05147 section 3, table 1.

  .venv/bin/python launch/train.py --workdir=/shared/27b \
      --config='configs/gemma_scope_27b.py:layers=22' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-27b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

  set    SAEs  chip-hours     GB
  131k     18       1,400    260

The one set of the paper: the residual stream of layers 10, 22 and 34 at 131k.
Chip-hours and GB of state: configs/suites.py; the model's pass adds 600 h for
8 B tokens, and its parameters in bfloat16 are 54 GB: 16 chips of 95 GB,
v5p:2x2x4 (gemma-scope compile-check --suites=gemma_scope_27b).

Published: the recipe of configs/gemma_scope_2b.py; 8 B tokens.
Chosen here: target L0 instead of a coefficient, the published L0 of layer 22
for all three. Layer 10 has 15,24,37,64,106,200, layer 34 21,38,72,155,333,785:
`layers=10;sparsity=15,24,...`.
"""

from ml_collections import ConfigDict

from configs import recipe, suites

SETS = ('131k',)


def get_config(argument: str | None = None) -> ConfigDict:
  _, argument = suites.choose(argument, 'set', SETS)
  config = recipe.gemma_scope_1('gemma2-27b')
  config.collection.layers = (10, 22, 34)
  config.collection.sites = ('resid_post',)
  config.collection.widths = (2**17,)
  config.collection.sparsity = (20.0, 31.0, 48.0, 82.0, 150.0, 290.0)
  suites.tokens(config, 8)
  return suites.finish(config, argument)
