"""The compiled sums of an evaluation: losses, squared errors, firing counts."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gemma_scope import sae, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.sae import released

# Results that the host reads: `..._B` a sequence, `..._T` a position.
Sums = dict[str, jax.Array]


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
    losses_nBt = splice.by_slices(of_slice, mesh, x_BTD, targets_BT)
  return splice.join(losses_nBt)[:, :-1]


@functools.partial(jax.jit, static_argnames='mesh')
def masked_sum(x_BTD, keep_BT, mesh: Mesh | None):
  """Sum of the x that count, float32 [D], and how many they are."""
  x_BTD = jnp.where(keep_BT[..., None], x_BTD.astype(jnp.float32), 0)
  return splice.everywhere((jnp.sum(x_BTD, (0, 1)), jnp.sum(keep_BT)), mesh)


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
) -> tuple[splice.Taps, jax.Array, jax.Array, Sums, dict[sites.Site, Sums]]:
  """The unspliced pass.

  Returns:
    taps at `at`, at `targets` and before their blocks; losses [B, T - 1] in
    nats; where they count; sums of tokens and losses; per target, the squared
    distance to its mean vector (`variance`) and to the mean of that vector
    (`flat`).
  """
  wanted = {*at, *targets, *map(splice.before, targets), splice.last(gemma)}
  taps = gemma.forward(params, tokens_BT, taps=wanted, logits=False).taps
  losses_BT = _losses(gemma, params, taps[splice.last(gemma)], tokens_BT, mesh)
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
  return taps, losses_BT, counts_BT, *splice.everywhere((sums, of_site), mesh)


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
    x32, y32 = (
      released.stacked(parts[: len(x)], several),
      released.stacked(clean, several),
    )
    f_BtF = sae.encode(params, x32)
    y_hat = sae.decode(params, f_BtF, x32)
    # Summed as float32: XLA's CPU is many times slower at summing booleans.
    active_BtF = ((f_BtF > 0) & released.beside(keep_Bt, f_BtF)).astype(
      jnp.float32
    )
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
    y_hats, error, l0_nB, fired_nF = splice.by_slices(
      of_slice, mesh, keep_BT, *x, *(y or ())
    )
  sums = {
    **_by_row_and_position('error', splice.join(error)),
    'l0_B': l0_nB.sum(0),
    'fired_F': fired_nF.sum(0),
  }
  return tuple(map(splice.join, y_hats)), splice.everywhere(sums, mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def active(params, x: tuple[jax.Array, ...], keep_BT, mesh: Mesh | None):
  """Latents that fire, summed over the tokens that count."""

  def of_slice(keep_Bt, *parts):
    f_BtF = sae.encode(
      params, released.stacked(parts, params['W_enc'].ndim == 3)
    )
    active_BtF = (f_BtF > 0) & released.beside(keep_Bt, f_BtF)
    return jnp.sum(active_BtF.astype(jnp.float32), (0, 1)).sum()

  with jax.default_matmul_precision('highest'):
    total = splice.by_slices(of_slice, mesh, keep_BT, *x).sum()
  return splice.everywhere(total, mesh)


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
  spliced_BTD = splice.residual(
    gemma, params, tokens_BT, target, y_hat_BTD, before_BTD
  )
  spliced_BT = _losses(gemma, params, spliced_BTD, tokens_BT, mesh)
  delta_BT = jnp.where(counts_BT, spliced_BT - losses_BT, 0)
  return splice.everywhere(_by_row_and_position('delta', delta_BT), mesh)
