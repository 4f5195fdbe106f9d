"""Figures of several targets: their intervals are those of the mean."""

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


def test_sums_of_targets_lie_side_by_side():
  parts = [estimates.Sums() for _ in range(2)]
  for i, part in enumerate(parts):
    for _ in range(2):
      part.add({'a_B': np.full((4, 1), i), 'a_T': np.full(3, i)}, rows=3)
  found = estimates.joined(parts)
  assert found['a_B'].shape == (6, 2) and found['a_T'].shape == (3, 2)
  np.testing.assert_array_equal(found['a_T'][0], [0, 2])


@pytest.mark.parametrize('share', [0.002, 0.1, 0.5, 0.97])
def test_wilsons_interval_covers_the_share(share):
  hits = np.random.default_rng(2).binomial(1000, share, 2000)
  limits = [estimates.wilson_interval(int(n), 1000) for n in hits]
  covered = np.mean([low <= share <= high for _, low, high in limits])
  assert 0.92 < covered <= 0.99
  for value, low, high in [*limits, estimates.wilson_interval(0, 5)]:
    assert 0 <= low <= value <= high <= 1 and high > low
