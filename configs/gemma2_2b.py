"""Gemma Scope 1 on Gemma 2 2B (PT): arXiv 2408.05147 section 3, table 1.

  .venv/bin/python launch/train.py --workdir=/shared/run \
      --config='configs/gemma2_2b.py:layers=12,20;widths=16k,65k' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-2b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

Without an argument: the 16k and 65k SAEs of the paper's three sites at layer
12, five sparsities each, 30 SAEs from one forward pass. Any collection is a
choice of layers=0-25; sites=...; widths=16k,32k,...,1m; penalty=l0 with
sparsity=6e-4,1e-3 is the paper's linear penalty.

Hardware (arithmetic, not measured: 12 d F FLOPs a token and SAE, at 200
TFLOP/s a chip): 8 TPU v5p or H100 for the default, about 50 h for 8 B tokens;
one layer at 16k and 4 B tokens is 2.5 h of one chip a SAE plus 1.5 h of the
language model. State is 12 bytes a parameter: 0.9 GB at 16k, 3.6 GB at 65k.
Expected, from the published releases at layer 12 (16k): L0 22 to 445; at L0
176 FVU is about 0.16 and delta loss 0.06 nats (measured by third parties).

Published: batch 4096, Adam (0, 0.999), eps 1e-8, learning rate 7e-5 with 1000
steps of cosine warm-up from a tenth and no decay, sparsity warm-up 10,000
steps, theta and bandwidth 0.001, 4 B tokens at 16k and 8 B above (16 B at 1m),
chunks of about 10^6 rows, float32. Not published, so a choice here: the
training sequence length (1024, the evaluation's), the text (the paper's is
Gemma's own), the coefficient of each released SAE (hence target L0).
"""

from ml_collections import ConfigDict

from configs import recipe
from gemma_scope import config as config_lib


def get_config(argument: str | None = None) -> ConfigDict:
  config = recipe.gemma_scope_1('gemma2-2b')
  config.collection.layers = (12,)
  config.collection.widths = (2**14, 2**16)
  return config_lib.apply_argument(config, argument)
