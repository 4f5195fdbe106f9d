"""Writes and reads releases: folders of SAEs that other tools can use.

The layout, keys, shapes and dtype are those of Gemma Scope 1
(arXiv 2408.05147), one folder for each kind of site above it; transcoders,
crosscoders and CLTs in folders of their own (`paths`, `manifest`):

  release/
    README.md  frontier.png  manifest.json      sizes, SHA-256 of every file
    resid_post/layer_12/width_16k/average_l0_82/
      params.npz    W_enc [d_in, F]  b_enc [F]  W_dec [F, d_out]
                    b_dec [d_out]  threshold [F]  (W_skip [d_in, d_out])
      config.json   the card    metrics.json   what was measured
    transcoder/layer_12/width_16k/average_l0_71_affine/ ...

Released SAEs act on raw activations: `fold` moves the normalisation of training
into the parameters. Three lines read one, without JAX or training code:

  from gemma_scope import release
  params, card = release.load('release/resid_post/layer_12/.../average_l0_82')
  f = sae.encode(params, x)      # y_hat = sae.decode(params, f, x)

Names, sizes, hashes, headers, shapes and values are checked, in this order,
before they are used. What fails a check raises `ReleaseError`, one sentence.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence

from gemma_scope import files
from gemma_scope.release import card as card_lib
from gemma_scope.release import frontier, manifest, npz, sae_folder
from gemma_scope.release import paths as paths_lib
from gemma_scope.release import table as table_lib
from gemma_scope.release.released import Released

Params = sae_folder.Params
KEYS = sae_folder.KEYS
MAX_BYTES = 128 << 30  # 1m latents on four layers of 27B have 108 GB

_SUMMARY = 'name type sites targets architecture width seed'.split()


class ReleaseError(ValueError):
  """A release cannot be read or written; the message is one sentence."""


def save(
  folder: str | os.PathLike[str],
  saes: Sequence[Released],
  *,
  title: str | None = None,
  license_name: str = 'apache-2.0',
  overwrite: bool = False,
) -> bool:
  """Writes a release, completely or not at all.

  Equal SAEs give equal files, byte for byte.

  Args:
    folder: the release; made here, with the folders above it.
    saes: parameters float32 as `fold` returns them, metrics as `evaluate`
      returns them or None. A number in metrics or card that is not finite is
      written as null; a card gets 'affine': true where there is a W_skip.
    title: heading of the model card; None: 'Sparse autoencoders for ...'.
    license_name: Hugging Face licence identifier of the weights.
    overwrite: replace a different release that is already there. A folder
      that holds anything else is never replaced.

  Returns:
    True when files were written, False when the folder already held exactly
    this release, intact.

  Raises:
    ReleaseError: an SAE that does not fit its card, a folder that holds
      something else, a full disk.
  """
  target = _here(folder)
  if not saes:
    raise ReleaseError('A release needs at least one SAE; none was given.')
  try:
    prepared = sorted(
      map(_ready, saes), key=lambda entry: table_lib.order(entry[1:])
    )
    paths = paths_lib.paths([entry[1:] for entry in prepared])
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, prepared)
    with files.whole_folder(target, replace=True) as draft:
      _build(draft, prepared, paths, title, license_name)
      if not _may_replace(target, draft, overwrite):
        raise _Unchanged
  except _Unchanged:
    return False
  except files.Refused as error:
    raise ReleaseError(str(error)) from None
  except files.NotWritten as error:
    raise ReleaseError(str(error)) from error
  except OSError as error:
    raise ReleaseError(
      f'The release {files.show(target)} could not be written: {error}.'
    ) from error
  return True


class _Unchanged(Exception):
  """The folder holds the same release; nothing is replaced."""


def _ready(sae: Released) -> tuple[Params, dict, dict | None]:
  """Parameters, card and metrics as they are written, checked."""
  params = sae.load()
  card, metrics = manifest.plain(sae.card), manifest.plain(sae.metrics)
  if isinstance(card, dict):
    card = manifest.public(card)
    if 'W_skip' in params:
      card['affine'] = True  # the table and the path say so
  return sae_folder.fit(params, card), card, metrics


def load(
  path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES
) -> tuple[Params, dict]:
  """Reads one SAE's folder, or the params.npz in it.

  A params.npz with no config.json beside it (as Gemma Scope 1 was published)
  gets a card of its sizes alone.

  Args:
    path: a folder such as release/resid_post/layer_12/width_16k/average_l0_82.
    max_bytes: the largest file to accept, whatever the card says.

  Returns:
    (params, card): numpy float32 under `KEYS` (and W_skip and k where there
    are), and the card. For z = x @ W_enc + b_enc on raw activations x,
    f = relu(z) * (z > threshold) and y_hat = f @ W_dec + b_dec; `sae.encode`
    and `sae.decode` for all types.

  Raises:
    ReleaseError: the folder is no complete, unchanged SAE.
  """
  try:
    return sae_folder.read(*_located(path), max_bytes)
  except files.Refused as error:
    raise ReleaseError(str(error)) from None


def read_card(path: str | os.PathLike[str]) -> dict:
  """Reads and checks the card of an SAE's folder, and no parameters.

  Raises:
    ReleaseError: there is no card, or it does not fit its folder.
  """
  try:
    folder, name, listed = _located(path)
    card = sae_folder.read_card(folder, name, listed)
    if card is None:
      raise files.Refused(
        f'{files.show(folder)} holds no SAE in a format that is known.'
      )
  except files.Refused as error:
    raise ReleaseError(str(error)) from None
  return card


def _located(path) -> tuple[pathlib.Path, str | None, dict | None]:
  """(folder, its path in its release, its files by the manifest there)."""
  folder = _here(path)
  if folder.suffix == '.npz':
    if folder.name != 'params.npz':
      raise files.Refused(f'{files.show(folder)} must be called params.npz.')
    folder = folder.parent
  location = paths_lib.locate(folder)
  if not location:
    if folder.is_symlink():
      raise files.Refused(
        f'{files.show(folder)} is a symbolic link; give the path of the folder '
        'itself.'
      )
    return folder, None, None
  root, name = location
  manifest.refuse_links(root, name)
  if not os.path.lexists(root / manifest.NAME):
    return folder, name, None
  entries = manifest.read(root)['members']
  listed = {entry['path']: entry['files'] for entry in entries}.get(name)
  if listed is None:
    raise files.Refused(
      f'{files.show(folder)} is not in the manifest of its release.'
    )
  return folder, name, listed


def load_all(root: str | os.PathLike[str]) -> list[Released]:
  """Opens all SAEs of a release: reads cards and metrics, no parameters.

  Returns:
    SAEs by site, width and L0; `sae.load()` reads the parameters of one.

  Raises:
    ReleaseError: no manifest, a damaged one, or files that differ from it.
  """
  root = _here(root)
  try:
    saes = []
    for entry in manifest.read(root)['members']:
      manifest.refuse_links(root, entry['path'])
      folder, listed = root / entry['path'], entry['files']
      card = sae_folder.read_card(folder, entry['path'], listed)
      metrics = None
      if 'metrics.json' in listed:
        path = folder / 'metrics.json'
        metrics = manifest.read_json(path, listed[path.name])
        if not isinstance(metrics, dict):
          raise files.Refused(
            f'{files.show(folder)} has a metrics.json that is no JSON object.'
          )
      read = functools.partial(_params, folder)
      saes.append(Released(card, read, metrics, entry['path'], folder))
  except files.Refused as error:
    raise ReleaseError(str(error)) from None
  return sorted(saes, key=lambda sae: table_lib.order((sae.card, sae.metrics)))


def _here(path: str | os.PathLike[str]) -> pathlib.Path:
  """The absolute path of a folder of this machine."""
  try:
    files.refuse_address(path, 'The folder of a release')
  except ValueError as error:
    raise ReleaseError(str(error)) from None
  return pathlib.Path(os.path.abspath(path))


def _params(folder: pathlib.Path) -> Params:
  return load(folder)[0]


def verify(root: str | os.PathLike[str]) -> int:
  """Re-reads every file of a release against its manifest.

  Returns:
    How many bytes were checked.

  Raises:
    ReleaseError: the first file that is missing, changed or not plain.
  """
  root = _here(root)
  total = 0
  try:
    for name, expected in manifest.listed(manifest.read(root)).items():
      manifest.refuse_links(root, name)
      total += manifest.check_file(root / name, expected)
  except files.Refused as error:
    raise ReleaseError(str(error)) from None
  return total


def _build(root: pathlib.Path, ready, paths, title, license_name):
  """Writes every file of a release into an empty folder."""
  rows = [(card, metrics) for _, card, metrics in ready]
  entries = []
  for (params, card, metrics), path in zip(ready, paths, strict=True):
    folder = root / path
    folder.mkdir(parents=True)
    npz.write(folder / 'params.npz', params)
    manifest.write_json(folder / 'config.json', card)
    if metrics is not None:
      manifest.write_json(folder / 'metrics.json', metrics)
    summary = {key: card.get(key) for key in _SUMMARY}
    for key in ('l0', 'fvu', 'delta_loss'):
      summary[key] = table_lib.value((metrics or {}).get(key))
    present = [
      name for name in manifest.MEMBER_FILES if (folder / name).exists()
    ]
    described = {name: manifest.describe(folder / name) for name in present}
    entries.append(summary | {'path': path, 'files': described})
  picture = None
  if any(frontier.has_points(row) for row in rows):
    picture = 'frontier.png'
    frontier.frontier(root / picture, rows)
  text = card_lib.model_card(
    rows, paths, title=title, license_name=license_name, picture=picture
  )
  files.write_text(root / 'README.md', text)
  present = [name for name in manifest.ROOT_FILES if (root / name).exists()]
  sealed = manifest.seal(
    {
      'format': manifest.FORMAT,
      'version': manifest.VERSION,
      'members': entries,
      'files': {name: manifest.describe(root / name) for name in present},
    }
  )
  manifest.write_json(root / manifest.NAME, sealed)


def _may_replace(
  target: pathlib.Path, partial: pathlib.Path, overwrite: bool
) -> bool:
  """Whether to replace the target; False if it is this release already.

  Raises:
    ReleaseError: the target holds something that must not be replaced.
  """
  shown = files.show(target)
  if not os.path.lexists(target):
    return True
  if not target.is_dir():
    raise ReleaseError(f'{shown} is a file; a release needs a folder.')
  if not any(target.iterdir()):
    return True
  try:
    old_manifest = manifest.read(target)
  except files.Refused as error:
    raise ReleaseError(
      f'{shown} is not empty, and holds no release that can be read ({error}) '
      'It was not changed; choose another folder or delete this one.'
    ) from None
  known = {
    target / name for name in (manifest.NAME, *manifest.listed(old_manifest))
  }
  for path, _, names in os.walk(target):
    for name in names:
      if pathlib.Path(path, name) not in known:
        raise ReleaseError(
          f'{files.show(pathlib.Path(path, name))} does not belong to the '
          'release in this folder and would be lost; move it, or choose '
          'another folder.'
        )
  if old_manifest == manifest.read(partial):
    try:
      verify(target)
      return False
    except ReleaseError as error:
      if not overwrite:
        raise ReleaseError(
          f'{error} Pass --overwrite to write it again.'
        ) from None
  elif not overwrite:
    raise ReleaseError(
      f'{shown} holds a different release; pass --overwrite to replace it, or '
      'choose another folder.'
    )
  return True


def _check_room(folder: pathlib.Path, ready):
  needed = sum(
    array.nbytes for params, _, _ in ready for array in params.values()
  )
  needed += len(ready) << 17
  files.check_room(folder, needed, 'The release')
