"""Graphs: sums that must hold, influence on paths drawn by hand, ablations."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from gemma_scope import release, sae, sites
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import attribution_graph
from gemma_scope.microscope.circuits import intervene as iv
from gemma_scope.microscope.circuits.replacement_model import (
  Replacement,
  Sources,
  check,
)
from tests.helpers import circuits, random_models, random_saes
from tests.helpers.replacement import tiny

TOKENS_T, T = circuits.TOKENS_T, circuits.T


def transcoders(model, skip: bool, layers, d: int, width=60, threshold=14.0):
  """Random transcoders of some layers; `d` the model's width."""
  found = []
  for layer in layers:
    rng = np.random.default_rng(layer)
    draw = lambda *shape, r=rng: r.normal(size=shape).astype(np.float32)
    params = {
      'W_enc': draw(d, width), 'b_enc': draw(width),
      'W_dec': draw(width, d) / d, 'b_dec': draw(d) / d,
      'threshold': np.full(width, threshold, np.float32),
    }  # fmt: skip
    if skip:
      params['W_skip'] = draw(d, d) / d
    card = {
      'type': 'transcoder', 'sites': [f'mlp_in/{layer}'],
      'targets': [f'mlp_out/{layer}'],
    }  # fmt: skip
    found.append(
      iv.subject(model, release.in_memory(params, card), np.ones(width))
    )
  return found


def clt():
  params, card = circuits.MEMBERS['clt']
  rng = np.random.default_rng(0)
  skip = rng.normal(size=(3, 128, 128)).astype(np.float32) / 128
  params = params | {'W_skip': skip, 'W_dec': params['W_dec'] / 128}
  return [iv.subject(tiny(), release.in_memory(params, card), np.ones(48))]


CASES = {
  'tiny': lambda: (transcoders(tiny(), False, range(4), 128), TOKENS_T),
  'skip': lambda: (transcoders(tiny(), True, (0, 3), 128), TOKENS_T),
  'clt': lambda: (clt(), TOKENS_T),
  'gemma2': lambda: (
    transcoders(
      random_models.model(random_models.GEMMA2), True, (0, 1), 16, 20, 3.0
    ),
    [2, *range(5, 16)],
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_what_sources_add_is_the_pre_activation(name):
  """z = b_enc + sum of A, of features of every layer; the logit's too."""
  subjects, tokens_T = CASES[name]()
  model = Replacement(subjects, tokens_T)
  s = model.sources
  features = np.flatnonzero(s.kind == 0)
  assert len(features) > 10 and not (s.position[features] == 0).any()
  rng = np.random.default_rng(0)
  chosen = [
    int(i)
    for layer in np.unique(s.layer[features])
    for i in rng.permutation(features[s.layer[features] == layer])[:3]
  ]
  rows = list(model.rows([model.target(i) for i in chosen]))
  for i, row in zip(chosen, rows, strict=True):
    subject = subjects[s.member[i]]
    b_enc = np.asarray(subject.params['b_enc']).reshape(-1)[s.feature[i]]
    scale = float(np.abs(row).sum())
    assert row.sum() + b_enc == pytest.approx(s.value[i], abs=1e-4 * scale)
    later = (s.layer >= s.layer[i]) & (s.kind != 2)
    assert np.abs(row[later]).max(initial=0) < 1e-5 * scale
    assert np.abs(row[s.position > s.position[i]]).max(initial=0) < 1e-5 * scale
  last = splice.last(subjects[0].gemma)
  vector_D = rng.normal(size=model.last_TD.shape[1]).astype(np.float32)
  (row,) = model.rows([(last, 5, vector_D)])
  assert row.sum() == pytest.approx(
    float(vector_D @ model.last_TD[5]), abs=1e-4 * float(np.abs(row).sum())
  )


def test_features_are_those_that_fire():
  subjects, tokens_T = CASES['clt']()
  s = Replacement(subjects, tokens_T).sources
  params, card = circuits.MEMBERS['clt']
  place = sites.wiring_of(card)
  taps = splice.taps(*tiny(), np.array([tokens_T]), place.sites)
  x = np.stack([taps[site][0] for site in place.sites], -2)
  with jax.default_matmul_precision('highest'):
    f = np.array(sae.encode(params, x)).reshape(T, -1)
  f[0] = 0
  got = np.zeros_like(f)
  mine = s.kind == 0
  got[s.position[mine], s.feature[mine]] = s.value[mine]
  np.testing.assert_allclose(got, f, rtol=1e-4, atol=1e-4)


def by_hand():
  """Embedding 4 -> feature 0 -> feature 1 -> logit; error 3 -> both."""
  column = lambda *values: np.array(values)
  sources = Sources(
    kind=column(0, 0, 0, 1, 2), member=column(0, 0, 0, -1, -1),
    feature=column(5, 6, 7, -1, -1), layer=column(0, 1, 1, 0, 0),
    position=column(1, 1, 1, 1, 1), value=column(2.0, 4.0, 1.0, 1.0, 1.0),
  )  # fmt: skip
  of_logit = np.array([1.0, 3.0, 0.0, -1.0, 0.0])
  rows = {0: np.array([0, 0, 0, 0.5, 1.5]), 1: np.array([3.0, 0, 0, 1.0, 0])}
  return sources, of_logit, rows


def test_influence_follows_all_paths():
  _, of_logit, rows = by_hand()
  got = attribution_graph.influence(of_logit, rows)
  one = 3 / 5  # feature 1
  zero = 1 / 5 + one * 3 / 4  # feature 0, also through feature 1
  want = [zero, one, 0, 1 / 5 + one / 4 + zero / 4, zero * 3 / 4]
  np.testing.assert_allclose(got, want)
  assert got[3] + got[4] == pytest.approx(1)  # all of it ends somewhere


def test_a_source_acts_along_all_paths():
  sources, of_logit, rows = by_hand()
  got = attribution_graph.along_all_paths(sources, of_logit, rows)
  zero = 1 + 3 / 4 * 3  # direct, and three quarters of what feature 1 reads
  np.testing.assert_allclose(
    got, [zero, 3, 0, -1 + 3 / 4 * 1 + zero / 2 * 0.5, zero / 2 * 1.5]
  )


def test_pruning_keeps_paths_alone():
  sources, of_logit, rows = by_hand()
  influence = attribution_graph.influence(of_logit, rows)
  every = attribution_graph.prune(
    sources,
    of_logit,
    rows,
    influence,
    attribution_graph.Settings(nodes=1.0, edges=1.0),
  )
  assert every[0] == [0, 1, 3, 4]
  assert (0, 1, 3.0) in every[1] and (1, attribution_graph.LOGIT, 3.0) in every[
    1
  ]
  few, edges = attribution_graph.prune(
    sources,
    of_logit,
    rows,
    influence,
    attribution_graph.Settings(nodes=0.7, edges=0.9),
  )
  assert set(few) < set(every[0]) and len(edges) < len(every[1])
  # Without anything that leads into it, a feature goes, and what it led to.
  lonely = {1: np.array([3.0, 0, 0, 0, 0])}
  influence = attribution_graph.influence(of_logit, lonely)
  kept, edges = attribution_graph.prune(
    sources,
    of_logit,
    lonely,
    influence,
    attribution_graph.Settings(nodes=1.0, edges=1.0),
  )
  assert kept == [3] and edges == [(3, attribution_graph.LOGIT, -1.0)]


def test_an_outlier_has_no_features_of_the_sae_whose_rule_it_breaks():
  first, second = transcoders(tiny(), True, (0, 3), 128)
  (site,) = first.place.sites
  taps = splice.taps(*tiny(), np.array([TOKENS_T]), (site,))
  norm_T = np.linalg.norm(np.asarray(taps[site][0]), axis=-1)
  t = 1 + int(norm_T[1:].argmax())
  bound = float(np.sort(norm_T[1:])[-2:].mean())
  ruled = dataclasses.replace(first, norm_bounds={site: bound})

  def features(subjects, member):
    s = Replacement(subjects, TOKENS_T).sources
    mine = (s.kind == 0) & (s.member == member)
    return s.feature[mine], s.position[mine]

  plain, found = features([first], 0), features([ruled, second], 0)
  assert (plain[1] == t).any()
  np.testing.assert_array_equal(found, np.array(plain)[:, plain[1] != t])
  np.testing.assert_array_equal(
    features([ruled, second], 1), features([second], 0)
  )


@pytest.mark.parametrize('name', ['skip', 'clt'])
def test_a_graph_is_measured_and_written(name, tmp_path):
  subjects, tokens_T = CASES[name]()
  found = attribution_graph.trace(
    subjects, tokens_T, (7, 9), settings=attribution_graph.Settings(most=20)
  )
  assert found.edges and found.nodes
  assert sum(found.ends.values()) == pytest.approx(1)
  assert min(found.ends.values()) >= 0 and len(found.shuffled) == 19
  assert {t for _, t, _ in found.edges} <= {
    *found.nodes,
    attribution_graph.LOGIT,
  }
  for line in found.features:
    i = line['node']
    subject = subjects[found.sources.member[i]]
    rows = iv.rows(subject, [[iv.Change(int(found.sources.feature[i]))]])
    tokens_BT = np.array([tokens_T])
    where_BT = np.arange(len(tokens_T))[None] == found.sources.position[i]
    logits = [
      subject.gemma.forward(
        subject.lm_params, tokens_BT, edits=edits
      ).logits_BTV[0, -1]
      for edits in (
        {},
        iv.edits(subject.place, subject.params, rows, where_BT),
      )
    ]
    change = (logits[0] - logits[1])[7] - (logits[0] - logits[1])[9]
    assert line['exact'] == pytest.approx(float(change), abs=1e-4)
    more = sum(most >= abs(line['exact']) for most in found.shuffled)
    assert line['p'] == (1 + more) / 20
    assert line['passes'] is (line['p'] <= 0.05)
  attribution_graph.write(tmp_path / 'graph.json', found)
  written = json.loads((tmp_path / 'graph.json').read_text())
  assert written['nodes'][-1]['kind'] == 'logit'
  assert len(written['nodes']) == len(found.nodes) + 1
  assert 'shuffled' in attribution_graph.report(
    found, [str(t) for t in tokens_T]
  )


def test_only_transcoders_one_a_layer():
  one = transcoders(tiny(), False, (1,), 128)
  with pytest.raises(ValueError, match='transcoders write to layer 1'):
    check(one * 2)
  sae = release.in_memory(*random_saes.member(0, 'resid_post/1'))
  with pytest.raises(ValueError, match='needs transcoders or CLTs'):
    check([iv.subject(tiny(), sae, np.ones(random_saes.F))])


def test_the_logit_of_a_graph_is_the_models(tmp_path):
  """One logit, with a soft-cap: first-order changes of what is measured."""
  model = random_models.model(random_models.GEMMA2)
  subjects = transcoders(model, False, (0, 1), 16, 20, 3.0)
  tokens_T = [2, *range(5, 16)]
  replaced = Replacement(subjects, tokens_T)
  at = len(tokens_T) - 1
  for logit in ((7, None), (7, 9)):
    target, value = attribution_graph._readout(
      subjects[0], replaced.last_TD, logit, at
    )
    last = splice.last(subjects[0].gemma)
    step_D = np.random.default_rng(0).normal(size=16).astype(np.float32)

    def of(scale, last=last, step_D=step_D, logit=logit):
      logits_V = subjects[0].gemma.unembed(
        model[1], replaced.last_TD[at][None, None] + scale * step_D
      )[0, 0]
      return logits_V[7] - (logits_V[9] if logit[1] else 0)

    # Its norm held: the part along the residual itself does not count.
    x_D = replaced.last_TD[at]
    step_D -= x_D * (step_D @ x_D) / (x_D @ x_D)
    slope = (of(1e-2) - of(-1e-2)) / 2e-2
    assert float(slope) == pytest.approx(float(target[2] @ step_D), rel=2e-2)
    assert value == pytest.approx(float(target[2] @ x_D), rel=1e-5)
