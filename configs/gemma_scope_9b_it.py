"""Gemma Scope 1 on Gemma 2 9B IT: arXiv 2408.05147 section 4.5, table 1.

  .venv/bin/python launch/prepare_rollouts.py --prompts=oasst1.jsonl.gz \
      --model=gemma2-9b --checkpoint=/data/gemma2-9b-it --dtype=bfloat16 \
      --tokenizer=/data/tokenizer_gemma2.model --out=/data/chats
  .venv/bin/python launch/train.py --workdir=/shared/9b_it_16k \
      --config='configs/gemma_scope_9b_it.py:set=16k' \
      --config.lm.checkpoint=/data/gemma2-9b-it \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/chats

  set    SAEs  chip-hours     GB
  16k      15          59     21
  131k     15         940    170

Sets: the residual stream of layers 9, 20 and 31. Chip-hours and GB of state:
configs/suites.py; the model's pass adds 104 h for each 4 B tokens. 16k fits
one chip of 95 GB, 131k 8 of them, v5p:2x2x2 (gemma-scope compile-check
--suites=gemma_scope_9b_it).

Published: see configs/gemma_scope_2b.py, the recipe is the same; the SAEs start
at random (--config.initialise.release starts from those of 9B PT); positions of
the user's turn are left out, which the chat store sees to.
Chosen here: the text. The paper wraps its pre-training documents as prompts;
here the model answers the prompts of a file, and the answers are trained on.
4 B tokens of answers are many: with fewer the store is read again. Target L0
instead of a coefficient, the published L0 of layer 20 for all three layers.
"""

from ml_collections import ConfigDict

from configs import recipe, suites
from gemma_scope import sites

SETS = {  # width: target L0, billions of tokens
  '16k': ((14, 25, 47, 91, 189), 4),
  '131k': ((13, 24, 43, 81, 153), 8),
}


def get_config(argument: str | None = None) -> ConfigDict:
  name, argument = suites.choose(argument, 'set', SETS)
  l0, billions = SETS[name]
  config = recipe.gemma_scope_1('gemma2-9b')
  config.collection.layers = (9, 20, 31)
  config.collection.sites = ('resid_post',)
  config.collection.widths = (sites.parse_width(name),)
  config.collection.sparsity = tuple(map(float, l0))
  suites.tokens(config, billions)
  return suites.finish(config, argument)
