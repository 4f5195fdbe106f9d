"""Files that are made to do harm: refused at once, with little memory.

One list for every reader of what others publish: SAEs of each format, language
models, token stores and text files.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.release.formats import published
from gemma_scope.text import sources
from tests.faults.registry import Trial, attempt, fault

# Of the processor and of memory; more than that is a harm of its own.
SECONDS, MIB = 3.0, 200


def _npz(entries: dict[str, bytes], compressed=False) -> bytes:
  file = io.BytesIO()
  kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
  with zipfile.ZipFile(file, 'w', kind) as archive:
    for name, data in entries.items():
      archive.writestr(name, data)
  return file.getvalue()


def _npy(header: str, data: bytes = b'') -> bytes:
  text = header.encode() + b' ' * 16 + b'\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text + data


def _arrays() -> dict[str, np.ndarray]:
  shapes = {'W_enc': (4, 8), 'b_enc': 8, 'W_dec': (8, 4), 'b_dec': 4}
  return {
    k: np.ones(s, np.float32) for k, s in (shapes | {'threshold': 8}).items()
  }


def _entries() -> dict[str, bytes]:
  found = {}
  for name, array in _arrays().items():
    file = io.BytesIO()
    np.save(file, array)
    found[f'{name}.npy'] = file.getvalue()
  return found


def _objects() -> bytes:
  file = io.BytesIO()
  np.save(file, np.array([os.system], object), allow_pickle=True)
  return file.getvalue()


def _npz_files() -> dict[str, bytes]:
  good = _entries()
  four_tib = _npy(
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1048576, 1048576), }"
  )
  wrong_crc = bytearray(_npz(good))
  wrong_crc[200] ^= 1
  return {
    'objects': _npz(good | {'W_enc.npy': _objects()}),
    'a header of 4 TiB': _npz(good | {'W_enc.npy': four_tib}),
    'a bomb': _npz(good | {'W_enc.npy': bytes(1 << 26)}, compressed=True),
    'a path out': _npz(good | {'../../escaped.npy': b'x'}),
    'a wrong checksum': bytes(wrong_crc),
    'code in a header': _npz(
      good | {'W_enc.npy': _npy("__import__('os').abort()")}
    ),
    '20,000 entries': _npz({f'{i}.npy': b'' for i in range(20_000)}),
    'half of it': _npz(good)[:300],
    'no zip': b'\x80\x04' + b'cos\nabort\n(tR.',
  }


def _tensors(header: object, data: bytes = b'', length: int | None = None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (
    struct.pack('<Q', len(text) if length is None else length) + text + data
  )


def _safetensors_files() -> dict[str, bytes]:
  one = {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]}
  deep = b'{"a":' * 100_000
  return {
    'a header of 2^63': _tensors({}, length=1 << 63),
    'overlapping': _tensors({'W_enc': one, 'W_dec': one}, bytes(16)),
    '20,000 tensors': _tensors(
      b'{%s}'
      % b','.join(
        b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i
        for i in range(20_000)
      )
    ),
    'names with ..': _tensors({'../../W_enc': one}, bytes(16)),
    'an offset past the end': _tensors(
      {'W_enc': one | {'data_offsets': [0, 1 << 40]}}, bytes(16)
    ),
    'a shape that overflows': _tensors(
      {'W_enc': one | {'shape': [1 << 62, 1 << 62]}}, bytes(16)
    ),
    'deep JSON': _tensors(deep),
    'empty': b'',
  }


_JSON = {
  'deep JSON': b'[' * 200_000,
  'no object': b'[1, 2]',
  'a huge number': b'{"d_in": 1' + b'0' * 5000 + b'}',
  'two gigabytes of width': b'{"architecture": "standard", "d_in": 1e999}',
  'not UTF-8': b'{"\xff\xfe": 1}',
  'NaN': b'{"d_in": NaN, "architecture": "jumprelu"}',
}


def _cases(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
  """(what, how it is read), one after the other."""

  def sae(what, **files):
    place = folder / f'{len(os.listdir(folder))}'
    place.mkdir()
    for name, data in files.items():
      (place / name.replace('__', '.')).write_bytes(data)
    return what, lambda: published.load(str(place))

  for what, data in _npz_files().items():
    yield sae(f'params.npz: {what}', params__npz=data, config__json=_card())
  for what, data in _safetensors_files().items():
    lens = json.dumps(
      {
        'architecture': 'standard',
        'd_in': 4,
        'd_sae': 8,
        'hook_name': 'blocks.2.hook_resid_post',
        'model_name': 'gemma-2-2b',
      }
    ).encode()
    yield sae(
      f'sae_weights.safetensors: {what}',
      cfg__json=lens,
      sae_weights__safetensors=data,
    )
    place = folder / f'model{len(os.listdir(folder))}'
    place.mkdir()
    (place / 'model.safetensors').write_bytes(data)
    yield (
      f'model.safetensors: {what}',
      lambda place=place: weights.load('gemma2-2b', str(place)),
    )
  for what, data in _JSON.items():
    yield sae(
      f'cfg.json: {what}', cfg__json=data, sae_weights__safetensors=b'x'
    )
    yield sae(f'config.json: {what}', config__json=data, params__npz=b'x')
    path = folder / f'{len(os.listdir(folder))}.jsonl'
    path.write_bytes(data + b'\n')
    yield (
      f'text: {what}',
      lambda path=path: list(sources.documents(f'files:{path}')),
    )
  for what, path in {
    'a pipe': folder / 'pipe',
    'an endless device': pathlib.Path('/dev/zero'),
    'a folder': folder / 'inner',
  }.items():
    place = folder / f'links{len(os.listdir(folder))}'
    place.mkdir()
    if what == 'a pipe':
      os.mkfifo(path)
    elif what == 'a folder':
      path.mkdir()
    (place / 'params.npz').symlink_to(path)
    (place / 'config.json').write_bytes(_card())
    yield (
      f'params.npz: a link to {what}',
      lambda p=place: published.load(str(p)),
    )
  for name in (
    '../../etc',
    'a/../../b',
    'a\nb',
    'a\x00b',
    '/etc/passwd',
    '~x/y',
  ):
    yield f'a path: {name!r}', lambda name=name: published.load(name)


def _card() -> bytes:
  return json.dumps(
    {
      'type': 'sae',
      'sites': ['resid_post/2'],
      'targets': ['resid_post/2'],
      'd_in': 4,
      'd_out': 4,
      'width': 8,
      'name': 'x',
      'model': 'tiny',
    }
  ).encode()


@fault(
  'hostile-files',
  f'files made to do harm: refused within {SECONDS:g} s and {MIB} MiB',
  full=1000,
  quick=1000,
)
def hostile_files(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  inner = folder / 'files'
  inner.mkdir()
  before = set(os.listdir(folder)) | set(os.listdir(folder.parent))
  lm.Gemma(weights.read_config('tiny'))  # imports what a model needs
  for _, (what, use) in zip(range(times), _cases(inner), strict=False):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    trial = attempt(use, lambda value: False, what)
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    if trial.outcome == 'refused' and (seconds > SECONDS or grown > MIB):
      trial = Trial('broken', what, f'{seconds:.1f} s, {grown:.0f} MiB')
    yield Trial(trial.outcome, what, trial.detail, seconds)
  after = set(os.listdir(folder)) | set(os.listdir(folder.parent))
  if after != before:
    yield Trial('wrong', 'files written outside', str(after - before))
