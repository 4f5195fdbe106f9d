"""Attribution graphs: the paths through transcoders or a CLT to a logit.

  A          what each source adds to a target (`replacement_model`); found for
             the logit first, then for features, the most influential first
  influence  of a node: the logit has influence 1, and each target divides its
             influence among its sources in proportion to |A|

Nodes are pruned to 0.8 of all influence, edges to 0.98 (Ameisen et al., Circuit
Tracing, 2025).

Each remaining feature is ablated at its token in the original model, and the
exact effect is compared with the prediction along all paths of the graph. The
control is that of `attribution`, by token: as many latents at single tokens,
selected by gradient after the decoders are shuffled.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import (
  attention_heads,
  attribution,
  graph_influence,
  intervene,
  permutation_test,
  replacement_model,
  supernodes,
)
from gemma_scope.microscope.circuits.graph_influence import LOGIT
from gemma_scope.microscope.circuits.intervene import Change, Subject
from gemma_scope.microscope.circuits.replacement_model import (
  KINDS,
  Replacement,
  Sources,
  Target,
)
from gemma_scope.runtime import progress

_AT_ONCE = 32  # features expanded before influence is updated


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """The nodes left after pruning, and the edges between them and the logit.

  Attributes:
    sources: all sources, before pruning.
    nodes: indices of the sources left after pruning.
    edges: (source, target, A); a target is a node or `LOGIT`.
    influence: the influence of every source.
    value: the logit, which is the sum of its A. With a soft-cap, it is the
      uncapped logit times the slope of the cap, so that each A is a
      first-order change of the capped logit.
    ends: fractions of the influence that end in embeddings, errors, biases and
      features that were not expanded (their sources were not traced).
    features: the ablated features, each with `node`, `predicted`, `exact`, `p`
      and `passes`.
    agreement: of predicted and exact effects (`attribution.agreement`).
    shuffled: the largest effect of each shuffle.
    scores: `graph_influence.scores`.
    heads: for each edge between two tokens, the attention heads that carry it
      (`attention_heads.shares`); [] for others.
  """

  sources: Sources
  nodes: list[int]
  edges: list[tuple[int, int, float]]
  influence: np.ndarray
  value: float
  ends: dict[str, float]
  features: list[dict[str, Any]]
  agreement: dict[str, float | None]
  shuffled: list[float]
  scores: dict[str, float]
  heads: list[list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """How far a graph is traced.

  Attributes:
    most: maximum number of features to expand, that is, to trace further.
    nodes, edges: fractions of the influence to keep.
    measured: maximum number of features to ablate, the most influential first.
    carried: maximum number of sources whose edges are traced to attention
      heads, the most influential first.
    shuffles: shuffles of the decoders; with fewer than 19 no feature can pass.
    seed: random seed of the shuffles.
  """

  most: int = 256
  nodes: float = 0.8
  edges: float = 0.98
  measured: int = 64
  carried: int = 32
  shuffles: int = 19
  seed: int = 0


def trace(
  subjects: Sequence[Subject],
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
  position: int | None = None,
  settings: Settings | None = None,
  reading: permutation_test.Reading | None = None,
) -> Graph:
  """Traces the attribution graph of a logit, a difference, or a reading.

  Args:
    subjects: transcoders, at most one per layer, or one CLT; all of one model.
    tokens_T: ids, BOS first.
    logit: tokens (a, b) of the logit difference; if b is None, logit a alone.
    position: the token after which the logit is read; by default the last.
    settings: how far to trace.
    reading: traced instead of the logit. Its features are ablated, but not
      tested by shuffles.

  Raises:
    ValueError: the SAEs are not transcoders or CLTs, two write to the same
      layer, or the text is too long.
  """
  settings = settings or Settings()
  position = len(tokens_T) - 1 if position is None else position
  replacement_model.check(subjects)
  attribution.check(subjects[0], tokens_T, logit, position)
  tokens_T = [int(i) for i in tokens_T[: position + 1]]
  model = Replacement(subjects, tokens_T)
  sources = model.sources
  if reading is None:
    target, value = _readout(subjects[0], model.last_TD, logit, position)
  else:
    settings = dataclasses.replace(settings, shuffles=0)
    target = reading.site, position, np.asarray(reading.vector_D, np.float32)
    value = model.read(target)
  (of_logit_n,) = model.rows([target])
  features = int((sources.kind == 0).sum())
  rows: dict[int, np.ndarray] = {}
  for start in progress.track(range(0, settings.most, _AT_ONCE), 'graph'):
    influence_n = graph_influence.influence(of_logit_n, rows)
    order = np.argsort(-influence_n[:features], kind='stable')
    chosen = [int(i) for i in order if i not in rows and influence_n[i] > 0]
    chosen = chosen[: min(_AT_ONCE, settings.most - start)]
    if not chosen:
      break
    traced = model.rows([model.target(i) for i in chosen])
    rows |= dict(zip(chosen, traced, strict=True))
  influence_n = graph_influence.influence(of_logit_n, rows)
  kept, kept_edges = graph_influence.prune(
    sources, of_logit_n, rows, influence_n, settings
  )
  measured_nodes = [i for i in kept if sources.kind[i] == 0]
  measured_nodes = sorted(measured_nodes, key=lambda i: -influence_n[i])[
    : settings.measured
  ]
  predicted_n = graph_influence.along_all_paths(sources, of_logit_n, rows)
  queries = [
    permutation_test.Query(subject, tuple(tokens_T), logit, reading)
    for subject in subjects
  ]
  measured = _measured(queries, sources, measured_nodes, predicted_n)
  most_C = _shuffled(queries, sources, measured_nodes, settings)
  for line in measured:
    line['p'] = permutation_test.p_value(line['exact'], most_C)
    line['passes'] = line['p'] <= attribution.LEVEL
  return Graph(
    sources, kept, kept_edges, influence_n, value,
    _ends(sources, influence_n, rows), measured,
    attribution.agreement(measured, 'predicted'),
    sorted(map(float, most_C), reverse=True),
    graph_influence.scores(sources, of_logit_n, rows),
    _heads(model, kept_edges, target, influence_n, settings.carried),
  )  # fmt: skip


def _readout(subject: Subject, last_TD, logit, position: int):
  """The logit as a target (a vector in the last residual stream), its value."""
  lm_params = subject.lm_params
  gain_D = np.asarray(lm.gain(lm_params, lm_params['final_norm']))
  x_D = last_TD[position]
  gain_D = gain_D / np.sqrt(np.mean(np.square(x_D)) + 1e-6)
  cap, vectors = subject.gemma.config.final_softcap, []
  for token in logit:
    if token is None:
      continue
    row_D = subject.lm_params['embedder']['input_embedding'][token]
    vector_D = np.asarray(row_D, np.float32) * gain_D
    slope = 1 if cap is None else 1 - np.tanh(vector_D @ x_D / cap) ** 2
    vectors.append(slope * vector_D)
  vector_D = vectors[0] - sum(vectors[1:])
  return (splice.last(subject.gemma), position, vector_D), float(vector_D @ x_D)


def _heads(model: Replacement, edges, target: Target, influence_n, most: int):
  """The heads of each edge between two tokens; [] of others."""
  sources, last = model.sources, target[1]
  across_tokens = [
    (j, i, weight)
    for j, i, weight in edges
    if 0 <= sources.position[j] != (last if i == LOGIT else sources.position[i])
  ]
  order = sorted(
    {j for j, _, _ in across_tokens}, key=lambda j: -influence_n[j]
  )
  across_tokens = [edge for edge in across_tokens if edge[0] in order[:most]]
  if not across_tokens:
    return [[] for _ in edges]
  targets = {
    i: target if i == LOGIT else model.target(i) for _, i, _ in across_tokens
  }
  shares = attention_heads.shares(model, across_tokens, targets)
  by_edge = {
    edge[:2]: heads for edge, heads in zip(across_tokens, shares, strict=True)
  }
  return [by_edge.get((j, i), []) for j, i, _ in edges]


def _ends(sources, influence_n, rows) -> dict[str, float]:
  """Fractions of the influence that end in each kind of node."""
  unexpanded = [
    i for i in np.flatnonzero(sources.kind == 0) if int(i) not in rows
  ]
  ends = {
    kind: float(influence_n[sources.kind == k].sum())
    for k, kind in enumerate(KINDS)
    if k
  } | {'unexpanded': float(influence_n[unexpanded].sum())}
  total = sum(ends.values())
  return {key: value / total if total else 0.0 for key, value in ends.items()}


def _measured(
  queries: Sequence[permutation_test.Query],
  sources: Sources,
  nodes: Sequence[int],
  predicted_n: np.ndarray,
) -> list[dict[str, Any]]:
  """Ablates each feature at its token: predicted and exact effects."""
  lines = []
  for n, query in enumerate(queries):
    own_nodes = [i for i in nodes if sources.member[i] == n]
    if not own_nodes:
      continue
    rows = intervene.rows(
      query.subject, [[Change(int(sources.feature[i]))] for i in own_nodes]
    )
    at_BT = sources.position[own_nodes][:, None] == np.arange(
      len(query.tokens_T)
    )
    change_B = permutation_test.exact(query, rows, at_BT)
    lines += [
      {'node': i, 'predicted': float(predicted_n[i]), 'exact': float(exact)}
      for i, exact in zip(own_nodes, change_B, strict=True)
    ]
  return lines


def _shuffled(queries, sources, nodes, settings: Settings) -> np.ndarray:
  """The largest effect in each shuffle, over all subjects."""
  most_C = np.zeros(settings.shuffles)
  if not settings.shuffles:
    return most_C
  for n, query in enumerate(queries):
    count = sum(sources.member[i] == n for i in nodes)
    if count:
      predicted = attribution.search(
        query.subject, query.tokens_T, query.logit, 1
      )
      control = permutation_test.Shuffles(
        int(count), settings.shuffles, settings.seed, by_token=True
      )
      own_C = permutation_test.largest(
        query, predicted['f'], [predicted['slope']['gradient']], control
      )
      most_C = np.maximum(most_C, own_C)
  return most_C


# Reports and JSON.


def plain(graph: Graph) -> dict[str, Any]:
  """The graph for JSON; edges and groups refer to nodes by index in the list.

  'similar' has groups of features that could be supernodes, and 'supernodes' is
  empty.
  """
  sources, lines = (
    graph.sources,
    {line['node']: line for line in graph.features},
  )
  index = {i: n for n, i in enumerate(graph.nodes)} | {LOGIT: len(graph.nodes)}
  nodes = [
    {
      'kind': KINDS[sources.kind[i]],
      'member': int(sources.member[i]),
      'feature': int(sources.feature[i]),
      'layer': int(sources.layer[i]),
      'position': int(sources.position[i]),
      'value': float(sources.value[i]),
      'influence': float(graph.influence[i]),
      **{k: v for k, v in lines.get(i, {}).items() if k != 'node'},
    }
    for i in graph.nodes
  ]
  plain_graph = {
    'nodes': [*nodes, {'kind': 'logit', 'value': graph.value}],
    'edges': [
      [index[source], index[target], weight]
      for source, target, weight in graph.edges
    ],
    'ends': graph.ends,
    'verdict': verdict(graph),
    'agreement': graph.agreement,
    'shuffled': graph.shuffled,
    'scores': graph.scores,
    'heads': graph.heads,
    'supernodes': [],
  }
  return plain_graph | {'similar': supernodes.similar(plain_graph)}


def write(path: str | os.PathLike[str], graph: Graph) -> None:
  """Writes `plain` as a JSON file; the file is never partial."""
  files.write_json(path, plain(graph), indent=1)


def report(
  graph: Graph,
  pieces: Sequence[str],
  named: Callable[[int, int], str] = lambda member, feature: '',
) -> str:
  """The ablated features as a text table, the most influential first.

  Args:
    pieces: the text's tokens as strings.
    named: returns the label of a (subject, feature), or ''.
  """
  sources = graph.sources
  lines = [
    f'logit {graph.value:.3f}; {len(graph.nodes)} nodes, {len(graph.edges)} '
    'edges; shares of influence by origin: '
    + ', '.join(f'{k} {v:.0%}' for k, v in graph.ends.items()),
    'circuit-tracer scores: '
    + ', '.join(f'{k} {v:.2f}' for k, v in graph.scores.items()),
    f'{"layer":>5} {"token":>12} {"feature":>8} {"influence":>9} '
    f'{"predicted":>9} {"exact":>8} {"p":>5}',
  ]
  for line in sorted(
    graph.features, key=lambda line: -graph.influence[line['node']]
  ):
    i = line['node']
    lines.append(
      f'{sources.layer[i]:>5} {pieces[sources.position[i]]!r:>12} '
      f'{sources.feature[i]:>8} {graph.influence[i]:>9.3f} '
      f'{line["predicted"]:>9.3f} {line["exact"]:>8.3f} {line["p"]:>5.2f} '
      f'{"passes" if line["passes"] else "":6} '
      f'{named(int(sources.member[i]), int(sources.feature[i]))}'.rstrip()
    )
  if graph.agreement['slope'] is not None:
    lines.append(
      f'predicted against exact: rank correlation '
      f'{graph.agreement["spearman"]:.2f}, slope {graph.agreement["slope"]:.2f}'
    )
  return '\n'.join([*lines, verdict(graph)])


def verdict(graph: Graph) -> str:
  """One sentence: how many of the ablated features pass the test."""
  passing = sum(line['passes'] for line in graph.features)
  return attribution.verdict(
    len(graph.features), passing, np.array(graph.shuffled)
  )
