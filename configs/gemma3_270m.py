"""Gemma Scope 2's four-layer set on Gemma 3 270M (PT).

  .venv/bin/python launch/train.py --workdir=/shared/run \
      --config=configs/gemma3_270m.py \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma3-270m \
      --config.lm.tokenizer=/data/tokenizer_gemma3.model \
      --config.text.store=/data/tokens

Layers 5, 9, 12 and 15 (25, 50, 65 and 85 % of the depth), three sites,
16k, 65k and 262k, target L0 10, 50 and 150: 108 SAEs, selected further by
`:layers=...;widths=...`. d = 640; by arithmetic (12 d F FLOPs a
token and SAE, 200 TFLOP/s a chip, 8 B tokens) about 1,057 chip-hours.
Architecture and targets are published, the token count, the Matryoshka prefixes
and the frequency penalty are not (see configs/recipe.py): these SAEs are
JumpReLU with the target form of the JumpReLU paper.
"""

from ml_collections import ConfigDict

from configs import recipe
from gemma_scope import config as config_lib


def get_config(argument: str | None = None) -> ConfigDict:
  config = recipe.gemma_scope_2('gemma3-270m', (5, 9, 12, 15))
  config.mesh.latent = 1  # wide SAEs: latent-parallel
  return config_lib.apply_argument(config, argument)
