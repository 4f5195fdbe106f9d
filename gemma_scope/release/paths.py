"""Where an SAE lies in a release, and what it is called by its path."""

from __future__ import annotations

import os
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


# Folders whose names say what an SAE is; others are of the user's machine.
_TELLS = re.compile(
  r'layer|width|(^|_)l0|^blocks\.|resid|mlp|attn|transcoder|clt|crosscoder|'
  r'trainer|gemma-scope'
)


def name_of(path: str) -> str:
  """What an SAE is called by its path, in indexes and pages.

  These are published. Of an absolute path the name therefore has only the last
  folder, and those above it whose names say what the SAE is.
  """
  names = path.replace('\\', '/').split('/')
  names = [name for name in names if name not in ('', '..')][-4:]
  if os.path.isabs(path):
    first = len(names) - 1
    while first > 0 and _TELLS.search(names[first - 1]):
      first -= 1
    names = names[first:]
  return '/'.join(re.sub(r'[^\w.+=-]', '_', name) for name in names)


def told_apart(paths: Sequence[str]) -> list[str]:
  """A word for each path: of absolute ones, what differs in them."""
  local = [os.path.dirname(path) for path in paths if os.path.isabs(path)]
  above = os.path.commonpath(local) if local else ''
  inside = [
    os.path.relpath(path, above) if os.path.isabs(path) else path
    for path in paths
  ]
  return [name_of(path).replace('/', '_') for path in inside]
