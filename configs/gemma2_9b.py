"""Gemma Scope 1 on Gemma 2 9B (PT): arXiv 2408.05147, table 1.

  .venv/bin/python launch/train.py --workdir=/shared/run \
      --config='configs/gemma2_9b.py:layers=20;widths=16k,131k' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-9b \
      --config.lm.tokenizer=/data/tokenizer_gemma2.model \
      --config.text.store=/data/tokens

Without an argument: 16k and 131k at layer 20 and the paper's three sites, 30
SAEs from one forward pass. The paper has every layer (layers=0-41) at 16k and
131k, and all widths from 16k to 1m on the residual stream of layer 20. Expected
at layer 20 and 16k: FVU about 0.18 at L0 139 (third parties).

Hardware (arithmetic, not measured: 12 d F FLOPs a token and SAE, 200 TFLOP/s a
chip): one 131k SAE over 8 B tokens is 63 h of one chip; the paper's
ran at 45 ms a step on 8 TPU v3. State is 11 GB a SAE at 131k: 16 chips of
95 GB for the default, about 75 h.
What is published and what is a choice here: see configs/gemma2_2b.py.
"""

from ml_collections import ConfigDict

from configs import recipe
from gemma_scope import config as config_lib


def get_config(argument: str | None = None) -> ConfigDict:
  config = recipe.gemma_scope_1('gemma2-9b')
  config.collection.layers = (20,)
  config.collection.sites = ('attn_out', 'mlp_out', 'resid_post')
  config.collection.widths = (2**14, 2**17)
  config.mesh.latent = 4  # wide SAEs: latent-parallel
  return config_lib.apply_argument(config, argument)
