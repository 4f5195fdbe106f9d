"""The compiled steps of an evaluation: taps, reconstructions, spliced losses.

  y_hat_BTD = decode(encode(x_BTD)), y itself where a token does not count
  delta     = loss(tokens, y_hat at the target) - loss(tokens)

x is read at a member's sites and y at its targets, the same in an SAE. With
several layers x and y are stacked on an axis L or M of layers, and each target
is spliced alone.

A spliced pass starts at its target's own block, from the residual stream that
the clean pass left there: the layers before it, the same for all members, are
run once for all of them, and XLA drops them here because nothing reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm

Taps = dict[sites.Site, jax.Array]

_ROWS = 512  # tokens whose latents or logits are there at once, a device


def before(site: sites.Site) -> sites.Site:
  """Where a pass spliced at `site` starts: the input of its block."""
  return sites.Site(site.layer, 'resid_pre')


def last(gemma: lm.Gemma) -> sites.Site:
  """The residual stream that is unembedded."""
  return sites.Site(gemma.config.num_layers - 1, 'resid_post')


def residual(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_BT: jax.Array,
  target: sites.Site,
  y_hat_BTD: jax.Array,
  before_BTD: jax.Array,
) -> jax.Array:
  """The last residual stream with `y_hat` in the place of y at `target`.

  Args:
    before_BTD: the tap at `before(target)`, where the pass starts.
  """
  # In this order: where the target is its block's input, y_hat is what counts.
  edits = {before(target): lambda _: before_BTD, target: lambda _: y_hat_BTD}
  at = last(gemma)
  with jax.named_scope('splice'):
    return gemma.forward(
      params, tokens_BT, taps=(at,), edits=edits, logits=False
    ).taps[at]


def everywhere(tree, mesh: Mesh | None):
  """Replicated, so that every process of a pod can read it."""
  if mesh is None:
    return tree
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(tree, whole)


def by_slices(
  function: Callable, mesh: Mesh | None, *arrays_BT, rows: int = 0
) -> Any:
  """`function(*arrays)` on slices of T of about `rows` (512) tokens a device.

  Latents and logits are many times wider than x: so they are never there for a
  whole batch, and on a CPU they stay in the cache, which halves the time.

  Returns:
    Its results with a leading axis of slices; `join` makes [n, B, t, ...] one.
  """
  batch, length = arrays_BT[0].shape[:2]
  devices = mesh.shape.get('data', 1) if mesh is not None else 1
  most = (rows or _ROWS) * devices
  count = next(
    n
    for n in range(1, length + 1)
    if length % n == 0 and (n == length or batch * length <= most * n)
  )
  parts = [
    jnp.moveaxis(a.reshape(batch, count, -1, *a.shape[2:]), 1, 0)
    for a in arrays_BT
  ]
  return jax.lax.map(lambda part: function(*part), parts)


def join(x_nBt: jax.Array) -> jax.Array:
  """[n, B, t, ...] -> [B, n t, ...]."""
  n, rows, length, *rest = x_nBt.shape
  return jnp.moveaxis(x_nBt, 0, 1).reshape(rows, n * length, *rest)


@functools.partial(jax.jit, static_argnames=('gemma', 'at'))
def taps(
  gemma: lm.Gemma, params: lm.Params, tokens_BT: jax.Array, at: tuple
) -> Taps:
  """x_BTD at each of the sites `at`; no logits."""
  return gemma.forward(params, tokens_BT, taps=at, logits=False).taps
