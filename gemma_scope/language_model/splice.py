"""Forward passes with a reconstruction in the place of an activation.

  y_hat_BTD = decode(encode(x_BTD)), or y where a token does not count
  delta     = loss(tokens, y_hat at the target) - loss(tokens)

An SAE reads x at its sites and predicts y at its targets. With several layers x
and y have an axis L or M of layers, and each target is spliced on its own.

A spliced pass starts at the target's block, from the residual stream of the
clean pass. The layers before it are then run only once for all SAEs: in the
spliced pass nothing reads them, and XLA drops them.
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

_ROWS = 512  # tokens per device whose latents or logits exist at once


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
    gemma, params, tokens_BT: as in `lm.Gemma.forward`.
    target: the site to splice at.
    y_hat_BTD: the reconstruction.
    before_BTD: the tap at `before(target)`, where the pass starts.
  """
  # In this order, so that y_hat wins if the target is the block's input.
  edits = {before(target): lambda _: before_BTD, target: lambda _: y_hat_BTD}
  end = last(gemma)
  with jax.named_scope('splice'):
    return gemma.forward(
      params, tokens_BT, taps=(end,), edits=edits, logits=False
    ).taps[end]


def everywhere(tree, mesh: Mesh | None):
  """Replicates a tree, so that every process of a pod can read it."""
  if mesh is None:
    return tree
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(tree, replicated)


def by_slices(
  function: Callable, mesh: Mesh | None, *arrays_BT, rows: int = 0
) -> Any:
  """Applies a function to slices of T, one after the other.

  Latents and logits are many times wider than x. Slices keep them from existing
  for a whole batch; on a CPU they also stay in the cache, which halves the
  time.

  Args:
    function: called with a slice [B, t, ...] of each array.
    mesh: the devices; None for one.
    arrays_BT: arrays [B, T, ...].
    rows: tokens in a slice, per device; 0 for 512.

  Returns:
    The results with a leading axis of slices; `join` merges [n, B, t, ...].
  """
  batch, length = arrays_BT[0].shape[:2]
  devices = mesh.shape.get('data', 1) if mesh is not None else 1
  slice_tokens = (rows or _ROWS) * devices
  count = next(
    n
    for n in range(1, length + 1)
    if length % n == 0 and (n == length or batch * length <= slice_tokens * n)
  )
  slices = [
    jnp.moveaxis(a.reshape(batch, count, -1, *a.shape[2:]), 1, 0)
    for a in arrays_BT
  ]
  return jax.lax.map(lambda part: function(*part), slices)


def join(x_nBt: jax.Array) -> jax.Array:
  """[n, B, t, ...] -> [B, n t, ...]."""
  n, rows, length, *other_axes = x_nBt.shape
  return jnp.moveaxis(x_nBt, 0, 1).reshape(rows, n * length, *other_axes)


@functools.partial(jax.jit, static_argnames=('gemma', 'sites_read'))
def taps(
  gemma: lm.Gemma, params: lm.Params, tokens_BT: jax.Array, sites_read: tuple
) -> Taps:
  """x_BTD at each of the sites read, without logits."""
  return gemma.forward(params, tokens_BT, taps=sites_read, logits=False).taps
