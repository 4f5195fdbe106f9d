"""Statistics of causal cards: false discoveries, power, and limits."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope.microscope.circuits import card_statistics as cs

C, M = 4, 3


def effects(rng, features: int, real: int, ratio: float):
  """KL [F, C] and of controls [F, C, M]; the first `real` are `ratio` larger.

  Contexts and directions have levels of their own, and features differ in how
  far directions spread.
  """
  spread_F = rng.uniform(0.2, 1.5, features)
  context_FC = rng.normal(-6, 2, (features, C))
  direction_FM = spread_F[:, None] * rng.normal(size=(features, M + 1))
  log_FCM = context_FC[..., None] + direction_FM[:, None]
  log_FCM += 0.3 * rng.normal(size=(features, C, M + 1))
  log_FCM[:real, :, 0] += np.log(ratio)
  kl = np.exp(log_FCM)
  return kl[..., 0], kl[..., 1:]


def q_values(rng, features, real, ratio):
  p_EF = np.stack(
    [
      np.max(
        [cs.edit_p(*effects(rng, features, real, ratio)) for _ in range(2)], 0
      )
      for _ in range(2)
    ]
  )
  return cs.adjusted(cs.either_p(p_EF))


def test_the_false_discovery_rate_is_at_most_the_nominal_one():
  """Where no feature has an effect, and where a fifth has."""
  rng = np.random.default_rng(0)
  for real in (0, 60):
    shares, found = [], []
    for _ in range(60):
      q_F = q_values(rng, 300, real, 40.0)
      hits = np.flatnonzero(q_F <= 0.1)
      shares.append((hits >= real).sum() / max(len(hits), 1))
      found.append((hits < real).sum() / max(real, 1))
    # Three standard errors of a share of at most 1.
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / np.sqrt(60), real
    assert np.mean(found) > 0.5 or not real


def test_one_kind_of_control_alone_has_uniform_p_values():
  rng = np.random.default_rng(1)
  p_F = np.concatenate(
    [cs.edit_p(*effects(rng, 400, 0, 1.0)) for _ in range(20)]
  )
  for level in (0.01, 0.05, 0.2, 0.5):
    assert np.mean(p_F <= level) == pytest.approx(
      level, abs=0.15 * level + 0.01
    )


def test_adjusted_values_are_those_of_scipy():
  from scipy import stats

  p_F = np.random.default_rng(2).random(50) ** 2
  np.testing.assert_allclose(
    cs.adjusted(p_F), stats.false_discovery_control(p_F)
  )
  some_F = np.where(np.arange(50) % 3, p_F, np.nan)
  got_F = cs.adjusted(some_F)
  np.testing.assert_array_equal(np.isnan(got_F), np.isnan(some_F))
  tested = ~np.isnan(some_F)
  np.testing.assert_allclose(
    got_F[tested], stats.false_discovery_control(some_F[tested])
  )


def test_missing_contexts_and_edits_are_left_out():
  kl_FC, control_FCM = effects(np.random.default_rng(3), 30, 0, 1.0)
  kl_FC[:, 2:], control_FCM[:, 2:] = np.nan, np.nan
  kl_FC[5], control_FCM[5] = np.nan, np.nan
  p_F = cs.edit_p(kl_FC, control_FCM)
  assert np.isnan(p_F[5]) and np.isfinite(np.delete(p_F, 5)).all()
  whole_F = cs.edit_p(kl_FC[:, :2], control_FCM[:, :2])
  np.testing.assert_array_equal(p_F, whole_F)
  both_F = cs.either_p(np.stack([p_F, np.full(30, np.nan)]))
  np.testing.assert_array_equal(both_F, p_F)  # one edit: no correction
  with pytest.raises(ValueError, match='At least 2 controls'):
    cs.excess(kl_FC, control_FCM[..., :1])


def test_verdicts_have_two_steps():
  q_F = np.array([0.01, 0.01, 0.3, np.nan, 0.04])
  lens_F = np.array([0.001, 0.9, 0.0001, 0.5, np.nan])
  verdict_F, lens_q_F = cs.verdicts(q_F, lens_F, 0.05)
  assert verdict_F.tolist() == [2, 1, 0, -1, 1]
  assert np.isnan(lens_q_F[2])  # without an effect nothing is asked of the lens


def test_halves_agree_where_features_differ_and_not_elsewhere():
  rng = np.random.default_rng(4)
  kl_FC, control_FCM = effects(rng, 400, 0, 1.0)
  larger_F = np.exp(rng.normal(0, 3, 400))
  same = cs.halves_agree(kl_FC * larger_F[:, None], control_FCM)
  none = np.exp(rng.normal(-6, 1, (400, C)))
  nulls = np.exp(rng.normal(-6, 1, (400, C, M)))
  assert same > 0.7 and abs(cs.halves_agree(none, nulls)) < 0.15


def test_intervals_hold_the_mean():
  rng, inside = np.random.default_rng(5), 0
  low_high = cs.interval(rng.normal(2, 1, (1000, 5)))
  inside = (low_high[:, 1] <= 2) & (2 <= low_high[:, 2])
  assert 0.93 < inside.mean() < 0.97
