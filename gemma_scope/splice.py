"""The compiled steps of an evaluation: taps, reconstructions, spliced losses.

  x_hat_BTD = decode(encode(x_BTD)), x itself where a token does not count
  delta     = loss(tokens, x_hat at the site) - loss(tokens)

A spliced pass starts at its site's own block, from the residual stream that the
clean pass left there: the layers before it, the same for all members, are run
once for all of them, and XLA drops them here because nothing reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope import lm, sae, sites

Taps = dict[sites.Site, jax.Array]
# Results that the host reads: `..._B` a sequence, `..._T` a position.
Sums = dict[str, jax.Array]

SHARDING = {  # parameters of an SAE over the mesh
  'W_enc': (None, 'latent'),
  'b_enc': ('latent',),
  'W_dec': ('latent', None),
  'b_dec': (None,),
  'threshold': ('latent',),
}
_ROWS = 512  # tokens whose latents or logits are there at once, a device


def before(site: sites.Site) -> sites.Site:
  """Where a pass spliced at `site` starts: the input of its block."""
  return sites.Site(site.layer, 'resid_pre')


def shardings(mesh: Mesh, width: int) -> dict[str, NamedSharding]:
  """Where an SAE lies: latents over that axis, if it divides them."""
  split = 'latent' in mesh.shape and width % mesh.shape['latent'] == 0
  return {
    key: NamedSharding(mesh, PartitionSpec(*(axes if split else ())))
    for key, axes in SHARDING.items()
  }


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


@functools.partial(jax.jit, static_argnames=('gemma', 'at', 'mesh'))
def clean(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_BT: jax.Array,
  keep_BT: jax.Array,
  at: tuple[sites.Site, ...],
  means: Mapping[sites.Site, jax.Array],
  mesh: Mesh | None,
) -> tuple[Taps, jax.Array, jax.Array, Sums, dict[sites.Site, Sums]]:
  """The unspliced pass.

  Returns:
    taps at `at` and before their blocks; losses [B, T - 1] in nats; where they
    count; sums of tokens and losses; per site, the squared distance to its
    mean vector (`variance`) and to the mean of that vector (`flat`).
  """
  last = sites.Site(gemma.config.num_layers - 1, 'resid_post')
  wanted = {*at, *map(before, at), last}
  taps = gemma.forward(params, tokens_BT, taps=wanted, logits=False).taps
  losses_BT = _losses(gemma, params, taps[last], tokens_BT, mesh)
  counts_BT = keep_BT[:, 1:] & keep_BT[:, :-1]
  sums = {
    **_by_row_and_position('tokens', keep_BT.astype(jnp.float32)),
    **_by_row_and_position('counts', counts_BT.astype(jnp.float32)),
    'clean_B': jnp.sum(jnp.where(counts_BT, losses_BT, 0), 1),
  }
  of_site = {}
  for site in at:
    x_BTD, mean_D = taps[site].astype(jnp.float32), means[site]
    variance_BT = jnp.sum((x_BTD - mean_D) ** 2, -1)
    flat_BT = jnp.sum((x_BTD - jnp.mean(mean_D)) ** 2, -1)
    of_site[site] = {
      **_by_row_and_position('variance', jnp.where(keep_BT, variance_BT, 0)),
      'flat_B': jnp.sum(jnp.where(keep_BT, flat_BT, 0), 1),
    }
  return taps, losses_BT, counts_BT, *everywhere((sums, of_site), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def reconstruct(
  params: Mapping[str, jax.Array],
  x_BTD: jax.Array,
  keep_BT: jax.Array,
  mesh: Mesh | None,
) -> tuple[jax.Array, Sums]:
  """x_hat of one SAE, clean where a token does not count, and its sums.

  Returns:
    x_hat_BTD in the dtype of x; `l0_B`, `error` and `fired_F` (tokens on which
    each latent fired), over the tokens that count.
  """

  def of_slice(x_BtD, keep_Bt):
    x32_BtD, keep_Bt1 = x_BtD.astype(jnp.float32), keep_Bt[..., None]
    f_BtF = sae.encode(params, x32_BtD)
    x_hat_BtD = sae.decode(params, f_BtF)
    # Summed as float32: XLA's CPU is many times slower at summing booleans.
    active_BtF = ((f_BtF > 0) & keep_Bt1).astype(jnp.float32)
    return (
      jnp.where(keep_Bt1, x_hat_BtD.astype(x_BtD.dtype), x_BtD),
      jnp.where(keep_Bt, jnp.sum((x32_BtD - x_hat_BtD) ** 2, -1), 0),
      jnp.sum(active_BtF, (1, 2)),
      jnp.sum(active_BtF, (0, 1)),
    )

  # Which latents fire is decided in float32, whatever the accelerator prefers.
  with jax.named_scope('reconstruct'), jax.default_matmul_precision('highest'):
    x_hat, error, l0_nB, fired_nF = by_slices(of_slice, mesh, x_BTD, keep_BT)
  sums = {
    **_by_row_and_position('error', join(error)),
    'l0_B': l0_nB.sum(0),
    'fired_F': fired_nF.sum(0),
  }
  return join(x_hat), everywhere(sums, mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def active(params, x_BTD, keep_BT, mesh: Mesh | None):
  """Latents that fire, summed over the tokens that count."""

  def of_slice(x_BtD, keep_Bt):
    f_BtF = sae.encode(params, x_BtD.astype(jnp.float32))
    active_BtF = (f_BtF > 0) & keep_Bt[..., None]
    return jnp.sum(active_BtF.astype(jnp.float32), (0, 1)).sum()

  with jax.default_matmul_precision('highest'):
    total = by_slices(of_slice, mesh, x_BTD, keep_BT).sum()
  return everywhere(total, mesh)


@jax.jit
def ablate(x_BTD: jax.Array, keep_BT: jax.Array, value_D) -> jax.Array:
  """`value` in the place of x where a token counts."""
  return jnp.where(keep_BT[..., None], value_D, x_BTD).astype(x_BTD.dtype)


@functools.partial(jax.jit, static_argnames=('gemma', 'site', 'mesh'))
def delta(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_BT: jax.Array,
  site: sites.Site,
  x_hat_BTD: jax.Array,
  before_BTD: jax.Array,
  losses_BT: jax.Array,
  counts_BT: jax.Array,
  mesh: Mesh | None,
) -> Sums:
  """Spliced minus clean loss, with `x_hat` in the place of x at `site`.

  Args:
    before_BTD: the tap at `before(site)`.
    losses_BT, counts_BT: of the clean pass, [B, T - 1].

  Returns:
    `delta_B` and `delta_T`, sums of nats over the losses that count.
  """
  last = sites.Site(gemma.config.num_layers - 1, 'resid_post')
  # In this order: where the site is its block's input, x_hat is what counts.
  edits = {before(site): lambda _: before_BTD, site: lambda _: x_hat_BTD}
  with jax.named_scope('splice'):
    spliced = gemma.forward(
      params, tokens_BT, taps=(last,), edits=edits, logits=False
    )
    spliced_BT = _losses(gemma, params, spliced.taps[last], tokens_BT, mesh)
  delta_BT = jnp.where(counts_BT, spliced_BT - losses_BT, 0)
  return everywhere(_by_row_and_position('delta', delta_BT), mesh)
