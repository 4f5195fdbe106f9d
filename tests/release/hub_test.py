"""Repositories, layouts, and input that means harm; the hub is a stand-in."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import resource
import shutil
import struct
import sys
import time
import types

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from gemma_scope import files, release
from gemma_scope.release import manifest
from gemma_scope.release.formats import export, hub, published, saelens
from tests.helpers import commands, peer_formats


class Hub:
  """What huggingface_hub does, on a folder; fails when told to."""

  def __init__(self, root: pathlib.Path):
    self.root, self.failures, self.calls = root, [], []

  def HfApi(self):  # noqa: N802 - its name there
    return self

  def _call(self, name, repository):
    self.calls.append(name)
    if self.failures:
      raise self.failures.pop()
    if not (self.root / repository).is_dir():
      raise type('RepositoryNotFoundError', (Exception,), {})('secret-token')
    return self.root / repository

  def repo_info(self, repository, revision=None):
    folder = self._call(f'list {revision}', repository)
    there = (p for p in folder.rglob('*') if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in there]
    names += getattr(self, 'more', [])
    siblings = [types.SimpleNamespace(rfilename=name) for name in names]
    return types.SimpleNamespace(siblings=siblings, sha=f'sha{revision}')

  def hf_hub_download(self, repository, name, revision):
    """As there: snapshots of links into one folder of blobs."""
    folder = self._call(f'get {name}', repository)
    home = pathlib.Path(os.environ['HF_HOME'], 'hub')
    cache = home / f'models--{repository.replace("/", "--")}'
    data = (folder / name).read_bytes()
    blob = cache / 'blobs' / hashlib.sha256(data).hexdigest()
    link = cache / 'snapshots' / revision / name
    for path in (blob, link):
      path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return str(link)

  def create_repo(self, repository, private, exist_ok):
    assert private and exist_ok
    (self.root / repository).mkdir(parents=True, exist_ok=True)

  def upload_folder(
    self, repo_id, folder_path, path_in_repo, allow_patterns, commit_message
  ):
    folder = self._call(f'send {path_in_repo}', repo_id)
    for name in allow_patterns:
      target = folder / (path_in_repo or '') / name
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(pathlib.Path(folder_path, name), target)


@pytest.fixture
def fake(tmp_path, monkeypatch):
  made = Hub(tmp_path / 'hub')
  module = types.SimpleNamespace(
    HfApi=made.HfApi, hf_hub_download=made.hf_hub_download
  )
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(time, 'sleep', lambda seconds: None)
  return made


REPOSITORY = 'google/gemma-scope-2b-pt-res'


def publish(fake, *paths):
  for path in paths:
    peer_formats.gemma_scope_1_folder(fake.root, f'{REPOSITORY}/{path}')


def test_one_sae_of_a_repository_is_fetched_and_no_more(fake, tmp_path):
  ladder = [f'layer_12/width_16k/average_l0_{n}' for n in (22, 82, 176)]
  publish(fake, *ladder)
  params, card = published.load(f'{REPOSITORY}/{ladder[2]}', 'v1')
  peer_formats.same(params, peer_formats.make_member('jumprelu')[0])
  assert card['sites'] == ['resid_post/12']
  assert fake.calls == ['list v1', f'get {ladder[2]}/params.npz']
  _, card = published.load(f'{REPOSITORY}/layer_12/width_16k/canonical')
  assert card['sparsity']['value'] == 82
  entries = published.listed(f'{REPOSITORY}/layer_12')
  assert sorted(e.l0 for e in entries) == ['176', '22', '82']
  outside = [p for p in tmp_path.iterdir() if p.name not in ('hub', 'home')]
  assert not outside


def test_a_set_of_transcoders_fetches_the_files_that_it_names(fake, tmp_path):
  paths = [f'layer_{i}/width_16k/average_l0_{9 + i}' for i in (0, 1)]
  publish(fake, *paths)
  folder = tmp_path / 'set'
  folder.mkdir()

  def listed(*names):
    addresses = [f'hf://{REPOSITORY}/{name}' for name in names]
    (folder / 'config.yaml').write_text(
      'model_name: google/gemma-2-2b\n'
      'feature_input_hook: ln2.hook_normalized\n'
      'feature_output_hook: hook_mlp_out\n'
      f'transcoders: {json.dumps(addresses)}\n'
    )
    return published.open_all(str(folder))

  saes = listed(*(f'{path}/params.npz?revision=v1' for path in paths))
  assert [str(one.wiring) for one in saes] == [
    f'transcoder mlp_in_ungained/{layer}' for layer in (0, 1)
  ]
  peer_formats.same(saes[1].load(), peer_formats.make_member('jumprelu')[0])
  wanted = [f'get {path}/params.npz' for path in paths]
  assert [call for call in fake.calls if call.startswith('get')] == wanted
  for name, words in (
    ('layer_9/params.npz', 'has no file'),
    ('../../secret.npz', 'looks like OWNER/NAME'),
    ('a.npz?revision=../x', 'no address'),
    ('a.npz?token=1', 'no address'),
  ):
    with pytest.raises(release.ReleaseError, match=words):
      listed(name)


def test_a_failure_on_the_way_is_tried_again(fake):
  publish(fake, 'layer_1/width_16k/average_l0_9')
  fake.failures = [OSError('reset'), OSError('reset')]
  published.load(f'{REPOSITORY}/layer_1/width_16k/average_l0_9')
  fake.failures = [OSError('reset')] * 9
  with pytest.raises(release.ReleaseError, match='could not be fetched'):
    published.load(f'{REPOSITORY}/layer_1/width_16k/average_l0_9')


def test_no_such_repository_is_one_sentence_without_the_token(fake):
  with pytest.raises(release.ReleaseError) as refusal:
    published.load('google/nothing/layer_1')
  assert 'secret' not in str(refusal.value)
  assert fake.calls == ['list None']  # a final answer is not asked for twice


def test_a_repository_that_asks_for_consent_is_said_with_the_way_in(fake):
  path = 'layer_1/width_16k/average_l0_9'
  publish(fake, path)
  fake.failures = [type('GatedRepoError', (Exception,), {})('secret-token')]
  with pytest.raises(release.ReleaseError, match='hf auth login') as refusal:
    published.load(f'{REPOSITORY}/{path}')
  assert 'secret' not in str(refusal.value) and fake.calls == ['list None']


def test_each_revision_has_files_of_its_own(fake):
  path = 'layer_1/width_16k/average_l0_9'
  publish(fake, path)
  early = published.open_sae(f'{REPOSITORY}/{path}', 'v1')
  before = early.load()
  file = fake.root / REPOSITORY / path / 'params.npz'
  np.savez(file, **before | {'b_dec': before['b_dec'] + 1})
  late = published.open_sae(f'{REPOSITORY}/{path}', 'v2')
  peer_formats.same(late.load(), before | {'b_dec': before['b_dec'] + 1})
  peer_formats.same(early.load(), before)


def test_what_the_repository_has_is_said(fake):
  publish(fake, 'layer_1/width_16k/average_l0_9')
  with pytest.raises(release.ReleaseError, match='it has layer_1/width_16k/av'):
    published.load(f'{REPOSITORY}/layer_1/width_16k/average_l0_10')


@pytest.mark.parametrize(
  'path',
  ['../x', 'google/../../x', '/etc/x/y', 'google/a\nb', 'google/a\0b', 'one'],
)
def test_hostile_names_are_refused_before_the_hub_is_asked(path, fake):
  with pytest.raises((release.ReleaseError, ValueError)):
    published.load(path)
  assert not fake.calls


def test_names_that_leave_the_folder_are_not_fetched(fake, tmp_path):
  publish(fake, 'layer_1/width_16k/average_l0_9')
  path = 'layer_1/width_16k/average_l0_9'
  fake.more = ['../params.npz', f'{path}/../../../params.npz', '/params.npz']
  published.load(f'{REPOSITORY}/{path}')
  assert [c for c in fake.calls if c.startswith('get')] == [
    f'get {path}/params.npz'
  ]


# Layouts.


def rows(*kinds):
  found = []
  for i, kind in enumerate(kinds):
    params, card = peer_formats.for_saelens(kind)
    card |= {'name': f'{kind}_{i}', 'model': 'gemma2-2b'}
    card['sparsity'] = {'kind': 'target_l0', 'value': 99.0}
    found.append(release.in_memory(params, card, {'l0': 10.0 + 10 * i}))
  return found


@pytest.mark.parametrize(
  'layout, paths',
  [
    (
      'gemma_scope_1',
      [
        'gemma-scope-2b-pt-res/layer_3/width_32/average_l0_10',
        'gemma-scope-2b-pt-transcoders/layer_3/width_32/average_l0_20',
      ],
    ),
    (
      'saelens',
      [
        'blocks.3.hook_resid_post/width_32/average_l0_10',
        'blocks.3.ln2.hook_normalized/width_32/average_l0_20',
      ],
    ),
  ],
)
def test_a_layout_is_read_back_and_complete(layout, paths, tmp_path):
  members = rows('jumprelu', 'transcoder')
  assert export.write(tmp_path / 'out', members, layout) == paths
  for path, sae in zip(paths, members, strict=True):
    found, of = published.load(str(tmp_path / 'out' / path))
    peer_formats.same(found, sae.load())
    assert of['sites'] == sae.card['sites']
  listed = json.loads((tmp_path / 'out/manifest.json').read_text())['files']
  there = {
    p.relative_to(tmp_path / 'out').as_posix()
    for p in (tmp_path / 'out').rglob('*')
    if p.is_file()
  }
  assert set(listed) == there - {'manifest.json'}
  for name, expected in listed.items():
    manifest.check_file(tmp_path / 'out' / name, expected)
  assert [e.path for e in published.listed(str(tmp_path / 'out'))] == paths
  with pytest.raises(release.ReleaseError, match='there already'):
    export.write(tmp_path / 'out', members, layout)


def test_labels_of_gemma_scope_2_are_unique(tmp_path):
  def paths(*values):
    members = rows(*['jumprelu'] * len(values))
    for i, value in enumerate(values):
      members[i] = members[i].measured({'l0': value})
    return export.write(tmp_path / str(values), members, 'gemma_scope_2')

  start = 'resid_post/layer_3_width_32_l0'
  assert paths(12.0, 55.0) == [f'{start}_small', f'{start}_medium']
  assert paths(12.0, 14.0, 55.0) == [f'{start}_{n}' for n in (12, 14, 55)]
  assert paths(12.0, 12.0) == [f'{start}_12', f'{start}_12_2']


def test_what_a_layout_has_no_place_for_leaves_nothing(tmp_path):
  with pytest.raises(release.ReleaseError, match='Gemma Scope 1 has SAEs of'):
    members = rows('jumprelu')
    members[0].card['model'] = 'gemma3-1b'
    export.write(tmp_path / 'out', members, 'gemma_scope_1')
  with pytest.raises(release.ReleaseError, match='thresholds alone'):
    export.write(tmp_path / 'out', rows('jumprelu', 'topk'), 'gemma_scope_2')
  assert not list(tmp_path.iterdir())


def test_a_release_is_sent_and_continued(fake, tmp_path):
  out = tmp_path / 'out'
  export.write(out, rows('jumprelu', 'transcoder'), 'saelens')
  lines = []
  hub.push(out, 'me/saes', False, lines.append)
  assert not fake.calls and all(line.startswith('would') for line in lines)
  fake.failures = [OSError('cut')] * 3
  with pytest.raises(files.Refused, match='could not be'):
    hub.push(out, 'me/saes', True, lines.append)
  hub.push(out, 'me/saes', True, lines.append)
  for path in out.rglob('*'):
    if path.is_file():
      sent = fake.root / 'me/saes' / path.relative_to(out)
      assert sent.read_bytes() == path.read_bytes()
  assert fake.calls[-1] == 'send None'  # the card and the manifest, last
  found, _ = published.load(
    'me/saes/blocks.3.hook_resid_post/width_32/average_l0_10'
  )
  peer_formats.same(found, peer_formats.make_member('jumprelu')[0])
  (out / 'link').symlink_to('/etc/passwd')
  with pytest.raises(files.Refused, match='is a link'):
    hub.push(out, 'me/saes', True, lines.append)


# Files that mean harm: each is refused at once, in little memory.


def _huge_header(path):
  path.write_bytes(struct.pack('<Q', 1 << 63) + b'{}')


def _many_tensors(path):
  header = {
    f't{i}': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}
    for i in range(100_000)
  }
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text)


def _overlap(path):
  data = bytearray(save({'W_enc': np.zeros((2, 2), np.float32)}))
  text = b'{"W_enc":{"dtype":"F32","shape":[2,2],"data_offsets":[0,99]}}'
  path.write_bytes(struct.pack('<Q', len(text)) + text + data[-16:])


def _odd_name(path):
  save_file({'../../x': np.zeros(3, np.float32)}, path)


def _link(path):
  (path.parent / 'real').write_bytes(b'x')
  path.symlink_to('real')


def _cut(path):
  params, _ = peer_formats.make_member('jumprelu')
  path.write_bytes(save(dict(params))[:-10])


def _pipe(path):
  os.mkfifo(path)


@pytest.mark.parametrize(
  'make',
  [_huge_header, _many_tensors, _overlap, _odd_name, _link, _cut, _pipe],
)
def test_hostile_tensors_are_refused(make, tmp_path):
  params, card = peer_formats.make_member('jumprelu')
  folder = tmp_path / 'sae'
  saelens.write(folder, params, card)
  (folder / saelens.WEIGHTS).unlink()
  make(folder / saelens.WEIGHTS)
  before = set(tmp_path.rglob('*'))
  start = time.monotonic()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(release.ReleaseError) as refusal:
    published.load(str(folder))
  assert time.monotonic() - start < 1
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
  assert grown < 200 << 10  # KiB
  assert '\n' not in str(refusal.value)
  assert set(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('text', ['', '[]', '[' * 100_000, '{"a": 1', '\xff'])
def test_a_config_that_is_none_is_refused(text, tmp_path):
  params, card = peer_formats.make_member('jumprelu')
  saelens.write(tmp_path / 'sae', params, card)
  (tmp_path / 'sae/cfg.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(release.ReleaseError, match='JSON'):
    published.load(str(tmp_path / 'sae'))


def test_the_command_lists_and_converts(tmp_path, capsys):
  members = rows('jumprelu', 'transcoder')
  release.save(tmp_path / 'ours', members)

  ours, out = tmp_path / 'ours', tmp_path / 'out'
  run = functools.partial(commands.run, capsys, 'release')
  done = run(f'--release={ours}', '--layout=saelens', f'--out={out}')
  assert done.code == 0, done.err
  assert 'blocks.3.hook_resid_post/width_32/average_l0_10' in done.out
  done = run(f'--release={out}', '--push=me/saes')
  assert done.code == 0 and 'would upload' in done.out
  done = run('--list=google/gemma-scope-2b-pt-res')
  assert done.code == 1
  assert len(done.err.strip().splitlines()) == 1
