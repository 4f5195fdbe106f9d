"""Damaged and hostile releases are refused by what the manifest says."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest

from gemma_scope import release
from gemma_scope.release import manifest
from tests.helpers import releases
from tests.helpers.releases import MEMBER, files_in, metrics_of, params_of

pytestmark = pytest.mark.usefixtures('no_picture')


def test_any_flipped_bit_is_found_and_named(folder):
  """20 places in each file of a release, the manifest itself among them."""
  root = folder.parents[3]
  rng = np.random.default_rng(0)
  for path in files_in(root):
    data = path.read_bytes()
    for at in rng.integers(0, max(len(data), 1), 20 if data else 0):
      flipped = bytearray(data)
      flipped[at] ^= 1 << int(rng.integers(8))
      path.write_bytes(flipped)
      try:
        release.verify(root)
        # A change of white space in the manifest is no change.
        assert path.name == 'manifest.json'
        assert json.loads(flipped) == json.loads(data)
      except release.ReleaseError as error:
        assert path.name in str(error)
      if path.name in ('params.npz', 'config.json'):
        with pytest.raises(release.ReleaseError, match=path.name):
          release.load(folder)
    path.write_bytes(data)
  assert release.verify(root)


def edit(root, change):
  """Edits the manifest and seals it again, as an attacker would."""
  path = root / 'manifest.json'
  found = json.loads(path.read_text())
  del found['digest']
  change(found)
  path.write_text(json.dumps(manifest.seal(found)))


@pytest.mark.parametrize(
  'name',
  [
    '../../outside',
    f'../{MEMBER}',
    f'{MEMBER}/..',
    '/etc',
    f'/{MEMBER}',
    f'{MEMBER}\n',
    f'{MEMBER}\0',
    f'{MEMBER}/',
    f'./{MEMBER}',
    'resid_post//layer_2/width_24/average_l0_5',
    'resid_post/layer_２/width_24/average_l0_5',
    'C:\\x',
    '\ud800',
    '',
    7,
    None,
    'x' * 100_000,
  ],
)
def test_hostile_names_in_a_manifest_are_refused(folder, name):
  root = folder.parents[3]
  edit(root, lambda found: found['members'][0].update(path=name))
  for read in (release.load_all, release.verify):
    start = time.perf_counter()
    with pytest.raises(release.ReleaseError, match='names an SAE') as caught:
      read(root)
    assert time.perf_counter() - start < 1
    text = str(caught.value)
    assert '\n' not in text and '\0' not in text and len(text) < 700
    text.encode('utf-8')


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda m: m['files'].update({'../x': m['files']['README.md']}), 'lists'),
    (
      lambda m: m['members'][0]['files'].update({'a.pkl': {}}),
      'lists the file',
    ),
    (lambda m: m['members'][0]['files'].pop('params.npz'), 'without params'),
    (lambda m: m['members'][0].pop('files'), 'without a list of files'),
    (lambda m: m['files']['README.md'].update(sha256='0'), 'no size and SHA'),
    (lambda m: m['files']['README.md'].update(bytes='1'), 'no size and SHA'),
    (lambda m: m['members'].append(m['members'][0]), 'twice'),
    (lambda m: m['members'].append([]), 'names an SAE'),
    (lambda m: m.update(version=1), 'version'),
    (lambda m: m.update(format='other'), 'not the manifest'),
    (lambda m: m.update(members={}), 'lacks its lists'),
  ],
)
def test_malformed_manifests_are_refused(folder, change, words):
  root = folder.parents[3]
  edit(root, change)
  with pytest.raises(release.ReleaseError, match=words):
    release.load_all(root)


@pytest.mark.parametrize(
  'data',
  [b'', b'[' * 100_000, b'{"a": NaN}', b'\xff\xfe', b'null', b'1' * 10_000],
)
def test_json_that_is_none_is_refused(folder, data):
  root = folder.parents[3]
  for path in (folder / 'config.json', root / 'manifest.json'):
    whole = path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(release.ReleaseError, match=path.name):
      release.load(folder)
    path.write_bytes(whole)
  (root / 'manifest.json').unlink()
  (folder / 'config.json').write_bytes(data)
  with pytest.raises(release.ReleaseError, match='config.json'):
    release.load(folder)


def test_a_huge_manifest_is_not_parsed(folder):
  root = folder.parents[3]
  with open(root / 'manifest.json', 'wb') as file:
    file.truncate(1 << 33)
  start = time.perf_counter()
  with pytest.raises(release.ReleaseError, match='at most'):
    release.load_all(root)
  assert time.perf_counter() - start < 1


def test_links_and_pipes_are_refused(tmp_path, folder):
  root = folder.parents[3]
  moved = tmp_path / 'elsewhere'
  for path in (folder, folder.parent, folder / 'params.npz'):
    os.rename(path, moved)
    os.symlink(moved, path)
    with pytest.raises(release.ReleaseError, match='symbolic link'):
      release.load(folder)
    with pytest.raises(release.ReleaseError, match='symbolic link'):
      release.verify(root)
    path.unlink()
    os.rename(moved, path)
  bare = tmp_path / 'bare'
  os.symlink(folder, bare)
  with pytest.raises(release.ReleaseError, match='symbolic link'):
    release.load(bare)
  (folder / 'config.json').unlink()
  os.mkfifo(folder / 'config.json')
  with pytest.raises(release.ReleaseError, match='not a plain file'):
    release.load(folder)


def test_files_the_manifest_does_not_know_are_refused(folder):
  other = folder.with_name('average_l0_6')
  shutil.copytree(folder, other)
  with pytest.raises(release.ReleaseError, match='not in the manifest'):
    release.load(other)


def test_a_card_that_belongs_elsewhere_is_refused(folder):
  root = folder.parents[3]
  (root / 'manifest.json').unlink()
  for layer, width in ((3, 24), (2, 25)):
    other = root / f'resid_post/layer_{layer}/width_{width}/average_l0_5'
    shutil.copytree(folder, other)
    with pytest.raises(release.ReleaseError, match='its folder is'):
      release.load(other)


def test_a_valid_file_in_anothers_place_is_refused(tmp_path):
  """Each file is whole; the hash in the manifest is what tells."""
  members = [
    (params_of(i), releases.card(seed=i), metrics_of(l0=5 + 10 * i))
    for i in range(2)
  ]
  releases.save(tmp_path / 'out', members)
  first, second = (m.folder for m in release.load_all(tmp_path / 'out'))
  shutil.copy(first / 'params.npz', second / 'params.npz')
  with pytest.raises(release.ReleaseError, match='SHA-256'):
    release.load(second)


def test_missing_things_are_named(tmp_path):
  with pytest.raises(release.ReleaseError, match=r'params\.npz.*not exist'):
    release.load(tmp_path / 'nowhere')
  with pytest.raises(release.ReleaseError, match=r'manifest\.json.*not exist'):
    release.load_all(tmp_path)
  with pytest.raises(release.ReleaseError, match='must be called'):
    release.load(tmp_path / 'weights.npz')
  with pytest.raises(release.ReleaseError, match='cannot be opened'):
    release.load('a\0b')
