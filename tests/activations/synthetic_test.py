"""Synthetic activations: what they claim of frequencies, pairs and sites."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemma_scope import sites
from gemma_scope.activations import harvest, synthetic
from gemma_scope.activations import store as store_lib
from tests.helpers import commands

ROWS = 20_000
SMALL = synthetic.Settings(
  features=48,
  d_model=16,
  l0=4.0,
  parents=4,
  children=2,
  groups=5,
  max_frequency=0.2,
)


def layout(rows=1, dtype='float32'):
  return harvest.Layout.of(
    chunk_rows=rows, seq_len=11, batch=1, lm_batch=10, dtype=dtype
  )


def rows_of(settings, chunk=0, rows=1):
  source = synthetic.Source(settings, layout(rows))
  parts, counts_R = harvest.rows(source, chunk)
  assert counts_R.all() and len(counts_R) == source.layout.rows
  return {site: np.concatenate(part) for site, part in parts.items()}


@pytest.fixture(scope='module')
def fires_RG():
  return synthetic.latents(SMALL, 0, ROWS) > 0


def test_frequencies_are_zipf_and_meet_the_mean_l0(fires_RG):
  p_G = SMALL.frequency_G
  assert p_G.sum() == pytest.approx(SMALL.l0, abs=1e-9)
  ranks = np.arange(1, SMALL.roots + 1)
  below = p_G[: SMALL.roots] < SMALL.max_frequency
  c = (p_G[: SMALL.roots] * ranks**SMALL.zipf)[below]
  assert below.sum() > 10 and np.ptp(c) < 1e-9
  # Groups and parents leave every marginal as it is: six standard errors.
  error_G = 6 * np.sqrt(p_G * (1 - p_G) / ROWS)
  assert np.all(np.abs(fires_RG.mean(0) - p_G) < error_G)


def test_groups_fire_together_and_others_do_not(fires_RG):
  c_GG = np.corrcoef(fires_RG[:, : SMALL.roots].T)
  group = np.arange(SMALL.roots) % SMALL.groups
  same = (group[:, None] == group) & ~np.eye(SMALL.roots, dtype=bool)
  assert c_GG[same].mean() > 0.15
  assert abs(c_GG[group[:, None] != group].mean()) < 0.01
  alone = dataclasses.replace(SMALL, groups=0)
  c_GG = np.corrcoef(synthetic.latents(alone, 0, ROWS)[:, : SMALL.roots].T > 0)
  assert abs(c_GG[same].mean()) < 0.01


def test_a_child_fires_only_where_its_parent_does(fires_RG):
  children = np.flatnonzero(SMALL.parent_G >= 0)
  assert len(children) == SMALL.parents * SMALL.children
  parents = SMALL.parent_G[children]
  assert np.all(np.bincount(parents) == SMALL.children)
  assert not np.any(fires_RG[:, children] & ~fires_RG[:, parents])
  both = fires_RG[:, children].sum() / fires_RG[:, parents].sum()
  assert both == pytest.approx(SMALL.child_share, abs=0.02)


def test_coefficients_have_median_one_and_the_spread():
  f = synthetic.latents(SMALL, 0, ROWS)
  logs = np.log(f[f > 0])
  assert abs(logs.mean()) < 0.01
  assert logs.std() == pytest.approx(SMALL.spread, rel=0.02)


def test_rows_are_the_sum_of_features_and_isotropic_noise():
  (x_RD,) = rows_of(SMALL, rows=ROWS).values()
  truth = synthetic.make_truth(SMALL)
  (d_GD,), (b_D,) = truth.directions.values(), truth.biases.values()
  assert np.allclose(np.linalg.norm(d_GD, axis=1), 1)
  f_RG = synthetic.latents(SMALL, 0, len(x_RD))
  noise_RD = x_RD - (f_RG @ d_GD + b_D)
  alone = dataclasses.replace(SMALL, groups=0, parents=0)
  (free_RD,) = rows_of(dataclasses.replace(alone, noise=0), rows=ROWS).values()
  variance = noise_RD.var(0)
  assert np.allclose(variance, variance.mean(), rtol=0.1)
  # The signal's variance is exact where features are independent.
  (d_GD,) = synthetic.make_truth(alone).directions.values()
  signal = free_RD.astype(np.float64).var(0).sum()
  (noisy_RD,) = rows_of(alone, rows=ROWS).values()
  added = (noisy_RD - free_RD).astype(np.float64).var(0).sum()
  assert added / signal == pytest.approx(SMALL.noise, rel=0.05)
  assert np.linalg.norm(b_D) ** 2 == pytest.approx(signal, rel=0.3)


def test_a_chunk_is_a_function_of_settings_and_number():
  (first,), (again,) = rows_of(SMALL).values(), rows_of(SMALL).values()
  np.testing.assert_array_equal(first, again)
  (longer,) = rows_of(SMALL, rows=5000).values()  # past one block
  np.testing.assert_array_equal(longer[: len(first)], first)
  for other in (
    rows_of(SMALL, chunk=1),
    rows_of(dataclasses.replace(SMALL, seed=1)),
  ):
    assert np.all(np.any(first != next(iter(other.values())), 1))
  f_RG = synthetic.latents(SMALL, 3, 5000)
  np.testing.assert_array_equal(f_RG[:50], synthetic.latents(SMALL, 3, 50))


def test_layers_share_coefficients_and_features_persist():
  at = tuple(
    f'{kind}/{l}'
    for kind in ('resid_post', 'mlp_in', 'mlp_out')
    for l in range(3)
  )
  truth = synthetic.make_truth(dataclasses.replace(SMALL, sites=at))
  here = {str(s): d_GD.any(1) for s, d_GD in truth.directions.items()}
  reads = np.stack([here[f'mlp_in/{l}'] for l in range(3)])
  assert np.all(reads.sum(0) == 1)  # each is read once
  for l in range(3):
    born = reads[: l + 1].any(0)
    np.testing.assert_array_equal(here[f'mlp_out/{l}'], born)
    np.testing.assert_array_equal(here[f'resid_post/{l}'], born)
  is_child = truth.parent_G >= 0
  for born in reads:  # a pair lives in the same layers
    np.testing.assert_array_equal(
      born[is_child], born[truth.parent_G[is_child]]
    )
  d = truth.directions
  first = here['resid_post/0']
  cosine = np.sum(
    d[sites.parse('resid_post/0')] * d[sites.parse('resid_post/1')], 1
  )[first]
  assert np.abs(cosine).max() < 0.95  # another direction at each layer


def test_a_store_reads_back_as_the_source(tmp_path):
  source = synthetic.Source(SMALL, layout(dtype='bfloat16'))
  facts = synthetic.facts(source.truth, 'bfloat16')
  store_lib.write_store(tmp_path, source, 2, facts)
  synthetic.write_truth(tmp_path, source.truth)
  store = store_lib.StoreSource(tmp_path, source.sites, batch=7)
  assert store.facts['model'] == 'synthetic'
  assert store.facts['dimensions']['d_model'] == SMALL.d_model
  for site in source.sites:
    assert site.width(sites.Uniform(**store.facts['dimensions'])) == 16
  for chunk in range(2):
    (expected,), (found,) = (
      harvest.rows(s, chunk)[0].values() for s in (source, store)
    )
    np.testing.assert_array_equal(
      np.concatenate(expected), np.concatenate(found)
    )
  found = synthetic.truth(tmp_path)
  assert found.settings == SMALL
  assert found.directions.keys() == source.truth.directions.keys()
  for site in source.sites:
    np.testing.assert_array_equal(
      found.directions[site], source.truth.directions[site]
    )
    np.testing.assert_array_equal(found.biases[site], source.truth.biases[site])
  np.testing.assert_array_equal(found.parent_G, SMALL.parent_G)
  np.testing.assert_array_equal(found.frequency_G, SMALL.frequency_G)


def test_a_missing_or_damaged_truth_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'launch/synthetic\.py writes it'):
    synthetic.truth(tmp_path)
  synthetic.write_truth(tmp_path, synthetic.make_truth(SMALL))
  path = tmp_path / synthetic.FILE
  data = path.read_bytes()
  bad = bytearray(data)
  bad[len(bad) // 2] ^= 1
  for damage in (data[: len(data) // 2], bytes(bad), b'', b'nothing'):
    path.write_bytes(damage)
    with pytest.raises(ValueError, match='is damaged'):
      synthetic.truth(tmp_path)
  np.savez(path.open('wb'), settings=np.array({}, object))
  with pytest.raises(ValueError, match='is damaged'):  # pickled: never read
    synthetic.truth(tmp_path)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'l0': 40.0}, 'mean L0 is above 0 and below'),
    ({'parents': 17}, 'at most features'),
    ({'correlation': 1.0}, 'correlation'),
    ({'child_share': 0.0}, 'child_share'),
    ({'noise': -1.0}, 'noise'),
    ({'sites': ()}, 'at least one site'),
    ({'sites': ('resid/0',)}, 'no site kind'),
    ({'sites': ('resid_mid/0',)}, 'cannot be trained at'),
    ({'d_model': 0}, 'd_model'),
  ],
)
def test_impossible_data_are_refused_in_a_sentence(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(SMALL, **change)


def test_no_hierarchy_and_no_children_are_data_too():
  for change in ({'parents': 0}, {'children': 0}, {'zipf': 0.0}):
    settings = dataclasses.replace(SMALL, **change)
    f_RG = synthetic.latents(settings, 0, 4096)
    assert (f_RG > 0).sum(1).mean() == pytest.approx(SMALL.l0, rel=0.05)


def test_the_launcher_writes_what_the_library_makes(tmp_path, capsys):
  command = ['synthetic', f'--out={tmp_path}', '--chunks=1']
  command += ['--chunk_rows=100', '--features=60', '--d_model=8', '--l0=3']
  command += ['--sites=mlp_in/0,mlp_out/0']
  done = commands.run(capsys, *command)
  assert done.code == 0, done.err
  truth = synthetic.truth(tmp_path)
  expected = synthetic.Settings(
    features=60, d_model=8, l0=3.0, sites=('mlp_in/0', 'mlp_out/0')
  )
  assert truth.settings == expected
  store = store_lib.StoreSource(tmp_path, truth.settings.at, 8)
  assert store.chunks == 1
  # It continues with these data, and with no others.
  source = synthetic.Source(expected, store.layout)
  facts = synthetic.facts(source.truth, 'float32')
  store_lib.write_store(tmp_path, source, 1, facts)
  other = synthetic.make_truth(dataclasses.replace(expected, noise=0.5))
  with pytest.raises(ValueError, match='holds another activation store'):
    store_lib.write_store(
      tmp_path, source, 1, synthetic.facts(other, 'float32')
    )
