"""Shared by the suites' config files: the argument, the mesh, the cost.

A suite is a union of sets; a set is all combinations of the collection's lists.
`set=` in the argument chooses one, and further fields change its collection as
in any config: `set=1m;layers=12;sparsity=60`. The set decides the run's length.

Costs are arithmetic and not measured, at an assumed 200 TFLOP/s per chip (about
a TPU v5p or an H100). An SAE takes 6 (d_in + d_out) F FLOPs per row; a
crosscoder or CLT of n layers, with F latents of all layers together, takes
6 (d_in + d_out (n + 1) / 2) F. The state takes 12 bytes per parameter (value,
gradient, second moment). `cost` adds these up. Not included, for all SAEs of a
run together:

  the language model's pass, 2 N FLOPs a token: for N billions of parameters
  and T billions of tokens 2.8 N T chip-hours, less for early layers;
  another 4 N to 6 N FLOPs a token for each SAE that is tuned end to end;
  about 12 bytes per latent and row of the batch that a chip holds;
  2 d bytes per site and row of a chunk, or of all tokens where rows are stored
  first (launch/harvest.py), as in the paper, so that sets share one pass.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import re
from collections.abc import Collection, Iterator

from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import sites, specs


def tokens(config: ConfigDict, billions: float) -> None:
  """Sets the length of the run."""
  config.train.steps = int(billions * 1e9 / config.train.batch)


def choose(
  argument: str | None, name: str, choices: Collection[str]
) -> tuple[str, str]:
  """('set=1m;layers=5', 'set', ...) -> '1m', 'layers=5', for `finish`.

  Without `name=` in the argument it is the first of the choices.

  Raises:
    ConfigError: it is none of them.
  """
  parts = (argument or '').split(';')
  for i, part in enumerate(parts):
    key, _, value = part.partition('=')
    if key.strip() == name:
      if value.strip() not in choices:
        raise config_lib.ConfigError(
          f'{name} must be one of {", ".join(choices)}; found '
          f'{value.strip()!r}.'
        )
      return value.strip(), ';'.join(parts[:i] + parts[i + 1 :])
  return next(iter(choices)), argument or ''


def finish(config: ConfigDict, argument: str) -> ConfigDict:
  """The config with the rest of the argument."""
  config_lib.apply_argument(config, argument)
  return config


def published() -> Iterator[tuple[str, str, str]]:
  """(suite, argument of a set, topology) of what a suite's docstring names.

  A set of a model that has none is left out, and so are sets of IT models,
  whose programs are those of PT ones.
  """
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    topologies = re.findall(r'\bv\d\w*:\d+(?:x\d+)+', module.__doc__ or '')
    for argument in _arguments(module) if topologies else ():
      for topology in topologies:
        yield path.stem, argument, topology


def _arguments(module) -> Iterator[str]:
  for model in getattr(module, 'MODELS', ('',)):
    for name in module.SETS:
      argument = f'model={model};set={name}' if model else f'set={name}'
      with contextlib.suppress(config_lib.ConfigError):
        module.get_config(argument)
        yield argument


def cost(config: ConfigDict, model: sites.Dimensions) -> tuple[float, float]:
  """Chip-hours of all members, and gigabytes of their state; see above."""
  flops = parameters = 0.0
  for m in specs.members(config):
    d_in, d_out = m.widths(model)
    layers = max(m.layers, 1)
    flops += 6 * (d_in + d_out * (layers + 1) / 2) * m.width
    # Decoders to all layers are kept, those to earlier ones as zeros.
    parameters += (d_in + d_out * layers) * m.width
  rows = config.train.steps * config.train.batch
  return flops * rows / 2e14 / 3600, 12 * parameters / 1e9
