"""Gemma 3 270M on two CPU cores: 15 SAEs of a real Gemma in half an hour.

  bash launch/demo.sh gemma3-270m
  .venv/bin/python launch/train.py --config=configs/gemma3_270m.py \
      --workdir=runs/gemma3-270m

  set    SAEs  chip-hours     GB
  short    15           0      1
  full    162         136     49

short: resid_post of layers 5, 9 and 12, mlp_out and attn_out of layer 9, at
width 4k and target L0 16, 32 and 64. full: the three sites of all 18 layers at
width 16k and target L0 10, 50 and 150.
Model: the pre-trained Gemma 3 270M as the package index has it, a quantised
copy (launch/setup.sh gemma3-270m). Text: English of installed documentation.
Layers 5, 9 and 12 are three of the four of Gemma Scope 2.

The short recipe is for 2.3e5 rows and not the papers' 4e9. What makes it work
on this model (docs/gemma3_270m.md has the measurements):

  centre, scale   most of E|x|^2 is the mean: it is subtracted, and the unit is
                  the spread that is left
  max_norm        one row in a thousand is 5 to 13 medians long, above 4 none is
                  ordinary; together they carry half of the variance
  whitening       latents start along the rows' covariance: a few directions
                  have most of the variance, and random latents all follow them
  BatchTopK       meets its L0 in every batch; L0 falls from 128 to its target
                  over a third of the run, so that more latents are trained
  auxk            latents that were silent for 5,000 rows learn the error
  batch = 256     many small steps do more than few large ones
  b2 = 0.99       the second moment forgets the first, large gradients
  meet_l0         thresholds are set to meet the target L0 at the end

objective.active_set=True and train.refit_decoders=True lower FVU by another 3
and 4 %, in several minutes each (docs/short_runs.md); train.b1=0.9 with a
learning rate of 4e-3 lowers it by another 2 to 7 % (docs/comparison.md).

Cost by arithmetic, not measured, as in configs/suites.py, for a chip of 200
TFLOP/s (assumed: about an H100 or a TPU v5p). short: 900 steps of 256 rows are
1.2e14 FLOPs in dense steps, a second of such a chip and 10 minutes of two CPU
cores of 100 GFLOP/s each. full: 1e20 FLOPs for 4e9 rows, and the model's own
pass 2 * 1e8 parameters * 4e9 tokens = 8e17, another hour.
"""

from ml_collections import ConfigDict

from configs import recipe, suites, tiny

SETS = ('short', 'full')


def get_config(argument: str | None = None) -> ConfigDict:
  name, argument = suites.choose(argument, 'set', SETS)
  if name == 'full':
    return suites.finish(full(), argument)
  return suites.finish(short(), argument)


def short() -> ConfigDict:
  """The recipe for two cores."""
  config = tiny.get_config()
  config.lm.name = 'gemma3-270m'
  config.text.source = 'prose'
  config.text.seq_len = 256
  activations = config.activations
  activations.chunk_rows = 76_800  # 302 steps: the run has three chunks
  activations.lm_batch = 8  # a few seconds, so that a request to stop is heard
  activations.centre = 'mean'
  activations.scale = 'centred_rms'
  activations.max_norm = 4.0
  collection = config.collection
  collection.layers = (5, 9, 12)
  collection.sites = ('resid_post', 'mlp_out/9', 'attn_out/9')
  collection.widths = (2**12,)
  collection.architectures = ('batch_topk',)
  collection.sparsity = (16.0, 32.0, 64.0)
  config.initialise.whitening = 0.5
  objective = config.objective
  objective.auxk = 1 / 8
  objective.auxk_latents = 1024
  train = config.train
  train.steps = 900
  train.batch = 256
  train.learning_rate = 2e-3
  train.warm_up = 32
  train.decay = 300
  train.sparsity_warm_up = 0
  train.b2 = 0.99
  train.dead_after = 5_000
  train.active_limit = 256  # a denser row makes a step dense, and slow
  train.initial_l0 = 128.0  # at first many latents fire
  train.l0_steps = 300
  train.meet_l0 = True
  config.checkpoint.every = 128
  config.metrics.every = 8
  config.evaluation.sequences = 16
  config.evaluation.batch = 8
  config.evaluation.loss_every = 8  # logits cost more than all the layers
  return config


def full() -> ConfigDict:
  """Gemma Scope 1's recipe at all layers, on centred rows."""
  config = recipe.gemma_scope_1('gemma3-270m')
  config.collection.layers = tuple(range(18))
  config.collection.sites = recipe.SITES
  config.collection.widths = (2**14,)
  config.collection.sparsity = (10.0, 50.0, 150.0)
  config.activations.centre = 'mean'
  config.activations.scale = 'centred_rms'
  config.activations.max_norm = 4.0
  suites.tokens(config, 4)
  return config
