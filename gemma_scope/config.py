"""A run's settings: the argument after the config file, checks, the members.

A config file (configs/*.py) returns a complete, typed `ConfigDict`; its fields
are documented in configs/tiny.py. `--config=configs/tiny.py:layers=1;widths=1k`
selects the collection in one argument, `--config.train.batch=8` changes any
field; ml_collections refuses a wrong name or type with a
suggestion, and `check` an impossible combination with a sentence, both before
a model or a device is touched.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ml_collections import ConfigDict

from gemma_scope import sites, specs

ARCHITECTURES = {
  # architecture -> the penalties it can be trained by; 'target_l0' asks every
  # architecture for an L0, each in its own way (see `objectives`)
  'jumprelu': (
      'target_l0', 'l0', 'quadratic_l0', 'quadratic_frequency', 'tanh',
  ),
  'topk': ('target_l0',),
  'batch_topk': ('target_l0',),
  'gated': ('target_l0', 'l1'),
  'relu': ('target_l0', 'l1', 'tanh'),
}  # fmt: skip
DTYPES = ('float32', 'bfloat16')


class ConfigError(ValueError):
  """A config that cannot run; the message is the sentence to show."""


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
        value = _same_type(collection[name], items, text.strip())
    except ValueError as error:
      raise ConfigError(f'{part!r} does not parse: {error}') from error
    collection[name] = value
  return config


def _same_type(old, items: list[str], text: str):
  """The argument's words as the type of the field's present value."""
  if isinstance(old, tuple):
    return tuple(items)
  if isinstance(old, bool):
    if text.lower() not in ('true', 'false'):
      raise ValueError('it is either true or false')
    return text.lower() == 'true'
  return text


def _layer_range(text: str) -> range:
  first, _, last = text.partition('-')
  return range(int(first), int(last or first) + 1)


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
  lists = ('layers', 'sites', 'widths', 'architectures', 'sparsity', 'seeds')
  for field in lists:
    found = c[field]
    need(
      bool(found) and len(set(found)) == len(found),
      f'collection.{field} must be a list without repeats; found {found}.',
    )
  need(
    c.type in sites.TYPES,
    f'collection.type must be one of {", ".join(sites.TYPES)}; found '
    f'{c.type!r}.' + _suggestion(c.type, sites.TYPES),
  )
  for architecture in c.architectures:
    base = architecture.removeprefix(specs.MATRYOSHKA)
    need(
      base in ARCHITECTURES,
      f'collection.architectures are {", ".join(ARCHITECTURES)}, each also '
      f'after {specs.MATRYOSHKA!r}; found {architecture!r}.'
      + _suggestion(base, ARCHITECTURES),
    )
    kinds = ARCHITECTURES[base]
    need(
      c.penalty in kinds,
      f'A {base} SAE is trained by {" or ".join(kinds)}; found '
      f'collection.penalty {c.penalty!r}.' + _suggestion(c.penalty, kinds),
    )
    trained = base == 'jumprelu'
    need(
      trained or not (config.objective.frequency or config.objective.pre_act),
      'objective.frequency and objective.pre_act act on trained thresholds; '
      f'{architecture} has none: set them to 0 or train jumprelu alone.',
    )
    need(
      base != 'topk' or config.sae.unit_decoder,
      'TopK ranks latents of one unit: sae.unit_decoder must be true for '
      f'{architecture}.',
    )
    if base != architecture:
      shares = tuple(config.sae.matryoshka)
      need(
        bool(shares) and sorted(set(shares)) == list(shares)
        and shares[0] > 0 and shares[-1] == 1,
        'sae.matryoshka must rise to 1, such as (0.125, 0.25, 0.5, 1.0); '
        f'found {shares}.',
      )  # fmt: skip
  for kind in c.sites:
    need(
      kind in sites.KINDS,
      f'collection.sites has {kind!r}; the kinds are '
      f'{", ".join(sites.KINDS)}.' + _suggestion(kind, sites.KINDS),
    )
    need(
      c.type in sites.ITSELF or kind in specs.TARGETS,
      f'A {c.type} reads {" or ".join(specs.TARGETS)}; found {kind!r} in '
      'collection.sites.',
    )
  need(
    not c.skip or c.type not in sites.ITSELF,
    f'collection.skip is for transcoders and CLTs; found it on a {c.type}, '
    'which would copy its input.',
  )
  several = c.type in sites.SEVERAL
  if several:
    need(
      len(c.layers) > 1,
      f'A {c.type} reads several layers; found layers {c.layers}.',
    )
    for width in c.widths:
      need(
        width % len(c.layers) == 0,
        f'The width {width} of a {c.type} is that of all layers together and '
        f'must be divisible by their number ({len(c.layers)}).',
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
  if c.penalty in ('target_l0', 'quadratic_l0'):
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
    a.scale in ('rms', 'sqrt_d'),
    f'activations.scale must be rms or sqrt_d; found {a.scale!r}.',
  )
  need(
    a.memory in ('auto', 'device', 'host'),
    f'activations.memory must be auto, device or host; found {a.memory!r}.',
  )
  need(
    a.ahead in ('auto', 'on', 'off'),
    f'activations.ahead must be auto, on or off; found {a.ahead!r}.',
  )
  need(
    config.text.seq_len >= 2, 'text.seq_len must be at least 2 (BOS and one).'
  )
  for name in ('steps', 'batch', 'learning_rate', 'dead_after'):
    need(t[name] > 0, f'train.{name} must be positive; found {t[name]}.')
  e = config.end_to_end
  need(e.beta >= 0, f'end_to_end.beta must not be negative; found {e.beta}.')
  if e.beta:
    need(
      not several,
      'End-to-end fine-tuning is for members that write one site; a '
      f'{c.type} writes several: set end_to_end.beta to 0.',
    )
    need(
      not a.store,
      'End-to-end fine-tuning runs the language model itself; set either '
      'activations.store to nothing or end_to_end.beta to 0.',
    )
    rows = e.sequences * (config.text.seq_len - 1)
    need(
      t.batch == rows,
      'End-to-end fine-tuning has end_to_end.sequences * (text.seq_len - 1) '
      f'= {rows} rows a step; found train.batch {t.batch}.',
    )
  need(
    t.active_limit >= 0,
    'train.active_limit is a number of latents a row, 0 for a dense step; '
    f'found {t.active_limit}.',
  )
  for name in ('warm_up', 'decay', 'sparsity_warm_up', 'l0_steps'):
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
    need(
      not e.beta or e.sequences % data_size == 0,
      f'end_to_end.sequences ({e.sequences}) must be divisible by the '
      f"mesh's data axis ({data_size}).",
    )
    layers = len(c.layers) if several else 1
    for width in c.widths:
      need(
        width // layers % latent_size == 0,
        f'The width {width}, {width // layers} a layer, is not divisible by '
        f"the mesh's latent axis ({latent_size}).",
      )
    if model is not None:
      for (architecture, width, d_in, _), group in specs.stacks(
        config, model
      ).items():
        need(
          len(group) % sae_size == 0,
          f'The {len(group)} {architecture} SAEs of width {width} on '
          f"{d_in}-wide sites cannot be split over the mesh's sae axis "
          f'({sae_size}).',
        )


def _suggestion(word: str, words) -> str:
  near = difflib.get_close_matches(str(word), list(words), 1)
  return f' Did you mean {near[0]!r}?' if near else ''
