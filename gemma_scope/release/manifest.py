"""The manifest of a release: size and SHA-256 of every file, and the checks.

manifest.json is

  {"format": "gemma_scope.release", "version": 2,
   "members": [{"path": "resid_post/layer_2/width_512/average_l0_20",
                "files": {"params.npz": {"bytes": n, "sha256": hex}, ...},
                "sites", "width", "l0", ...: a summary of the card}],
   "files": {"README.md": {"bytes": n, "sha256": hex}, ...},
   "digest": SHA-256 of all the above as canonical JSON}

so that a flipped bit is found anywhere, in the manifest too. An SAE's path is

  kind of site/layer_12/width_16k/average_l0_82           an SAE
  transcoder/layer_12/width_16k/average_l0_82_affine      with an affine skip
  crosscoder/layer_7_13_17_22/width_65k/average_l0_50
  clt/layer_0_to_25/width_262k/average_l0_50              many layers in a row

followed by _ARCHITECTURE in a release of several architectures. A name must
match the pattern of names in a release, which has no '..', absolute path or
control character; links are refused. The size of JSON is limited before it is
parsed. A failed check raises `files.Refused`, one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope import files, path_values
from gemma_scope.release import paths as paths_lib

NAME = 'manifest.json'
FORMAT = 'gemma_scope.release'
VERSION = 2
MEMBER_FILES = ('params.npz', 'config.json', 'metrics.json')
ROOT_FILES = ('README.md', 'frontier.png')

_JSON_BYTES = 4 << 20
_ANY_BYTES = 1 << 50
_SHA256 = re.compile(r'[0-9a-f]{64}', re.ASCII)


def public(card: dict) -> dict:
  """The card without the folders of the machine that it was written on."""
  card = dict(card)
  text = card.get('text')
  if isinstance(text, dict) and isinstance(text.get('source'), str):
    card['text'] = text | {'source': path_values.shortened(text['source'])}
  for key in ('name', 'initialised_from'):
    if isinstance(card.get(key), str):
      paths = card[key].split(',') if key != 'name' else [card[key]]
      card[key] = ','.join(
        path_values.shortened_path(part)
        if part.startswith(('/', '~', '../'))
        else part
        for part in paths
      )
  return card


def plain(value: Any) -> Any:
  """The value in JSON's types; numbers that are not finite become None."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple | np.ndarray):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise files.Refused(
    'Cards and metrics may hold numbers, strings, lists and dicts; found '
    f'{files.show(type(value).__name__)}.'
  )


def write_json(path: str | os.PathLike[str], value: Any):
  """Writes JSON with sorted keys, no larger than `read_json` accepts."""
  text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + '\n'
  if len(text) > _JSON_BYTES:
    raise files.Refused(
      f'{files.show(path)} would have {len(text):,} bytes, more than the '
      f'{_JSON_BYTES:,} that are read back; put fewer SAEs into a release.'
    )
  files.write_text(path, text)


def describe(path: str | os.PathLike[str]) -> dict:
  """A file's {'bytes', 'sha256'} as the manifest holds them."""
  return {'bytes': os.path.getsize(path), 'sha256': files.sha256(path)}


def seal(manifest: dict) -> dict:
  """Adds the manifest's own digest."""
  return manifest | {'digest': _digest(manifest)}


def listed(manifest: dict) -> dict[str, dict]:
  """All files of the release but the manifest: path below the root -> entry."""
  entries = dict(manifest['files'])
  for member in manifest['members']:
    for name, expected in member['files'].items():
      entries[f'{member["path"]}/{name}'] = expected
  return entries


def read(root: pathlib.Path) -> dict:
  """Reads and checks manifest.json; its names are then safe to join."""
  path = root / NAME
  content = read_json(path)
  shown = files.show(path)
  if not isinstance(content, dict) or content.get('format') != FORMAT:
    raise files.Refused(
      f'{shown} is not the manifest of a gemma_scope release.'
    )
  if content.get('version') != VERSION:
    raise files.Refused(
      f'{shown} has version {files.show(content.get("version"))}; this '
      f'gemma_scope reads version {VERSION}.'
    )
  members, root_files = content.get('members'), content.get('files')
  if not isinstance(members, list) or not isinstance(root_files, dict):
    raise files.Refused(f'{shown} lacks its lists of SAEs and files.')
  # Names before the digest: an attacker can write a valid digest.
  names = set()
  for member in members:
    name = member.get('path') if isinstance(member, dict) else None
    if not isinstance(name, str) or not paths_lib.MEMBER.fullmatch(name):
      raise files.Refused(
        f'{shown} names an SAE {files.show(name)}; expected '
        'kind/layer_L/width_W/average_l0_N.'
      )
    if name in names:
      raise files.Refused(f'{shown} names the SAE {name} twice.')
    names.add(name)
    _check_names(shown, member.get('files'), MEMBER_FILES, 2)
  _check_names(shown, root_files, ROOT_FILES, 0)
  unsealed = {key: item for key, item in content.items() if key != 'digest'}
  try:
    same = content.get('digest') == _digest(unsealed)
  except RecursionError:
    same = False
  if not same:
    raise files.Refused(
      f'{shown} is damaged or was edited: its digest does not match.'
    )
  return content


def read_json(path: pathlib.Path, expected: dict | None = None) -> Any:
  """Reads a small JSON file; `expected` is its {'bytes', 'sha256'} if known."""
  try:
    with files.open_plain(path, _JSON_BYTES) as (file, _):
      data = file.readall()
  except files.Refused as error:
    raise files.Refused(f'{files.show(path)} {error}.') from None
  if expected is not None:
    sha256 = hashlib.sha256(data).hexdigest()
    _compare(path, {'bytes': len(data), 'sha256': sha256}, expected)
  try:
    return json.loads(data.decode('utf-8'), parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise files.Refused(
      f'{files.show(path)} is not valid JSON ({str(error)[:100]}).'
    ) from None


def check_file(path: pathlib.Path, expected: dict) -> int:
  """Checks a file's size and hash; returns its size."""
  try:
    with files.open_plain(path, _ANY_BYTES) as (file, size):
      if size != expected['bytes']:
        sha256 = '-'
      else:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  except files.Refused as error:
    raise files.Refused(f'{files.show(path)} {error}.') from None
  _compare(path, {'bytes': size, 'sha256': sha256}, expected)
  return size


def refuse_links(root: pathlib.Path, name: str):
  """Raises `files.Refused` if a folder between `root` and `name` is a link."""
  path = root
  for folder_name in name.split('/'):
    path = path / folder_name
    if path.is_symlink():
      raise files.Refused(
        f'{files.show(path)} is a symbolic link; a release may hold only files '
        'and folders.'
      )


def _check_names(shown_path, entries, allowed, needed: int):
  """Checks {name: {'bytes', 'sha256'}}; the first `needed` names must exist."""
  if not isinstance(entries, dict):
    raise files.Refused(f'{shown_path} has an SAE without a list of files.')
  for name, entry in entries.items():
    if name not in allowed:
      raise files.Refused(
        f'{shown_path} lists the file {files.show(name)}; expected '
        f'{", ".join(allowed)} only.'
      )
    if (
      not isinstance(entry, dict)
      or type(entry.get('bytes')) is not int
      or not isinstance(entry.get('sha256'), str)
      or not _SHA256.fullmatch(entry['sha256'])
    ):
      raise files.Refused(f'{shown_path} gives no size and SHA-256 for {name}.')
  missing = [name for name in allowed[:needed] if name not in entries]
  if missing:
    raise files.Refused(
      f'{shown_path} has an SAE without {", ".join(missing)}.'
    )


def _compare(path: pathlib.Path, actual: dict, expected: dict):
  if actual['bytes'] != expected['bytes']:
    raise files.Refused(
      f'{files.show(path)} has {actual["bytes"]:,} bytes, and its manifest '
      f'says {expected["bytes"]:,}; fetch or write it again.'
    )
  if actual['sha256'] != expected['sha256']:
    raise files.Refused(
      f'{files.show(path)} is damaged or was changed: its SHA-256 should be '
      f'{expected["sha256"][:12]}... and is {actual["sha256"][:12]}...'
    )


def _digest(manifest: dict) -> str:
  return files.json_sha256(manifest, separators=(',', ':'))


def _no_constant(name: str):
  raise ValueError(f'{name} is not a JSON number')
