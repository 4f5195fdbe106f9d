"""Gemma Scope 2, on Gemma 3 270M to 27B, PT and IT: its table 1.

  T='--config.lm.tokenizer=/data/tokenizer_gemma3.model'
  .venv/bin/python launch/train.py --workdir=runs/1b_pt_four_layers $T \
      --config='configs/gemma_scope_2.py:model=1b;set=four_layers' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma3-1b \
      --config.text.store=/data/tokens
  .venv/bin/python launch/train.py --workdir=runs/1b_it_four_layers $T \
      --config='configs/gemma_scope_2.py:tuning=it;set=four_layers' \
      --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma3-1b-it \
      --config.text.store=/data/chats     # by launch/prepare_rollouts.py

  set (model=1b)        SAEs  chip-hours     GB   starts from
  four_layers            108       1,800    330
  four_layers_1m          12       1,900    350
  all_layers             312       6,400  1,200
  transcoders             36         630    110
  transcoders_skip        36         630    110
  transcoders_all        104       2,200    400
  transcoders_all_skip   104       2,200    400
  crosscoder               8       1,000    260   four_layers
  clt                      4       1,800    590   transcoders_all
  clt_skip                 4       1,800    590   transcoders_all_skip
  end_to_end               4           1      7   four_layers

Layers at 25, 50, 65 and 85 % of the depth, or all. Chip-hours and GB of state
(configs/suites.py; the model's own passes come on top) grow with d and, in sets
of all layers, with their number. What a set starts from is
runs/MODEL_TUNING_SET/release, or what --config.initialise.release names; IT
SAEs and transcoders start from the PT ones. Narrow a set as usual,
`set=all_layers;layers=0-5`. More seeds: `set=four_layers;widths=65k;seeds=1,2`.
For v5p:2x2x4 (gemma-scope compile-check --suites=gemma_scope_2).

Published: sites, layers, widths, target L0; Gemma Scope 1's rates, batch, theta
and bandwidth; the quadratic L0 penalty, warm-up of 50,000 steps; that there is
a Matryoshka loss and a penalty on frequent latents; transcoders read mlp_in,
gain included; a crosscoder or CLT starts from single-layer SAEs, its target L0
at the sum of theirs, falling over 50,000 steps; the KL loss of end_to_end.
Guesses: 8 B tokens, 10^9 for IT, 10^8 for end_to_end, without a sparsity
warm-up there; the prefixes; the penalty's prefactor (printed 2, but 1/2 gives
the slope that the text describes) and strength 0.1 (theirs is likely weaker:
their L0 are up to 20 % above target); the frequency penalty's form and its
0.01; beta = 1, and which SAEs were tuned end to end. BatchTopK for transcoders
and several layers (appendix B says "typically", and also that it was not worth
it), the former Matryoshka, since CLTs take their first latents. L0 of all
members fall from the sum for the largest target. A CLT's width must be
divisible by its layers: 262,080 as 1B's, and twice that. IT crosscoders and
CLTs start from IT parts.
"""

import math

from ml_collections import ConfigDict

from configs import recipe, suites
from gemma_scope import config as config_lib
from gemma_scope import specs

MODELS = {'1b': 26, '270m': 18, '4b': 34, '12b': 48, '27b': 62}  # layers
TUNINGS = ('pt', 'it')
MLP, RESIDUAL = ('mlp_in',), ('resid_post',)
THREE, TWO = (2**14, 2**16, 2**18), (2**14, 2**18)
WIDE = (2**16, 2**18, 2**19, 2**20)
SETS = {  # type, sites, four or all layers, widths, target L0
  'four_layers': ('sae', recipe.SITES, 'four', THREE, (10, 50, 150)),
  'four_layers_1m': ('sae', RESIDUAL, 'four', (2**20,), (10, 50, 150)),
  'all_layers': ('sae', recipe.SITES, 'all', TWO, (10, 100)),
  'transcoders': ('transcoder', MLP, 'four', THREE, (10, 50, 150)),
  'transcoders_skip': ('transcoder', MLP, 'four', THREE, (10, 50, 150)),
  'transcoders_all': ('transcoder', MLP, 'all', TWO, (10, 100)),
  'transcoders_all_skip': ('transcoder', MLP, 'all', TWO, (10, 100)),
  'crosscoder': ('crosscoder', RESIDUAL, 'four', WIDE, (50, 150)),
  'clt': ('clt', MLP, 'all', (262_080, 524_160), (50, 150)),
  'clt_skip': ('clt', MLP, 'all', (262_080, 524_160), (50, 150)),
  'end_to_end': ('sae', RESIDUAL, 'four', (2**16,), (50,)),
}
STARTS = {  # set -> the set that its members start from
  'crosscoder': 'four_layers',
  'clt': 'transcoders_all',
  'clt_skip': 'transcoders_all_skip',
  'end_to_end': 'four_layers',
}


def four(layers: int) -> tuple[int, ...]:
  """The layers at 25, 50, 65 and 85 % of the depth."""
  return tuple(int(p * layers + 0.5) for p in (0.25, 0.5, 0.65, 0.85))


def get_config(argument: str | None = None) -> ConfigDict:
  model, argument = suites.choose(argument, 'model', MODELS)
  tuning, argument = suites.choose(argument, 'tuning', TUNINGS)
  name, argument = suites.choose(argument, 'set', SETS)
  type_, kinds, layers, widths, l0 = SETS[name]
  if type_ == 'clt' and model not in ('270m', '1b'):
    raise config_lib.ConfigError(
      f'CLTs are for model=270m and 1b; found {model!r}.'
    )
  config = recipe.gemma_scope_2(f'gemma3-{model}')
  c = config.collection
  c.type, c.sites, c.widths = type_, kinds, widths
  depth = MODELS[model]
  c.layers = four(depth) if layers == 'four' else tuple(range(depth))
  c.sparsity = tuple(map(float, l0))
  c.skip = name.endswith('_skip')
  if type_ != 'sae':
    prefix = specs.MATRYOSHKA if type_ == 'transcoder' else ''
    recipe.batch_topk(config, prefix)
  alone = type_ in ('sae', 'transcoder')
  end_to_end = name == 'end_to_end'
  if name in STARTS or tuning == 'it':
    start = (tuning, STARTS[name]) if name in STARTS else ('pt', name)
    config.initialise.release = f'runs/{model}_{"_".join(start)}/release'
  if end_to_end:
    config.end_to_end.beta = 1.0
    config.train.batch = config.end_to_end.sequences * (config.text.seq_len - 1)
  suites.tokens(config, 8)
  if end_to_end or (tuning == 'it' and alone):  # fine-tuned
    config.train.sparsity_warm_up = 0
    suites.tokens(config, 0.1 if end_to_end else 1)
  suites.finish(config, argument)
  if not alone:
    l0_of_parts, largest = SETS[STARTS[name]][-1], max(c.sparsity)
    nearest = min(l0_of_parts, key=lambda l0: abs(math.log(l0 / largest)))
    config.train.initial_l0 = float(len(c.layers) * nearest)
    config.train.l0_steps = 50_000
  if end_to_end:
    config.mesh.update(sae=1, data=config.end_to_end.sequences, latent=-1)
  return config
