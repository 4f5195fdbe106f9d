"""SAEs in any format, from a folder or from the hub; what a folder holds.

  load('downloads/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71')
  load('google/gemma-scope-2b-pt-res/layer_20/width_16k/canonical')

A path that exists is read where it is; any other is `owner/name/...` on the
hub, of which the files of one SAE alone are fetched (`hub`). `canonical` is the
SAE whose L0 is nearest to 100 among those of its folder, as the field means it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import files, sites
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
  tensors,
  transcoder_sets,
)
from gemma_scope.release.released import Released

# Tried in this order: each knows its own files.
FORMATS = (gemma_scope_1, gemma_scope_2, saelens, sparsify, dictionaries)
_FILES = {
  'params.npz',
  'params.safetensors',
  'params_layer_0.safetensors',
  saelens.WEIGHTS,
  sparsify.WEIGHTS,
  dictionaries.WEIGHTS,
  dictionaries.PICKLE,
}
_L0 = re.compile(r'(?:^|/)average_l0_(\d{1,6})(?:_[\w.+-]*)?$')
_CANONICAL = 100
_MOST = 1 << 16  # folders of a release


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
  sae = open_sae(path, revision)
  return sae.load(), sae.card


def open_sae(
  path: str, revision: str = '', about: Mapping[str, Any] | None = None
) -> Released:
  """Opens one SAE: its card is read and checked, its parameters are not.

  Args:
    path, revision: as of `load`.
    about: describes a params.npz without a card: 'sites' and 'targets', such
      as ['resid_post/12'], and 'model'.

  Raises:
    release.ReleaseError: as of `load`.
  """
  path = os.path.expanduser(path)
  try:
    if (member := _of_set(path)) is not None:
      return member
    folder = _folder(pathlib.Path(path))
    if folder is None:
      try:
        folder, path = hub.fetch(path, revision, canonical)
      except files.Refused as error:
        raise files.Refused(f'{error}{files.near(path)}') from None
    elif folder.name == 'canonical' and not folder.exists():
      within = [entry.path for entry in listed(str(folder.parent))]
      folder = folder.parent / canonical(within)
    folder = pathlib.Path(os.path.abspath(folder))
    if _is_release(folder):
      raise files.Refused(
        f'{files.show(folder)} is a release of several; name one of its '
        'folders.'
      )
    card, read = _card(folder, path, about)
  except files.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None
  return Released(
    card, functools.partial(_checked, card, read), path=path, folder=folder
  )


def open_all(
  paths: str, revision: str = '', about: Mapping[str, Any] | None = None
) -> list[Released]:
  """Opens all SAEs of releases of ours and of other paths, joined by commas.

  Where SAEs of different paths have one name, what differs in the paths is put
  before it.

  Raises:
    release.ReleaseError: a path has none that can be read, or is given twice.
  """
  opened: list[tuple[str, Released]] = []
  for path in paths.split(','):
    folder = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
    location = paths_lib.locate(folder)
    if _is_release(folder):
      opened += [(str(folder), sae) for sae in folder_lib.load_all(folder)]
    elif location and _is_release(location[0]):
      saes_of_release = folder_lib.load_all(location[0])
      opened += [
        (str(location[0]), sae)
        for sae in saes_of_release
        if sae.path == location[1]
      ]
      if not opened or opened[-1][1].path != location[1]:
        raise folder_lib.ReleaseError(
          f'{files.show(path)} is not in the manifest of its release.'
        )
    elif transcoder_sets.is_there(folder):
      opened += [(str(folder), open_sae(member)) for member in _members(path)]
    else:
      opened.append((str(folder), open_sae(path, revision, about)))
  return _uniquely_named(opened)


def described(site: str, model: str = '') -> dict[str, Any] | None:
  """Describes a params.npz without a card, for `open_sae`.

  Args:
    site: 'resid_post/12', or of a transcoder 'mlp_in/12:mlp_out/12'; '' gives
      None.
    model: such as 'gemma2-2b'.

  Raises:
    ValueError: it is no site.
  """
  if not site:
    return None
  read, _, written = site.partition(':')
  read, written = sites.parse(read), sites.parse(written or read)
  return {'sites': [str(read)], 'targets': [str(written)], 'model': model}


def _members(path: str) -> list[str]:
  """The paths of the transcoders of a set of circuit-tracer."""
  folder = pathlib.Path(os.path.expanduser(path))
  try:
    layers = transcoder_sets.layers(folder)
  except files.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None
  return [str(folder / f'layer_{layer}') for layer in layers]


def _of_set(path: str) -> Released | None:
  """The transcoder that the path names in a set of circuit-tracer, or None.

  Raises:
    files.Refused: the path names a set of several.
  """
  folder = pathlib.Path(path)
  if transcoder_sets.is_there(folder) and not _is_release(folder):
    first, *more = _members(path)
    if more:
      raise files.Refused(
        f'{files.show(path)} is a set of several transcoders; name one, such '
        f'as {files.show(first)}.'
      )
    folder = pathlib.Path(first)
  layer = transcoder_sets.layer_of(folder.name)
  if layer is None or not transcoder_sets.is_there(folder.parent):
    return None
  card, read = transcoder_sets.read(folder.parent, str(folder.parent), layer)
  sae_folder.check_card(card, card['name'], None)
  card = manifest.public(card)
  return Released(
    card,
    functools.partial(_checked, card, read),
    path=str(folder),
    folder=folder.parent,
  )


def _uniquely_named(opened: Sequence[tuple[str, Released]]) -> list[Released]:
  """The SAEs of (root, SAE); equal names get what differs in their roots."""
  counts = collections.Counter(sae.name for _, sae in opened)
  common = os.path.commonpath([root for root, _ in opened]) if opened else ''
  saes = [
    sae
    if counts[sae.name] == 1
    else dataclasses.replace(
      sae, name=f'{pathlib.PurePath(os.path.relpath(root, common))}/{sae.name}'
    )
    for root, sae in opened
  ]
  for name, count in collections.Counter(sae.name for sae in saes).items():
    if count > 1:
      raise folder_lib.ReleaseError(
        f'The SAE {files.show(name)} is given twice.'
      )
  return saes


def _folder(path: pathlib.Path) -> pathlib.Path | None:
  """The folder that a path names; None if it is a path on the hub.

  Raises:
    files.Refused: a file that is no part of an SAE, or a misspelt folder.
  """
  try:
    if path.is_file():
      if path.name in _FILES or path.suffix == '.json':
        return path.parent
      raise files.Refused(
        f'{files.show(path)} is a file; give the folder of an SAE.'
      )
    if path.exists() or (path.name == 'canonical' and path.parent.is_dir()):
      return path
  except (OSError, ValueError) as error:  # too long, or a null character
    raise files.Refused(f'{files.show(path)} is no path ({error}).') from None
  existing = next(ancestor for ancestor in path.parents if ancestor.is_dir())
  hint = files.near(path)
  is_local = path.is_absolute() or existing != pathlib.Path('.')
  # OWNER/NAME of the hub may be like a folder here; the whole path is not.
  is_whole = bool(hint) and hint.count('/') == path.as_posix().count('/')
  if not is_local and not is_whole and len(path.parts) > 1:
    return None
  raise files.Refused(f'There is no folder {files.show(path)}.{hint}')


def _is_release(root: pathlib.Path) -> bool:
  """Whether it is a release of ours, or an export of several SAEs."""
  return (root / manifest.NAME).exists()


Read = Callable[[], sae_folder.Params]


def _card(
  folder: pathlib.Path, path: str, about
) -> tuple[dict[str, Any], Read]:
  """An SAE's card, checked, and what reads its parameters."""
  if about and (folder / 'params.npz').is_file():
    if not (folder / 'config.json').exists():
      return _own(folder, path, about)
  for layout in FORMATS:
    if layout.is_there(folder):
      # The whole path: the folders above may say what the SAE is of.
      card, read = layout.read(
        folder, path if layout is not gemma_scope_1 else str(folder)
      )
      sae_folder.check_card(card, card['name'], None)
      return manifest.public(card), read
  return folder_lib.read_card(folder), lambda: folder_lib.load(folder)[0]


def _own(folder: pathlib.Path, path: str, about) -> tuple[dict[str, Any], Read]:
  """A params.npz without a card, described by the user."""
  file = folder / 'params.npz'
  keys = {
    'required': sae_folder.KEYS,
    'optional': sae_folder.OPTIONAL_KEYS,
    'max_bytes': tensors.MAX_BYTES,
  }
  shapes = npz.shapes(file, **keys)
  writes_input = list(about['sites']) == list(about['targets'])
  several = len(shapes['W_enc']) == 3
  card = {
    'name': path,
    'type': ('transcoder', 'sae', 'clt', 'crosscoder')[
      2 * several + writes_input
    ],
    'architecture': 'topk' if 'k' in shapes else 'jumprelu',
    **about,
    **sae_folder.sizes_of(shapes),
  }
  card = manifest.public(card)
  sae_folder.check_card(card, file, None)
  check = functools.partial(sae_folder.check_shapes, card=card)
  return card, lambda: npz.read(file, check=check, **keys)


def _checked(card: Mapping[str, Any], read: Read) -> sae_folder.Params:
  """Reads the parameters and checks them against the card."""
  try:
    params = {
      key: np.asarray(array, np.float32) for key, array in read().items()
    }
    return sae_folder.fit(params, card)
  except files.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of a list: an SAE's path, and what the path says."""

  path: str
  layer: str
  width: str
  l0: str


def listed(path: str, revision: str = '') -> list[Entry]:
  """Lists what a folder or a repository holds, by path; reads no SAE.

  Raises:
    release.ReleaseError: there is nothing that can be read.
  """
  path = os.path.expanduser(path)
  try:
    folder = _folder(pathlib.Path(path))
    if folder is None:
      names = hub.names(path, revision)
    else:
      names = [
        pathlib.Path(root, name).relative_to(folder).as_posix()
        for root, _, names_there in os.walk(folder)
        for name in names_there
      ]
  except files.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None
  split_names = [name.rpartition('/') for name in names]
  folders = {parent for parent, _, name in split_names if name in _FILES}
  if folder is not None:
    for parent, _, name in split_names:
      if name == transcoder_sets.CONFIG:
        members = _members(str(folder / parent))
        folders |= {os.path.relpath(member, folder) for member in members}
  folders = sorted(folders)
  if not folders:
    raise folder_lib.ReleaseError(
      f'{files.show(path)} holds no SAE in a format that is known.'
    )
  return [_entry(path, folder_name) for folder_name in folders[:_MOST]]


def _entry(root: str, path: str) -> Entry:
  """From the path; where that is the root itself, from the root's folders."""
  searched = path or os.path.abspath(root)

  def find(pattern):
    match = re.search(pattern, searched)
    return match[1] if match else ''

  return Entry(
    path or '.',
    find(r'layers?[_.](\d+(?:_\d+)*)') or find(r'blocks\.(\d+)'),
    find(r'width_(\d+[km]?)'),
    find(r'(?:average_)?l0_([a-z0-9]+)'),
  )


def table(entries: Sequence[Entry]) -> str:
  """One line for each SAE: layer, width, L0 and path."""
  rows = [('layer', 'width', 'L0', 'path')]
  rows += [
    (entry.layer, entry.width, entry.l0, entry.path)
    for entry in sorted(entries, key=_order)
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  return '\n'.join(
    '  '.join([*map(str.rjust, row, widths), row[3]]) for row in rows
  )


def _order(entry: Entry):
  def number(text: str, convert=int):
    try:
      return convert(text.split('_')[0])
    except ValueError:
      return -1

  return (
    re.sub(r'\d', '', entry.path.split('layer_')[0]),
    number(entry.layer),
    number(entry.width, sites.parse_width),
    number(entry.l0),
    entry.path,
  )


def canonical(paths: Sequence[str]) -> str:
  """The path `.../average_l0_N` with N nearest to 100, the smaller of two.

  Raises:
    files.Refused: none has an L0 in its name.
  """
  by_l0 = [
    (int(match[1]), path) for path in paths if (match := _L0.search(path))
  ]
  if not by_l0:
    raise files.Refused(
      'There is no canonical SAE: no path has an average_l0 in its name.'
    )
  return min(by_l0, key=lambda entry: (abs(entry[0] - _CANONICAL), entry))[1]
