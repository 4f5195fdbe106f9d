"""Where an SAE lies in a release."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence

from gemma_scope import files, sites
from gemma_scope.release import table

MEMBER = re.compile(
  r'(?P<folder>(?P<kind>[a-z_]{1,40})'
  r'/layer_\d{1,4}(?:_to_\d{1,4}|(?:_\d{1,4}){0,61})/width_\d{1,9}[km]?)/'
  r'(?:average_l0_\d{1,9}|unmeasured_[a-z0-9_]{1,40}?(?:[.+-][a-z0-9]{1,9})*)'
  r'(?P<affine>_affine)?(?:_[a-z][a-z0-9]{0,29}){0,7}'
  r'(?:_seed_\d{1,19})?(?:_\d{1,6})?',
  re.ASCII,
)


def folder(
  card: dict, width_name: Callable[[int], str] = sites.width_name
) -> str:
  """The folder of an SAE up to its width: resid_post/layer_2/width_16k."""
  wiring = sites.wiring_of(card)
  layers = wiring.layers('_', '_to_')
  return f'{wiring.folder}/layer_{layers}/width_{width_name(card["width"])}'


def paths(rows: Sequence[table.Row]) -> list[str]:
  """A folder for each SAE; equal names get the seed, else a number."""
  paths_taken = []
  several = len({card.get('architecture') for card, _ in rows}) > 1
  for card, metrics in rows:
    l0 = table.value((metrics or {}).get('l0'))
    if l0 is None:
      sparsity = table.sparsity(card).lower().replace(' ', '_')
      leaf = (
        f'unmeasured_{sparsity}' if sparsity != '-' else 'unmeasured_sparsity'
      )
    else:
      leaf = f'average_l0_{round(l0)}'
    affine = bool(card.get('affine'))
    base = f'{folder(card)}/{leaf}' + '_affine' * affine
    if several and card.get('architecture'):
      base += f'_{card["architecture"]}'
    path, count = base, 1
    if (
      path in paths_taken
      and type(card.get('seed')) is int
      and card['seed'] >= 0
    ):
      path = f'{base}_seed_{card["seed"]}'
    while path in paths_taken:
      count += 1
      path = f'{base}_{count}'
    match = MEMBER.fullmatch(path)
    if not match or (match['affine'] is not None) != affine:
      raise files.Refused(
        f'{files.show(path)} cannot name a folder of a release.'
      )
    paths_taken.append(path)
  return paths_taken


def locate(folder: pathlib.Path) -> tuple[pathlib.Path, str] | None:
  """(release, path in it) if the folder's path has the form of an SAE's."""
  if len(folder.parts) < 5:
    return None
  name = '/'.join(folder.parts[-4:])
  match = MEMBER.fullmatch(name)
  if not match or match['kind'] not in (*sites.KINDS, *sites.TYPES):
    return None
  return folder.parents[3], name
