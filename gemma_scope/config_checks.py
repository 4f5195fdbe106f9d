"""Rules between the fields of a config, its language model and its devices.

Each check yields one sentence for each problem. `config_fields` checks the
fields one by one.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from gemma_scope import sites, specs
from gemma_scope.config_fields import ARCHITECTURES, MOST

_MOST_REFIT = 2**16  # latents: 16 GiB over the mesh's latent axis


def _architectures(config: ConfigDict) -> Iterator[str]:
  c, objective = config.collection, config.objective
  for architecture in c.architectures:
    base = architecture.removeprefix(specs.MATRYOSHKA)
    kinds = ARCHITECTURES[base]
    if c.penalty not in kinds:
      yield (
        f'A {base} SAE is trained by {" or ".join(kinds)}; found '
        f'collection.penalty {c.penalty!r}.'
      )
    if base != 'jumprelu' and (objective.frequency or objective.pre_act):
      yield (
        'objective.frequency and objective.pre_act act on trained thresholds; '
        f'{architecture} has none: set them to 0 or train jumprelu alone.'
      )
    if base == 'topk':
      if not config.sae.unit_decoder:
        yield (
          'TopK compares latents by their size: sae.unit_decoder must be true '
          f'for {architecture}.'
        )
      if config.train.refit_decoders:
        yield (
          'TopK compares latents by their size, so the norms of new decoders '
          'cannot be folded: set train.refit_decoders to False for '
          f'{architecture}.'
        )
      if fractions := [k for k in c.sparsity if float(k) % 1]:
        yield (
          f'TopK keeps a whole number of latents; found {fractions[0]:g} in '
          'collection.sparsity.'
        )
    if base != architecture:
      shares = list(config.sae.matryoshka)
      if sorted(shares) != shares or shares[-1] != 1:
        yield (
          'sae.matryoshka must rise to 1, such as (0.125, 0.25, 0.5, 1.0); '
          f'found {tuple(shares)}.'
        )
      elif round(shares[0] * min(c.widths)) < 1:
        yield (
          f'The first prefix of sae.matryoshka, {shares[0]:g} of '
          f'{min(c.widths)} latents, has none.'
        )
  if (
    'jumprelu'
    in {
      architecture.removeprefix(specs.MATRYOSHKA)
      for architecture in c.architectures
    }
    and config.sae.log_threshold
    and config.sae.initial_threshold == 0
  ):
    yield (
      'sae.initial_threshold is 0, and sae.log_threshold trains its '
      'logarithm: set it above 0.'
    )


def _collection(config: ConfigDict) -> Iterator[str]:
  collection = config.collection
  if collection.type not in sites.ITSELF:
    for kind in collection.sites:
      if kind.partition('/')[0] not in specs.TARGETS:
        yield (
          f'A {collection.type} reads {" or ".join(specs.TARGETS)}; found '
          f'{kind!r} in collection.sites.'
        )
  elif collection.skip:
    yield (
      'collection.skip is for transcoders and CLTs; found it on a '
      f'{collection.type}, which would copy its input.'
    )
  if specs.over_layers(config):
    if layered := specs.own_layer(collection.sites):
      yield (
        f'A {collection.type} reads all of collection.layers; found '
        f'{layered[0]!r} in collection.sites.'
      )
    if len(collection.layers) < 2:
      yield (
        f'A {collection.type} reads several layers; found layers '
        f'{tuple(collection.layers)}.'
      )
    for width in collection.widths:
      if width % len(collection.layers):
        yield (
          f'The width {width} of a {collection.type} is that of all layers '
          'together and must be divisible by their number '
          f'({len(collection.layers)}).'
        )
  targets = collection.penalty in ('target_l0', 'quadratic_l0')
  if targets and max(collection.sparsity) >= min(collection.widths):
    yield (
      f'A target L0 of {max(collection.sparsity):g} in collection.sparsity '
      f'cannot be met by {min(collection.widths)} latents.'
    )


def _two_models(config: ConfigDict) -> Iterator[str]:
  """A second model and what it cannot be combined with."""
  if specs.second_model(config) is None:
    return
  if config.collection.type != 'crosscoder':
    yield (
      'lm.second is compared with lm.name by crosscoders: set collection.type '
      f'to crosscoder; found {config.collection.type!r}.'
    )
  if config.activations.store:
    yield (
      'An activation store holds the rows of one model: leave '
      'activations.store empty to compare two (lm.second).'
    )
  if config.initialise.release:
    yield (
      'Crosscoders of two models (lm.second) start at random: leave '
      'initialise.release empty.'
    )


def _options(config: ConfigDict) -> Iterator[str]:
  """Options of training that suit some collections only."""
  collection = config.collection
  if config.objective.active_set and collection.type not in sites.ITSELF:
    yield (
      'objective.active_set steps towards the input, which a '
      f'{collection.type} does not reconstruct: set it to False.'
    )
  if config.initialise.whitening:
    if (
      collection.type != 'sae' or collection.nulls or config.initialise.release
    ):
      yield (
        'initialise.whitening rotates the random latents of SAEs: set it to 0 '
        'for other types, with collection.nulls and with initialise.release.'
      )
    if config.end_to_end.beta:
      yield 'initialise.whitening is not for end-to-end training: set it to 0.'
  if collection.nulls and (
    config.train.resample_every or config.initialise.release
  ):
    yield (
      'collection.nulls keep parts of an SAE at their random start: set '
      'train.resample_every to 0 and leave initialise.release empty.'
    )
  if config.train.refit_decoders and max(collection.widths) > _MOST_REFIT:
    yield (
      'train.refit_decoders holds a matrix of width x width, and the width '
      f'{max(collection.widths):,} is above {_MOST_REFIT:,}: set it to False.'
    )


def _names(config: ConfigDict) -> Iterator[str]:
  """Metrics, cards and folders go by name: each SAE needs its own."""
  collection = config.collection
  kinds = {item.partition('/')[0] for item in collection.sites}
  if collection.type not in sites.ITSELF and kinds - set(specs.TARGETS):
    return  # said already
  names = collections.Counter(spec.name for spec in specs.members(config))
  shared = [name for name, count in names.items() if count > 1]
  if shared:
    more = f', and {len(shared) - 1} more names are shared' * (len(shared) > 1)
    yield (
      f'{names[shared[0]]} SAEs of the collection are named {shared[0]}{more}: '
      'their widths or sparsities are too close to be told apart; choose '
      'others, or train them in separate runs.'
    )


def _training(config: ConfigDict) -> Iterator[str]:
  activations, train = config.activations, config.train
  for name in ('warm_up', 'decay', 'sparsity_warm_up', 'l0_steps'):
    if train[name] > train.steps:
      yield (
        f'train.{name} is {train[name]} steps, and the run has {train.steps}.'
      )
  if activations.scale == 'centred_rms' and activations.centre == 'none':
    yield (
      'activations.scale is centred_rms, which needs a centre: set '
      'activations.centre to mean or geometric_median, or the scale to rms.'
    )
  if 0 < activations.max_norm <= 1:
    yield (
      'activations.max_norm is a number of median norms above 1, or 0 to keep '
      f'all rows; found {activations.max_norm:g}.'
    )
  if activations.chunk_rows < train.batch:
    yield (
      f'activations.chunk_rows ({activations.chunk_rows}) must hold at least '
      f'one batch of train.batch ({train.batch}).'
    )
  for name, sequences in (
    ('activations.lm_batch', activations.lm_batch),
    ('evaluation.batch', config.evaluation.batch),
  ):
    if sequences * config.text.seq_len > MOST:
      yield (
        f'{name} * text.seq_len is {sequences * config.text.seq_len:,} tokens '
        f'in a forward pass; at most {MOST:,} can be counted.'
      )
  if config.evaluation.sequences and config.text.seq_len < 3:
    yield (
      'Evaluation needs text.seq_len of at least 3 (BOS, a token, and the one '
      'it predicts); set evaluation.sequences to 0 for none.'
    )


def _end_to_end(config: ConfigDict) -> Iterator[str]:
  end_to_end, collection = config.end_to_end, config.collection
  if not end_to_end.beta:
    return
  if config.train.meet_l0 or config.train.refit_decoders:
    yield (
      'End-to-end fine-tuning has no closing phase: set train.meet_l0 and '
      'train.refit_decoders to False.'
    )
  if collection.type in sites.SEVERAL:
    yield (
      'End-to-end fine-tuning is for SAEs that write one site; a '
      f'{collection.type} writes several: set end_to_end.beta to 0.'
    )
  if config.activations.store:
    yield (
      'End-to-end fine-tuning runs the language model itself: leave '
      'activations.store empty or set end_to_end.beta to 0.'
    )
  rows = end_to_end.sequences * (config.text.seq_len - 1)
  if config.train.batch != rows:
    yield (
      'End-to-end fine-tuning has end_to_end.sequences * (text.seq_len - 1) '
      f'= {rows} rows a step; found train.batch {config.train.batch}.'
    )


def _axes(config: ConfigDict) -> Iterator[str]:
  axes = config.mesh.to_dict()
  if list(axes.values()).count(-1) > 1:
    yield f'At most one axis of the mesh may be -1; found mesh {axes}.'


# (sections read, check)
CHECKS = (
  (('collection', 'sae', 'objective', 'train'), _architectures),
  (('lm', 'collection'), _collection),
  (('lm', 'collection', 'activations', 'initialise'), _two_models),
  (('collection', 'objective', 'train', 'initialise'), _options),
  (('lm', 'collection'), _names),
  (('train', 'activations', 'text', 'evaluation'), _training),
  (
    ('end_to_end', 'collection', 'activations', 'text', 'train'),
    _end_to_end,
  ),
  (('mesh',), _axes),
)


def model(config: ConfigDict, dimensions: sites.Dimensions) -> Iterator[str]:
  collection = config.collection
  layered = [sites.parse(item) for item in specs.own_layer(collection.sites)]
  for field, layer in (
    *(('layers', layer) for layer in collection.layers),
    *(('sites', site.layer) for site in layered),
  ):
    if layer >= dimensions.num_layers:
      yield (
        f'collection.{field} has {layer}, and {config.lm.name} has layers 0 '
        f'to {dimensions.num_layers - 1}.'
      )
      return
  for member in specs.members(config):
    widths = set()
    for site in (*member.sites, *member.targets):
      try:
        widths.add((site.kind, site.width(dimensions)))
      except ValueError as error:
        yield f'collection.sites: {error}'
        return
    for kind in {kind for kind, _ in widths}:
      widths_of_kind = sorted(
        width for other_kind, width in widths if other_kind == kind
      )
      if len(widths_of_kind) > 1:
        yield (
          f'A {config.collection.type} over layers needs one width, and {kind} '
          f'of {config.lm.name} has {" and ".join(map(str, widths_of_kind))} '
          'in its layers; choose others with layers=.'
        )
        return


def mesh(
  config: ConfigDict,
  dimensions: sites.Dimensions | None,
  mesh_shape: Sequence[int],
) -> Iterator[str]:
  collection, evaluation = config.collection, config.evaluation
  sae_size, data_size, latent_size = mesh_shape
  divisible = {
    'train.batch': config.train.batch,
    'activations.lm_batch': config.activations.lm_batch,
  }
  if evaluation.sequences and config.lm.name != 'synthetic':
    divisible['evaluation.batch'] = evaluation.batch
  if config.end_to_end.beta:
    divisible['end_to_end.sequences'] = config.end_to_end.sequences
  for name, size in divisible.items():
    if size % data_size:
      yield (
        f"{name} ({size}) must be divisible by the mesh's data axis "
        f'({data_size}).'
      )
  layers = len(collection.layers) if specs.over_layers(config) else 1
  for width in collection.widths:
    if width // layers % latent_size:
      yield (
        f'The width {width}, {width // layers} a layer, is not divisible by '
        f"the mesh's latent axis ({latent_size})."
      )
  split = dimensions is not None and sae_size > 1
  groups = specs.stacks(config, dimensions) if split else {}
  for (architecture, width, d_in, _), group in groups.items():
    if len(group) % sae_size:
      yield (
        f'The {len(group)} {architecture} SAEs of width {width} on '
        f"{d_in}-wide sites cannot be split over the mesh's sae axis "
        f'({sae_size}).'
      )
