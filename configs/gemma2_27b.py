"""Gemma Scope 1 on Gemma 2 27B (PT): arXiv 2408.05147, table 1.

  .venv/bin/python launch/train.py --workdir=/shared/run \
      --config='configs/gemma2_27b.py:layers=22' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-27b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

The paper's set: the residual stream of layers 10, 22 and 34 at 131k. Published
L0 are 15 to 785.

Hardware (arithmetic, not measured: 12 d F FLOPs a token and SAE, 200 TFLOP/s a
chip): one SAE over 8 B tokens is 80 h of one chip; the model in
bfloat16 is 54 GB, sharded over the same mesh. 32 chips for the default's 15
SAEs, about 60 h with the model's own pass.
What is published and what is a choice here: see configs/gemma2_2b.py.
"""

from ml_collections import ConfigDict

from configs import recipe
from gemma_scope import config as config_lib


def get_config(argument: str | None = None) -> ConfigDict:
  config = recipe.gemma_scope_1('gemma2-27b')
  config.collection.layers = (10, 22, 34)
  config.collection.sites = ('resid_post',)
  config.collection.widths = (2**17,)
  config.mesh.latent = 8  # wide SAEs: latent-parallel
  return config_lib.apply_argument(config, argument)
