"""Graphs: sums that must hold, influence on paths drawn by hand, ablations."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from gemma_scope import release, sae, sites
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import (
  attribution_graph,
  graph_files,
  graph_influence,
  permutation_test,
)
from gemma_scope.microscope.circuits import intervene as iv
from gemma_scope.microscope.circuits.replacement_model import (
  Replacement,
  Sources,
  check,
)
from tests.helpers import circuits, forward, random_models, random_saes
from tests.helpers.replacement import tiny
from tests.helpers.transcoders import clt, transcoders

TOKENS_T = [2, *range(5, 16)]
CASES = {
  'plain': lambda: small(random_models.GEMMA2, False, (0, 1)),
  'skip': lambda: small(random_models.GEMMA2, True, (0, 1)),
  'clt': lambda: clt(random_models.model(random_models.GEMMA2), 2, 16, 60, 1.0),
  'gemma4': lambda: small(GEMMA4, True, (0, 2)),
}


def small(config, skip: bool, layers):
  return transcoders(random_models.model(config), skip, layers, 16, 20, 3.0)


# Two layers that share the keys of two others, and per-layer inputs.
GEMMA4 = dataclasses.replace(
  random_models.GEMMA4_E,
  name='g4_graph',
  num_layers=4,
  pattern='LG',
  kv_shared=2,
)
EACH = [
  pytest.param(
    name, marks=[random_models.needs_gemma4] if name == 'gemma4' else []
  )
  for name in CASES
]


@pytest.mark.parametrize('name', EACH)
def test_what_sources_add_is_the_pre_activation(name):
  """z = b_enc + sum of A, of features of every layer; the logit's too."""
  subjects, tokens_T = CASES[name](), TOKENS_T
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
  (subject,) = CASES['clt']()
  s = Replacement([subject], TOKENS_T).sources
  reads = subject.place.sites
  tokens_1T = np.array([TOKENS_T])
  taps = splice.taps(subject.gemma, subject.lm_params, tokens_1T, reads)
  x = np.stack([taps[site][0] for site in reads], -2)
  with jax.default_matmul_precision('highest'):
    f = np.array(sae.encode(subject.params, x)).reshape(len(TOKENS_T), -1)
  f[0] = 0
  got = np.zeros_like(f)
  mine = s.kind == 0
  got[s.position[mine], s.feature[mine]] = s.value[mine]
  np.testing.assert_allclose(got, f, rtol=1e-4, atol=1e-4)


def by_hand():
  """Embedding 4 -> feature 0 -> feature 1 -> logit; error 3 -> both."""
  column = lambda *values: np.array(values)
  sources = Sources(
    kind=column(0, 0, 0, 1, 2),
    member=column(0, 0, 0, -1, -1),
    feature=column(5, 6, 7, -1, -1),
    layer=column(0, 1, 1, 0, 0),
    position=column(1, 1, 1, 1, 1),
    value=column(2.0, 4.0, 1.0, 1.0, 1.0),
  )
  of_logit = np.array([1.0, 3.0, 0.0, -1.0, 0.0])
  rows = {0: np.array([0, 0, 0, 0.5, 1.5]), 1: np.array([3.0, 0, 0, 1.0, 0])}
  return sources, of_logit, rows


def test_influence_follows_all_paths():
  _, of_logit, rows = by_hand()
  got = graph_influence.influence(of_logit, rows)
  one = 3 / 5  # feature 1
  zero = 1 / 5 + one * 3 / 4  # feature 0, also through feature 1
  want = [zero, one, 0, 1 / 5 + one / 4 + zero / 4, zero * 3 / 4]
  np.testing.assert_allclose(got, want)
  assert got[3] + got[4] == pytest.approx(1)  # all of it ends somewhere


def test_a_source_acts_along_all_paths():
  sources, of_logit, rows = by_hand()
  got = graph_influence.along_all_paths(sources, of_logit, rows)
  zero = 1 + 3 / 4 * 3  # direct, and three quarters of what feature 1 reads
  np.testing.assert_allclose(
    got, [zero, 3, 0, -1 + 3 / 4 * 1 + zero / 2 * 0.5, zero / 2 * 1.5]
  )


def test_pruning_keeps_paths_alone():
  sources, of_logit, rows = by_hand()
  influence = graph_influence.influence(of_logit, rows)
  every = graph_influence.prune(
    sources,
    of_logit,
    rows,
    influence,
    attribution_graph.Settings(nodes=1.0, edges=1.0),
  )
  assert every[0] == [0, 1, 3, 4]
  assert (0, 1, 3.0) in every[1] and (1, graph_influence.LOGIT, 3.0) in every[1]
  few, edges = graph_influence.prune(
    sources,
    of_logit,
    rows,
    influence,
    attribution_graph.Settings(nodes=0.7, edges=0.9),
  )
  assert set(few) < set(every[0]) and len(edges) < len(every[1])
  # Without anything that leads into it, a feature goes, and what it led to.
  lonely = {1: np.array([3.0, 0, 0, 0, 0])}
  influence = graph_influence.influence(of_logit, lonely)
  kept, edges = graph_influence.prune(
    sources,
    of_logit,
    lonely,
    influence,
    attribution_graph.Settings(nodes=1.0, edges=1.0),
  )
  assert kept == [3] and edges == [(3, graph_influence.LOGIT, -1.0)]


def test_scores_are_those_of_dense_matrices():
  """Replacement and completeness by their definition: (1 - A)^-1 over nodes."""
  sources, of_logit, rows = by_hand()
  unused = {2: np.array([0, 0, 0, 5.0, 0])}  # a feature without influence
  for expanded in (rows, rows | unused):
    nodes = [*sorted(expanded), 3, 4]  # features, an error, an embedding
    size = len(nodes) + 1  # and the logit
    A = np.zeros((size, size))
    for n, node in enumerate(nodes):
      if node in expanded:
        A[n, :-1] = expanded[node][nodes]
    A[-1, :-1] = of_logit[nodes]
    A = np.abs(A)
    A /= np.maximum(A.sum(1, keepdims=True), 1e-10)
    start = np.eye(size)[-1]
    influence = start @ np.linalg.inv(np.eye(size) - A) - start
    error, embedding = size - 3, size - 2
    output = influence + start
    complete = ((1 - A[:, error]) * output).sum() / output.sum()
    replaced = influence[embedding] / (influence[embedding] + influence[error])
    got = graph_influence.scores(sources, of_logit, expanded)
    assert 0 < replaced < 1 and 0 < complete < 1
    assert got['replacement'] == pytest.approx(replaced)
    assert got['completeness'] == pytest.approx(complete)


def test_an_outlier_has_no_features_of_the_sae_whose_rule_it_breaks():
  first, second = CASES['skip']()
  (site,) = first.place.sites
  tokens_1T = np.array([TOKENS_T])
  taps = splice.taps(first.gemma, first.lm_params, tokens_1T, (site,))
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
  subjects, tokens_T = CASES[name](), TOKENS_T
  found = attribution_graph.trace(
    subjects, tokens_T, (7, 9), settings=attribution_graph.Settings(most=20)
  )
  assert found.edges and found.nodes and found.features
  assert sum(found.ends.values()) == pytest.approx(1)
  assert min(found.ends.values()) >= 0 and len(found.shuffled) == 19
  assert {t for _, t, _ in found.edges} <= {
    *found.nodes,
    graph_influence.LOGIT,
  }
  tokens_1T = np.array([tokens_T])

  def difference(output):
    logits_V = np.asarray(output.logits_BTV[0, -1])
    return float(logits_V[7] - logits_V[9])

  first = subjects[0]
  before = difference(forward.forward(first.gemma, first.lm_params, tokens_1T))
  for line in found.features:
    i = line['node']
    subject = subjects[found.sources.member[i]]
    rows = iv.rows(subject, [[iv.Change(int(found.sources.feature[i]))]])
    where_1T = np.arange(len(tokens_T))[None] == found.sources.position[i]
    after = difference(forward.changed(subject, tokens_1T, rows, where_1T))
    assert line['exact'] == pytest.approx(before - after, abs=1e-4)
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
  widths = [subject.width // len(subject.place.sites) for subject in subjects]
  graph_is_read_back(attribution_graph.plain(found), tokens_T, widths, tmp_path)


# What circuit-tracer's and Neuronpedia's graph files must have, by their types.
_NODE = {
  'node_id': {'type': 'string'},
  'feature': {'type': ['integer', 'null']},
  'layer': {'type': 'string'},
  'ctx_idx': {'type': 'integer'},
  'feature_type': {'type': 'string'},
  'jsNodeId': {'type': 'string'},
  'clerp': {'type': 'string'},
}
_LINK = {
  'source': {'type': 'string'},
  'target': {'type': 'string'},
  'weight': {'type': 'number'},
}
_METADATA = {
  'slug': {'type': 'string'},
  'scan': {'type': 'string'},
  'prompt': {'type': 'string'},
  'prompt_tokens': {'type': 'array', 'items': {'type': 'string'}},
  'transcoder_list': {'type': 'array'},
}
_PARAMETERS = {
  'pinnedIds': {'type': 'array', 'items': {'type': 'string'}},
  'supernodes': {'type': 'array'},
  'linkType': {'type': 'string'},
  'clickedId': {'type': 'string'},
  'sg_pos': {'type': 'string'},
}


def whole(properties):
  return {
    'type': 'object',
    'properties': properties,
    'required': list(properties),
  }


SCHEMA = whole(
  {
    'metadata': whole(_METADATA),
    'qParams': whole(_PARAMETERS),
    'nodes': {'type': 'array', 'items': whole(_NODE)},
    'links': {'type': 'array', 'items': whole(_LINK)},
  }
)


def graph_is_read_back(plain, tokens_T, widths, tmp_path):
  prompt = graph_files.Prompt(
    'text', tokens_T, [str(t) for t in tokens_T], (7, 9), 0.25
  )
  model = graph_files.Model('gemma-tiny', 4, widths, 'transcoders')
  content = graph_files.plain(plain, prompt, model, 'one', lambda m, i: f'f{i}')
  jsonschema = pytest.importorskip(
    'jsonschema', reason='jsonschema is not installed'
  )
  jsonschema.validate(content, SCHEMA)
  kept = [node for node in plain['nodes'] if node['kind'] != 'bias']
  ids = [node['node_id'] for node in content['nodes']]
  assert len(set(ids)) == len(ids) == len(kept)
  for node in content['nodes']:
    if node['feature_type'] == 'cross layer transcoder':
      # The inverse of the pairing that circuit-tracer numbers features by.
      w = int(((8 * node['feature'] + 1) ** 0.5 - 1) // 2)
      i = node['feature'] - w * (w + 1) // 2
      assert node['node_id'].startswith(f'{w - i}_{i}_')
  path = tmp_path / 'one.json'
  graph_files.write(path, content)
  read = graph_files.read(path)
  assert [n['kind'] for n in read['nodes']] == [n['kind'] for n in kept]
  for got, want in zip(read['nodes'][:-1], kept[:-1], strict=True):
    assert got['position'] == want['position']
    if want['kind'] == 'feature':
      assert got['value'] == want['value'] and got['layer'] == want['layer']
  weights = [
    w for a, _, w in plain['edges'] if plain['nodes'][a]['kind'] != 'bias'
  ]
  assert [w for _, _, w in read['edges']] == weights
  assert max(n.get('reached', 0) for n in read['nodes']) <= 1 + 1e-6
  path.write_text('{"nodes": []}')
  with pytest.raises(ValueError, match='not a graph of circuit-tracer'):
    graph_files.read(path)


def test_a_graph_of_a_direction_or_of_a_feature():
  """A probe's direction at a site; its features are ablated exactly."""
  subjects = transcoders(tiny(), True, (0, 3), 128)
  tokens_T, site = circuits.TOKENS_T, sites.parse('resid_post/2')
  vector_D = np.random.default_rng(0).normal(size=128).astype(np.float32)
  settings = attribution_graph.Settings(most=12, measured=6)
  found = attribution_graph.trace(
    subjects,
    tokens_T,
    (7, None),
    settings=settings,
    reading=permutation_test.Reading(site, vector_D),
  )
  s = found.sources
  assert s.layer[found.nodes].max() <= 2  # nothing after the site
  tokens_1T, last = np.array([tokens_T]), len(tokens_T) - 1
  read = lambda taps: float(np.asarray(taps[site][0, last]) @ vector_D)
  before = read(splice.taps(*tiny(), tokens_1T, (site,)))
  assert found.value == pytest.approx(before, rel=1e-4)
  assert len(found.features) > 3
  for line in found.features:
    i = line['node']
    subject = subjects[s.member[i]]
    rows = iv.rows(subject, [[iv.Change(int(s.feature[i]))]])
    where_1T = np.arange(len(tokens_T))[None] == s.position[i]
    after = forward.changed(subject, tokens_1T, rows, where_1T, (site,)).taps
    assert line['exact'] == pytest.approx(
      found.value - read(after), abs=1e-3 * abs(found.value)
    )
    assert not line['passes']
  assert 'Not tested' in attribution_graph.verdict(found)
  # A feature's encoder at its site: what it reads is its pre-activation.
  model = Replacement(subjects, tokens_T)
  late = int(np.flatnonzero(model.sources.kind == 0)[-1])
  at, t, encoder_D = model.target(late)
  params = subjects[model.sources.member[late]].params
  bias = params['b_enc'][int(model.sources.feature[late])]
  value = model.read((at, t, encoder_D)) + float(bias)
  assert value == pytest.approx(float(model.sources.value[late]), rel=1e-3)


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
  at, unembed = len(tokens_T) - 1, jax.jit(subjects[0].gemma.unembed)
  for logit in ((7, None), (7, 9)):
    target, value = attribution_graph._readout(
      subjects[0], replaced.last_TD, logit, at
    )
    step_D = np.random.default_rng(0).normal(size=16).astype(np.float32)

    def of(scale, step_D=step_D, logit=logit):
      x_11D = replaced.last_TD[at][None, None] + scale * step_D
      logits_V = np.asarray(unembed(model[1], x_11D)[0, 0])
      return logits_V[7] - (logits_V[9] if logit[1] else 0)

    # Its norm held: the part along the residual itself does not count.
    x_D = replaced.last_TD[at]
    step_D -= x_D * (step_D @ x_D) / (x_D @ x_D)
    slope = (of(1e-2) - of(-1e-2)) / 2e-2
    assert float(slope) == pytest.approx(float(target[2] @ step_D), rel=2e-2)
    assert value == pytest.approx(float(target[2] @ x_D), rel=1e-5)
