"""The SAEs that a config asks for: one `SaeSpec` each, and their stacks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from gemma_scope import sites

MATRYOSHKA = 'matryoshka_'  # before any architecture: nested prefixes
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
  def base(self) -> str:
    """The architecture without its Matryoshka prefix."""
    return self.architecture.removeprefix(MATRYOSHKA)

  @property
  def layers(self) -> int:
    """Layers of a crosscoder or CLT; 0 for one that reads a single site."""
    return len(self.sites) if self.type in sites.SEVERAL else 0

  @property
  def name(self) -> str:
    """Unique in a collection:
    resid_post/12/jumprelu/width_16k/target_l0_50/seed_0.
    """
    layers = '_'.join(str(site.layer) for site in self.sites)
    kind = '' if self.type == 'sae' else f'{self.type}/'
    return (
      f'{kind}{self.sites[0].kind}/{layers}/{self.architecture}/'
      f'width_{sites.width_name(self.width)}/'
      f'{self.penalty}_{self.sparsity:g}/seed_{self.seed}'
    )


def members(config: ConfigDict) -> list[SaeSpec]:
  """Every SAE of the run: the product of the collection's lists.

  A crosscoder or CLT reads all layers of the collection at once.
  """
  c = config.collection
  several = c.type in sites.SEVERAL
  groups = [tuple(sorted(c.layers))] if several else [(n,) for n in c.layers]
  return [
      SaeSpec(
      c.type, *_places(c.type, group, kind), architecture, width, c.penalty,
      value, seed,
    )
      for width, group, kind, architecture, value, seed in itertools.product(
          c.widths, groups, c.sites, c.architectures, c.sparsity, c.seeds
      )
  ]  # fmt: skip


def _places(type_: str, layers: Sequence[int], kind: str):
  """Sites read and written."""
  target = kind if type_ in sites.ITSELF else TARGETS[kind]
  return (
    tuple(sites.Site(layer, kind) for layer in layers),
    tuple(sites.Site(layer, target) for layer in layers),
  )


def prefixes(config: ConfigDict, member: SaeSpec) -> tuple[int, ...]:
  """Ends of a member's Matryoshka prefixes; () where it has none."""
  if member.base == member.architecture:
    return ()
  latents = member.width // max(member.layers, 1)
  return tuple(round(share * latents) for share in config.sae.matryoshka)


def site_list(config: ConfigDict) -> tuple[sites.Site, ...]:
  """Every site that some member reads or writes, in the order of the model."""
  found = {s for m in members(config) for s in (*m.sites, *m.targets)}
  order = sites.KINDS.index
  return tuple(sorted(found, key=lambda s: (s.layer, order(s.kind))))


def stacks(
  config: ConfigDict, model: sites.Dimensions
) -> dict[tuple[str, int, int, int], list[SaeSpec]]:
  """(architecture, width, d_in, d_out) -> the members that share them."""
  groups: dict[tuple[str, int, int, int], list[SaeSpec]] = {}
  for member in members(config):
    d_in, d_out = (at[0].width(model) for at in (member.sites, member.targets))
    key = member.architecture, member.width, d_in, d_out
    groups.setdefault(key, []).append(member)
  return groups
