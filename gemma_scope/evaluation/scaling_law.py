"""The error of SAEs as a law of width, L0 and tokens, and its predictions.

  L(F, k, T) = exp(alpha + beta ln k + nu ln F + gamma ln k ln F)
             + exp(zeta + eta ln k)
             + exp(tau + delta ln F - kappa ln T)

F is the number of latents, k the L0, T the tokens of training. The first two
terms are the joint law of sparsity and width of Gao et al. (arXiv 2406.04093,
section 3.1.3), for SAEs trained to convergence. The third is what a finite
number of tokens leaves, in the form of arXiv 2203.15556, with an exponent of
width: a wider SAE has more to learn. Logarithms are centred at the measured
points, so that the constants are of the size of ln L.

The fit is least squares in ln L, with a weak pull of each exponent towards a
usual value: few points cannot tell nine numbers apart, and predictions do not
need them to.

An interval has three parts, added as variances of ln L:

  spread    of the predictions of refits to resampled residuals
  noise     the residuals themselves: another SAE at this point
  reach     what a fit without the widest SAEs gets wrong about them, for each
            time that the predicted width is as far away as they were
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_NAMES = tuple('alpha beta nu gamma zeta eta tau delta kappa'.split())
# Usual values of the exponents, and how far a fit may easily move.
_PRIOR = np.array([0, -0.4, -0.2, 0, -1.5, -0.4, -1, 0.3, 0.5])
_EASE = np.array([3, 0.5, 0.3, 0.1, 3, 0.5, 3, 0.5, 0.5])
_PULL = 0.01  # of a whole `_EASE`, in units of ln L
_REFITS = 40


@dataclasses.dataclass(frozen=True)
class Point:
  """SAEs of one width, L0 and number of tokens, and their error."""

  width: int
  l0: float
  tokens: int
  fvu: float = float('nan')


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
  """A fitted law.

  Attributes:
    constants: of the terms above, in the order alpha ... kappa.
    centre: means of ln F, ln k, ln T of the points.
    residuals: ln measured - ln fitted, of each point.
  """

  constants: np.ndarray
  centre: np.ndarray
  residuals: np.ndarray

  def log(self, points: Sequence[Point]) -> np.ndarray:
    """ln L at each point."""
    return _log_law(self.constants, _logs(points) - self.centre)

  def describe(self) -> dict[str, Any]:
    """The constants, for JSON."""
    return {
      'constants': dict(zip(_NAMES, map(float, self.constants), strict=True)),
      'centre': dict(zip('FkT', map(float, self.centre), strict=True)),
      'rms_residual': float(np.sqrt(np.mean(self.residuals**2))),
    }


def _logs(points: Sequence[Point]) -> np.ndarray:
  return np.log([[point.width, point.l0, point.tokens] for point in points])


def _log_law(constants, logs_P3) -> np.ndarray:
  alpha, beta, nu, gamma, zeta, eta, tau, delta, kappa = constants
  F, k, T = logs_P3.T
  terms = (
    alpha + beta * k + nu * F + gamma * k * F,
    zeta + eta * k,
    tau + delta * F - kappa * T,
  )
  return np.logaddexp.reduce(np.stack(terms))


def _fit(logs_P3, log_fvu_P, starts_SN) -> np.ndarray:
  """Constants of least error, from the best of several starts."""
  from scipy import optimize  # slow to import

  prior = _PRIOR.copy()
  prior[[0, 4, 6]] += np.mean(log_fvu_P)

  def residuals(constants):
    pull = _PULL * (constants - prior) / _EASE
    return np.concatenate([_log_law(constants, logs_P3) - log_fvu_P, pull])

  fits = [optimize.least_squares(residuals, start) for start in starts_SN]
  return min(fits, key=lambda fit: fit.cost).x


def fit(points: Sequence[Point], seed: int = 0) -> Law:
  """Fits the law to measured points.

  Raises:
    ValueError: the points have one width or one number of tokens, are fewer
      than the constants, or an error is not positive.
  """
  for name in ('width', 'tokens'):
    if len({getattr(point, name) for point in points}) < 2:
      raise ValueError(
        f'A scaling law needs SAEs that differ in {name}; all {len(points)} '
        'have the same.'
      )
  if len(points) < len(_NAMES):
    raise ValueError(
      f'A scaling law has {len(_NAMES)} constants, and {len(points)} SAEs are '
      'too few to fit them.'
    )
  fvu_P = np.array([point.fvu for point in points])
  if not (np.isfinite(fvu_P) & (fvu_P > 0)).all():
    raise ValueError('Every error (FVU) must be positive and finite.')
  logs_P3, log_fvu_P = _logs(points), np.log(fvu_P)
  centre = logs_P3.mean(0)
  start = _PRIOR.copy()
  start[[0, 4, 6]] += log_fvu_P.mean()
  random = np.random.default_rng(seed)
  noise_SN = random.standard_normal((7, len(_NAMES))) * _EASE / 2
  starts_SN = start + np.concatenate([np.zeros((1, len(_NAMES))), noise_SN])
  constants = _fit(logs_P3 - centre, log_fvu_P, starts_SN)
  fitted_P = _log_law(constants, logs_P3 - centre)
  return Law(constants, centre, log_fvu_P - fitted_P)


def forecast(
  points: Sequence[Point], wanted: Sequence[Point], seed: int = 0
) -> list[dict[str, Any]]:
  """Predictions for SAEs that are not trained yet, beside two baselines.

  Args:
    points: measured, of at least three widths.
    wanted: their `fvu` is ignored.
    seed: of the starts of the fits and of the resampling.

  Returns:
    For each point wanted: width, l0, tokens; the prediction `fvu` with a 95 %
    interval `low`, `high`; the baselines `last_width` (the error of the widest
    SAE measured at this L0 and number of tokens) and `log_linear` (a line
    through ln F and ln L at this L0 and number of tokens), None where none was
    measured there.
  """
  widths = sorted({point.width for point in points})
  if len(widths) < 3:
    raise ValueError(
      f'A prediction needs SAEs of at least three widths; found {widths}.'
    )
  law = fit(points, seed)
  log_fvu_Q = law.log(wanted)
  spread_Q = _spread(law, points, wanted, seed)
  degrees_of_freedom = max(len(points) - len(_NAMES), 1)
  noise = np.sum(law.residuals**2) / degrees_of_freedom
  reach = _reach(points, widths, seed)
  predictions = []
  for point, log_fvu, spread in zip(wanted, log_fvu_Q, spread_Q, strict=True):
    distance = np.log(point.width / widths[-1]) / np.log(
      widths[-1] / widths[-2]
    )
    half = 1.96 * np.sqrt(spread + noise + (max(distance, 0) * reach) ** 2)
    predictions.append(
      {
        'width': point.width,
        'l0': point.l0,
        'tokens': point.tokens,
        'fvu': float(np.exp(log_fvu)),
        'low': float(np.exp(log_fvu - half)),
        'high': float(np.exp(log_fvu + half)),
        **_baselines(points, point),
      }
    )
  return predictions


def _spread(law: Law, points, wanted, seed: int) -> np.ndarray:
  """Variance of ln L at each point wanted, over refits."""
  random = np.random.default_rng(seed)
  logs_P3 = _logs(points) - law.centre
  fitted_P = _log_law(law.constants, logs_P3)
  # Residuals of a fit are smaller than the noise, by the constants it has.
  degrees_of_freedom = max(len(points) - len(_NAMES), 1)
  residuals = law.residuals * np.sqrt(len(points) / degrees_of_freedom)
  refits = []
  for _ in range(_REFITS):
    drawn_P = random.choice(residuals, len(points))
    constants = _fit(logs_P3, fitted_P + drawn_P, [law.constants])
    refits.append(_log_law(constants, _logs(wanted) - law.centre))
  return np.var(refits, 0)


def _reach(points, widths, seed: int) -> float:
  """Root mean square error of ln L of a fit to all but the widest, for these.

  0 where the others are too few to fit.
  """
  inner = [point for point in points if point.width < widths[-1]]
  outer = [point for point in points if point.width == widths[-1]]
  if len(inner) < len(_NAMES):
    return 0.0
  errors = fit(inner, seed).log(outer) - np.log([point.fvu for point in outer])
  return float(np.sqrt(np.mean(errors**2)))


def _baselines(points, wanted: Point) -> dict[str, float | None]:
  """What one would guess without a law."""
  same_rung = sorted(
    (point.width, point.fvu)
    for point in points
    if (point.tokens, _rung(point.l0)) == (wanted.tokens, _rung(wanted.l0))
  )
  if len({width for width, _ in same_rung}) < 2:
    return {'last_width': None, 'log_linear': None}
  log_width, log_fvu = np.log(np.array(same_rung)).T
  slope, level = np.polyfit(log_width, log_fvu, 1)
  widest = [fvu for width, fvu in same_rung if width == same_rung[-1][0]]
  return {
    'last_width': float(np.exp(np.mean(np.log(widest)))),
    'log_linear': float(np.exp(level + slope * np.log(wanted.width))),
  }


def _rung(l0: float) -> int:
  """Which L0 a measured one was meant to be: the nearest half power of two."""
  return round(2 * np.log2(l0))
