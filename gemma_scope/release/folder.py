"""Parameters and card <-> a folder that others can use.

The layout, keys, shapes and dtype are those of Gemma Scope 1
(arXiv 2408.05147), one folder for each kind of site above it; transcoders,
crosscoders and CLTs in folders of their own (`manifest`, `member`):

  release/
    README.md  frontier.png  manifest.json      sizes, SHA-256 of every file
    resid_post/layer_12/width_16k/average_l0_82/
      params.npz    W_enc [d_in, F]  b_enc [F]  W_dec [F, d_out]
                    b_dec [d_out]  threshold [F]  (W_skip [d_in, d_out])
      config.json   the card    metrics.json   what was measured
    transcoder/layer_12/width_16k/average_l0_71_affine/ ...

What is released works on raw activations: `fold` moved the scales of training
into the parameters. Three lines read one, with no JAX and no training code:

  from gemma_scope import release
  params, card = release.load('release/resid_post/layer_12/.../average_l0_82')
  f = sae.encode(params, x)      # y_hat = sae.decode(params, f, x)

Nothing read is trusted before it is checked: names, sizes, hashes, headers,
shapes, then values. What fails is a `ReleaseError` of one sentence.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope.release import card as card_lib
from gemma_scope.release import frontier, manifest, npz, sae_folder
from gemma_scope.release import paths as paths_lib
from gemma_scope.release import table as table_lib

Params = sae_folder.Params
KEYS = sae_folder.KEYS
MAX_BYTES = 128 << 30  # 1m latents on four layers of 27B have 108 GB

_SUMMARY = 'name type sites targets architecture width seed'.split()


class ReleaseError(ValueError):
  """A release that cannot be read or written; the text is one sentence."""


@dataclasses.dataclass(frozen=True)
class Member:
  """One member of a release on disk; its parameters are read when asked for."""

  path: str  # below the release, such as resid_post/layer_2/...
  folder: pathlib.Path
  card: dict
  metrics: dict | None

  def load(self) -> Params:
    """Returns the parameters, checked as `release.load` checks them."""
    return load(self.folder)[0]


def save(
  folder: str | os.PathLike[str],
  members: Sequence[tuple[Mapping[str, np.ndarray], dict, dict | None]],
  *,
  title: str | None = None,
  license_name: str = 'apache-2.0',
  overwrite: bool = False,
) -> bool:
  """Writes a release, whole or not at all.

  It is built in a hidden folder beside `folder` and renamed into place; what
  a killed writer left there is cleaned up by the next. Equal members give
  equal files, byte for byte.

  Args:
    folder: the release; made here, with the folders above it.
    members: (params, card, metrics), params float32 as `fold` returns them,
      metrics as `evaluate` returns them or None. A number in metrics or card
      that is not finite is written as null; a card gets 'affine': true where
      there is a W_skip.
    title: heading of the model card; None: 'Sparse autoencoders for ...'.
    license_name: Hugging Face licence identifier of the weights.
    overwrite: replace a different release that is already there. A folder
      that holds anything else is never replaced.

  Returns:
    True when files were written, False when the folder already held exactly
    this release, intact.

  Raises:
    ReleaseError: unfit members, a folder that is taken, no room on the disk.
  """
  target = pathlib.Path(os.path.realpath(folder))
  if not members:
    raise ReleaseError('A release needs at least one member; none was given.')
  partial = target.with_name(f'.{target.name}.partial')
  aside = target.with_name(f'.{target.name}.replaced')
  try:
    ready = []
    for params, card, metrics in members:
      card, metrics = manifest.plain(card), manifest.plain(metrics)
      if 'W_skip' in params and isinstance(card, dict):
        card['affine'] = True  # the table and the path say so
      ready.append((sae_folder.fit(params, card), card, metrics))
    # By the table's order, so that the order given changes nothing.
    ready.sort(key=lambda each: table_lib.order(each[1:]))
    paths = paths_lib.paths([each[1:] for each in ready])
    target.parent.mkdir(parents=True, exist_ok=True)
    if aside.exists() and not target.exists():
      os.rename(aside, target)  # a writer was killed between two renames
    _remove(partial)
    _remove(aside)
    _check_room(target.parent, ready)
    try:
      _build(partial, ready, paths, title, license_name)
      if not _may_replace(target, partial, overwrite):
        return False
      if target.exists():
        os.rename(target, aside)
      os.rename(partial, target)
      _remove(aside)
    finally:
      _remove(partial)
  except npz.Refused as error:
    raise ReleaseError(str(error)) from None
  except OSError as error:
    raise ReleaseError(
      f'The release {npz.show(target)} could not be written: {error}.'
    ) from error
  return True


def load(
  path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES
) -> tuple[Params, dict]:
  """Reads one member's folder, or the params.npz in it.

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
    ReleaseError: anything that is not a whole, unchanged member.
  """
  folder = pathlib.Path(os.path.abspath(path))
  if folder.suffix == '.npz':
    if folder.name != 'params.npz':
      raise ReleaseError(
        f'{npz.show(folder)} should be called params.npz, in its folder.'
      )
    folder = folder.parent
  try:
    inside = paths_lib.locate(folder)
    files = None
    if inside:
      root, name = inside
      manifest.refuse_links(root, name)
      if os.path.lexists(root / manifest.NAME):
        entries = manifest.read(root)['members']
        files = {e['path']: e['files'] for e in entries}.get(name)
        if files is None:
          raise npz.Refused(
            f'{npz.show(folder)} is not in the manifest of its release.'
          )
    elif folder.is_symlink():
      raise npz.Refused(
        f'{npz.show(folder)} is a symbolic link; give the folder itself.'
      )
    return sae_folder.read(folder, name if inside else None, files, max_bytes)
  except npz.Refused as error:
    raise ReleaseError(str(error)) from None


def load_all(root: str | os.PathLike[str]) -> list[Member]:
  """Lists a release: cards and metrics, checked; parameters not yet read.

  Returns:
    Members by place, width and L0; `member.load()` reads one.

  Raises:
    ReleaseError: no manifest, a damaged one, or files that differ from it.
  """
  root = pathlib.Path(os.path.abspath(root))
  try:
    members = []
    for entry in manifest.read(root)['members']:
      manifest.refuse_links(root, entry['path'])
      folder, files = root / entry['path'], entry['files']
      card = manifest.read_json(folder / 'config.json', files['config.json'])
      sae_folder.check_card(card, folder, entry['path'])
      metrics = None
      if 'metrics.json' in files:
        path = folder / 'metrics.json'
        metrics = manifest.read_json(path, files[path.name])
        if not isinstance(metrics, dict):
          raise npz.Refused(f'{npz.show(folder)} has metrics of no known form.')
      members.append(Member(entry['path'], folder, card, metrics))
  except npz.Refused as error:
    raise ReleaseError(str(error)) from None
  return sorted(members, key=lambda m: table_lib.order((m.card, m.metrics)))


def verify(root: str | os.PathLike[str]) -> int:
  """Re-reads every file of a release against its manifest.

  Returns:
    How many bytes were checked.

  Raises:
    ReleaseError: the first file that is missing, changed or not plain.
  """
  root = pathlib.Path(os.path.abspath(root))
  total = 0
  try:
    for name, expected in manifest.listed(manifest.read(root)).items():
      manifest.refuse_links(root, name)
      total += manifest.check_file(root / name, expected)
  except npz.Refused as error:
    raise ReleaseError(str(error)) from None
  return total


def _build(root: pathlib.Path, ready, paths, title, license_name):
  """Writes every file of a release below a folder that is not there yet."""
  os.mkdir(root)
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
    present = [n for n in manifest.MEMBER_FILES if (folder / n).exists()]
    files = {name: manifest.describe(folder / name) for name in present}
    entries.append(summary | {'path': path, 'files': files})
  picture = None
  if any(frontier.has_points(row) for row in rows):
    picture = 'frontier.png'
    frontier.frontier(root / picture, rows)
  text = card_lib.model_card(
    rows, paths, title=title, license_name=license_name, picture=picture
  )
  manifest.write_text(root / 'README.md', text)
  present = [n for n in manifest.ROOT_FILES if (root / n).exists()]
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
  """False: target already is this release. Raises where it must stay."""
  where = npz.show(target)
  if not os.path.lexists(target):
    return True
  if not target.is_dir():
    raise ReleaseError(f'{where} is a file; a release is a folder.')
  if not any(target.iterdir()):
    return True
  try:
    old = manifest.read(target)
  except npz.Refused as error:
    raise ReleaseError(
      f'{where} is not empty and not a release that can be read ({error}) '
      'It is left as it is; choose another folder or remove it.'
    ) from None
  known = {target / name for name in (manifest.NAME, *manifest.listed(old))}
  for path, _, names in os.walk(target):
    for name in names:
      if pathlib.Path(path, name) not in known:
        raise ReleaseError(
          f'{npz.show(pathlib.Path(path, name))} is no part of the release '
          'it lies in and would be lost; move it, or choose another folder.'
        )
  if old == manifest.read(partial):
    try:
      verify(target)
      return False
    except ReleaseError as error:
      if not overwrite:
        raise ReleaseError(f'{error} Ask to overwrite, to mend it.') from None
  elif not overwrite:
    raise ReleaseError(
      f'{where} holds a different release; ask to overwrite it, or choose '
      'another folder.'
    )
  return True


def _check_room(folder: pathlib.Path, ready):
  needed = sum(a.nbytes for params, _, _ in ready for a in params.values())
  needed += len(ready) << 17
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise ReleaseError(
      f'The release needs {needed:,} bytes and {npz.show(folder)} has '
      f'{free:,} free; make room or choose another disk.'
    )


def _remove(folder: pathlib.Path):
  if folder.is_dir() and not folder.is_symlink():
    shutil.rmtree(folder)
