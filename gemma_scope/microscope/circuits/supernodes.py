"""Supernodes: features of an attribution graph that are read as one.

A graph is that of `attribution_graph.plain`, and a supernode has a name and the
indices of its nodes: {'name', 'nodes'}.

  similar    features with a similar role in the graph: s is the mean cosine of
             their incoming and of their outgoing edges, each edge divided by
             all that enters its target; average linkage of 1 - s. The same
             feature at several tokens has s = 1
  predicted  how much the logit falls in the linear model when all of them are
             ablated: what they add along the paths of the graph that do not go
             through another of them
  exact      the same in the whole model, where all are ablated in one pass,
             beside controls of equal norm at the same tokens
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import budget, effects, intervene
from gemma_scope.microscope.circuits.intervene import Change, Rows, Subject

CONTROLS = 8
_ALIKE = 0.5  # similarity of the features of a supernode


class Node(NamedTuple):
  """A feature at a token; `member` is the index of its SAE in the graph."""

  member: int
  feature: int
  position: int


def node(graph: Mapping[str, Any], n: int) -> Node:
  """The feature that is number n of the graph's nodes."""
  return Node(*(graph['nodes'][n][key] for key in Node._fields))


def similar(graph: Mapping[str, Any], least: float = _ALIKE) -> list[list[int]]:
  """Features with a similar role, in groups; the most influential group first.

  Args:
    graph: `attribution_graph.plain`.
    least: mean similarity at which groups are joined.
  """
  nodes = graph['nodes']
  features = [
    n for n, node_record in enumerate(nodes) if node_record['kind'] == 'feature'
  ]
  if len(features) < 2:
    return []
  edge_NN = np.zeros((len(nodes), len(nodes)))
  for source, target, weight, *_ in graph['edges']:
    edge_NN[source, target] = weight
  edge_NN /= np.maximum(np.abs(edge_NN).sum(0), 1e-30)
  similar_FF = np.zeros((len(features), len(features)))
  for edge_FN in (edge_NN[features], edge_NN[:, features].T):
    norm_F1 = np.linalg.norm(edge_FN, axis=1, keepdims=True)
    edge_FN = edge_FN / np.maximum(norm_F1, 1e-30)
    similar_FF += edge_FN @ edge_FN.T / 2
  names = [(nodes[n]['member'], nodes[n]['feature']) for n in features]
  same_FF = [
    [own_name == other_name for other_name in names] for own_name in names
  ]
  apart_FF = np.where(same_FF, 0, np.maximum(1 - similar_FF, 0))
  tree = hierarchy.average(distance.squareform(apart_FF, checks=False))
  cluster_F = hierarchy.fcluster(tree, 1 - least, 'distance')
  groups = [
    [
      n
      for n, cluster_of in zip(features, cluster_F, strict=True)
      if cluster_of == cluster
    ]
    for cluster in np.unique(cluster_F)
  ]
  influence = lambda group: sum(nodes[n]['influence'] for n in group)
  return sorted((g for g in groups if len(g) > 1), key=lambda g: -influence(g))


def named(
  graph: Mapping[str, Any],
  groups: Iterable[Sequence[int]],
  label: Callable[[int, int], str],
) -> list[dict[str, Any]]:
  """Groups as supernodes, each named after its most influential feature.

  Args:
    label: label of (member, feature).
  """
  nodes = graph['nodes']
  most = lambda group: max(group, key=lambda n: nodes[n]['influence'])
  return [
    {'name': label(*node(graph, most(group))[:2]), 'nodes': list(group)}
    for group in groups
  ]


def carried_over(
  saved: Mapping[str, Any], graph: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Supernodes of a saved graph, for the same features of another graph.

  Features that the other graph does not have are left out.

  Raises:
    ValueError: the saved graph has no supernodes, or is none.
  """
  index = {
    node(graph, n): n
    for n, node_record in enumerate(graph['nodes'])
    if node_record['kind'] == 'feature'
  }
  try:
    groups = [
      {
        'name': str(group['name']),
        'nodes': [
          index[node(saved, n)]
          for n in group['nodes']
          if node(saved, n) in index
        ],
      }
      for group in saved['supernodes']
    ]
  except (KeyError, TypeError, IndexError):
    raise ValueError('it is not a graph.json') from None
  if not any(group['nodes'] for group in groups):
    raise ValueError('it has no supernode with a feature of this graph')
  return [group for group in groups if group['nodes']]


def predicted(graph: Mapping[str, Any], nodes: Sequence[int]) -> float:
  """How much the logit falls in the linear model without these features.

  A feature that loses a share of its pre-activation loses the same share of
  what it writes. Ablated features write nothing, whatever they read.
  """
  all_nodes = graph['nodes']
  incoming: dict[int, list[tuple[int, float]]] = {}
  for source, target, weight, *_ in graph['edges']:
    incoming.setdefault(target, []).append((source, weight))
  slope = dict.fromkeys(
    range(len(all_nodes)), 0.0
  )  # of the logit, by activation
  effect = dict(slope)
  # Features read only from earlier layers: go from the last to the first.
  readers = [n for n in incoming if all_nodes[n]['kind'] == 'feature']
  readers.sort(key=lambda n: -all_nodes[n]['layer'])
  logit = next(
    n
    for n, node_record in enumerate(all_nodes)
    if node_record['kind'] == 'logit'
  )
  for target in (logit, *readers):
    if target in nodes:
      continue
    share = 1.0
    if target != logit:
      share = effect[target] / (all_nodes[target]['value'] or np.inf)
    for source, weight in incoming.get(target, []):
      effect[source] += share * weight
  return float(sum(effect[n] for n in set(nodes)))


def exact(
  subjects: Sequence[Subject],
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
  nodes: Sequence[Node],
  controls: int = CONTROLS,
) -> dict[str, Any]:
  """How much the logit falls when all of these features are ablated at once.

  Args:
    subjects: the SAEs of the graph, all of one model.
    tokens_T: ids, BOS first; the logit is read after the last.
    logit: tokens (a, b) of the logit difference; if b is None, logit a alone.
    nodes: the features, each at its token.
    controls: number of controls. Each writes vectors of the same norms at the
      same tokens, along the decoders of other features.

  Returns:
    'exact', and 'controls', the same of each control.

  Raises:
    ValueError: the text is too long, or an SAE has no other feature that fired.
  """
  tokens_1T = effects.padded([tokens_T])
  rows_of = [
    _rows(
      subject, tokens_1T, [node for node in nodes if node.member == m], controls
    )
    for m, subject in enumerate(subjects)
  ]
  gemma, lm_params = subjects[0].gemma, subjects[0].lm_params
  count = 2 + controls
  latents = sum(subject.width for subject in subjects if 'k' in subject.params)
  batch = budget.rows(
    budget.forward, gemma, tokens_1T.shape[1], 1 << count.bit_length(), latents
  )
  static = gemma, tuple(subject.place for subject in subjects)
  params = lm_params, tuple(subject.params for subject in subjects)
  ends = len(tokens_T) - 1, *(-1 if token is None else token for token in logit)
  batches = []
  for start in range(0, count, batch):
    rows_B = np.arange(start, min(start + batch, count))
    filled_B = np.resize(rows_B, min(batch, count))
    batch_rows = [
      (Rows(*(array[filled_B] for array in rows)), at_1TK)
      for rows, at_1TK in rows_of
    ]
    found_B = _difference(static, params, tokens_1T, batch_rows, np.int32(ends))
    batches.append(np.asarray(found_B)[: len(rows_B)])
  clean, ablated, *controlled = np.concatenate(batches)
  return {
    'exact': float(clean - ablated),
    'controls': [float(clean - difference) for difference in controlled],
  }


def _rows(
  subject: Subject, tokens_1T: np.ndarray, nodes: Sequence[Node], controls: int
) -> tuple[Rows, np.ndarray]:
  """No change, the ablations, their controls; the tokens of each [1, T, K].

  K is padded to a power of two, so that few programs are compiled.
  """
  features = sorted({node.feature for node in nodes})
  own = intervene.rows(subject, [[Change(feature) for feature in features]])
  row_sets = intervene.with_controls(subject, own, controls)
  unchanged = own._replace(kind_BK=np.zeros_like(own.kind_BK))
  row_sets = intervene.stacked([unchanged, row_sets])
  slots = 1 << max(len(features) - 1, 0).bit_length()
  missing = slots - row_sets.kind_BK.shape[1]
  row_sets = Rows(
    *(np.pad(array, ((0, 0), (0, missing))) for array in row_sets)
  )
  at_1TK = np.zeros((*tokens_1T.shape, slots), bool)
  for node in nodes:
    at_1TK[0, node.position, features.index(node.feature)] = True
  usual_1T, _ = intervene.counted(subject, tokens_1T)
  return row_sets, at_1TK & usual_1T[..., None]


@functools.partial(jax.jit, static_argnums=0)
def _difference(static, params, tokens_1T, edit_rows, ends):
  """The logit difference after the last token in each row of changes, [B]."""
  gemma, places = static
  lm_params, params_of = params
  last, plus, minus = ends
  edits = {}
  for place, sae_params, (rows, at_1TK) in zip(
    places, params_of, edit_rows, strict=True
  ):
    edits |= intervene.edits(place, sae_params, rows, at_1TK, projects=False)
  count = len(edit_rows[0][0].kind_BK)
  tokens_BT = jax.numpy.repeat(tokens_1T, count, 0)
  site = splice.last(gemma)
  x_BTD = gemma.forward(
    lm_params, tokens_BT, taps=(site,), edits=edits, logits=False
  ).taps[site]
  x_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, last, 1, 1)
  logits_BV = gemma.unembed(lm_params, x_B1D)[:, 0]
  second_B = jax.numpy.where(minus < 0, 0, logits_BV[:, minus])
  return logits_BV[:, plus] - second_B


def measure(
  graph: dict[str, Any],
  subjects: Sequence[Subject],
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
) -> None:
  """Adds 'predicted', 'exact' and 'controls' to the graph's supernodes."""
  for group in graph['supernodes']:
    nodes = [node(graph, n) for n in group['nodes']]
    group['predicted'] = predicted(graph, group['nodes'])
    group |= exact(subjects, tokens_T, logit, nodes)


def report(graph: Mapping[str, Any]) -> str:
  """The supernodes that `measure` has measured, as a text table."""
  if not graph['supernodes']:
    return 'No two features of the graph have similar edges: no supernodes.'
  lines = [f'{"features":>8} {"predicted":>9} {"exact":>8} {"control":>8}']
  for group in graph['supernodes']:
    control = max(map(abs, group['controls']))
    lines.append(
      f'{len(group["nodes"]):>8} {group["predicted"]:>9.3f} '
      f'{group["exact"]:>8.3f} {control:>8.3f}  {group["name"]}'
    )
  return '\n'.join([*lines, _EXPLAINED])


_EXPLAINED = (
  'supernodes: how much the logit falls when their features are ablated '
  f'together; control: the largest of {CONTROLS} of equal norm'
)
