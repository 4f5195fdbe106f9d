"""Two models of one shape, compared by crosscoders: pre-trained against tuned.

  .venv/bin/python launch/diffing.py --config=configs/diffing.py \
      --workdir=runs/diffing --config.lm.second.checkpoint=/data/gemma-3-270m-it

  set    SAEs  chip-hours     GB
  short     1           0      0

model=gemma3-270m (two cores, not measured) or tiny, the embedded model. Until
lm.second.checkpoint names another, the second model is the first itself: a
control, in which no latent should be specific. For other sizes --config.lm.name
and --config.lm.checkpoint name the first model.

A BatchTopK crosscoder (arXiv 2504.02922: under an L1 penalty many more latents
look exclusive) of the residual stream in the middle of the model. Rows of both
are centred and scaled, each model's by its own.

chip-hours and GB by arithmetic, as in configs/suites.py, without the passes of
the two models.
"""

from ml_collections import ConfigDict

from configs import gemma3_270m, suites, tiny

SETS = ('short',)
MODELS = ('gemma3-270m', 'tiny')


def get_config(argument: str | None = None) -> ConfigDict:
  _, argument = suites.choose(argument, 'set', SETS)
  model, argument = suites.choose(argument, 'model', MODELS)
  config = gemma3_270m.short() if model == 'gemma3-270m' else embedded()
  config.lm.second.name = config.lm.get_oneway_ref('name')
  collection = config.collection
  collection.type = 'crosscoder'
  collection.sites = ('resid_post',)
  collection.architectures = ('batch_topk',)
  collection.sparsity = (32.0,) if model == 'gemma3-270m' else (16.0,)
  collection.layers = (9,) if model == 'gemma3-270m' else (2, 3)
  config.initialise.whitening = 0.0  # is for SAEs
  return suites.finish(config, argument)


def embedded() -> ConfigDict:
  """The recipe for the embedded model, in minutes on two cores."""
  config = tiny.get_config()
  config.activations.centre = 'mean'
  config.activations.scale = 'centred_rms'
  config.collection.widths = (1024,)
  config.objective.auxk = 1 / 32
  train = config.train
  train.steps = 2000
  train.learning_rate = 4e-3
  train.decay = 600
  train.sparsity_warm_up = 0
  train.b2 = 0.99
  train.dead_after = 20_000
  return config
