"""Batches are a pure function of (config, step), from the model or a store."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.activations import harvest, outliers, store
from gemma_scope.language_model import gemma as lm
from gemma_scope.runtime import interrupt
from gemma_scope.text import tokenizers

CONFIG = lm.Config(
  name='t',
  vocab_size=64,
  d_model=16,
  num_layers=3,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  d_ff=32,
  window=8,
  pattern='LG',
  qk_norm=True,
)
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
  text = harvest.Text(sequences, KEEP)
  source = harvest.ModelSource(gemma, params, at, text, layout, mesh)
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
  taps = jax.jit(lambda p, t: gemma.forward(p, t, taps=AT).taps)(
    params, tokens_NT
  )
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
  chunks = chunks_lib.Chunks(source, 0, mesh)
  found = chunks.load(0)
  for site, batch_BD in chunks.batch(found, 1).items():
    np.testing.assert_allclose(
      found.rows[site], expected.rows[site], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(batch_BD, found.rows[site][1])
    # A chunk is split over all devices; a batch over 'data' alone.
    assert found.rows[site].addressable_shards[0].data.size == (
      found.rows[site].size // mesh.size
    )
    assert batch_BD.addressable_shards[0].data.size == (
      batch_BD.size // mesh.shape['data']
    )


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 1)])
def test_host_memory_gives_the_same_batches(shape):
  source, mesh, _, _ = make(shape)
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
    text = harvest.Text(lambda s, n: np.full((n, T), 2, np.int32), KEEP)
    only = harvest.ModelSource(*make()[2:], AT, text, source.layout, mesh)
    chunks_lib.Chunks(only, 0, mesh).load(0)


def test_scale_makes_the_mean_square_norm_one(made):
  source, mesh, _, _ = made
  chunk = chunks_lib.Chunks(source, 0, mesh).load(0)
  for site, normal in chunks_lib.measure(chunk, {}).items():
    assert normal.centre is None and normal.norm_bound is None
    norms = np.square(np.asarray(chunk.rows[site]) / normal.scale).sum(-1)
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
  good = path.read_bytes()
  data = bytearray(good)
  data[-5] ^= 1
  path.write_bytes(data)
  stored = store.StoreSource(tmp_path, AT, 16)
  with pytest.raises(ValueError, match=r'resid_post\.1\.npy.*damaged'):
    harvest.rows(stored, 0)
  path.write_bytes(data[:100])
  with pytest.raises(ValueError, match='damaged'):
    harvest.rows(stored, 0)
  # Its header says another order of bytes; then its manifest another number.
  data = good.replace(b"'<f4'", b"'>f4'")
  assert data != good
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r'damaged \(>f4 .*expected <f4'):
    harvest.rows(store.StoreSource(tmp_path, AT, 16), 0)
  path.write_bytes(good)
  harvest.rows(store.StoreSource(tmp_path, AT, 16), 0)
  manifest = tmp_path / 'manifest.json'
  text = manifest.read_text()
  manifest.write_text(text.replace('"share": 1.0', '"share": 1.5'))
  with pytest.raises(ValueError, match='manifest.json.* its own hash'):
    store.StoreSource(tmp_path, AT, 16)
  unsealed = json.loads(text)  # as version 0.3.0 wrote it
  del unsealed['manifest_sha256']
  manifest.write_text(json.dumps(unsealed))
  with pytest.raises(ValueError, match='no rows of mlp_out/0'):
    store.StoreSource(tmp_path, [sites.Site(0, 'mlp_out')], 16)
  with pytest.raises(ValueError, match='No activation store'):
    store.StoreSource(tmp_path / 'none', AT, 16)


class Given:
  """A source of rows that a test chooses, one chunk of them."""

  def __init__(self, layout, rows):
    self.layout, self.parts = layout, 1
    self.rows = rows
    self.widths = {site: x.shape[-1] for site, x in rows.items()}

  def passes(self, chunk, poll):
    yield {site: x + 0 * chunk for site, x in self.rows.items()}

  def counts(self, chunk):
    return np.arange(self.layout.rows) > 2  # three are special


def with_outliers(layout):
  """Rows of norm about 4; rows 0 and 5 of one site, 9 of the other are long."""
  rng = np.random.default_rng(0)
  rows = {
    site: (3 + rng.normal(size=(layout.rows, 8))).astype(np.float32)
    for site in AT
  }
  rows[AT[0]][[0, 5]] *= 100
  rows[AT[1]][9] *= 100
  return rows


def test_rows_of_large_norm_are_left_out_and_counted(made):
  source, mesh, _, _ = made
  rows = with_outliers(source.layout)
  chunks = chunks_lib.Chunks(Given(source.layout, rows), 0, mesh, max_norm=10.0)
  chunk = chunks.load(0)
  assert (chunk.special, chunk.not_finite, chunk.outliers) == (3, 0, 2)
  for site, x in rows.items():
    norm_R = np.linalg.norm(x, axis=1)
    bound = 10 * np.median(norm_R[3:])
    np.testing.assert_allclose(chunks.norm_bounds[site], bound, rtol=1e-5)
    kept = np.linalg.norm(np.asarray(chunk.rows[site]), axis=-1)
    assert kept.max() < bound
  # The first chunk's bounds serve all others, and a resumed run's serve it.
  bounds = dict(chunks.norm_bounds)
  assert chunks.load(1).outliers == 2 and chunks.norm_bounds == bounds
  chunks.norm_bounds = {AT[1]: bounds[AT[1]]}
  assert chunks.load(0).outliers == 1
  everything = chunks_lib.Chunks(Given(source.layout, rows), 0, mesh).load(0)
  assert everything.outliers == 0
  assert np.abs(np.asarray(everything.rows[AT[1]])).max() > 100


@pytest.mark.parametrize('centre', ['mean', 'geometric_median'])
@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 4, 1)])
def test_centre_and_scale_are_those_of_the_rows(centre, shape):
  source, mesh, _, _ = make(shape)
  rows = with_outliers(source.layout)
  chunks = chunks_lib.Chunks(Given(source.layout, rows), 0, mesh)
  chunk = chunks.load(0)
  found = chunks_lib.measure(chunk, {}, centre, 'centred_rms')
  for site, normal in found.items():
    x_RD = np.asarray(chunk.rows[site], np.float64).reshape(-1, 8)
    m_D = np.asarray(normal.centre, np.float64)
    seen = np.asarray(normal.apply(x_RD))
    np.testing.assert_allclose((seen**2).sum(1).mean(), 1, rtol=1e-5)
    if centre == 'mean':
      np.testing.assert_allclose(m_D, x_RD.mean(0), rtol=1e-5)
    else:  # the mean direction to all rows is zero, and outliers hardly count
      away = x_RD - m_D
      pull = (away / np.linalg.norm(away, axis=1, keepdims=True)).mean(0)
      assert np.linalg.norm(pull) < 1e-2
      assert np.abs(m_D - 3).max() < 0.5 < np.abs(x_RD.mean(0) - 3).max()
    rms = chunks_lib.measure(chunk, {}, centre, 'rms')[site]
    np.testing.assert_allclose(
      rms.scale, np.sqrt((x_RD**2).sum(1).mean()), rtol=1e-5
    )


def test_outliers_by_a_card(made):
  rows = with_outliers(made[0].layout)
  card = {'outliers': outliers.describe(10.0, {AT[0]: 85.5, AT[1]: 90.25})}
  bounds = outliers.norm_bounds(json.loads(json.dumps(card)))
  assert bounds == {AT[0]: 85.5, AT[1]: 90.25}
  for convert in (np.asarray, jnp.asarray):
    arrays = {site: convert(x) for site, x in rows.items()}
    is_outlier = np.asarray(outliers.is_outlier(arrays, bounds))
    assert np.flatnonzero(is_outlier).tolist() == [0, 5, 9]
    one = {AT[1]: arrays[AT[1]]}
    assert np.flatnonzero(outliers.is_outlier(one, bounds)).tolist() == [9]
    assert not np.any(outliers.is_outlier(arrays, outliers.norm_bounds({})))


@pytest.mark.parametrize(
  'rule', [{}, {'norm_bounds': {'resid_post/0': -1}}, {'norm_bounds': [1]}, 3]
)
def test_a_damaged_rule_is_a_sentence(rule):
  with pytest.raises(ValueError, match='norm_bounds'):
    outliers.norm_bounds({'outliers': rule})
