"""Supernodes: features alike, what ablating them does, predicted and exact."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from gemma_scope.microscope.circuits import intervene as iv
from gemma_scope.microscope.circuits import permutation_test, supernodes
from gemma_scope.microscope.circuits.replacement_model import Replacement
from gemma_scope.microscope.circuits.supernodes import Node
from tests.helpers import circuits
from tests.helpers.replacement import tiny
from tests.helpers.transcoders import transcoders

TOKENS_T, LAST = circuits.TOKENS_T, circuits.T - 1


def feature(layer, number, position, value=1.0, influence=0.1):
  return {
    'kind': 'feature', 'member': layer, 'feature': number, 'layer': layer,
    'position': position, 'value': value, 'influence': influence,
  }  # fmt: skip


def drawn(seed=0, layers=3, wide=3):
  """A graph with random edges between all layers, and an embedding."""
  rng = np.random.default_rng(seed)
  nodes = [
    feature(layer, i, 1, float(rng.uniform(0.5, 2)), float(rng.uniform(0, 1)))
    for layer in range(layers)
    for i in range(wide)
  ]
  start = {'kind': 'embedding', 'member': -1, 'feature': -1, 'layer': 0,
           'position': 0, 'value': 1.0, 'influence': 0.5}  # fmt: skip
  nodes += [start, {'kind': 'logit', 'value': 0.0}]
  layer_of = [n.get('layer', layers) for n in nodes]
  layer_of[-2] = -1
  edges = [
    [a, b, float(rng.normal())]
    for a in range(len(nodes) - 1)
    for b in range(len(nodes))
    if layer_of[a] < layer_of[b]
  ]
  return {'nodes': nodes, 'edges': edges, 'supernodes': []}


def logit_of(graph, ablated):
  """The logit of the linear model, where each node is a sum of its edges."""
  nodes, share = graph['nodes'], {}
  into = lambda target: [e for e in graph['edges'] if e[1] == target]
  order = sorted(range(len(nodes)), key=lambda n: nodes[n].get('layer', 99))
  order.sort(key=lambda n: nodes[n]['kind'] != 'embedding')
  for n in order:
    lost = sum(w * (1 - share[a]) for a, _, w in into(n) if a in share)
    if nodes[n]['kind'] == 'logit':
      return -lost
    # The share of its activation that is left.
    share[n] = 0.0 if n in ablated else 1 - lost / nodes[n]['value']
  raise AssertionError


@pytest.mark.parametrize('ablated', [[0], [4], [9], [0, 4], [1, 5, 8], [6, 7]])
def test_the_predicted_effect_is_that_of_the_linear_model(ablated):
  graph = drawn()
  want = -logit_of(graph, ablated)
  assert abs(want) > 0.05
  assert supernodes.predicted(graph, ablated) == pytest.approx(want)


def test_similar_features_read_and_write_the_same():
  graph = drawn(layers=1, wide=4)
  *_, start, logit = range(len(graph['nodes']))
  first, second, third, fourth = range(4)
  later = len(graph['nodes'])
  graph['nodes'].append(feature(1, 9, 1))
  graph['nodes'].append(feature(2, 0, 2))  # feature 0 of another SAE
  graph['nodes'].append(feature(0, 2, 3))
  graph['edges'] = [
    [start, first, 1.0], [start, second, 3.0],  # the same role, other sizes
    [first, later, 2.0], [second, later, 5.0],
    [start, third, -1.0], [third, logit, 1.0],
    [start, fourth, 1.0], [fourth, later, -2.0],
    [start, later + 1, 1.0], [later + 1, logit, -1.0],
    [later, later + 2, 1.0], [later + 2, logit, 1.0],  # the third, later
  ]  # fmt: skip
  groups = supernodes.similar(graph, 0.7)
  assert sorted(map(sorted, groups)) == [[first, second], [third, later + 2]]
  for group, one in zip(
    groups,
    supernodes.named(graph, groups, lambda m, i: f'{m}/{i}'),
    strict=True,
  ):
    most = max(group, key=lambda n: graph['nodes'][n]['influence'])
    assert one == {
      'name': f'0/{graph["nodes"][most]["feature"]}',
      'nodes': group,
    }
  assert supernodes.similar(drawn(0, 1, 1)) == []


def test_saved_supernodes_are_found_in_another_graph():
  saved, graph = drawn(), drawn()
  saved['supernodes'] = [{'name': 'a', 'nodes': [0, 4]}]
  graph['nodes'] = graph['nodes'][::-1]
  (one,) = supernodes.carried_over(saved, graph)
  names = [supernodes.node(graph, n) for n in one['nodes']]
  assert names == [supernodes.node(saved, n) for n in (0, 4)]
  graph['nodes'] = [n for n in graph['nodes'] if n.get('feature') != 1]
  (one,) = supernodes.carried_over(saved, graph)
  assert len(one['nodes']) == 1
  for broken in ({}, {'supernodes': [{'nodes': [0]}]}, {'supernodes': []}):
    with pytest.raises(ValueError, match='graph|supernode'):
      supernodes.carried_over(broken, graph)


@pytest.fixture(scope='module')
def subjects():
  return transcoders(tiny(), True, (0, 3), 128)


def active(subjects):
  """Features that fire at token 4 and at the last, two of each SAE."""
  model = Replacement(subjects, TOKENS_T).sources
  nodes = []
  for member in (0, 1):
    for position in (4, LAST):
      mine = (model.kind == 0) & (model.member == member)
      mine = np.flatnonzero(mine & (model.position == position))[:2]
      nodes += [Node(member, int(model.feature[i]), position) for i in mine]
  return nodes


def test_one_feature_falls_as_in_the_graph(subjects):
  one = active(subjects)[-1]
  query = permutation_test.Query(subjects[one.member], tuple(TOKENS_T), (7, 9))
  rows = iv.rows(query.subject, [[iv.Change(one.feature)]])
  at_1T = np.arange(len(TOKENS_T))[None] == one.position
  (want,) = permutation_test.exact(query, rows, at_1T)
  got = supernodes.exact(subjects, TOKENS_T, (7, 9), [one])
  assert got['exact'] == pytest.approx(float(want), abs=1e-4)
  assert abs(want) > 1e-3 and len(got['controls']) == supernodes.CONTROLS
  assert min(abs(c - got['exact']) for c in got['controls']) > 1e-4


def test_several_fall_together_each_at_its_own_token(subjects):
  """The same edits, one SAE and one token after the other, are one pass."""
  nodes = active(subjects)
  assert len({(n.member, n.position) for n in nodes}) == 4
  nodes.append(nodes[0]._replace(position=9))  # a feature at two tokens
  edits = {}
  for position in (4, 9, LAST):
    for member, subject in enumerate(subjects):
      here = [
        iv.Change(n.feature)
        for n in nodes
        if (n.member, n.position) == (member, position)
      ]
      at_1T = np.arange(len(TOKENS_T))[None] == position
      rows = iv.rows(subject, [here])
      for site, edit in iv.edits(
        subject.place, subject.params, rows, at_1T
      ).items():
        before = edits.get(site, lambda x: x)
        edits[site] = lambda x, edit=edit, before=before: edit(before(x))
  tokens_1T = np.array([TOKENS_T])

  @jax.jit
  def change():
    gemma, lm_params = subjects[0].gemma, subjects[0].lm_params
    logits_2V = [
      gemma.forward(lm_params, tokens_1T, edits=each).logits_BTV[0, -1]
      for each in ({}, edits)
    ]
    before, after = (logits_V[7] - logits_V[9] for logits_V in logits_2V)
    return before - after

  want = float(change())
  got = supernodes.exact(subjects, TOKENS_T, (7, 9), nodes)
  assert abs(want) > 1e-2
  assert got['exact'] == pytest.approx(want, abs=1e-4)
  at_bos = supernodes.exact(subjects, TOKENS_T, (7, None), [Node(0, 3, 0)])
  assert abs(at_bos['exact']) < 1e-4  # no SAE applies to BOS


def test_a_report_has_a_line_for_each(subjects):
  first, *_, last = active(subjects)
  graph = {
    'nodes': [
      feature(first.member, first.feature, first.position),
      feature(last.member, last.feature, last.position),
      {'kind': 'logit', 'value': 1.0},
    ],
    'edges': [[0, 2, 0.5], [1, 2, 0.25]],
    'supernodes': [{'name': 'both', 'nodes': [0, 1]}],
  }
  supernodes.measure(graph, subjects, TOKENS_T, (7, 9))
  (group,) = graph['supernodes']
  assert group['predicted'] == 0.75
  want = supernodes.exact(subjects, TOKENS_T, (7, 9), [first, last])
  assert group['exact'] == want['exact']
  line = supernodes.report(graph).splitlines()[1]
  assert line.split()[:2] == ['2', '0.750'] and line.endswith('both')
