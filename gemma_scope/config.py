"""A run's settings: the argument after the config file, checks, the members.

A config file (configs/*.py) returns a complete, typed `ConfigDict`; its fields
are documented in configs/tiny.py. `--config=configs/gemma2_2b.py:layers=12,20;
widths=16k,65k` selects the collection in one argument, `--config.train.batch=8`
changes any field; ml_collections refuses a wrong name or type with a
suggestion, and `check` an impossible combination with a sentence, both before
a model or a device is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from gemma_scope import sites

ARCHITECTURES = {
  # architecture -> the kinds of sparsity it can be trained by
  'jumprelu': ('target_l0', 'l0'),
  'relu': ('l1',),
}
DTYPES = ('float32', 'bfloat16')


class ConfigError(ValueError):
  """A config that cannot run; the message is the sentence to show."""


@dataclasses.dataclass(frozen=True)
class Member:
  """One SAE of a collection."""

  site: sites.Site
  architecture: str
  width: int
  penalty: str  # 'target_l0', 'l0' or 'l1'
  sparsity: float  # the target L0, or the penalty's coefficient
  seed: int

  @property
  def name(self) -> str:
    """Unique in a collection: resid_post/12/width_16k/target_l0_50/seed_0."""
    return (
      f'{self.site}/width_{sites.width_name(self.width)}/'
      f'{self.penalty}_{self.sparsity:g}/seed_{self.seed}'
    )


def apply_argument(config: ConfigDict, argument: str | None) -> ConfigDict:
  """Applies 'layers=12,20;widths=16k;sparsity=30,60' to `config.collection`.

  Any field of the collection may be named; lists are separated by commas,
  layers may be a range (`0-25`), widths are spelled as in Gemma Scope.

  Raises:
    ConfigError: an unknown field (with a suggestion) or a value that does not
      parse.
  """
  collection = config.collection
  for part in filter(None, (argument or '').split(';')):
    name, separator, text = part.partition('=')
    name = name.strip()
    if name not in collection or not separator:
      near = difflib.get_close_matches(name, collection.keys(), 1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ConfigError(
        f'{part!r} is not field=value with a field of the collection '
        f'({", ".join(collection.keys())}).{hint}'
      )
    items = [item.strip() for item in text.split(',') if item.strip()]
    try:
      if name == 'layers':
        value = tuple(layer for item in items for layer in _layer_range(item))
      elif name == 'widths':
        value = tuple(map(sites.parse_width, items))
      elif name == 'sparsity':
        value = tuple(map(float, items))
      elif name == 'seeds':
        value = tuple(map(int, items))
      else:
        value = tuple(items) if name == 'sites' else text.strip()
    except ValueError as error:
      raise ConfigError(f'{part!r} does not parse: {error}') from error
    collection[name] = value
  return config


def _layer_range(text: str) -> range:
  first, _, last = text.partition('-')
  return range(int(first), int(last or first) + 1)


def members(config: ConfigDict) -> list[Member]:
  """Every SAE of the run: the product of the collection's lists."""
  c = config.collection
  return [
      Member(
      sites.Site(layer, kind), c.architecture, width, c.penalty, value, seed
    )
      for width, layer, kind, value, seed in itertools.product(
          c.widths, c.layers, c.sites, c.sparsity, c.seeds
      )
  ]  # fmt: skip


def check(
  config: ConfigDict,
  model: sites.Dimensions | None = None,
  mesh_shape: Sequence[int] | None = None,
) -> None:
  """Refuses what cannot run.

  Args:
    config: the run's.
    model: the language model's dimensions, when known.
    mesh_shape: sizes of ('sae', 'data', 'latent'), when known.

  Raises:
    ConfigError: one sentence on the first thing found.
  """

  def need(holds: bool, sentence: str):
    if not holds:
      raise ConfigError(sentence)

  c, t, a = config.collection, config.train, config.activations
  for field in ('layers', 'sites', 'widths', 'sparsity', 'seeds'):
    found = c[field]
    need(
      bool(found) and len(set(found)) == len(found),
      f'collection.{field} must be a list without repeats; found {found}.',
    )
  need(
    c.architecture in ARCHITECTURES,
    f'collection.architecture must be one of {", ".join(ARCHITECTURES)}; '
    f'found {c.architecture!r}.' + _suggestion(c.architecture, ARCHITECTURES),
  )
  kinds = ARCHITECTURES[c.architecture]
  need(
    c.penalty in kinds,
    f'A {c.architecture} SAE is trained by {" or ".join(kinds)}; found '
    f'collection.penalty {c.penalty!r}.' + _suggestion(c.penalty, kinds),
  )
  for kind in c.sites:
    need(
      kind in sites.KINDS,
      f'collection.sites has {kind!r}; the kinds are '
      f'{", ".join(sites.KINDS)}.' + _suggestion(kind, sites.KINDS),
    )
  if model is not None:
    for layer in c.layers:
      need(
        0 <= layer < model.num_layers,
        f'collection.layers has {layer}, and {config.lm.name} has layers 0 '
        f'to {model.num_layers - 1}.',
      )
  need(min(c.widths) > 0, 'collection.widths must be positive.')
  need(min(c.sparsity) > 0, 'collection.sparsity must be positive.')
  if c.penalty == 'target_l0':
    need(
      max(c.sparsity) < min(c.widths),
      f'A target L0 of {max(c.sparsity):g} cannot be met by '
      f'{min(c.widths)} latents.',
    )
  for name, dtype in (
    ('lm.dtype', config.lm.dtype),
    ('activations.dtype', a.dtype),
    ('sae.matmul_dtype', config.sae.matmul_dtype),
  ):
    need(
      dtype in DTYPES, f'{name} must be float32 or bfloat16; found {dtype!r}.'
    )
  need(
    a.memory in ('auto', 'device', 'host'),
    f'activations.memory must be auto, device or host; found {a.memory!r}.',
  )
  need(
    config.text.seq_len >= 2, 'text.seq_len must be at least 2 (BOS and one).'
  )
  for name in ('steps', 'batch', 'learning_rate', 'dead_after'):
    need(t[name] > 0, f'train.{name} must be positive; found {t[name]}.')
  for name in ('warm_up', 'decay', 'sparsity_warm_up'):
    need(
      0 <= t[name] <= t.steps,
      f'train.{name} is {t[name]} steps, and the run has {t.steps}.',
    )
  need(
    a.chunk_rows >= t.batch,
    f'activations.chunk_rows ({a.chunk_rows}) must hold at least one batch '
    f'of train.batch ({t.batch}).',
  )
  if mesh_shape is not None:
    sae_size, data_size, latent_size = mesh_shape
    need(
      t.batch % data_size == 0 and a.lm_batch % data_size == 0,
      f'train.batch ({t.batch}) and activations.lm_batch ({a.lm_batch}) must '
      f"be divisible by the mesh's data axis ({data_size}).",
    )
    for width in c.widths:
      need(
        width % latent_size == 0,
        f"The width {width} is not divisible by the mesh's latent axis "
        f'({latent_size}).',
      )
    if model is not None:
      for (width, d_in), size in stack_sizes(config, model).items():
        need(
          size % sae_size == 0,
          f'The {size} SAEs of width {width} on {d_in}-wide sites cannot be '
          f"split over the mesh's sae axis ({sae_size}).",
        )


def stack_sizes(config: ConfigDict, model: sites.Dimensions) -> dict:
  """(width, d_in) -> number of members that share it."""
  sizes: dict[tuple[int, int], int] = {}
  for member in members(config):
    key = member.width, member.site.width(model)
    sizes[key] = sizes.get(key, 0) + 1
  return sizes


def _suggestion(word: str, words) -> str:
  near = difflib.get_close_matches(str(word), list(words), 1)
  return f' Did you mean {near[0]!r}?' if near else ''
