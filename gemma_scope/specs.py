"""The SAEs that a config asks for, as `SaeSpec`s, and their stacks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from gemma_scope import sites

MATRYOSHKA = 'matryoshka_'  # before any architecture: nested prefixes
# Controls that are trained with a part held at its random start (arXiv
# 2602.14111): the decoder, the decoder within a cosine of it, or the encoder.
NULLS = ('frozen_decoder', 'soft_frozen_decoder', 'frozen_encoder')
# What a transcoder or CLT that reads one kind of site writes.
TARGETS = {'mlp_in': 'mlp_out', 'mlp_in_ungained': 'mlp_out'}


@dataclasses.dataclass(frozen=True)
class SaeSpec:
  """One SAE of a collection."""

  type: str  # one of `sites.TYPES`
  sites: tuple[sites.Site, ...]  # read
  targets: tuple[sites.Site, ...]  # reconstructed
  architecture: str
  width: int  # latents, of all layers together
  penalty: str  # one of its architecture's
  sparsity: float  # the target L0, or the penalty's coefficient
  seed: int

  @property
  def null(self) -> str:
    """One of `NULLS`, or '' for an SAE without a fixed part."""
    return null_of(self.architecture)

  @property
  def trained_as(self) -> str:
    """The architecture without the prefix of a null."""
    return self.architecture.removeprefix(f'{self.null}_' if self.null else '')

  @property
  def base(self) -> str:
    """The architecture without any prefix."""
    return self.trained_as.removeprefix(MATRYOSHKA)

  @property
  def pair(self) -> bool:
    """Whether it reads and writes one site of two models, side by side."""
    return any(site.second for site in self.sites)

  @property
  def layers(self) -> int:
    """Layers of a crosscoder or CLT; 0 for one without an axis of layers."""
    several = self.type in sites.SEVERAL and not self.pair
    return len(self.sites) if several else 0

  def widths(self, model: sites.Dimensions) -> tuple[int, int]:
    """(d_in, d_out), of the rows of two models both together."""
    d_ins, d_outs = (
      [site.width(model) for site in wired_sites]
      for wired_sites in (self.sites, self.targets)
    )
    if self.pair:
      return sum(d_ins), sum(d_outs)
    return d_ins[0], d_outs[0]

  @property
  def name(self) -> str:
    """Unique in a collection:
    resid_post/12/jumprelu/width_16k/target_l0_50/seed_0.
    """
    layers = '_'.join(dict.fromkeys(str(site.layer) for site in self.sites))
    kind = '' if self.type == 'sae' else f'{self.type}/'
    return (
      f'{kind}{self.sites[0].kind}/{layers}/{self.architecture}/'
      f'width_{sites.width_name(self.width)}/'
      f'{self.penalty}_{self.sparsity:g}/seed_{self.seed}'
    )


def null_of(architecture: str) -> str:
  """Which of `NULLS` a card's architecture names, '' for none."""
  nulls = [null for null in NULLS if str(architecture).startswith(f'{null}_')]
  return nulls[0] if nulls else ''


def members(config: ConfigDict) -> list[SaeSpec]:
  """All SAEs of the run: the product of the collection's lists.

  Each SAE is followed by its nulls, with the same seed and sparsity.

  A crosscoder or CLT reads all layers of the collection at once; a crosscoder
  of two models reads one site of both. A site such as 'mlp_out/9' is at that
  layer alone, 'mlp_out' at all layers of the collection.
  """
  collection = config.collection
  several = over_layers(config)
  groups = (
    [tuple(sorted(collection.layers))]
    if several
    else [(layer,) for layer in collection.layers]
  )
  layered = own_layer(collection.sites)
  kinds = [item for item in collection.sites if item not in layered]
  places = list(itertools.product(groups, kinds))
  places += [((site.layer,), site.kind) for site in map(sites.parse, layered)]
  places = [_places(config, group, kind) for group, kind in places]
  type_, penalty = collection.type, collection.penalty
  prefixes_of_names = ('', *(f'{null}_' for null in collection.nulls))
  return [
    SaeSpec(
      type_,
      *read_and_written,
      f'{prefix}{architecture}',
      width,
      penalty,
      value,
      seed,
    )
    for width, read_and_written, architecture, value, seed, prefix in (
      itertools.product(
        collection.widths,
        places,
        collection.architectures,
        collection.sparsity,
        collection.seeds,
        prefixes_of_names,
      )
    )
  ]


def second_model(config: ConfigDict) -> tuple[str, str] | None:
  """(name, checkpoint) of the model that the first is compared with, if any."""
  second = config.lm.second
  if not (second.name or second.checkpoint):
    return None
  return second.name or config.lm.name, second.checkpoint


def over_layers(config: ConfigDict) -> bool:
  """Whether an SAE of the run reads all layers of the collection at once."""
  return config.collection.type in sites.SEVERAL and not _compares(config)


def _compares(config: ConfigDict) -> bool:
  """Whether the SAEs of the run are crosscoders of two models."""
  second = second_model(config)
  return config.collection.type == 'crosscoder' and second is not None


def own_layer(items: Sequence[str]) -> list[str]:
  """The entries of collection.sites with a layer, such as 'mlp_out/9'."""
  return [item for item in items if '/' in item]


def _places(config: ConfigDict, layers: Sequence[int], kind: str):
  """Sites read and written."""
  if _compares(config):
    site = sites.Site(layers[0], kind)
    return ((site, site.of_second()),) * 2
  writes_input = config.collection.type in sites.ITSELF
  target = kind if writes_input else TARGETS[kind]
  return (
    tuple(sites.Site(layer, kind) for layer in layers),
    tuple(sites.Site(layer, target) for layer in layers),
  )


def prefixes(config: ConfigDict, member: SaeSpec) -> tuple[int, ...]:
  """Ends of a member's Matryoshka prefixes; () where it has none."""
  if member.base == member.trained_as:
    return ()
  latents = member.width // max(member.layers, 1)
  return tuple(round(share * latents) for share in config.sae.matryoshka)


def site_list(config: ConfigDict) -> tuple[sites.Site, ...]:
  """Every site that an SAE reads or writes, by model, in its order."""
  all_sites = {
    site
    for member in members(config)
    for site in (*member.sites, *member.targets)
  }
  order = sites.KINDS.index
  return tuple(
    sorted(
      all_sites,
      key=lambda site: (site.second, site.layer, order(site.kind)),
    )
  )


def stacks(
  config: ConfigDict, model: sites.Dimensions
) -> dict[tuple[str, int, int, int], list[SaeSpec]]:
  """(architecture, width, d_in, d_out) -> the members that share them."""
  groups: dict[tuple[str, int, int, int], list[SaeSpec]] = {}
  for member in members(config):
    key = member.trained_as, member.width, *member.widths(model)
    groups.setdefault(key, []).append(member)
  return groups
