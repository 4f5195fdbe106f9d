"""Figures and their intervals, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope.evaluation import estimates


def test_interval_of_a_mean_of_ratios_is_the_jackknifes():
  rng = np.random.default_rng(0)
  v_NM = rng.uniform(1, 3, (60, 3)) * [1, 10, 100]
  e_NM = v_NM * rng.uniform(0, 1, (60, 3)) * [0.1, 0.5, 1.5]
  found = estimates._mean_ratio(e_NM, v_NM, 60)
  mean = lambda keep: (e_NM[keep].sum(0) / v_NM[keep].sum(0)).mean()
  assert found['value'] == pytest.approx(mean(slice(None)))
  left_out = [mean(np.arange(60) != n) for n in range(60)]
  sigma = np.sqrt(59 / 60 * np.square(left_out - np.mean(left_out)).sum())
  half = (found['high'] - found['low']) / 2
  assert half == pytest.approx(2.0 * sigma, rel=0.03)  # t(59) = 2.00


def test_one_target_is_a_plain_ratio():
  rng = np.random.default_rng(1)
  e_N1, v_N1 = rng.uniform(1, 2, (2, 9, 1))
  found = estimates._mean_ratio(e_N1, v_N1, 9)
  want = estimates.ratio_interval(e_N1[:, 0], v_N1[:, 0])
  assert [found[key] for key in ('value', 'low', 'high')] == pytest.approx(want)
  nothing = estimates._mean_ratio(e_N1, np.zeros((9, 1)), 9)
  assert nothing['value'] is nothing['low'] is None


def test_a_tally_sums_by_document_and_by_position():
  rng = np.random.default_rng(4)
  values_NTM = rng.normal(size=(6, 5, 2))
  where_NT = rng.random((6, 5)) < 0.7
  where_NT[2] = False  # a row that only fills its batch
  cluster_NT = rng.integers(0, 3, (6, 5))
  tally = estimates.Tally(3, 5)
  for part in (slice(0, 4), slice(4, 6)):
    tally.add('a', values_NTM[part], where_NT[part], cluster_NT[part])
  kept_NTM = np.where(where_NT[..., None], values_NTM, 0)
  for g in range(3):
    want = kept_NTM[cluster_NT == g].sum(0)
    np.testing.assert_allclose(tally['a'][g], want)
  np.testing.assert_allclose(tally.by_position('a'), kept_NTM.sum(0))


def test_intervals_over_documents_cover_where_those_over_sequences_do_not():
  """Documents of several sequences that share an effect."""
  rng = np.random.default_rng(5)
  covered = {'documents': 0, 'sequences': 0}
  trials, documents, truth = 400, 24, 2.0
  for _ in range(trials):
    count_G = rng.integers(1, 12, documents)  # sequences of each document
    effect_G = truth + 0.5 * rng.standard_normal(documents)
    document_N = np.repeat(np.arange(documents), count_G)
    tokens_N1 = rng.integers(50, 100, (len(document_N), 1)).astype(float)
    noise_N1 = 0.3 * rng.standard_normal(tokens_N1.shape)
    value_N1 = tokens_N1 * (effect_G[document_N, None] + noise_N1)
    everywhere = np.ones(tokens_N1.shape, bool)
    for kind, cluster_N in (
      ('documents', document_N),
      ('sequences', np.arange(len(document_N))),
    ):
      tally = estimates.Tally(cluster_N.max() + 1, 1)
      tally.add('a', value_N1, everywhere, cluster_N[:, None])
      tally.add('b', tokens_N1, everywhere, cluster_N[:, None])
      found = estimates.figure(tally['a'][:, 0], tally['b'][:, 0], 1)
      covered[kind] += found['low'] <= truth <= found['high']
  assert 0.92 < covered['documents'] / trials < 0.98
  assert covered['sequences'] / trials < 0.75


def test_clusters_without_tokens_are_no_draws():
  a_n, b_n = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
  want = estimates.figure(a_n, b_n, 4)
  more = estimates.figure(np.append(a_n, [0, 0]), np.append(b_n, [0, 0]), 4)
  assert more == want
  assert estimates.figure([0.0], [0.0], 0)['value'] is None


def test_the_strongest_control_is_the_least_of_each_figure():
  figure = lambda value: {'value': value, 'low': 0, 'high': 1, 'tokens': 9}
  names = ('l0', 'fvu', 'fvu_inliers', 'fvu_rest', 'delta_loss', 'kl')
  row = lambda *values: dict(zip(names, map(figure, values), strict=True))
  found = estimates.strongest(
    {
      'random': row(8, 0.7, 0.5, 0.5, 0.2, None),
      'pca': row(9, 0.3, 0.6, 0.5, 1, 2),
    }
  )
  assert found['fvu']['value'] == 0.3 and found['l0']['value'] == 9
  assert found['delta_loss']['value'] == 0.2 and found['kl']['value'] == 2
  assert found['kinds']['fvu'] == 'pca'
  assert found['kinds']['fvu_inliers'] == 'random'


@pytest.mark.parametrize('share', [0.002, 0.1, 0.5, 0.97])
def test_wilsons_interval_covers_the_share(share):
  hits = np.random.default_rng(2).binomial(1000, share, 2000)
  limits = [estimates.wilson_interval(int(n), 1000) for n in hits]
  covered = np.mean([low <= share <= high for _, low, high in limits])
  assert 0.92 < covered <= 0.99
  for value, low, high in [*limits, estimates.wilson_interval(0, 5)]:
    assert 0 <= low <= value <= high <= 1 and high > low
