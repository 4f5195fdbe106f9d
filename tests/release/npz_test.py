"""Hostile and damaged arrays are refused, at once and in little memory."""

from __future__ import annotations

import functools
import io
import os
import shutil
import struct
import time
import zipfile

import numpy as np
import pytest

from gemma_scope import release
from tests.helpers.releases import D, F, files_in, params_of, python

pytestmark = pytest.mark.usefixtures('no_picture')


def npy_header(shape, descr='<f4', fortran=False):
  text = (
    f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"
  )
  text += ' ' * (-(len(text) + 11) % 64) + '\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text.encode()


def rewrite(path, change, compression=zipfile.ZIP_STORED):
  """Writes an npz anew with its raw entries changed."""
  with zipfile.ZipFile(path) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  change(entries)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, data in entries.items():
      archive.writestr(name, data)


def objects(path):
  params = params_of() | {'b_enc': np.array([{}] * F, dtype=object)}
  np.savez(path, **params)


def savez(path, **change):
  np.savez(path, **(params_of() | change))


def nan(path):
  params = params_of()
  params['W_dec'][1, 1] = np.nan
  np.savez(path, **params)


def tebibytes(path):
  header = npy_header((1 << 20, 1 << 20))
  rewrite(path, lambda e: e.update({'W_enc.npy': header + bytes(64)}))


def bomb(path):
  """256 MiB of zeros in 261 kB."""
  path.write_bytes(bomb_bytes())


@functools.cache
def bomb_bytes():
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
    for key, array in params_of().items():
      header = npy_header(array.shape if key != 'W_enc' else (8192, 8192))
      data = array.tobytes() if key != 'W_enc' else bytes(1 << 28)
      z.writestr(f'{key}.npy', header + data)
  return file.getvalue()


def lying_directory(path):
  """A directory that says 'stored' and gives a size that is not there."""
  data = bytearray(path.read_bytes())
  at = data.rindex(b'PK\x01\x02')
  data[at + 20 : at + 28] = struct.pack('<II', 1 << 31, 1 << 31)
  path.write_bytes(data)


def many_names(path):
  """A directory of 20,000 names, most of its file."""
  path.write_bytes(many_names_bytes())


@functools.cache
def many_names_bytes():
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for i in range(20_000):
      archive.writestr(f'{i}.npy', b'')
  return file.getvalue()


def flip(path):
  """One bit of the data, in the middle of W_enc."""
  data = bytearray(path.read_bytes())
  data[data.index(params_of()['W_enc'].tobytes()) + 101] ^= 0x10
  path.write_bytes(data)


def crossed_names(path):
  """The directory calls W_enc what the entry itself calls another name."""
  data = path.read_bytes().replace(b'W_enc.npy', b'../../xyz', 1)
  path.write_bytes(data)


HOSTILE = {
  'objects': (objects, "'|O'"),
  'float64': (lambda p: savez(p, W_enc=np.zeros((D, F))), 'float32'),
  'float16': (lambda p: savez(p, b_dec=np.zeros(D, np.float16)), 'float32'),
  'big-endian': (lambda p: savez(p, b_dec=np.zeros(D, '>f4')), 'float32'),
  'nan': (nan, 'not finite'),
  'negative threshold': (
    lambda p: savez(p, threshold=-np.ones(F, np.float32)),
    'below 0',
  ),
  'transposed W_dec': (
    lambda p: savez(p, W_dec=params_of()['W_dec'].T.copy()),
    'transposed',
  ),
  'another d': (lambda p: np.savez(p, **params_of(d_in=D + 1)), 'expected'),
  'scalar': (lambda p: savez(p, b_dec=np.float32(1)), 'expected'),
  'extra': (lambda p: savez(p, surprise=np.zeros(1, np.float32)), 'surprise'),
  'missing': (
    lambda p: rewrite(p, lambda e: e.pop('b_dec.npy')),
    'lacks b_dec',
  ),
  'zip slip': (
    lambda p: rewrite(p, lambda e: e.update({'../../../slipped': b'x'})),
    'slipped',
  ),
  'newline and nul': (
    lambda p: rewrite(p, lambda e: e.update({'a\nb\x1b.npy': b'x'})),
    'which is no parameter',
  ),
  'both cases': (lambda p: savez(p, w_enc=params_of()['W_enc']), 'twice'),
  '4 TiB header': (tebibytes, 'declares W_enc'),
  'deflated': (lambda p: np.savez_compressed(p, **params_of()), 'compressed'),
  'bomb': (bomb, 'compressed'),
  'lying directory': (lying_directory, ''),
  'many names': (many_names, ''),
  'crossed names': (crossed_names, ''),
  'flipped bit': (flip, 'CRC'),
  'cut': (lambda p: p.write_bytes(p.read_bytes()[:-200]), 'not a whole npz'),
  'empty': (lambda p: p.write_bytes(b''), 'not an npz'),
  'pickle': (lambda p: p.write_bytes(b'\x80\x04.'), 'not an npz'),
  'npy 3.0 header': (
    lambda p: rewrite(
      p, lambda e: e.update({'b_dec.npy': b'\x93NUMPY\x03\x00' + bytes(99)})
    ),
    'version 1.0',
  ),
  'code for a header': (
    lambda p: rewrite(
      p, lambda e: e.update({'b_dec.npy': npy_header('(' * 50 + ')' * 50)})
    ),
    'declares b_dec',
  ),
  'empty array': (
    lambda p: savez(p, b_dec=np.zeros(0, np.float32)),
    'which is empty',
  ),
}


def bare(folder):
  """The same member with no manifest above it: nothing knows its hash."""
  (folder.parents[3] / 'manifest.json').unlink()
  return folder / 'params.npz'


# Without a card an SAE of another d is as good as any.
@pytest.mark.parametrize(
  ('case', 'with_card'),
  [(case, True) for case in HOSTILE]
  + [(case, False) for case in HOSTILE if case != 'another d'],
)
def test_hostile_npz_is_refused_at_once(folder, case, with_card):
  attack, words = HOSTILE[case]
  path = bare(folder)
  attack(path)
  if not with_card:
    (folder / 'config.json').unlink()
  before = files_in(folder.parents[4])
  start = time.perf_counter()
  with pytest.raises(release.ReleaseError) as caught:
    release.load(folder)
  assert time.perf_counter() - start < 1
  text = str(caught.value)
  if with_card and case in ('bomb', 'many names'):
    words = 'at most'  # the card bounds the file before it is opened
  assert words in text
  assert '\n' not in text and len(text) < 500
  assert files_in(folder.parents[4]) == before


@pytest.mark.skipif(
  not os.path.exists('/proc/self/status'), reason='needs Linux to measure'
)
def test_large_attacks_take_no_memory(tmp_path, folder):
  """Peak memory of a process that refuses each, above one that loads one."""
  path = bare(folder)
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
  done = python(code)
  lines = done.stdout.splitlines()
  assert lines[:-1] == [f'refused {i} True' for i in range(len(cases))], done
  assert lines[-1] == 'grew True whole True', done
