"""Linear probes for a concept, on a few latents and on raw activations.

  labelled rows x [B, D] -> latents f [B, F], split into train and test by group
  k-sparse   logistic regression on the k latents whose class means differ most
             on the train rows
  controls   the same on the latents of a random SAE, on k principal components
             of x, on k coordinates of x, and with shuffled labels (shuffled by
             group if the rows of a group share a label)
  dense      logistic regression on all of x; the difference of class means

Scores are measured on test rows alone, with a 95 % interval. Rows of one group
(prompts from a template, tokens of a document) are not independent. So a group
is either in train or in test, and the interval treats groups as clusters:

  var = G / (G - 1) sum_g (sum_{b in g} h_b)^2

where h_b is the influence of row b on the score. For the mean v of values v_b
over a class of n rows it is (v_b - v) / n. AUC is such a mean over both
classes, where v_b is the share of the other class on the right side of row b
(Obuchowski, Biometrics 53, 1997). The interval does not cover the choice of
train rows.

Both classes have the same total weight in a fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KS = (1, 2, 5, 10, 20)
_SHUFFLES = 10
_NEWTON_WIDTH = 256  # wider fits do not form the Hessian


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """What is probed: one row for each prompt, or for each token.

  Attributes:
    x_BD: raw activations.
    f_BF: the SAE's latents for them.
    control_BF: latents of a random SAE with the same L0, or None.
    test_B: bool, which rows are held out.
    group_B: int; rows of the same group are not independent.
  """

  x_BD: np.ndarray
  f_BF: np.ndarray
  control_BF: np.ndarray | None
  test_B: np.ndarray
  group_B: np.ndarray

  def __post_init__(self):
    arrays = [self.f_BF, self.control_BF, self.test_B, self.group_B]
    lengths = {len(array) for array in arrays if array is not None} | {
      len(self.x_BD)
    }
    if len(lengths) > 1:
      raise ValueError(
        'The arrays of a probe must have the same number of rows; found '
        f'{sorted(lengths)}.'
      )
    shared = set(self.group_B[self.test_B]) & set(self.group_B[~self.test_B])
    if shared:
      raise ValueError(
        f'Group {min(shared)} has both train rows and test rows, so that test '
        'rows may be copies of train rows; split by group.'
      )


class Probe(NamedTuple):
  """score = x @ w + b; positive scores predict the label."""

  w_D: np.ndarray
  b: float

  def __call__(self, x_BD: np.ndarray) -> np.ndarray:
    return np.asarray(x_BD, np.float64) @ self.w_D + self.b


def split(group_B: np.ndarray, share: float = 0.3, seed: int = 0) -> np.ndarray:
  """Holds out about `share` of the groups, at least one; returns test_B."""
  groups = np.unique(group_B)
  if len(groups) < 2:
    raise ValueError(
      'A probe needs at least two groups, because one is held out.'
    )
  count = min(max(1, round(share * len(groups))), len(groups) - 1)
  held_out = np.random.default_rng(seed).permutation(groups)[:count]
  return np.isin(group_B, held_out)


def logistic(x_BD: np.ndarray, y_B: np.ndarray, penalty: float = 1.0) -> Probe:
  """Logistic regression on standardised columns, with balanced classes.

  Minimises sum_b weight_b log(1 + exp(-s_b (x_b w + b))) + penalty / 2 |w|^2.
  This is the loss of scikit-learn with C = 1 / penalty and balanced classes.

  Raises:
    ValueError: all rows are of one class.
  """
  from scipy import optimize, special  # slow to import

  y_B = np.asarray(y_B, bool)
  if y_B.all() or not y_B.any():
    raise ValueError('A probe needs train rows of both classes.')
  x_BD = np.asarray(x_BD, np.float64)
  mean_D, scale_D = x_BD.mean(0), x_BD.std(0)
  scale_D = np.where(scale_D > 0, scale_D, 1)
  x_BD = (x_BD - mean_D) / scale_D
  sign_B = np.where(y_B, 1.0, -1.0)
  weight_B = np.where(y_B, 0.5 / y_B.mean(), 0.5 / (~y_B).mean())

  def loss(parameters):
    w_D, b = parameters[:-1], parameters[-1]
    margin_B = sign_B * (x_BD @ w_D + b)
    value = weight_B @ np.logaddexp(0, -margin_B) + penalty / 2 * w_D @ w_D
    slope_B = -weight_B * sign_B * special.expit(-margin_B)
    return value, np.append(slope_B @ x_BD + penalty * w_D, slope_B.sum())

  if x_BD.shape[1] <= _NEWTON_WIDTH:
    w_C = _newton(loss, x_BD, sign_B, weight_B, penalty)
  else:
    start = np.zeros(x_BD.shape[1] + 1)
    w_C = optimize.minimize(loss, start, jac=True, method='L-BFGS-B').x
  w_D = w_C[:-1] / scale_D
  return Probe(w_D, float(w_C[-1] - mean_D @ w_D))


def _newton(loss, x_BD, sign_B, weight_B, penalty: float) -> np.ndarray:
  """Newton's method with step halving: few iterations for few columns."""
  from scipy import linalg, special  # slow to import

  x_BC = np.concatenate([x_BD, np.ones((len(x_BD), 1))], 1)
  ridge_C = np.append(np.full(x_BD.shape[1], penalty), 1e-9 * len(x_BD))
  w_C = np.zeros(x_BC.shape[1])
  value, slope_C = loss(w_C)
  for _ in range(100):
    wrong_B = special.expit(-sign_B * (x_BC @ w_C))
    curve_B = weight_B * wrong_B * (1 - wrong_B)
    hessian_CC = (x_BC.T * curve_B) @ x_BC + np.diag(ridge_C)
    step_C = linalg.solve(hessian_CC, slope_C, assume_a='pos')
    gain = slope_C @ step_C
    if gain <= 1e-10 * max(value, 1.0):
      break
    size = 1.0
    while size > 1e-6:
      new_value, new_slope_C = loss(w_C - size * step_C)
      if new_value <= value - 1e-4 * size * gain:
        break
      size /= 2
    else:
      break
    w_C = w_C - size * step_C
    value, slope_C = new_value, new_slope_C
  return w_C


def difference_of_means(x_BD: np.ndarray, y_B: np.ndarray) -> Probe:
  """A probe along the difference of the class means, with b half way."""
  positive_D, negative_D = x_BD[y_B].mean(0), x_BD[~y_B].mean(0)
  w_D = np.asarray(positive_D - negative_D, np.float64)
  return Probe(w_D, float(-w_D @ (positive_D + negative_D) / 2))


def ranked(f_BF: np.ndarray, y_B: np.ndarray) -> np.ndarray:
  """Latents in order of the absolute difference of their class means."""
  return np.argsort(-np.abs(class_difference(f_BF, y_B)), kind='stable')


def class_difference(f_BF: np.ndarray, y_B: np.ndarray) -> np.ndarray:
  """The difference of the two classes' means, for each column."""
  # A product, so that the rows of a class are not copied.
  weight_B = np.where(y_B, 1 / y_B.sum(), -1 / (~y_B).sum())
  return weight_B.astype(f_BF.dtype) @ f_BF


def _figure(value: float, part_B: np.ndarray, group_B: np.ndarray):
  """A score with its interval over groups; None if there is only one group."""
  from scipy import special

  _, index_B = np.unique(group_B, return_inverse=True)
  sums_G = np.bincount(index_B, part_B)
  groups = len(sums_G)
  figure = {'value': float(value), 'low': None, 'high': None}
  if groups > 1:
    sigma = np.sqrt(groups / (groups - 1) * np.sum(sums_G**2))
    half = special.stdtrit(groups - 1, 0.975) * sigma
    figure |= {
      'low': float(max(value - half, 0)),
      'high': float(min(value + half, 1)),
    }
  return figure


def scores(
  score_B: np.ndarray, y_B: np.ndarray, group_B: np.ndarray
) -> dict[str, dict[str, float | None]]:
  """Accuracy, balanced accuracy and AUC, each with a 95 % interval.

  Raises:
    ValueError: all rows are of one class.
  """
  from scipy import stats

  y_B = np.asarray(y_B, bool)
  positives, negatives = int(y_B.sum()), int((~y_B).sum())
  if not positives or not negatives:
    raise ValueError(
      'All held-out rows are of one class; a score needs both classes.'
    )
  right_B = ((score_B > 0) == y_B).astype(np.float64)
  accuracy = right_B.mean()
  of_class = np.where(y_B, right_B[y_B].mean(), right_B[~y_B].mean())
  size_B = np.where(y_B, positives, negatives)
  # The rank among all rows minus the rank in its class counts the other class.
  rank_B, own_B = stats.rankdata(score_B), np.empty(len(score_B))
  for class_B in (y_B, ~y_B):
    own_B[class_B] = stats.rankdata(score_B[class_B])
  beaten_B = rank_B - own_B
  side_B = np.where(y_B, beaten_B / negatives, 1 - beaten_B / positives)
  auc = side_B[y_B].mean()
  balanced = (right_B[y_B].mean() + right_B[~y_B].mean()) / 2
  return {
    'accuracy': _figure(accuracy, (right_B - accuracy) / len(y_B), group_B),
    'balanced_accuracy': _figure(
      balanced, (right_B - of_class) / size_B / 2, group_B
    ),
    'auc': _figure(auc, (side_B - auc) / size_B, group_B),
  }


def run(
  rows: Rows, y_B: np.ndarray, ks: Sequence[int] = KS, seed: int = 0
) -> dict[str, Any]:
  """Fits and scores all probes for one concept, on the same held-out rows.

  Args:
    rows: what is probed.
    y_B: bool, the labels.
    ks: numbers of latents for sparse probes; numbers above F are skipped.
    seed: of the shuffled labels.

  Returns:
    A dictionary for JSON with `train` and `test` (numbers of rows), `groups`
    (held out), `share` (of test rows with the label) and `probes`, a list of
    {'on', 'k', scores}. 'on' is latents, random_sae, coordinates (of x), pca or
    shuffled_labels; if k is None the probe is dense and 'on' is activations or
    difference_of_means. Sparse probes also have `latents` and their `weights`.
    For shuffled labels, value, low and high are the mean, minimum and maximum
    over ten shuffles.

  Raises:
    ValueError: all train rows or all test rows are of one class.
  """
  y_B, test_B = np.asarray(y_B, bool), rows.test_B
  train_B, group_B = ~test_B, rows.group_B[test_B]
  rng, probes = np.random.default_rng(seed), []

  def add(on, k, features_BC, fit=logistic, index=None):
    fitted = fit(features_BC[train_B], y_B[train_B])
    scored = scores(fitted(features_BC[test_B]), y_B[test_B], group_B)
    chosen = {}
    if index is not None:
      chosen = {'latents': index.tolist(), 'weights': fitted.w_D.tolist()}
    probes.append({'on': on, 'k': k, **scored, **chosen})

  add('activations', None, rows.x_BD)
  add('difference_of_means', None, rows.x_BD, fit=difference_of_means)
  component_BC = _components(rows.x_BD, train_B, max(ks))
  sources = {
    'latents': rows.f_BF,
    'random_sae': rows.control_BF,
    'coordinates': rows.x_BD,
  }
  for on, features_BF in sources.items():
    if features_BF is None:
      continue
    order = ranked(features_BF[train_B], y_B[train_B])
    for k in ks:
      if k <= len(order):
        add(on, k, features_BF[:, order[:k]], index=order[:k])
  for k in ks:
    if k <= component_BC.shape[1]:
      add('pca', k, component_BC[:, :k])
  shuffled = []
  f_train_BF = rows.f_BF[train_B]
  for _ in range(_SHUFFLES):
    y_train_B = _shuffled(y_B[train_B], rows.group_B[train_B], rng)
    order = ranked(f_train_BF, y_train_B)
    for k in ks:
      if k <= len(order):
        fitted = logistic(f_train_BF[:, order[:k]], y_train_B)
        score_B = fitted(rows.f_BF[:, order[:k]][test_B])
        shuffled.append((k, scores(score_B, y_B[test_B], group_B)))
  probes += _over_shuffles(shuffled)
  return {
    'train': int(train_B.sum()),
    'test': int(test_B.sum()),
    'groups': len(np.unique(group_B)),
    'share': float(y_B[test_B].mean()),
    'probes': probes,
  }


def _shuffled(y_B: np.ndarray, group_B: np.ndarray, rng) -> np.ndarray:
  """Shuffles the labels, by group if the rows of each group share a label.

  In that case shuffled rows would be a null distribution of many independent
  labels, which is narrower than that of a few groups.
  """
  _, first, index_B = np.unique(group_B, return_index=True, return_inverse=True)
  label_G = y_B[first]
  if not (label_G[index_B] == y_B).all():
    return rng.permutation(y_B)
  return rng.permutation(label_G)[index_B]


def _over_shuffles(shuffled) -> list[dict[str, Any]]:
  """For each k the mean, minimum and maximum over shuffles."""
  probes = []
  for k in dict.fromkeys(k for k, _ in shuffled):
    scores_of_k = [
      scores for k_of_scores, scores in shuffled if k_of_scores == k
    ]
    summary = {'on': 'shuffled_labels', 'k': k}
    for name in scores_of_k[0]:
      values = [score[name]['value'] for score in scores_of_k]
      summary[name] = {
        'value': float(np.mean(values)),
        'low': min(values),
        'high': max(values),
      }
    probes.append(summary)
  return probes


def _components(x_BD, train_B, count: int) -> np.ndarray:
  """All rows projected on the first principal components of the train rows."""
  centred_BD = x_BD[train_B] - x_BD[train_B].mean(0)
  _, v_DC = np.linalg.eigh(centred_BD.T.astype(np.float64) @ centred_BD)
  return (x_BD - x_BD[train_B].mean(0)) @ v_DC[:, ::-1][:, :count]


def best(result: Mapping[str, Any], on: str, k: int | None = None):
  """The probe of `run`'s result with this 'on' and k, or None."""
  for fitted in result['probes']:
    if fitted['on'] == on and fitted['k'] == k:
      return fitted
  return None
