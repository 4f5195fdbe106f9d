"""What the suites' files share: their argument, their mesh, their cost.

A suite is a union of sets, a set is all combinations of the collection's lists:
the argument's `set=` chooses one, what follows changes its collection as in
any config, `set=1m;layers=12;sparsity=60`. The length of the run is the set's.

Cost, by arithmetic and not measured, at 200 TFLOP/s a chip (assumed: about a
TPU v5p or an H100): an SAE takes 6 (d_in + d_out) F FLOPs a row, one of n
layers 6 (d_in + d_out (n + 1) / 2) F with F latents of all layers together, and
12 bytes a parameter (value, gradient, second moment). `cost` adds that up.
Beside it, for all members of a run together:

  the language model's pass, 2 N FLOPs a token: for N billions of parameters
  and T billions of tokens 2.8 N T chip-hours, less for early layers;
  where SAEs are tuned end to end, 4 N to 6 N more for each of them;
  about 12 bytes a row and latent for what a chip holds of the batch;
  2 d bytes a row and site of a chunk, or of all tokens where they are stored
  first (launch/harvest.py), as the paper did, so that sets share one pass.
"""

from __future__ import annotations

from collections.abc import Collection

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
  """The rest of the argument; the mesh of section 3.3.

  16k is data-parallel; wider, latents are sharded over 8 chips (the paper's
  TPU v3 4x2), and more chips share the rows.
  """
  config_lib.apply_argument(config, argument)
  config.mesh.latent = 1 if max(config.collection.widths) <= 2**14 else 8
  return config


def cost(config: ConfigDict, model: sites.Dimensions) -> tuple[float, float]:
  """Chip-hours of all members, and gigabytes of their state; see above."""
  flops = parameters = 0.0
  for m in specs.members(config):
    d_in, d_out = m.sites[0].width(model), m.targets[0].width(model)
    layers = max(m.layers, 1)
    flops += 6 * (d_in + d_out * (layers + 1) / 2) * m.width
    # Decoders to all layers are kept, those to earlier ones as zeros.
    parameters += (d_in + d_out * layers) * m.width
  rows = config.train.steps * config.train.batch
  return flops * rows / 2e14 / 3600, 12 * parameters / 1e9
