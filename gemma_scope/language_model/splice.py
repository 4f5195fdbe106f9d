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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope import sae, sites
from gemma_scope.language_model import gemma as lm

Taps = dict[sites.Site, jax.Array]
# Results that the host reads: `..._B` a sequence, `..._T` a position.
Sums = dict[str, jax.Array]

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


def shardings(
  mesh: Mesh, params: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, NamedSharding]:
  """Where a member lies: its latents over that axis, if it divides them."""
  width = params['b_enc'].shape[-1]
  split = 'latent' in mesh.shape and width % mesh.shape['latent'] == 0
  axes = {'W_enc': -1, 'b_enc': -1, 'threshold': -1}
  axes['W_dec'] = 1 if params['W_dec'].ndim == 4 else 0
  found = {}
  for key, array in params.items():
    spec = [None] * array.ndim
    if split and key in axes:
      spec[axes[key]] = 'latent'
    found[key] = NamedSharding(mesh, PartitionSpec(*spec))
  return found


def put(
  params: Mapping[str, np.ndarray], mesh: Mesh | None
) -> dict[str, jax.Array]:
  """A member on the devices, latents over the mesh's axis where they divide."""
  arrays = {key: np.asarray(a, np.float32) for key, a in params.items()}
  return jax.device_put(
    arrays, None if mesh is None else shardings(mesh, arrays)
  )


def everywhere(tree, mesh: Mesh | None):
  """Replicated, so that every process of a pod can read it."""
  if mesh is None:
    return tree
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(tree, whole)


def by_slices(function: Callable, mesh: Mesh | None, *arrays_BT) -> Any:
  """`function(*arrays)` on slices of T with about `_ROWS` tokens a device.

  Latents and logits are many times wider than x: so they are never there for a
  whole batch, and on a CPU they stay in the cache, which halves the time.

  Returns:
    Its results with a leading axis of slices; `join` makes [n, B, t, ...] one.
  """
  rows, length = arrays_BT[0].shape[:2]
  most = _ROWS * (mesh.shape.get('data', 1) if mesh is not None else 1)
  count = next(
    n
    for n in range(1, length + 1)
    if length % n == 0 and (n == length or rows * length <= most * n)
  )
  parts = [
    jnp.moveaxis(a.reshape(rows, count, -1, *a.shape[2:]), 1, 0)
    for a in arrays_BT
  ]
  return jax.lax.map(lambda part: function(*part), parts)


def join(x_nBt: jax.Array) -> jax.Array:
  """[n, B, t, ...] -> [B, n t, ...]."""
  n, rows, length, *rest = x_nBt.shape
  return jnp.moveaxis(x_nBt, 0, 1).reshape(rows, n * length, *rest)


def _by_row_and_position(name: str, x_BT: jax.Array) -> Sums:
  return {f'{name}_B': jnp.sum(x_BT, 1), f'{name}_T': jnp.sum(x_BT, 0)}


def _losses(gemma, params, x_BTD, tokens_BT, mesh):
  """`lm.token_losses` from the last residual stream: nats, [B, T - 1]."""

  def of_slice(x_BtD, targets_Bt):
    return optax.softmax_cross_entropy_with_integer_labels(
      gemma.unembed(params, x_BtD), targets_Bt
    )

  with jax.named_scope('loss'):
    targets_BT = jnp.roll(tokens_BT, -1, 1)  # the last has none
    losses_nBt = by_slices(of_slice, mesh, x_BTD, targets_BT)
  return join(losses_nBt)[:, :-1]


@functools.partial(jax.jit, static_argnames=('gemma', 'at'))
def taps(
  gemma: lm.Gemma, params: lm.Params, tokens_BT: jax.Array, at: tuple
) -> Taps:
  """x_BTD at each of the sites `at`; no logits."""
  return gemma.forward(params, tokens_BT, taps=at, logits=False).taps


@functools.partial(jax.jit, static_argnames='mesh')
def masked_sum(x_BTD, keep_BT, mesh: Mesh | None):
  """Sum of the x that count, float32 [D], and how many they are."""
  x_BTD = jnp.where(keep_BT[..., None], x_BTD.astype(jnp.float32), 0)
  return everywhere((jnp.sum(x_BTD, (0, 1)), jnp.sum(keep_BT)), mesh)


@functools.partial(jax.jit, static_argnames=('gemma', 'at', 'targets', 'mesh'))
def clean(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_BT: jax.Array,
  keep_BT: jax.Array,
  at: tuple[sites.Site, ...],
  targets: tuple[sites.Site, ...],
  means: Mapping[sites.Site, jax.Array],
  mesh: Mesh | None,
) -> tuple[Taps, jax.Array, jax.Array, Sums, dict[sites.Site, Sums]]:
  """The unspliced pass.

  Returns:
    taps at `at`, at `targets` and before their blocks; losses [B, T - 1] in
    nats; where they count; sums of tokens and losses; per target, the squared
    distance to its mean vector (`variance`) and to the mean of that vector
    (`flat`).
  """
  wanted = {*at, *targets, *map(before, targets), last(gemma)}
  taps = gemma.forward(params, tokens_BT, taps=wanted, logits=False).taps
  losses_BT = _losses(gemma, params, taps[last(gemma)], tokens_BT, mesh)
  counts_BT = keep_BT[:, 1:] & keep_BT[:, :-1]
  sums = {
    **_by_row_and_position('tokens', keep_BT.astype(jnp.float32)),
    **_by_row_and_position('counts', counts_BT.astype(jnp.float32)),
    'clean_B': jnp.sum(jnp.where(counts_BT, losses_BT, 0), 1),
  }
  of_site = {}
  for site in targets:
    x_BTD, mean_D = taps[site].astype(jnp.float32), means[site]
    variance_BT = jnp.sum((x_BTD - mean_D) ** 2, -1)
    flat_BT = jnp.sum((x_BTD - jnp.mean(mean_D)) ** 2, -1)
    of_site[site] = {
      **_by_row_and_position('variance', jnp.where(keep_BT, variance_BT, 0)),
      'flat_B': jnp.sum(jnp.where(keep_BT, flat_BT, 0), 1),
    }
  return taps, losses_BT, counts_BT, *everywhere((sums, of_site), mesh)


def stacked(parts: Sequence[jax.Array], several: bool) -> jax.Array:
  """float32 [B, t, D] of one site, or [B, t, L, D]."""
  parts = [part.astype(jnp.float32) for part in parts]
  return jnp.stack(parts, -2) if several else parts[0]


def beside(keep_BT: jax.Array, f: jax.Array) -> jax.Array:
  """keep_BT with axes of size 1, to broadcast with f [B, T, ...]."""
  return keep_BT.reshape(*keep_BT.shape, *[1] * (f.ndim - keep_BT.ndim))


@functools.partial(jax.jit, static_argnames='mesh')
def reconstruct(
  params: Mapping[str, jax.Array],
  x: tuple[jax.Array, ...],
  y: tuple[jax.Array, ...] | None,
  keep_BT: jax.Array,
  mesh: Mesh | None,
) -> tuple[tuple[jax.Array, ...], Sums]:
  """y_hat of one member, clean where a token does not count, and its sums.

  Args:
    params: released parameters.
    x: the activation [B, T, D] at each site.
    y: at each target; None where it writes what it reads.
    keep_BT: where a token counts.

  Returns:
    y_hat_BTD at each target in the dtype of y; `l0_B`, `error` (a column for
    each target) and `fired_F` (tokens on which each latent fired, [F] or
    [L, F]), over the tokens that count.
  """
  several = params['W_enc'].ndim == 3

  def of_slice(keep_Bt, *parts):
    clean = parts[len(x) :] or parts
    x32, y32 = stacked(parts[: len(x)], several), stacked(clean, several)
    f_BtF = sae.encode(params, x32)
    y_hat = sae.decode(params, f_BtF, x32)
    # Summed as float32: XLA's CPU is many times slower at summing booleans.
    active_BtF = ((f_BtF > 0) & beside(keep_Bt, f_BtF)).astype(jnp.float32)
    error = jnp.sum((y32 - y_hat) ** 2, -1)
    error_BtM = error if several else error[..., None]
    y_hats = jnp.moveaxis(y_hat, -2, 0) if several else [y_hat]
    return (
      tuple(
        jnp.where(keep_Bt[..., None], each.astype(one.dtype), one)
        for each, one in zip(y_hats, clean, strict=True)
      ),
      jnp.where(keep_Bt[..., None], error_BtM, 0),
      jnp.sum(active_BtF, tuple(range(1, active_BtF.ndim))),
      jnp.sum(active_BtF, (0, 1)),
    )

  # Which latents fire is decided in float32, whatever the accelerator prefers.
  with jax.named_scope('reconstruct'), jax.default_matmul_precision('highest'):
    y_hats, error, l0_nB, fired_nF = by_slices(
      of_slice, mesh, keep_BT, *x, *(y or ())
    )
  sums = {
    **_by_row_and_position('error', join(error)),
    'l0_B': l0_nB.sum(0),
    'fired_F': fired_nF.sum(0),
  }
  return tuple(map(join, y_hats)), everywhere(sums, mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def active(params, x: tuple[jax.Array, ...], keep_BT, mesh: Mesh | None):
  """Latents that fire, summed over the tokens that count."""

  def of_slice(keep_Bt, *parts):
    f_BtF = sae.encode(params, stacked(parts, params['W_enc'].ndim == 3))
    active_BtF = (f_BtF > 0) & beside(keep_Bt, f_BtF)
    return jnp.sum(active_BtF.astype(jnp.float32), (0, 1)).sum()

  with jax.default_matmul_precision('highest'):
    total = by_slices(of_slice, mesh, keep_BT, *x).sum()
  return everywhere(total, mesh)


@jax.jit
def ablate(x_BTD: jax.Array, keep_BT: jax.Array, value_D) -> jax.Array:
  """`value` in the place of x where a token counts."""
  return jnp.where(keep_BT[..., None], value_D, x_BTD).astype(x_BTD.dtype)


@functools.partial(jax.jit, static_argnames=('gemma', 'target', 'mesh'))
def delta(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_BT: jax.Array,
  target: sites.Site,
  y_hat_BTD: jax.Array,
  before_BTD: jax.Array,
  losses_BT: jax.Array,
  counts_BT: jax.Array,
  mesh: Mesh | None,
) -> Sums:
  """Spliced minus clean loss, with `y_hat` in the place of y at `target`.

  Args:
    before_BTD: the tap at `before(target)`.
    losses_BT, counts_BT: of the clean pass, [B, T - 1].

  Returns:
    `delta_B` and `delta_T`, sums of nats over the losses that count.
  """
  spliced_BTD = residual(
    gemma, params, tokens_BT, target, y_hat_BTD, before_BTD
  )
  spliced_BT = _losses(gemma, params, spliced_BTD, tokens_BT, mesh)
  delta_BT = jnp.where(counts_BT, spliced_BT - losses_BT, 0)
  return everywhere(_by_row_and_position('delta', delta_BT), mesh)
