"""Gemma Scope 1 on Gemma 2 2B (PT): arXiv 2408.05147 section 3, table 1.

  .venv/bin/python launch/train.py --workdir=/shared/2b_16k \
      --config='configs/gemma_scope_2b.py:set=16k;layers=12' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-2b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

  set    SAEs  chip-hours     GB
  16k     390         950    340
  65k     390       7,600  1,400
  32k       6          60     11
  131k      6         240     43
  262k      6         480     87
  524k      6         970    170
  1m       18      12,000  1,000

Sets: 16k and 65k are all 26 layers of three sites; 32k to 524k the residual
stream of layer 12, 1m that of layers 5, 12 and 19. Chip-hours and GB of state:
configs/suites.py; the model's pass adds 29 h for each 4 B tokens. So 16k at one
layer, the command above, fits 1 chip of 95 GB in 36 h, and 16k whole takes 8 or
more, a third of the layers (layers=0-8) at a time. docs/scale.md has
the memory of the sets on v5p:2x2x4 (compile-check --suites=gemma_scope_2b).

Published: architecture, batch 4096, Adam (0, 0.999), eps 1e-8, rate 7e-5 after
1000 steps of cosine warm-up, no decay, sparsity warm-up 10,000 steps, theta and
bandwidth 0.001, 4 B tokens for 16k, 16 B for 1m, 8 B else, chunks of about 10^6
rows; the L0 that came out (an average_l0 in each file's name).
Chosen here: the paper swept the coefficient of a linear penalty (at 6e-4 L0 is
about 50 at layer 20 of 9B; `penalty=l0;sparsity=6e-4`) and does not say which
released SAE has which; ours are given the published L0 of layer 12 as targets,
at all layers and sites. Layer 5 at 1m has 9,13,21,36,63,114, layer 19
16,18,29,50,88,157: `set=1m;layers=5;sparsity=9,13,...`. Text (theirs is Gemma's
own), sequence length (1024) and bfloat16 rows are guesses or savings.
Expected at layer 12, 16k, L0 176: FVU about 0.16, delta loss 0.06 nats
(measured by third parties).
"""

from ml_collections import ConfigDict

from configs import recipe, suites
from gemma_scope import sites

ALL = tuple(range(26))
SETS = {  # width: layers, sites, target L0, billions of tokens
  '16k': (ALL, recipe.SITES, (22, 41, 82, 176, 445), 4),
  '65k': (ALL, recipe.SITES, (21, 38, 72, 141, 297), 8),
  '32k': ((12,), ('resid_post',), (12, 22, 40, 76, 155, 360), 8),
  '131k': ((12,), ('resid_post',), (12, 20, 36, 67, 129, 264), 8),
  '262k': ((12,), ('resid_post',), (11, 21, 36, 67, 121, 243), 8),
  '524k': ((12,), ('resid_post',), (22, 29, 46, 65, 115, 227), 8),
  '1m': ((5, 12, 19), ('resid_post',), (19, 26, 58, 73, 107, 207), 16),
}


def get_config(argument: str | None = None) -> ConfigDict:
  name, argument = suites.choose(argument, 'set', SETS)
  layers, kinds, l0, billions = SETS[name]
  config = recipe.gemma_scope_1('gemma2-2b')
  config.collection.layers = layers
  config.collection.sites = kinds
  config.collection.widths = (sites.parse_width(name),)
  config.collection.sparsity = tuple(map(float, l0))
  suites.tokens(config, billions)
  return suites.finish(config, argument)
