"""Releases: files round-trip, hostile ones are refused."""

import errno
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import zipfile

import numpy as np
import pytest

import gemma_scope
from gemma_scope import release
from gemma_scope.release import frontier, manifest, npz, table
from tests.helpers import releases
from tests.helpers.releases import D, F

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
MEMBER = 'resid_post/layer_2/width_24/average_l0_5'


def _params(seed=0, d_in=D, width=F, d_out=None):
  rng = np.random.default_rng(seed)
  d_out = d_out or d_in
  W_dec = rng.normal(size=(width, d_out))
  W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
  params = {
    'W_enc': rng.normal(size=(d_in, width)),
    'b_enc': 0.1 * rng.normal(size=width),
    'W_dec': W_dec,
    'b_dec': 0.3 * rng.normal(size=d_out),
    'threshold': rng.uniform(0.05, 0.5, size=width),
  }
  return {key: array.astype(np.float32) for key, array in params.items()}


def _figure(value):
  return {'value': value, 'low': 0.9 * value, 'high': 1.2 * value, 'tokens': 99}


def _metrics(l0=5.2, fvu=0.31, delta=0.02):
  twin = {'l0': _figure(l0), 'fvu': _figure(0.9), 'delta_loss': _figure(1.5)}
  return {
    'l0': _figure(l0),
    'fvu': _figure(fvu),
    'delta_loss': _figure(delta),
    'dead': 0.125,
    'tokens': 61440,
    'control': twin,
  }


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch, request):
  """Drawing takes a second; one test below wants it."""
  if 'model_card_says' not in request.node.name:
    monkeypatch.setattr(frontier, 'frontier', lambda path, rows: path.touch())


@pytest.fixture
def folder(tmp_path):
  """One member, released."""
  releases.save(tmp_path / 'out', [(_params(), releases.card(), _metrics())])
  return tmp_path / 'out' / MEMBER


# ----------------------------------------------------------------- round trip


def test_round_trip_is_exact_in_the_papers_form(tmp_path):
  params, card, metrics = _params(), releases.card(), _metrics()
  assert releases.save(tmp_path / 'out', [(params, card, metrics)])
  folder = tmp_path / 'out' / MEMBER
  for path in (folder, str(folder), folder / 'params.npz'):
    loaded, found = release.load(path)
    assert found == card
    assert list(loaded) == ['W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold']
    for key, array in params.items():
      np.testing.assert_array_equal(loaded[key], array)
      assert loaded[key].dtype == np.float32
  (member,) = release.load_all(tmp_path / 'out')
  assert (member.path, member.card, member.metrics) == (MEMBER, card, metrics)
  np.testing.assert_array_equal(member.load()['W_enc'], params['W_enc'])
  assert release.verify(tmp_path / 'out') > 4 * 2 * D * F
  # What others read it with.
  with np.load(folder / 'params.npz', allow_pickle=False) as plain:
    assert plain['W_dec'].shape == (F, D)


def test_equal_members_give_equal_files_and_are_not_written_twice(tmp_path):
  members = [
    (_params(i), releases.card(seed=i), _metrics(l0=5 + 10 * i))
    for i in range(2)
  ]
  assert releases.save(tmp_path / 'a', members)
  assert releases.save(tmp_path / 'b', members[::-1])
  names = sorted(p.relative_to(tmp_path / 'a') for p in _files(tmp_path / 'a'))
  assert len(names) == 9
  for name in names:
    same = (tmp_path / 'a' / name).read_bytes()
    assert same == (tmp_path / 'b' / name).read_bytes(), name
  before = (tmp_path / 'a' / 'manifest.json').stat().st_mtime_ns
  assert not releases.save(tmp_path / 'a', members)
  assert (tmp_path / 'a' / 'manifest.json').stat().st_mtime_ns == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


def test_equal_names_are_told_apart(tmp_path):
  members = [
    (_params(0), releases.card(seed=0), _metrics()),
    (_params(1), releases.card(seed=1), _metrics()),
    (_params(2), releases.card(seed=1), _metrics(5.3)),
    (_params(3), releases.card(seed=1), _metrics(5.4)),
  ]
  releases.save(tmp_path / 'out', members)
  found = release.load_all(tmp_path / 'out')
  assert {member.path: member.card['seed'] for member in found} == {
    MEMBER: 0,
    f'{MEMBER}_seed_1': 1,
    f'{MEMBER}_2': 1,
    f'{MEMBER}_3': 1,
  }


def test_several_architectures_are_told_apart(tmp_path):
  names = ('jumprelu', 'matryoshka_batch_topk')
  members = [
    (_params(i), releases.card(architecture=name), _metrics())
    for i, name in enumerate(names)
  ]
  releases.save(tmp_path / 'out', members)
  found = release.load_all(tmp_path / 'out')
  assert [member.path for member in found] == [
    f'{MEMBER}_{name}' for name in names
  ]
  for member, (params, _, _) in zip(found, members, strict=True):
    np.testing.assert_array_equal(member.load()['W_enc'], params['W_enc'])
  lines = table.table([(m.card, m.metrics) for m in found]).split('\n')
  assert 'architecture' in lines[0] and 'batch_topk' in lines[3]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
  metrics = _metrics() | {'fvu': _figure(float('nan')), 'dense': np.float32(0)}
  releases.save(tmp_path / 'out', [(_params(), releases.card(), metrics)])
  (member,) = release.load_all(tmp_path / 'out')
  assert member.metrics['fvu']['value'] is None
  assert member.metrics['dense'] == 0.0


def test_three_lines_load_without_jax(folder):
  code = f"""
    import sys
    class Refuse:
      def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in (
            'jax', 'jaxlib', 'flax', 'optax', 'gemma', 'matplotlib'):
          raise ImportError(name)
    sys.meta_path.insert(0, Refuse())
    from gemma_scope import release
    params, card = release.load({str(folder)!r})
    print(params['W_enc'].shape, *card['sites'])
    assert not [m for m in sys.modules if m.startswith('gemma_scope.training')]
  """
  done = _python(code)
  assert done.stdout.split('\n')[0] == f'({D}, {F}) resid_post/2', done.stderr


def test_a_published_file_needs_no_card_and_no_upper_case(tmp_path):
  """As Gemma Scope 1 lies on the hub: params.npz alone; Fortran order too."""
  params = _params(d_out=6)
  folder = tmp_path / 'layer_20' / 'width_16k' / 'average_l0_71'
  folder.mkdir(parents=True)
  lower = {key.lower(): array for key, array in params.items()}
  lower['w_enc'] = np.asfortranarray(lower['w_enc'])
  np.savez(folder / 'params.npz', **lower)
  loaded, card = release.load(folder)
  assert card == {'d_in': D, 'd_out': 6, 'width': F}
  for key, array in params.items():
    np.testing.assert_array_equal(loaded[key], array)


# ---------------------------------------------------- what lies there already


def test_a_different_release_is_replaced_only_when_asked(tmp_path):
  out = tmp_path / 'out'
  releases.save(out, [(_params(0), releases.card(), _metrics())])
  other = [(_params(1), releases.card(), _metrics())]
  with pytest.raises(release.ReleaseError, match='different release'):
    releases.save(out, other)
  assert releases.save(out, other, overwrite=True)
  np.testing.assert_array_equal(
    release.load(out / MEMBER)[0]['W_enc'], _params(1)['W_enc']
  )
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_what_is_not_ours_is_never_replaced(tmp_path):
  members = [(_params(0), releases.card(), _metrics())]
  out = tmp_path / 'out'
  releases.save(out, members)
  (out / 'notes.txt').write_text('keep')
  with pytest.raises(release.ReleaseError, match='notes.txt'):
    releases.save(out, [(_params(1), releases.card(), None)], overwrite=True)
  assert (out / 'notes.txt').read_text() == 'keep'
  home = tmp_path / 'home'
  home.mkdir()
  (home / 'thesis').touch()
  with pytest.raises(release.ReleaseError, match='not empty'):
    releases.save(home, members, overwrite=True)
  with pytest.raises(release.ReleaseError, match='is a file'):
    releases.save(home / 'thesis', members, overwrite=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['home', 'out']


def test_a_killed_writer_leaves_nothing_half_done(tmp_path, monkeypatch):
  out, members = tmp_path / 'out', [(_params(0), releases.card(), _metrics())]
  releases.save(out, members)
  # Killed between the two renames, and while building.
  os.rename(out, tmp_path / '.out.replaced')
  assert not releases.save(out, members)
  assert [p.name for p in tmp_path.iterdir()] == ['out']

  def full(path, arrays):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(npz, 'write', full)
  with pytest.raises(release.ReleaseError, match='No space left'):
    releases.save(out, [(_params(1), releases.card(), None)], overwrite=True)
  assert release.verify(out)
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_damaged_release_is_mended_when_asked(tmp_path):
  out, members = tmp_path / 'out', [(_params(0), releases.card(), _metrics())]
  releases.save(out, members)
  (out / 'README.md').write_text('x')
  with pytest.raises(release.ReleaseError, match='README.md'):
    releases.save(out, members)
  assert releases.save(out, members, overwrite=True)
  assert release.verify(out)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda p, c: p.update(W_enc=p['W_enc'].astype(np.float64)), 'float64'),
    (lambda p, c: p['b_enc'].__setitem__(0, np.nan), 'not finite'),
    (lambda p, c: p['threshold'].__setitem__(0, -1), 'below 0'),
    (lambda p, c: p.update(W_dec=p['W_dec'].T), 'transposed'),
    (lambda p, c: p.pop('b_dec'), 'expected W_enc'),
    (lambda p, c: p.update(extra=p['b_dec']), 'extra'),
    (lambda p, c: c.update(d_in=2304), 'd_in = 2304'),
    (lambda p, c: c.update(width=True), 'whole number'),
    (
      lambda p, c: c.update(sites=['../../etc']),
      'which is no site|written kind',
    ),
    (lambda p, c: c.update(text=object()), 'numbers, strings'),
  ],
)
def test_unfit_members_are_not_released(tmp_path, change, words):
  params, card = _params(), releases.card()
  change(params, card)
  with pytest.raises(release.ReleaseError, match=words):
    releases.save(tmp_path / 'out', [(params, card, None)])
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------- damage and attack


def _files(root):
  return [path for path in root.rglob('*') if path.is_file()]


def _python(code):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def _header(shape, descr='<f4', fortran=False):
  text = (
    f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"
  )
  text += ' ' * (-(len(text) + 11) % 64) + '\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text.encode()


def _rewrite(path, change, compression=zipfile.ZIP_STORED):
  """Writes an npz anew with its raw entries changed."""
  with zipfile.ZipFile(path) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  change(entries)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, data in entries.items():
      archive.writestr(name, data)


def _objects(path):
  params = _params() | {'b_enc': np.array([{}] * F, dtype=object)}
  np.savez(path, **params)


def _savez(path, **change):
  np.savez(path, **(_params() | change))


def _nan(path):
  params = _params()
  params['W_dec'][1, 1] = np.nan
  np.savez(path, **params)


def _tebibytes(path):
  header = _header((1 << 20, 1 << 20))
  _rewrite(path, lambda e: e.update({'W_enc.npy': header + bytes(64)}))


def _bomb(path):
  """256 MiB of zeros in 261 kB."""
  path.write_bytes(_bomb_bytes())


@functools.cache
def _bomb_bytes():
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
    for key, array in _params().items():
      header = _header(array.shape if key != 'W_enc' else (8192, 8192))
      data = array.tobytes() if key != 'W_enc' else bytes(1 << 28)
      z.writestr(f'{key}.npy', header + data)
  return file.getvalue()


def _lying_directory(path):
  """A directory that says 'stored' and gives a size that is not there."""
  data = bytearray(path.read_bytes())
  at = data.rindex(b'PK\x01\x02')
  data[at + 20 : at + 28] = struct.pack('<II', 1 << 31, 1 << 31)
  path.write_bytes(data)


def _many_names(path):
  """A directory of 20,000 names, most of its file."""
  path.write_bytes(_many_names_bytes())


@functools.cache
def _many_names_bytes():
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for i in range(20_000):
      archive.writestr(f'{i}.npy', b'')
  return file.getvalue()


def _flip(path):
  """One bit of the data, in the middle of W_enc."""
  data = bytearray(path.read_bytes())
  data[data.index(_params()['W_enc'].tobytes()) + 101] ^= 0x10
  path.write_bytes(data)


def _crossed_names(path):
  """The directory calls W_enc what the entry itself calls another name."""
  data = path.read_bytes().replace(b'W_enc.npy', b'../../xyz', 1)
  path.write_bytes(data)


HOSTILE = {
  'objects': (_objects, "'|O'"),
  'float64': (lambda p: _savez(p, W_enc=np.zeros((D, F))), 'float32'),
  'float16': (lambda p: _savez(p, b_dec=np.zeros(D, np.float16)), 'float32'),
  'big-endian': (lambda p: _savez(p, b_dec=np.zeros(D, '>f4')), 'float32'),
  'nan': (_nan, 'not finite'),
  'negative threshold': (
    lambda p: _savez(p, threshold=-np.ones(F, np.float32)),
    'below 0',
  ),
  'transposed W_dec': (
    lambda p: _savez(p, W_dec=_params()['W_dec'].T.copy()),
    'transposed',
  ),
  'another d': (lambda p: np.savez(p, **_params(d_in=D + 1)), 'expected'),
  'scalar': (lambda p: _savez(p, b_dec=np.float32(1)), 'expected'),
  'extra': (lambda p: _savez(p, surprise=np.zeros(1, np.float32)), 'surprise'),
  'missing': (
    lambda p: _rewrite(p, lambda e: e.pop('b_dec.npy')),
    'lacks b_dec',
  ),
  'zip slip': (
    lambda p: _rewrite(p, lambda e: e.update({'../../../slipped': b'x'})),
    'slipped',
  ),
  'newline and nul': (
    lambda p: _rewrite(p, lambda e: e.update({'a\nb\x1b.npy': b'x'})),
    'which is no parameter',
  ),
  'both cases': (lambda p: _savez(p, w_enc=_params()['W_enc']), 'twice'),
  '4 TiB header': (_tebibytes, 'declares W_enc'),
  'deflated': (lambda p: np.savez_compressed(p, **_params()), 'compressed'),
  'bomb': (_bomb, 'compressed'),
  'lying directory': (_lying_directory, ''),
  'many names': (_many_names, ''),
  'crossed names': (_crossed_names, ''),
  'flipped bit': (_flip, 'CRC'),
  'cut': (lambda p: p.write_bytes(p.read_bytes()[:-200]), 'not a whole npz'),
  'empty': (lambda p: p.write_bytes(b''), 'not an npz'),
  'pickle': (lambda p: p.write_bytes(b'\x80\x04.'), 'not an npz'),
  'npy 3.0 header': (
    lambda p: _rewrite(
      p, lambda e: e.update({'b_dec.npy': b'\x93NUMPY\x03\x00' + bytes(99)})
    ),
    'version 1.0',
  ),
  'code for a header': (
    lambda p: _rewrite(
      p, lambda e: e.update({'b_dec.npy': _header('(' * 50 + ')' * 50)})
    ),
    'declares b_dec',
  ),
  'empty array': (
    lambda p: _savez(p, b_dec=np.zeros(0, np.float32)),
    'which is empty',
  ),
}


def _bare(folder):
  """The same member with no manifest above it: nothing knows its hash."""
  (folder.parents[3] / 'manifest.json').unlink()
  return folder / 'params.npz'


@pytest.mark.parametrize('with_card', [True, False])
@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_npz_is_refused_at_once(folder, case, with_card):
  attack, words = HOSTILE[case]
  if case == 'another d' and not with_card:
    pytest.skip('without a card any d is as good')
  path = _bare(folder)
  attack(path)
  if not with_card:
    (folder / 'config.json').unlink()
  before = _files(folder.parents[4])
  start = time.perf_counter()
  with pytest.raises(release.ReleaseError) as caught:
    release.load(folder)
  assert time.perf_counter() - start < 1
  text = str(caught.value)
  if with_card and case in ('bomb', 'many names'):
    words = 'at most'  # the card bounds the file before it is opened
  assert words in text
  assert '\n' not in text and len(text) < 500
  assert _files(folder.parents[4]) == before


@pytest.mark.skipif(
  not os.path.exists('/proc/self/status'), reason='needs Linux to measure'
)
def test_large_attacks_take_no_memory(tmp_path, folder):
  """Peak memory of a process that refuses each, above one that loads one."""
  path = _bare(folder)
  (folder / 'config.json').unlink()
  good = tmp_path / 'good.npz'
  shutil.copy(path, good)
  cases = ['4 TiB header', 'bomb', 'many names', 'lying directory', 'sparse']
  for i, case in enumerate(cases):
    where = tmp_path / f'case_{i}'
    where.mkdir()
    shutil.copy(good, where / 'params.npz')
    if case == 'sparse':
      # 60 GB of hole with a good directory at its end.
      data = good.read_bytes()
      with open(where / 'params.npz', 'wb') as file:
        file.write(b'PK\x03\x04')
        file.seek(60 << 30)
        file.write(data)
    else:
      HOSTILE[case][0](where / 'params.npz')
  code = rf"""
    import re, time
    from gemma_scope import release
    def peak():  # MiB, of this process alone
      found = re.search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())
      return int(found[1]) / 1024
    first = peak()
    for i in range({len(cases)}):
      start = time.perf_counter()
      try:
        release.load({str(tmp_path)!r} + f'/case_{{i}}')
        print('loaded', i)
      except release.ReleaseError as error:
        print('refused', i, time.perf_counter() - start < 1)
    print('grew', peak() - first < 60, 'whole', peak() < 200)
  """
  done = _python(code)
  lines = done.stdout.splitlines()
  assert lines[:-1] == [f'refused {i} True' for i in range(len(cases))], done
  assert lines[-1] == 'grew True whole True', done


def test_any_flipped_bit_is_found_and_named(folder):
  """20 places in each file of a release, the manifest itself among them."""
  root = folder.parents[3]
  rng = np.random.default_rng(0)
  for path in _files(root):
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


def _edit(root, change):
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
  _edit(root, lambda found: found['members'][0].update(path=name))
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
  _edit(root, change)
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
    (_params(i), releases.card(seed=i), _metrics(l0=5 + 10 * i))
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


# -------------------------------------------------------------- table and card


def test_table_is_sorted_and_has_the_control_beside():
  rows = [
    (releases.card('resid_post/10'), _metrics(l0=20)),
    (releases.card('resid_post/2'), _metrics(l0=20)),
    (releases.card('resid_post/2'), _metrics(l0=5)),
    (releases.card('attn_out/7'), None),
  ]
  text = table.table(rows, columns=200)
  lines = text.split('\n')
  assert [line.split()[:2] for line in lines[2:]] == [
    ['attn_out', '7'],
    ['resid_post', '2'],
    ['resid_post', '2'],
    ['resid_post', '10'],
  ]
  assert '5.0 ±1.0' in lines[3] and '0.900' in lines[3] and '12.5' in lines[3]
  assert lines[2].split()[-5:] == ['-'] * 5
  narrow = table.table(rows, columns=80)
  assert '±' not in narrow
  assert len({len(line) for line in narrow.split('\n')[:2]}) == 1
  assert 'seed' not in lines[0]
  assert 'seed' in table.table([*rows, (releases.card(seed=1), None)])


def test_the_two_faces_of_the_table_agree():
  rows = [
    (releases.card('mlp_out/1', target=t), _metrics(l0=t)) for t in (5, 20)
  ]
  plain = table.table(rows, columns=500).split('\n')
  marked = table.table(rows, markdown=True).split('\n')
  cells = [[c.strip() for c in line.strip('|').split('|')] for line in marked]
  assert len(plain) == len(marked)
  assert [' '.join(line.split()) for line in plain[2:]] == [
    ' '.join(line) for line in cells[2:]
  ]


def test_the_model_card_says_what_was_measured(tmp_path):
  members = [
    (_params(i), releases.card(seed=i), _metrics(l0=5 + 10 * i))
    for i in range(2)
  ]
  releases.save(tmp_path / 'out', members, license_name='cc-by-4.0')
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert text.startswith(
    '---\nlicense: "cc-by-4.0"\nlibrary_name: "gemma_scope"\ntags: ["sparse-'
  )
  for words in ('ab' * 32, 'Seed: 0, 1', '4,096', '61,440', MEMBER, '0.1.0'):
    assert words in text, words
  assert '](frontier.png)' in text
  picture = (tmp_path / 'out' / 'frontier.png').read_bytes()
  assert picture.startswith(b'\x89PNG')
  sha256 = hashlib.sha256(picture).hexdigest()
  assert sha256 in (tmp_path / 'out' / 'manifest.json').read_text()


def test_words_in_a_card_cannot_open_html_or_a_cell(tmp_path):
  nasty = '</td><script>alert(1)</script>|[x](y)`\n---\ud800'
  card = releases.card(text={'source': nasty}, model=nasty, code=nasty)
  releases.save(tmp_path / 'out', [(_params(), card, None)], title=nasty)
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert '<script' not in text and '</td' not in text and '[x]' not in text
  assert text.count('\n---\n') == 1
  assert release.load_all(tmp_path / 'out')[0].card == card


def test_figures_that_are_none_are_dashes():
  for figure in (None, 'x', float('nan'), {'value': None}, True, 10**400):
    assert table.value(figure) is None
  assert table.control({'control': [1]}) == {}


def test_the_command_lists_a_release(folder):
  done = subprocess.run(
    [
      sys.executable,
      'launch/release.py',
      f'--list={folder.parents[3]}',
    ],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert 'resid_post' in done.stdout and '0.310' in done.stdout
