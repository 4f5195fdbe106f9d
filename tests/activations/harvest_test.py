"""Batches are a pure function of (config, step), from the model or a store."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.activations import harvest, store
from gemma_scope.language_model import gemma as lm
from gemma_scope.runtime import interrupt
from gemma_scope.text import tokenizers

CONFIG = lm.Config(
    name='t', vocab_size=64, d_model=16, num_layers=3, num_heads=2,
    num_kv_heads=1, head_dim=4, d_ff=32, window=8, pattern='LG', qk_norm=True,
)  # fmt: skip
AT = (sites.Site(0, 'attn_out'), sites.Site(1, 'resid_post'))
SPECIAL = (0, 1, 2)
KEEP = tokenizers.Special(SPECIAL).keep
T = 9


def sequences(start, count):
  """Rows of tokens by index; some hold EOS, some end in padding."""
  rows = []
  for i in range(start, start + count):
    row = np.random.default_rng(i).integers(1, 64, T)
    row[0] = 2
    row[T - i % 3 :] = 0
    rows.append(row)
  return np.stack(rows).astype(np.int32)


def make(mesh_shape=(1, 1, 1), dtype='float32', batch=16, at=AT):
  devices = jax.devices()[: int(np.prod(mesh_shape))]
  mesh = mesh_lib.make(
    dict(zip(mesh_lib.AXES, mesh_shape, strict=True)), devices
  )
  gemma = lm.Gemma(CONFIG)
  params = jax.jit(gemma.init)(jax.random.key(0))
  layout = harvest.Layout.of(
    chunk_rows=100, seq_len=T, batch=batch, lm_batch=8, dtype=dtype
  )
  source = harvest.ModelSource(gemma, params, at, sequences, layout, mesh, KEEP)
  return source, mesh, gemma, params


@pytest.fixture(scope='module')
def made():
  return make()


def test_layout_arithmetic():
  layout = harvest.Layout.of(
    chunk_rows=10**6, seq_len=1024, batch=4096, lm_batch=64, dtype='bfloat16'
  )
  assert layout.rows >= 10**6 and layout.sequences % 64 == 0
  assert layout.batches == layout.rows // 4096
  small = harvest.Layout.of(
    chunk_rows=1, seq_len=9, batch=16, lm_batch=2, dtype='float32'
  )
  assert small.batches == 1


def test_rows_are_the_models_activations_without_special_tokens(made):
  source, mesh, gemma, params = made
  chunk = chunks_lib.Chunks(source, 0, mesh).load(1)
  n = source.layout.sequences
  tokens_NT = sequences(n, n)
  taps = gemma.forward(params, jnp.asarray(tokens_NT), taps=AT).taps
  keep = ~np.isin(tokens_NT, SPECIAL)
  keep[:, 0] = False
  assert chunk.special == n * (T - 1) - keep.sum()
  for site in AT:
    expected = np.asarray(taps[site])[keep]
    found = np.asarray(chunk.rows[site]).reshape(-1, expected.shape[-1])
    order = np.lexsort(np.round(expected, 4).T)
    unique = np.unique(np.round(found, 4), axis=0)
    nearest = np.abs(unique[:, None] - expected[order][None]).sum(-1).min(1)
    assert nearest.max() < 1e-3  # every row is a real one


def test_sites_stay_aligned_and_every_row_comes_before_any_comes_twice(made):
  """One permutation for all sites; wrap-around only after all rows."""
  source, mesh, _, _ = made

  class Numbered:
    layout, widths, parts = source.layout, dict.fromkeys(AT, 1), 1

    def passes(self, chunk, poll):
      r = np.arange(self.layout.rows, dtype=np.float32)[:, None]
      yield {AT[0]: r, AT[1]: 10 * r}

    def counts(self, chunk):
      return np.arange(self.layout.rows) % 5 > 0

  chunk = chunks_lib.Chunks(Numbered(), 3, mesh).load(0)
  first = np.asarray(chunk.rows[AT[0]]).reshape(-1)
  np.testing.assert_array_equal(
    np.asarray(chunk.rows[AT[1]]).reshape(-1), 10 * first
  )
  assert not np.any(first % 5 == 0)
  usable = source.layout.rows - chunk.special
  assert len(set(first[:usable])) == min(usable, first.size)
  np.testing.assert_array_equal(first[usable:], first[: first.size - usable])


def test_a_chunk_is_a_function_of_its_number(made):
  source, mesh, _, _ = made
  chunks = chunks_lib.Chunks(source, 0, mesh)
  third, again = chunks.load(3), chunks.load(3)
  for site in AT:
    np.testing.assert_array_equal(third.rows[site], again.rows[site])
    assert np.any(third.rows[site] != chunks.load(2).rows[site])
    other = chunks_lib.Chunks(source, 1, mesh).load(3)
    assert np.any(third.rows[site] != other.rows[site])


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2)])
def test_any_mesh_gives_the_same_batches(made, shape):
  source, mesh, _, _ = made
  expected = chunks_lib.Chunks(source, 0, mesh).load(0)
  source, mesh, _, _ = make(shape)
  found = chunks_lib.Chunks(source, 0, mesh).load(0)
  for site in AT:
    np.testing.assert_allclose(
      found.rows[site], expected.rows[site], rtol=1e-4, atol=1e-5
    )
    assert found.rows[site].sharding.spec[1] == 'data'


def test_host_memory_gives_the_same_batches(made):
  source, mesh, _, _ = made
  on_device, on_host = (
    chunks_lib.Chunks(source, 0, mesh, memory) for memory in ('device', 'host')
  )
  device, host = on_device.load(0), on_host.load(0)
  for site in AT:
    assert isinstance(host.rows[site], chunks_lib.OnHost)
    np.testing.assert_array_equal(host.rows[site].up(), device.rows[site])
    np.testing.assert_array_equal(
      on_host.batch(host, 1)[site], on_device.batch(device, 1)[site]
    )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_rows_that_are_not_finite_are_dropped_and_counted(made, bad):
  source, mesh, _, _ = made

  class Broken:
    layout, widths, counts = source.layout, source.widths, source.counts
    parts = source.parts + 1

    def passes(self, chunk, poll):
      parts, counts = harvest.rows(source, chunk, poll)
      yield from ({AT[0]: x} for x in parts[AT[0]])
      x = np.concatenate([np.array(p).reshape(-1, 16) for p in parts[AT[1]]])
      x[np.flatnonzero(counts)[:7], 3] = bad  # one site spoils its row at all
      yield {AT[1]: x}

  chunk = chunks_lib.Chunks(Broken(), 0, mesh).load(0)
  assert chunk.not_finite == 7
  assert all(np.all(np.isfinite(x)) for x in chunk.rows.values())


def test_a_chunk_of_special_tokens_alone_is_a_sentence(made):
  source, mesh, _, _ = made
  with pytest.raises(ValueError, match='no usable row'):
    only = harvest.ModelSource(
        *make()[2:], AT, lambda s, n: np.full((n, T), 2, np.int32),
        source.layout, mesh, KEEP,
    )  # fmt: skip
    chunks_lib.Chunks(only, 0, mesh).load(0)


def test_scale_makes_the_mean_square_norm_one(made):
  source, mesh, _, _ = made
  chunk = chunks_lib.Chunks(source, 0, mesh).load(0)
  for site, scale in chunks_lib.measure_scales(chunk).items():
    norms = np.square(np.asarray(chunk.rows[site]) / scale).sum(-1)
    np.testing.assert_allclose(norms.mean(), 1, rtol=1e-5)


def write(folder, source, chunks=3, **more):
  store.write_store(folder, source, chunks, {'model': 't'}, **more)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_store_gives_the_models_batches(tmp_path, dtype):
  source, mesh, _, _ = make(dtype=dtype)
  write(tmp_path, source)
  stored = store.StoreSource(tmp_path, AT, 16)
  assert stored.layout == source.layout and stored.chunks == 3
  for i in range(3):
    a = chunks_lib.Chunks(source, 0, mesh).load(i)
    b = chunks_lib.Chunks(stored, 0, mesh).load(i)
    for site in AT:
      assert b.rows[site].dtype == dtype
      np.testing.assert_array_equal(a.rows[site], b.rows[site])
  some = store.StoreSource(tmp_path, AT[1:], 16)
  assert some.sites == AT[1:]


def test_an_interrupted_store_continues(tmp_path, made):
  source = made[0]
  calls = []

  def stop_in_chunk_two():
    calls.append(1)
    if len(calls) == 2 * source.layout.sequences // 8 + 2:
      raise interrupt.Interrupted('stop')

  with pytest.raises(interrupt.Interrupted):
    write(tmp_path, source, poll=stop_in_chunk_two)
  assert store.StoreSource(tmp_path, AT, 16).chunks == 2
  harvested = []
  write(tmp_path, source, poll=lambda: harvested.append(1))
  assert len(harvested) == source.layout.sequences // 8  # the third alone
  whole = tmp_path.parent / 'whole'
  write(whole, source)
  assert (whole / 'manifest.json').read_text() == (
    tmp_path / 'manifest.json'
  ).read_text()


def test_another_store_in_the_folder_is_refused(tmp_path, made):
  write(tmp_path, made[0], 1)
  with pytest.raises(ValueError, match='facts'):
    store.write_store(tmp_path, made[0], 1, {'model': 'other'})
  with pytest.raises(ValueError, match='sites'):
    write(tmp_path, make(at=AT[:1])[0], 1)


def test_a_damaged_store_is_refused_by_name(tmp_path, made):
  write(tmp_path, made[0], 1)
  path = tmp_path / 'chunk_000000' / 'resid_post.1.npy'
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  stored = store.StoreSource(tmp_path, AT, 16)
  with pytest.raises(ValueError, match=r'resid_post\.1\.npy.*damaged'):
    harvest.rows(stored, 0)
  path.write_bytes(data[:100])
  with pytest.raises(ValueError, match='damaged'):
    harvest.rows(stored, 0)
  with pytest.raises(ValueError, match='no rows of mlp_out/0'):
    store.StoreSource(tmp_path, [sites.Site(0, 'mlp_out')], 16)
  with pytest.raises(ValueError, match='No activation store'):
    store.StoreSource(tmp_path / 'none', AT, 16)
