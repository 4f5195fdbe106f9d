"""Why a head attends: its score, as pairs of sources of the query and the key.

At token t the input of a head is, in the frozen model, a sum over sources
(`replacement_model`), x_t = sum_i x_ti. With the denominators of the norms of
queries and keys held too, queries and keys are linear in it:

  q = scale R_t diag(1 + g_q) W_Q x_t / |W_Q x_t|_rms       k alike, no scale
  score = q . k = sum_ij q_i . k_j

Sources are single features (those that matter most to the score), and groups:
the other features, errors, embeddings and biases. The terms of all pairs add up
to the score before the soft-cap. R is the rotary embedding (arXiv 2104.09864).

Ablating a feature at its token takes its row and its column out. The change of
the score that this predicts is compared with the exact one, measured by
ablating the feature in the whole model; the control is the same comparison with
the predictions shuffled among the features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import gemma3, splice
from gemma_scope.microscope.circuits import attention_heads, effects, intervene
from gemma_scope.microscope.circuits.intervene import Change, Subject
from gemma_scope.microscope.circuits.replacement_model import (
  KINDS,
  Replacement,
)

_SHUFFLES = 999
_EPSILON = 1e-6  # of Gemma's norms


@dataclasses.dataclass(frozen=True)
class Place:
  """A score: of a query token for a key token, in a head."""

  layer: int
  head: int
  query: int
  key: int

  @property
  def site(self) -> sites.Site:
    """What the head reads."""
    return sites.Site(self.layer, 'attn_in')


class Head:
  """Queries and keys of one head, in float64 on the host.

  Args:
    gemma, lm_params: the model: Gemma 2 or 3.
    layer, head: the head.

  Raises:
    ValueError: there is no such head, or the model is of another generation.
  """

  def __init__(self, gemma: lm.Gemma, lm_params, layer: int, head: int):
    c = gemma.config
    if not isinstance(c, gemma3.Config):
      raise ValueError(
        f'Scores of heads are explained for Gemma 2 and 3; found {c.name}.'
      )
    if not (0 <= layer < c.num_layers and 0 <= head < c.num_heads):
      raise ValueError(
        f'There is no head {head} in layer {layer}: {c.name} has '
        f'{c.num_layers} layers of {c.num_heads} heads.'
      )
    attn = lm_params[f'layer_{layer}']['attn']
    float64 = lambda array: np.asarray(array, np.float64)
    if 'qkv_einsum' in attn:
      self._q_DH, self._k_DH = float64(attn['qkv_einsum']['w'][:2, head])
    else:
      shared = head // (c.num_heads // c.num_kv_heads)
      self._q_DH = float64(attn['q_einsum']['w'][head])
      self._k_DH = float64(attn['kv_einsum']['w'][0, shared])
    gains = [attn.get(f'_{name}_norm') for name in ('query', 'key')]
    self._gain_2H = [
      None if gain is None else 1 + float64(gain['scale']) for gain in gains
    ]
    local = not c.is_global(layer)
    self._base = 10_000 if local else c.global_rope_base
    self._factor = 1.0 if local else c.global_rope_factor
    width = c.d_model // c.num_heads if c.query_scale_by_heads else c.head_dim
    self._scale = width**-0.5

  def query(self, parts_ND: np.ndarray, position: int) -> np.ndarray:
    """q of parts that add up to the head's input at a token, [N, H]."""
    q_NH = self._rotated(parts_ND @ self._q_DH, self._gain_2H[0], position)
    return q_NH * self._scale

  def key(self, parts_ND: np.ndarray, position: int) -> np.ndarray:
    """k of parts that add up to the head's input at a token, [N, H]."""
    return self._rotated(parts_ND @ self._k_DH, self._gain_2H[1], position)

  def _rotated(self, x_NH, gain_H, position: int):
    if gain_H is not None:
      input_H = x_NH.sum(0)
      norm = np.sqrt(np.mean(input_H**2) + _EPSILON)
      x_NH = x_NH / norm * gain_H
    half = x_NH.shape[1] // 2
    period_h = self._base ** (np.arange(half) / half) * self._factor
    sin_h, cos_h = np.sin(position / period_h), np.cos(position / period_h)
    a_Nh, b_Nh = x_NH[:, :half], x_NH[:, half:]
    return np.concatenate(
      [a_Nh * cos_h - b_Nh * sin_h, b_Nh * cos_h + a_Nh * sin_h], 1
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """A score as a sum over pairs.

  Attributes:
    place: the score.
    score: q . k, before the soft-cap.
    sources: the sources of the rows and of the columns: {'kind'}, and of a
      feature 'member', 'feature', 'layer' and 'position'.
    term_NN: q_i . k_j.
  """

  place: Place
  score: float
  sources: list[dict[str, Any]]
  term_NN: np.ndarray


def decompose(model: Replacement, place: Place, most: int = 12) -> Scores:
  """The score of `place`, over the `most` features of each side and groups.

  Raises:
    ValueError: there is no such head, or the key comes after the query.
  """
  gemma, lm_params, tokens_1T, _ = model.frozen
  if not 0 <= place.key <= place.query < tokens_1T.shape[1]:
    raise ValueError(
      f'Token {place.query} does not attend to token {place.key}: a key is at '
      'or before its query.'
    )
  head = Head(gemma, lm_params, place.layer, place.head)
  # Of every layer, so that one program serves all places.
  taps_at = tuple(
    sites.Site(layer, 'attn_in') for layer in range(gemma.config.num_layers)
  )
  input_TD = np.asarray(
    splice.taps(gemma, lm_params, tokens_1T, taps_at)[place.site][0], np.float64
  )
  # Which features matter: the score is linear in either side.
  q_H = head.query(input_TD[place.query][None], place.query)[0]
  k_H = head.key(input_TD[place.key][None], place.key)[0]
  slope = lambda project, x_D, other_H, t: np.array(
    [project(np.stack([d, x_D - d]), t)[0] @ other_H for d in np.eye(len(x_D))]
  )
  ends = [
    (place.query, slope(head.query, input_TD[place.query], k_H, place.query)),
    (place.key, slope(head.key, input_TD[place.key], q_H, place.key)),
  ]
  rows = model.rows(
    [
      (place.site, token, vector_D.astype(np.float32))
      for token, vector_D in ends
    ]
  )
  single = sorted({j for row_n in rows for j in _largest(model, row_n, most)})
  moved = attention_heads.tangents(model, _groups(model, single), taps_at)
  moved_GTD = np.stack(
    [np.asarray(taps[place.site], np.float64) for taps in moved]
  )
  q_NH = head.query(moved_GTD[:, place.query], place.query)
  k_NH = head.key(moved_GTD[:, place.key], place.key)
  sources = _sources(model, single)
  return Scores(place, float(q_H @ k_H), sources, q_NH @ k_NH.T)


def _largest(model: Replacement, row_n: np.ndarray, most: int) -> list[int]:
  """The features that add most, in absolute value."""
  features = np.flatnonzero((model.sources.kind == 0) & (row_n != 0))
  order = np.argsort(-np.abs(row_n[features]), kind='stable')
  return features[order[:most]].tolist()


def _groups(model: Replacement, single: Sequence[int]) -> list[list[int]]:
  """Each of the features, then all other sources by kind."""
  kinds = [np.flatnonzero(model.sources.kind == n) for n in range(len(KINDS))]
  return [[j] for j in single] + [
    [int(j) for j in kind if j not in single] for kind in kinds
  ]


def _sources(model: Replacement, single: Sequence[int]) -> list[dict[str, Any]]:
  """The names of `_groups`."""
  sources = model.sources
  fields = ('member', 'feature', 'layer', 'position')
  names = [
    {
      'kind': 'feature',
      **{name: int(getattr(sources, name)[j]) for name in fields},
    }
    for j in single
  ]
  return [*names, {'kind': 'other features'}, *({'kind': k} for k in KINDS[1:])]


def compare(
  subjects: Sequence[Subject], tokens_T: Sequence[int], scores: Scores
) -> dict[str, Any]:
  """Predicted and exact changes of the score when its features are ablated.

  Returns:
    'features', each with `predicted` and `exact`; 'spearman', their rank
    correlation; and 'p', the share of shuffled predictions with a correlation
    at least as high. None where there are too few features.
  """
  from scipy import stats  # slow to import

  term_NN, lines = scores.term_NN, []
  # A feature's row and column; where they cross, once.
  loss_N = term_NN.sum(0) + term_NN.sum(1) - np.diag(term_NN)
  for source, loss in zip(scores.sources, loss_N, strict=True):
    if source['kind'] == 'feature':
      subject = subjects[source['member']]
      remaining = _ablated(subject, tokens_T, scores.place, source)
      change = {'predicted': -float(loss), 'exact': remaining - scores.score}
      lines.append({**source, **change})
  predicted = [line['predicted'] for line in lines]
  exact = np.array([line['exact'] for line in lines])
  if len(set(predicted)) < 3 or len(set(exact.tolist())) < 3:
    return {'features': lines, 'spearman': None, 'p': None}
  correlation = lambda predictions: float(
    stats.spearmanr(predictions, exact).statistic
  )
  spearman, rng = correlation(predicted), np.random.default_rng(0)
  shuffled = [correlation(rng.permutation(predicted)) for _ in range(_SHUFFLES)]
  p_value = (1 + sum(value >= spearman for value in shuffled)) / (1 + _SHUFFLES)
  return {'features': lines, 'spearman': spearman, 'p': p_value}


def _ablated(subject: Subject, tokens_T, place: Place, source) -> float:
  """The score in the whole model without a feature at its token."""
  tokens_1T = effects.padded([tokens_T])
  rows = intervene.rows(subject, [[Change(source['feature'])]])
  where_1T = np.arange(tokens_1T.shape[1])[None] == source['position']
  static = subject.gemma, subject.place, place.site
  params = subject.lm_params, subject.params
  read_TD = _without(static, params, tokens_1T, rows, where_1T)
  input_TD = np.asarray(read_TD, np.float64)
  head = Head(subject.gemma, subject.lm_params, place.layer, place.head)
  q_H = head.query(input_TD[place.query][None], place.query)[0]
  return float(q_H @ head.key(input_TD[place.key][None], place.key)[0])


@functools.partial(jax.jit, static_argnums=0)
def _without(static, params, tokens_1T, rows, where_1T):
  gemma, wiring, site = static
  lm_params, sae_params = params
  edits = intervene.edits(wiring, sae_params, rows, where_1T, False)
  taps = gemma.forward(
    lm_params, tokens_1T, taps=(site,), edits=edits, logits=False
  ).taps
  return taps[site][0]


def plain(scores: Scores) -> dict[str, Any]:
  """The score for JSON."""
  return {
    'place': dataclasses.asdict(scores.place),
    'score': scores.score,
    'sources': scores.sources,
    'terms': scores.term_NN.tolist(),
  }


def report(scores: Scores, comparison: Mapping[str, Any], named) -> str:
  """The largest pairs, and how predictions compare with ablations.

  Args:
    named: label of (member, feature).
  """
  place = scores.place

  def name(source) -> str:
    if source['kind'] != 'feature':
      return source['kind']
    label = named(source['member'], source['feature'])
    return (
      f'{source["layer"]}/{source["feature"]} at {source["position"]} {label}'
    )

  order = np.argsort(-np.abs(scores.term_NN), axis=None, kind='stable')[:12]
  lines = [
    f'head {place.head} of layer {place.layer}, token {place.query} to '
    f'{place.key}: score {scores.score:.3f}; largest of {scores.term_NN.size} '
    'terms (query | key):'
  ]
  for i, j in zip(*np.unravel_index(order, scores.term_NN.shape), strict=True):
    lines.append(
      f'{scores.term_NN[i, j]:>9.3f}  {name(scores.sources[i])} | '
      f'{name(scores.sources[j])}'
    )
  if comparison['spearman'] is not None:
    lines.append(
      f'{len(comparison["features"])} features ablated: predicted against '
      'exact change of the score, rank correlation '
      f'{comparison["spearman"]:.2f}, p {comparison["p"]:.3f} (shuffled '
      'predictions)'
    )
  return '\n'.join(lines)
