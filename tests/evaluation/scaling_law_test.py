"""The fit recovers a known law, and its intervals cover what is held back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemma_scope.evaluation import scaling_law
from gemma_scope.evaluation.scaling_law import Point

WIDTHS, L0, TOKENS = (512, 1024, 2048, 4096), (16, 32, 64), (5e4, 1e5, 2e5)


def true_fvu(width, l0, tokens):
  """A law of the form that is fitted, with exponents -0.25, -0.5 and 0.6."""
  converged = 0.9 * l0**-0.35 * (width / 512) ** -0.25
  left = 0.03 * (l0 / 16) ** -0.5
  unlearned = 0.05 * (width / 512) ** 0.4 * (tokens / 5e4) ** -0.6
  return converged + left + unlearned


def points(noise: float, seed: int, widths=WIDTHS) -> list[Point]:
  random = np.random.default_rng(seed)
  return [
    Point(width, l0, tokens, true_fvu(width, l0, tokens) * np.exp(e))
    for (width, l0, tokens), e in zip(
      itertools.product(widths, L0, TOKENS),
      noise * random.standard_normal(100),
      strict=False,
    )
  ]


def test_the_fit_recovers_a_known_law():
  law = scaling_law.fit(points(0, 0))
  assert np.abs(law.residuals).max() < 0.003
  constants = law.describe()['constants']
  assert constants['nu'] == pytest.approx(-0.25, abs=0.07)
  assert constants['kappa'] == pytest.approx(0.6, abs=0.15)
  assert constants['delta'] == pytest.approx(0.4, abs=0.15)
  far = [Point(8192, 32, 2e5), Point(16384, 16, 4e5)]
  truth = [true_fvu(p.width, p.l0, p.tokens) for p in far]
  assert np.exp(law.log(far)) == pytest.approx(truth, rel=0.02)


def test_intervals_cover_new_saes_and_beat_the_baselines():
  wanted = [Point(8192, l0, tokens) for l0 in L0 for tokens in TOKENS]
  covered, errors = [], {'fvu': [], 'last_width': [], 'log_linear': []}
  for seed in range(2):
    noise = np.random.default_rng(100 + seed).standard_normal(len(wanted))
    forecasts = scaling_law.forecast(points(0.01, seed), wanted, seed)
    for forecast, e in zip(forecasts, noise, strict=True):
      key = (forecast[name] for name in ('width', 'l0', 'tokens'))
      result = true_fvu(*key) * np.exp(0.01 * e)
      covered.append(forecast['low'] < result < forecast['high'])
      # An interval of any width would cover: it must tell something.
      assert forecast['high'] / forecast['low'] < 1.5
      for name in errors:
        errors[name].append(np.log(forecast[name] / result) ** 2)
  assert np.mean(covered) >= 0.9
  mean = {name: np.mean(values) for name, values in errors.items()}
  assert mean['fvu'] < min(mean['last_width'], mean['log_linear'])


def test_an_interval_is_wider_farther_away_and_where_the_law_is_wrong():
  def width(forecast):
    return np.log(forecast['high'] / forecast['low'])

  near, far = scaling_law.forecast(
    points(0.005, 0), [Point(8192, 32, 2e5), Point(32768, 32, 2e5)]
  )
  assert width(far) > width(near)
  bent = [  # the last width is much worse than all others tell
    Point(p.width, p.l0, p.tokens, p.fvu * (1.3 if p.width == 4096 else 1))
    for p in points(0.005, 0)
  ]
  (wrong,) = scaling_law.forecast(bent, [Point(8192, 32, 2e5)])
  assert width(wrong) > 2 * width(near)


def test_too_little_to_fit_is_refused():
  with pytest.raises(ValueError, match='differ in width'):
    scaling_law.fit(points(0, 0, widths=(512,)))
  with pytest.raises(ValueError, match='three widths'):
    scaling_law.forecast(points(0, 0, (512, 1024)), [Point(4096, 32, 1e5)])
  with pytest.raises(ValueError, match='too few'):
    scaling_law.fit([*points(0, 0)[:1], *points(0, 0)[-1:]])
  wrong = [*points(0, 0)[1:], Point(512, 16, 5e4, 0.0)]
  with pytest.raises(ValueError, match='positive'):
    scaling_law.fit(wrong)
