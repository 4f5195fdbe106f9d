"""Gemma Scope 1's transcoders of Gemma 2 2B: arXiv 2408.05147, appendix B.

  .venv/bin/python launch/train.py --workdir=/shared/2b_transcoders \
      --config='configs/gemma_scope_transcoders.py:layers=12' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-2b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

  set    SAEs  chip-hours     GB
  16k     130         330    120

The one set: every layer's MLP, from its input after the norm without the gain
(mlp_in_ungained) to mlp_out, 16k. Chip-hours and GB of state:
configs/suites.py; the model's pass adds 29 h. 8 chips of 95 GB, v5p:2x2x2
(compile-check --suites=gemma_scope_transcoders).

Published: trained as the SAEs of mlp_out (configs/gemma_scope_2b.py), but W_enc
is not tied at the start, the encoder has no b_dec, and inputs and targets are
divided by sqrt(d). The architecture follows from collection.type.
Chosen here: the targets. One transcoder a layer is listed, of L0 5 to 95; these
five span that. 4 B tokens, as for 16k SAEs.
"""

from ml_collections import ConfigDict

from configs import recipe, suites

SETS = ('16k',)


def get_config(argument: str | None = None) -> ConfigDict:
  _, argument = suites.choose(argument, 'set', SETS)
  config = recipe.gemma_scope_1('gemma2-2b')
  config.collection.type = 'transcoder'
  config.collection.layers = tuple(range(26))
  config.collection.sites = ('mlp_in_ungained',)
  config.collection.widths = (2**14,)
  config.collection.sparsity = (6.0, 12.0, 25.0, 50.0, 100.0)
  config.activations.scale = 'sqrt_d'
  suites.tokens(config, 4)
  return suites.finish(config, argument)
