"""Gemma 4, E2B to 31B: Gemma Scope 2's recipe on models it was not made for.

  .venv/bin/python launch/train.py --workdir=runs/e2b_four_layers \
      --config='configs/gemma_4.py:model=e2b;set=four_layers' \
      --config.lm.checkpoint=/data/gemma-4-E2B \
      --config.lm.tokenizer=/data/tokenizer_gemma4.model \
      --config.text.store=/data/tokens

  set (model=e2b)      SAEs  chip-hours     GB
  four_layers           108       3,100    560
  all_layers            420      14,400  2,590
  transcoders            36         850    150
  transcoders_skip       36         850    150
  own                    36         850    150

No recipe for SAEs of Gemma 4 is published: sites, widths, target L0, losses and
lengths are those of configs/gemma_scope_2.py, its guesses included, and nobody
has tried them on these models. Layers at 25, 50, 65 and 85 % of the depth, or
all; model=e2b, e4b, 31b or 26b_a4b; PT or IT by lm.checkpoint.

What is particular to these models (gemma_scope/sites.py draws their blocks):

  attn_out   is twice as wide in global layers as in sliding ones
  own        ple_out, what the per-layer input adds to the residual stream, of
             E2B and E4B; experts_out, the sum of the chosen experts, of 26B-A4B
  mlp_in     in 26B-A4B the input of the dense branch; the experts' differs
             from it by a gain

Chip-hours and GB of state (configs/suites.py; the model's own passes come on
top) grow with d and, in all_layers, with the number of layers. Narrow a set as
usual, `set=all_layers;layers=0-5`.
For v5p:2x2x4 or v6e:4x8 (gemma-scope compile-check --suites=gemma_4).
"""

from ml_collections import ConfigDict

from configs import gemma_scope_2, recipe, suites
from gemma_scope import config as config_lib

MODELS = {'e2b': 35, 'e4b': 42, '31b': 60, '26b_a4b': 30}  # layers
OWN = {'e2b': 'ple_out', 'e4b': 'ple_out', '26b_a4b': 'experts_out'}
SETS = {  # type, sites, four or all layers, widths, target L0
  **{
    name: gemma_scope_2.SETS[name]
    for name in ('four_layers', 'all_layers', 'transcoders', 'transcoders_skip')
  },
  'own': ('sae', (), 'four', gemma_scope_2.THREE, (10, 50, 150)),
}


def get_config(argument: str | None = None) -> ConfigDict:
  model, argument = suites.choose(argument, 'model', MODELS)
  name, argument = suites.choose(argument, 'set', SETS)
  type_, kinds, layers, widths, l0 = SETS[name]
  if name == 'own':
    if model not in OWN:
      raise config_lib.ConfigError(
        f'set=own is for model={", ".join(OWN)}; {model} has neither per-layer '
        'inputs nor experts.'
      )
    kinds = (OWN[model],)
  config = recipe.gemma_scope_2(f'gemma4-{model.replace("_", "-")}')
  c, depth = config.collection, MODELS[model]
  c.type, c.sites, c.widths = type_, kinds, widths
  c.layers = (
    gemma_scope_2.four(depth) if layers == 'four' else tuple(range(depth))
  )
  c.sparsity = tuple(map(float, l0))
  c.skip = name.endswith('_skip')
  if type_ == 'transcoder':
    recipe.batch_topk(config, 'matryoshka_')
  suites.tokens(config, 8)
  return suites.finish(config, argument)
