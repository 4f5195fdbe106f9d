"""load(path or repository) -> params, card, whatever the format; lists.

  load('downloads/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71')
  load('google/gemma-scope-2b-pt-res/layer_20/width_16k/canonical')

A path that exists is read where it is; any other is `owner/name/...` on the
hub, of which the files of one SAE alone are fetched (`hub`). `canonical` is the
SAE whose L0 is nearest to 100 among those of its folder, as the field means it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope import sites
from gemma_scope.release import folder as folder_lib
from gemma_scope.release import manifest, npz, sae_folder
from gemma_scope.release import paths as paths_lib
from gemma_scope.release.formats import (
  dictionaries,
  gemma_scope_1,
  gemma_scope_2,
  hub,
  saelens,
  sparsify,
)

# Tried in this order: each knows its own files.
FORMATS = (gemma_scope_1, gemma_scope_2, saelens, sparsify, dictionaries)
_L0 = re.compile(r'(?:^|/)average_l0_(\d{1,6})(?:_[\w.+-]*)?$')
_CANONICAL = 100
_MOST = 1 << 16  # folders of a release


@dataclasses.dataclass(frozen=True)
class Entry:
  """One SAE of a list: its path, and what the path says."""

  path: str
  layer: str
  width: str
  l0: str


def load(path: str, revision: str = '') -> tuple[sae_folder.Params, dict]:
  """Reads one SAE, ours or published, from a folder or from the hub.

  Args:
    path: a folder, or `owner/name/path/in/the/repository`.
    revision: of the repository: a branch, a tag or a commit; '' is main.

  Returns:
    (params, card) as `release.load` gives them, checked the same way: float32
    parameters of `sae.encode` and `sae.decode`, and a card with type, sites,
    targets and sizes.

  Raises:
    release.ReleaseError: one sentence on what is missing, unknown or damaged.
  """
  try:
    folder = pathlib.Path(path)
    if not folder.exists():
      if folder.name == 'canonical' and folder.parent.is_dir():
        path = canonical([entry.path for entry in listed(str(folder.parent))])
        folder = folder.parent / path
      else:
        folder, path = hub.fetch(path, revision, canonical)
    return _read(pathlib.Path(os.path.abspath(folder)), path)
  except npz.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None


def load_all(
  path: str, revision: str = ''
) -> list[tuple[sae_folder.Params, dict]]:
  """The same of every SAE of a release of ours; else of the one at `path`."""
  if _sealed(pathlib.Path(path)):
    return [(m.load(), m.card) for m in folder_lib.load_all(path)]
  return [load(path, revision)]


class Member(folder_lib.Member):
  """One SAE anywhere; its parameters are read when asked for."""

  def load(self) -> sae_folder.Params:
    return load(self.path)[0]


def offered(paths: str) -> list[folder_lib.Member]:
  """The SAEs of releases of ours and of other paths, joined by commas.

  Raises:
    release.ReleaseError: a path has none that can be read.
  """
  found: list[folder_lib.Member] = []
  for path in paths.split(','):
    if _sealed(pathlib.Path(path)):
      found += folder_lib.load_all(path)
    elif inside := paths_lib.locate(pathlib.Path(os.path.abspath(path))):
      of_release = folder_lib.load_all(inside[0]) if _sealed(inside[0]) else []
      found += [m for m in of_release if m.path == inside[1]] or [
        Member(path, pathlib.Path(path), load(path)[1], None)
      ]
    else:
      found.append(Member(path, pathlib.Path(path), load(path)[1], None))
  return found


def _sealed(root: pathlib.Path) -> bool:
  """Whether it is a release, or another layout of several."""
  return (root / manifest.NAME).exists()


def _read(folder: pathlib.Path, path: str):
  if _sealed(folder):
    raise npz.Refused(
      f'{npz.show(folder)} is a release of several; name one of its folders.'
    )
  for one in FORMATS:
    if one.is_there(folder):
      # The whole path: the folders above may say what the SAE is of.
      name = path if one is not gemma_scope_1 else str(folder)
      params, card = one.read(folder, name)
      return _checked(params, card)
  return folder_lib.load(folder)


def _checked(params, card: dict[str, Any]):
  """The parameters in the file's order, and the card with its sizes."""
  place = sites.wiring_of(card)
  W_enc, b_dec = params['W_enc'], params['b_dec']
  card |= {
    'd_in': W_enc.shape[-2] if W_enc.ndim > 1 else 0,
    'd_out': b_dec.shape[-1] if b_dec.ndim else 0,
    'width': int(params['b_enc'].size),
  }
  if place.sites == place.targets and card['d_in'] != card['d_out']:
    raise npz.Refused(
      f'{npz.show(card["name"])} has W_enc {W_enc.shape} and b_dec '
      f'{b_dec.shape}, and a member of type {place.type} writes what it reads.'
    )
  if 'W_skip' in params:
    card['affine'] = True
  if place.several and len(place.sites) != len(W_enc):
    raise npz.Refused(f'{card["name"]} has {len(W_enc)} layers of parameters.')
  params = {key: np.asarray(a, np.float32) for key, a in params.items()}
  return sae_folder.fit(params, card), card


def listed(path: str, revision: str = '') -> list[Entry]:
  """What a folder or a repository holds, by path.

  Raises:
    release.ReleaseError: there is nothing that can be read.
  """
  try:
    folder = pathlib.Path(path)
    if folder.is_dir():
      files = [
        str(pathlib.Path(root, name).relative_to(folder))
        for root, _, names in os.walk(folder)
        for name in names
      ]
    else:
      files = hub.files(path, revision)
  except npz.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None
  found = sorted({folder for file in files if (folder := _folder_of(file))})
  if not found:
    raise folder_lib.ReleaseError(
      f'{npz.show(path)} holds no SAE that is known.'
    )
  return [_entry(one) for one in found[:_MOST]]


_FILES = {
  'params.npz', 'params.safetensors', 'params_layer_0.safetensors',
  saelens.WEIGHTS, sparsify.WEIGHTS, dictionaries.WEIGHTS, dictionaries.PICKLE,
}  # fmt: skip


def _folder_of(file: str) -> str:
  folder, _, name = file.replace(os.sep, '/').rpartition('/')
  return folder if name in _FILES else ''


def _entry(path: str) -> Entry:
  def find(pattern):
    found = re.search(pattern, path)
    return found[1] if found else ''

  return Entry(
    path,
    find(r'layers?[_.](\d+(?:_\d+)*)') or find(r'blocks\.(\d+)'),
    find(r'width_(\d+[km]?)'),
    find(r'(?:average_)?l0_([a-z0-9]+)'),
  )


def table(entries: Sequence[Entry]) -> str:
  """A line each: layer, width, L0 and path."""
  rows = [('layer', 'width', 'L0', 'path')]
  rows += [
    (e.layer, e.width, e.l0, e.path) for e in sorted(entries, key=_order)
  ]
  wide = [max(len(row[i]) for row in rows) for i in range(3)]
  return '\n'.join(
    '  '.join([*(cell.rjust(w) for cell, w in zip(row, wide)), row[3]])  # noqa: B905
    for row in rows
  )


def _order(entry: Entry):
  def number(text: str, of=int):
    try:
      return of(text.split('_')[0])
    except ValueError:
      return -1

  return (
    re.sub(r'\d', '', entry.path.split('layer_')[0]), number(entry.layer),
    number(entry.width, sites.parse_width), number(entry.l0), entry.path,
  )  # fmt: skip


def canonical(paths: Sequence[str]) -> str:
  """Of `.../average_l0_N`, the one with N nearest to 100; the first of two.

  Raises:
    npz.Refused: none has an L0 in its name.
  """
  found = [(int(match[1]), p) for p in paths if (match := _L0.search(p))]
  if not found:
    raise npz.Refused(
      'There is no canonical SAE where none has an average_l0 in its name.'
    )
  return min(found, key=lambda one: (abs(one[0] - _CANONICAL), one))[1]
