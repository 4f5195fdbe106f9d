"""Stores in a bucket are read into a bounded cache of the host."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from gemma_scope import files, sites
from gemma_scope.activations import harvest, store
from gemma_scope.runtime import cluster, host_cache, objects, remote
from gemma_scope.text import prepare, sequences, token_store
from tests.helpers import object_servers

if importlib.util.find_spec('moto') is None:
  pytest.skip('needs moto', allow_module_level=True)


@pytest.fixture(scope='module')
def proxy():
  with object_servers.started('s3') as (proxy, environment):
    before = dict(os.environ)
    os.environ.update(environment)
    yield proxy
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def here(proxy, tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_SCOPE_CACHE', str(tmp_path / 'cache'))
  return f's3://{object_servers.BUCKET}/{tmp_path.name}'


def written(address: str, name: str, **contents: bytes) -> None:
  with remote.folder(address) as local:
    with files.whole_folder(local / name) as draft:
      for file, data in contents.items():
        (draft / file).write_bytes(data)


def downloads(proxy) -> int:
  return sum(method == 'GET' for method, _ in proxy.requests)


def test_a_file_is_fetched_once(here, proxy):
  written(here, 'f', a=b'one', b=b'two')
  first = host_cache.Store(here).path('f', 'a')
  assert first.read_bytes() == b'one'
  before = downloads(proxy)
  other = host_cache.Store(here)  # another process: it reads the list alone
  assert other.path('f', 'a') == first
  assert downloads(proxy) == before + 1
  with pytest.raises(ValueError, match='There is no file'):
    other.path('f', 'c')
  with pytest.raises(ValueError, match='There is no folder'):
    other.path('g', 'a')


def test_the_least_lately_used_file_makes_room(here, monkeypatch):
  monkeypatch.setenv('GEMMA_SCOPE_CACHE_GB', '2.5e-6')
  written(here, 'f', **{name: name.encode() * 1000 for name in 'abc'})
  cached = host_cache.Store(here)
  paths = {name: cached.path('f', name) for name in 'ab'}
  os.utime(paths['a'], (1, 1))
  os.utime(paths['b'], (2, 2))
  cached.path('f', 'a')  # used again
  cached.path('f', 'c')
  assert paths['a'].exists() and not paths['b'].exists()
  assert cached.path('f', 'b').read_bytes() == b'b' * 1000
  monkeypatch.setenv('GEMMA_SCOPE_CACHE_GB', '1e-7')
  with pytest.raises(ValueError, match='GEMMA_SCOPE_CACHE_GB'):
    host_cache.make_room(1000)


def test_damaged_bytes_never_reach_the_cache(here):
  written(here, 'f', a=b'one')
  objects.Objects(here).write('f/a', b'eno')
  with pytest.raises(objects.BucketError, match='f/a does not have the check'):
    host_cache.Store(here).path('f', 'a')
  assert not list(remote.cache().rglob('*-a'))


class Rows:
  """Rows of one site, by their number."""

  sites = (sites.Site(0, 'resid_post'),)
  widths = {sites[0]: 3}
  layout = harvest.Layout(5, 4, 4, 2, 'float32')
  parts = 2

  def passes(self, chunk, poll=harvest.never):
    for part in range(self.parts):
      poll()
      start = 1000 * chunk + 100 * part
      yield {
        self.sites[0]: start + np.arange(24, dtype=np.float32).reshape(2, 4, 3)
      }

  def counts(self, chunk):
    return np.arange(16) % 3 > chunk % 2


def rows(source, chunk):
  (part,) = source.passes(chunk)
  return part[Rows.sites[0]], source.counts(chunk)


@pytest.mark.parametrize('hosts', [1, 2])
def test_a_store_written_by_hosts_is_the_store_of_one(
  hosts, here, tmp_path, monkeypatch
):
  facts = {'model': 'm'}
  store.write_store(tmp_path / 'one', Rows(), 4, facts)
  for index in reversed(range(hosts)):  # the first writes the manifest, last
    part = index, hosts
    monkeypatch.setattr(cluster, 'part', lambda part=part: part)
    with remote.folder(here) as local:
      store.write_store(local, Rows(), 4, facts)
  one = store.StoreSource(tmp_path / 'one', Rows.sites, 4)
  other = store.StoreSource(here, Rows.sites, 4)
  assert other.fingerprint == one.fingerprint and other.chunks == 4
  assert other.widths == one.widths
  for chunk in range(5):
    for a, b in zip(rows(one, chunk), rows(other, chunk), strict=True):
      np.testing.assert_array_equal(a, b)


def test_a_harvest_goes_on_where_it_was_stopped(here):
  class Stops(Rows):
    def passes(self, chunk, poll=harvest.never):
      made.append(chunk)
      if chunk == 2 and len(made) < 4:
        raise KeyboardInterrupt
      yield from super().passes(chunk, poll)

  made = []
  for _ in range(2):
    try:
      with remote.folder(here) as local:
        store.write_store(local, Stops(), 4, {'model': 'm'})
    except KeyboardInterrupt:
      pass
  assert made == [0, 1, 2, 2, 3]
  with remote.folder(here) as local:
    with pytest.raises(ValueError, match='holds another activation store'):
      store.write_store(local, Stops(), 4, {'model': 'n'})


TOKENS = 1000  # of the text; 50 rows of 21, in parts of 256 tokens


@pytest.fixture
def tokens(here, tmp_path, monkeypatch):
  """A token store on the disk and in the bucket, there in four parts."""
  monkeypatch.setattr(remote, 'PART', 512)
  split = {
    'train': np.random.default_rng(0).integers(3, 500, TOKENS).astype('<u2'),
    'eval': np.full(40, 1, '<u2'),
  }
  with remote.place(f'{here}/tokens') as place:
    with files.whole_folder(place) as draft:
      for name, stream in split.items():
        stream.tofile(draft / f'{name}.tokens')
      token_store.write_manifest(draft, manifest(draft, split))
    (tmp_path / 'tokens').mkdir()
    for file in place.iterdir():
      (tmp_path / 'tokens' / file.name).write_bytes(file.read_bytes())
  return token_store.Tokens(tmp_path / 'tokens'), f'{here}/tokens'


def manifest(folder, split):
  return {
    'format': token_store.FORMAT,
    'vocab_size': 500,
    'dtype': sequences.dtype_of(500),
    **{'bos_id': 2, 'eos_id': 1, 'pad_id': 0},
    'tokens': {name: len(stream) for name, stream in split.items()},
    'documents': dict.fromkeys(split, 1),
    'sha256': {n: files.sha256(folder / f'{n}.tokens') for n in split},
    **dict.fromkeys(('source_sha256', 'tokenizer_sha256'), '0' * 64),
    **{'source': 's', 'python': None, 'limit_tokens': None},
  }


def fetched(proxy, before: int) -> list[str]:
  """The parts of the text that were downloaded since."""
  gets = [path for method, path in proxy.requests[before:] if method == 'GET']
  return [path.rpartition('.')[2] for path in gets if 'train.tokens' in path]


def test_only_the_parts_of_a_text_that_are_read_are_fetched(tokens, proxy):
  local, address = tokens
  before = len(proxy.requests)
  remote_store = token_store.Tokens(address)
  remote_store.verify()
  assert remote_store.fingerprint == local.fingerprint
  rows, expected = remote_store.sequences(21), local.sequences(21)
  assert len(rows) == len(expected) and fetched(proxy, before) == []
  np.testing.assert_array_equal(rows[30], expected[30])
  assert fetched(proxy, before) == ['part-00002']
  np.testing.assert_array_equal(rows[12], expected[12])  # over a part's end
  assert sorted(fetched(proxy, before)) == [f'part-0000{i}' for i in range(3)]
  # A process that starts later goes on with what is there.
  again = token_store.Tokens(address).sequences(21)
  both = [prepare.shuffled(each, 3) for each in (again, expected)]
  batches = [prepare.batch(order, 40, 120) for order in both]
  np.testing.assert_array_equal(*batches)
  assert sorted(fetched(proxy, before)) == [f'part-0000{i}' for i in range(4)]
  index = np.arange(3)
  np.testing.assert_array_equal(
    *(each.documents(index, 300) for each in (again, expected))
  )


def test_a_text_larger_than_the_cache_is_read_through_it(tokens, monkeypatch):
  local, address = tokens
  rows, expected = (
    token_store.Tokens(address).sequences(21),
    local.sequences(21),
  )
  monkeypatch.setenv('GEMMA_SCOPE_CACHE_GB', '1.1e-6')  # two parts
  for i in (0, 49, 20, 0, 30):
    np.testing.assert_array_equal(rows[i], expected[i])
    kept = [p for p in remote.cache().rglob('*.tokens') if p.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 1100


def test_a_damaged_part_of_a_text_is_never_read(tokens):
  _, address = tokens
  rows = token_store.Tokens(address).sequences(21)
  objects.Objects(address).write('train.tokens.part-00001', b'x' * 512)
  with pytest.raises(objects.BucketError, match='part-00001 does not have the'):
    prepare.batch(rows, 0, 40)
  np.testing.assert_array_equal(rows[0][:1], [2])
