"""What a member reads and writes: its type, its sites and its targets.

  type        reads                      writes
  sae         one site                   the same site
  transcoder  one site                   another site of its layer
  crosscoder  several layers, one kind   the same sites
  clt         several layers, one kind   another kind, in each of these layers

A latent of a crosscoder or of a cross-layer transcoder (CLT) belongs to one
layer, reads there, and writes to that layer and to those after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_scope import sites

TYPES = ('sae', 'transcoder', 'crosscoder', 'clt')
ITSELF = ('sae', 'crosscoder')  # they write what they read
SEVERAL = ('crosscoder', 'clt')  # over several layers
_MOST_LAYERS = 1024
_LISTED = 3  # more layers in a row than this are named by the first and last


@dataclasses.dataclass(frozen=True)
class Place:
  """A type from `TYPES`, the sites read and the sites written, by layer."""

  type: str
  sites: tuple[sites.Site, ...]
  targets: tuple[sites.Site, ...]

  def __post_init__(self):
    if self.type not in TYPES:
      raise ValueError(
        f'There is no type {str(self.type)[:40]!r}; the types are '
        f'{", ".join(TYPES)}.'
      )
    reads = [site.layer for site in self.sites]
    writes = [site.layer for site in self.targets]
    kinds = {s.kind for s in self.sites}, {s.kind for s in self.targets}
    itself = self.type in ITSELF
    if not (
      reads == writes == sorted(set(reads))
      and 0 < len(reads) <= (_MOST_LAYERS if self.several else 1)
      and [len(kind) for kind in kinds] == [1, 1]
      and (kinds[0] == kinds[1]) is itself
    ):
      raise ValueError(
        f'A member of type {self.type} reads '
        f'{"sites of one kind, by layer" if self.several else "one site"}, and '
        f'writes {"the same" if itself else "another kind"} in each layer; '
        f'found {_listed(self.sites)} and {_listed(self.targets)}.'
      )

  @property
  def several(self) -> bool:
    """Whether parameters have an axis of layers."""
    return self.type in SEVERAL

  @property
  def kind(self) -> str:
    """Of the sites read."""
    return self.sites[0].kind

  @property
  def folder(self) -> str:
    """The first part of its path in a release."""
    return self.kind if self.type == 'sae' else self.type

  def layers(self, between: str = ',', through: str = '-') -> str:
    """'12', '7,13,17,22', or '0-25' for more than three layers in a row."""
    found = [site.layer for site in self.sites]
    if len(found) > _LISTED and found[-1] - found[0] == len(found) - 1:
      return f'{found[0]}{through}{found[-1]}'
    return between.join(map(str, found))

  def __str__(self) -> str:
    """'resid_post/12', 'transcoder mlp_in/3', 'crosscoder resid_post/0-5'."""
    where = f'{self.kind}/{self.layers()}'
    return where if self.type == 'sae' else f'{self.type} {where}'


def of(card: Mapping[str, Any]) -> Place:
  """The place that a card names under 'type', 'sites' and 'targets'.

  Raises:
    ValueError: one sentence, where these do not fit together.
  """
  return Place(card.get('type'), _sites(card, 'sites'), _sites(card, 'targets'))


def order(place: Place) -> tuple:
  """Sort key: type, kind in the order of a block, number of layers, layers."""
  return (
    TYPES.index(place.type),
    sites.KINDS.index(place.kind),
    len(place.sites),
    place.sites,
    place.targets,
  )


def _sites(card: Mapping[str, Any], key: str) -> tuple[sites.Site, ...]:
  names = card.get(key)
  if not isinstance(names, list | tuple) or len(names) > _MOST_LAYERS:
    raise ValueError(f'{key} is no list of sites such as ["resid_post/12"].')
  found = []
  for name in names:
    site = sites.parse(name) if isinstance(name, str) else None
    if str(site) != name:
      raise ValueError(f'{key} has {str(name)[:80]!r}, which is no site.')
    found.append(site)
  return tuple(found)


def _listed(found: tuple[sites.Site, ...]) -> str:
  shown = ', '.join(map(str, found[:6])) or 'none'
  return shown + (', ...' if len(found) > 6 else '')
