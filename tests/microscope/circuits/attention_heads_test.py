"""Heads of edges, and scores as pairs: sums that must hold, and ablations."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import (
  attention_heads,
  attention_scores,
  attribution_graph,
  graph_influence,
)
from gemma_scope.microscope.circuits.attention_scores import Head, Place
from gemma_scope.microscope.circuits.replacement_model import Replacement
from tests.helpers import random_models
from tests.helpers.transcoders import clt, transcoders

GEMMA3 = dataclasses.replace(
  random_models.GEMMA3,
  num_layers=2,
  pattern='LG',
  num_kv_heads=2,
  window=4,
  global_rope_base=1000,
  global_rope_factor=2.0,
)
CASES = {
  'gemma2': lambda: (small(random_models.GEMMA2, True), TOKENS_T),
  'gemma3': lambda: (small(GEMMA3, False), TOKENS_T),
  'clt': lambda: (
    clt(random_models.model(GEMMA3), 2, 16, 20, 3.0),
    TOKENS_T,
  ),
}
TOKENS_T = [2, *range(5, 16)]


def small(config, skip: bool):
  """Transcoders at every layer."""
  model = random_models.model(config)
  return transcoders(model, skip, range(config.num_layers), 16, 20, 3.0)


@pytest.mark.parametrize('name', CASES)
def test_terms_of_heads_add_up_to_an_edge_between_tokens(name):
  """Targets: the last residual stream, and a feature of a late layer."""
  subjects, tokens_T = CASES[name]()
  model = Replacement(subjects, tokens_T)
  s, last = model.sources, len(tokens_T) - 1
  rng = np.random.default_rng(0)
  d = subjects[0].gemma.config.d_model
  vector_D = rng.normal(size=d).astype(np.float32)
  targets = [(splice.last(subjects[0].gemma), last, vector_D)]
  late = np.flatnonzero((s.kind == 0) & (s.layer == s.layer[s.kind == 0].max()))
  targets.append(model.target(int(late[-1])))
  rows = list(model.rows(targets))
  sources = rng.choice(len(s.kind) - 1, 24, replace=False).tolist()
  found = attention_heads.terms(model, sources, targets)
  compared = 0
  for n, (row_n, target) in enumerate(zip(rows, targets, strict=True)):
    scale = float(np.abs(row_n).max())
    for j, source in enumerate(sources):
      if s.position[source] == target[1]:
        continue  # there is a direct path too
      whole = found[n, j].sum()
      assert whole == pytest.approx(row_n[source], abs=2e-5 * scale)
      compared += abs(row_n[source]) > 1e-3 * scale
  assert compared > 5


def test_heads_are_listed_on_the_edges_of_a_graph():
  subjects, tokens_T = CASES['gemma3']()
  settings = attribution_graph.Settings(most=12, measured=4, shuffles=0)
  graph = attribution_graph.trace(subjects, tokens_T, (7, 9), settings=settings)
  assert set(map(len, graph.edges)) == {3} and len(graph.heads) == len(
    graph.edges
  )
  plain = attribution_graph.plain(graph)
  s, listed = graph.sources, 0
  for edge, heads in zip(graph.edges, graph.heads, strict=True):
    source, target, _ = edge
    at = (
      len(tokens_T) - 1
      if target == graph_influence.LOGIT
      else s.position[target]
    )
    if s.position[source] == at or s.kind[source] == 3:
      assert not heads  # not through attention alone
    else:
      listed += bool(heads)
      assert sum(head['share'] for head in heads) < 1.5 + len(heads)
  assert listed > 3
  assert plain['heads'] == graph.heads


@pytest.mark.parametrize('name', CASES)
def test_pairs_add_up_to_the_score_of_the_model(name):
  """The score itself: its softmax gives what the head writes."""
  subjects, tokens_T = CASES[name]()
  model = Replacement(subjects, tokens_T)
  gemma, lm_params = subjects[0].gemma, subjects[0].lm_params
  c = gemma.config
  for layer, head in ((1, 0), (c.num_layers - 1, c.num_heads - 1)):
    query = len(tokens_T) - 2
    scores = [
      attention_scores.decompose(model, Place(layer, head, query, key), 4)
      for key in (query - 1, 1)
    ]
    for found in scores:
      whole = np.abs(found.term_NN).sum()
      assert found.term_NN.sum() == pytest.approx(found.score, abs=1e-5 * whole)
      assert sum(one['kind'] == 'feature' for one in found.sources) > 2
    pattern_is_the_models(gemma, lm_params, tokens_T, scores[0])


def pattern_is_the_models(gemma, lm_params, tokens_T, found):
  """What the scores give, through softmax and values, is the head's output."""
  c, place = gemma.config, found.place
  at = tuple(
    sites.Site(layer, kind)
    for layer in range(c.num_layers)
    for kind in ('attn_in', 'attn_out')
  )
  taps = splice.taps(gemma, lm_params, np.array([tokens_T]), at)
  x_TD, out_TE = (
    np.asarray(taps[sites.Site(place.layer, kind)][0], np.float64)
    for kind in ('attn_in', 'attn_out')
  )
  head = Head(gemma, lm_params, place.layer, place.head)
  q_H = head.query(x_TD[place.query][None], place.query)[0]
  first = 0
  if c.pattern[place.layer % len(c.pattern)] == 'L':
    first = max(place.query - c.window + 1, 0)
  keys = range(first, place.query + 1)
  score_S = np.array([q_H @ head.key(x_TD[s][None], s)[0] for s in keys])
  assert score_S[place.key - first] == pytest.approx(found.score, rel=1e-4)
  if c.attn_softcap is not None:
    score_S = c.attn_softcap * np.tanh(score_S / c.attn_softcap)
  weight_S = np.asarray(jax.nn.softmax(score_S))
  attn = lm_params[f'layer_{place.layer}']['attn']
  if 'qkv_einsum' in attn:
    v_DH = np.asarray(attn['qkv_einsum']['w'])[2, place.head]
  else:
    shared = place.head // (c.num_heads // c.num_kv_heads)
    v_DH = np.asarray(attn['kv_einsum']['w'])[1, shared]
  want_H = weight_S @ (x_TD[list(keys)] @ v_DH)
  got_H = out_TE[place.query].reshape(c.num_heads, -1)[place.head]
  np.testing.assert_allclose(got_H, want_H, rtol=1e-3, atol=1e-4)


def test_predictions_rank_the_exact_changes_of_a_score():
  subjects, tokens_T = CASES['gemma3']()
  model = Replacement(subjects, tokens_T)
  found = attention_scores.decompose(model, Place(1, 1, 9, 8), 8)
  compared = attention_scores.compare(subjects, tokens_T, found)
  # Layer 1 reads the features of layer 0 alone: only norms were held.
  assert len(compared['features']) >= 6
  assert compared['spearman'] > 0.7 and compared['p'] <= 0.01
  said = attention_scores.report(found, compared, lambda m, i: f'label {i}')
  assert 'rank correlation' in said and 'label' in said


def test_scores_that_do_not_exist_are_refused():
  subjects, tokens_T = CASES['gemma2']()
  model = Replacement(subjects, tokens_T)
  with pytest.raises(ValueError, match='does not attend'):
    attention_scores.decompose(model, Place(0, 0, 2, 5))
  with pytest.raises(ValueError, match='no head 7'):
    attention_scores.decompose(model, Place(0, 7, 5, 2))
  assert isinstance(subjects[0].gemma, lm.Gemma)
