"""The attention heads that carry an edge of an attribution graph.

In the frozen model, what source j adds to target z at token t is a sum over
paths. Split by the last attention head that a path goes through,

  A_j = direct_j + sum_{l, h} A_j(l, h)
  A_j(l, h) = (what j adds to head h of layer l at token t) . dz / d(that head)

where the derivative is taken with the attention of all later layers held. The
terms add up to A_j; between two different tokens there is no direct term.

  tangents   what sources add to every head: one forward derivative each
  slopes     dz / d(heads): one backward derivative for each target
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sites
from gemma_scope.microscope.circuits import replacement_model
from gemma_scope.microscope.circuits.replacement_model import (
  Replacement,
  Target,
)
from gemma_scope.runtime import progress

_SHOWN = 3  # heads listed on an edge
_LEAST = 0.05  # share of an edge, of a head that is listed


def tangents(
  model: Replacement,
  groups: Sequence[Sequence[int]],
  taps_at: tuple[sites.Site, ...],
) -> Iterator[dict[sites.Site, jax.Array]]:
  """What each group of sources adds at `taps_at`, [T, D of the site]."""
  gemma, *frozen = model.frozen
  for group in groups:
    first_TD, later_MTD = model.written(group)
    where = gemma, taps_at
    yield _moved(where, *frozen, first_TD[None], later_MTD[:, None])


@functools.partial(jax.jit, static_argnums=0)
def _moved(static, lm_params, tokens_1T, skips, first_1TD, later_M1TD):
  stream, zeros = replacement_model.linear(static, lm_params, tokens_1T, skips)
  return jax.jvp(stream, zeros, (first_1TD, later_M1TD))[1]


def slopes(model: Replacement, targets: Sequence[Target]) -> np.ndarray:
  """dz / d(heads) at each target's token, later attention held: [n, L, E]."""
  gemma, *frozen = model.frozen
  return np.stack(
    [
      np.asarray(_sloped((gemma, (site,)), *frozen, position, vector_D))
      for site, position, vector_D in targets
    ]
  )


@functools.partial(jax.jit, static_argnums=0)
def _sloped(static, lm_params, tokens_1T, skips, position, vector_D):
  gemma, (site,) = static
  c = gemma.config
  heads_LTE = jnp.zeros(
    (c.num_layers, tokens_1T.shape[1], c.num_heads * c.head_dim)
  )

  def read(heads_LTE):
    stream, zeros = replacement_model.linear(
      static, lm_params, tokens_1T, skips, heads_LTE
    )
    return stream(*zeros)[site][position] @ vector_D

  return jax.grad(read)(heads_LTE)[:, position]


def terms(
  model: Replacement, sources: Sequence[int], targets: Sequence[Target]
) -> np.ndarray:
  """A_j(l, h) of every source and target: [targets, sources, L, heads]."""
  c = model.frozen[0].config
  heads = tuple(sites.Site(l, 'attn_out') for l in range(c.num_layers))
  slope_nLE = slopes(model, targets)
  terms_njlh = np.zeros(
    (len(targets), len(sources), c.num_layers, c.num_heads), np.float32
  )
  for j, source in enumerate(progress.track(sources, 'heads')):
    (moved,) = map(jax.device_get, tangents(model, [[source]], heads))
    for l, site in enumerate(heads):
      for n, (_, position, _) in enumerate(targets):
        product_E = moved[site][position] * slope_nLE[n, l]
        terms_njlh[n, j, l] = product_E.reshape(c.num_heads, -1).sum(1)
  return terms_njlh


def shares(
  model: Replacement,
  edges: Sequence[tuple[int, int, float]],
  targets: dict[int, Target],
) -> list[list[dict[str, Any]]]:
  """The heads that carry each edge, the largest shares first.

  Args:
    edges: (source, target, A), as in `attribution_graph.Graph`.
    targets: the targets by their number in `edges`.

  Returns:
    For each edge, {'layer', 'head', 'share'} of the heads that carry most of
    it; shares of one edge may cancel.
  """
  sources = sorted({source for source, _, _ in edges})
  numbers = list(targets)
  of_all = terms(model, sources, list(targets.values()))
  carriers = []
  for source, target, weight in edges:
    own_LH = of_all[numbers.index(target), sources.index(source)]
    share_LH = own_LH / weight if weight else np.zeros_like(own_LH)
    order = np.argsort(-np.abs(share_LH), axis=None, kind='stable')[:_SHOWN]
    carriers.append(
      [
        {'layer': int(l), 'head': int(h), 'share': float(share_LH[l, h])}
        for l, h in zip(*np.unravel_index(order, share_LH.shape), strict=True)
        if abs(share_LH[l, h]) >= _LEAST
      ]
    )
  return carriers
