"""Influence of the nodes of an attribution graph, pruning, and scores.

With A what each source adds to a target, each target divides its influence
among its sources in proportion to |A|; the logit has influence 1.

  replacement   influence of embeddings / (that of embeddings and errors)
  completeness  mean over nodes, weighted by influence, of the share of |A| that
                does not come from errors (a node without sources counts as 1)

Both scores are those of circuit-tracer (Ameisen et al., Circuit Tracing, 2025):
over errors, embeddings and the expanded features, before pruning, without bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from gemma_scope.microscope.circuits.replacement_model import KINDS, Sources

LOGIT = -1  # the logit, as the target of an edge


class Shares(Protocol):
  """The fractions of the influence that pruning keeps."""

  nodes: float
  edges: float


def influence(
  of_logit_n: np.ndarray, rows: dict[int, np.ndarray]
) -> np.ndarray:
  """Influence of each source, along all paths through expanded features."""
  share = lambda row: np.abs(row) / max(np.abs(row).sum(), 1e-30)
  nodes = np.fromiter(rows, int, len(rows))
  reach_n = share(of_logit_n)
  total_n = reach_n.astype(np.float64)
  if not len(nodes):
    return total_n
  share_En = np.stack([share(rows[i]) for i in nodes])
  while True:  # once for each step of the longest path
    reach_n = reach_n[nodes] @ share_En
    if reach_n.sum() < 1e-9:
      return total_n
    total_n += reach_n


def along_all_paths(
  sources: Sources, of_logit_n: np.ndarray, rows: dict[int, np.ndarray]
) -> np.ndarray:
  """How much the logit falls in the linear model if a source is ablated.

  A feature that loses a fraction of its pre-activation loses the same fraction
  of what it writes.
  """
  total_n = of_logit_n.astype(np.float64)
  # Features read only from earlier layers: go from the last to the first.
  for i in sorted(rows, key=lambda i: -sources.layer[i]):
    total_n += total_n[i] / sources.value[i] * rows[i]
  return total_n


def prune(
  sources: Sources,
  of_logit_n: np.ndarray,
  rows: dict[int, np.ndarray],
  influence_n: np.ndarray,
  settings: Shares,
) -> tuple[list[int], list[tuple[int, int, float]]]:
  """The nodes and edges that carry the given fractions of the influence.

  Features without incoming or without outgoing edges are removed as well.
  """
  kept = set(_most(influence_n, settings.nodes))
  expanded = sorted(i for i in kept if i in rows)
  targets = [LOGIT, *expanded]
  weight_En = np.stack([of_logit_n, *(rows[i] for i in expanded)])
  score_En = np.abs(weight_En)
  score_En /= np.maximum(score_En.sum(1, keepdims=True), 1e-30)
  score_En *= np.append(1.0, influence_n[expanded])[:, None]
  score_En[:, sorted(set(range(len(influence_n))) - kept)] = 0
  edges = [
    (int(j), targets[e], float(weight_En[e, j]))
    for e, j in zip(
      *np.unravel_index(
        _most(score_En.ravel(), settings.edges), score_En.shape
      ),
      strict=True,
    )
  ]
  while True:
    origins, fed = {j for j, _, _ in edges}, {target for _, target, _ in edges}
    connected = {i for i in origins if sources.kind[i] != 0 or i in fed} | {
      LOGIT
    }
    remaining = [
      edge for edge in edges if edge[0] in connected and edge[1] in connected
    ]
    if len(remaining) == len(edges):
      return sorted(origins), edges
    edges = remaining


def _most(score_n: np.ndarray, share: float) -> np.ndarray:
  """Indices of the largest scores that add up to `share` of the total."""
  order = np.argsort(-score_n, kind='stable')
  reached = np.cumsum(score_n[order])
  if not len(order) or not reached[-1]:
    return order[:0]
  count = int(np.searchsorted(reached, share * reached[-1])) + 1
  return order[:count][score_n[order[:count]] > 0]


def scores(
  sources: Sources, of_logit_n: np.ndarray, rows: Mapping[int, np.ndarray]
) -> dict[str, float]:
  """Replacement and completeness, as defined above."""
  kept_n = np.isin(
    sources.kind, [KINDS.index('error'), KINDS.index('embedding')]
  )
  kept_n[list(rows)] = True
  masked = {i: np.where(kept_n, row, 0) for i, row in rows.items()}
  logit_n = np.where(kept_n, of_logit_n, 0)
  influence_n = influence(logit_n, masked)
  error_n = sources.kind == KINDS.index('error')
  embedded = influence_n[sources.kind == KINDS.index('embedding')].sum()
  error_influence = influence_n[error_n].sum()

  def from_errors(row):
    return np.abs(row[error_n]).sum() / max(np.abs(row).sum(), 1e-30)

  from_error = from_errors(logit_n)
  from_error += sum(
    influence_n[i] * from_errors(row) for i, row in masked.items()
  )
  return {
    'replacement': float(embedded / max(embedded + error_influence, 1e-30)),
    'completeness': float(1 - from_error / (1 + influence_n.sum())),
  }
