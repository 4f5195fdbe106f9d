"""The compiled steps of an evaluation; each returns one value per token.

  clean        activations at every site, and the denominators of the FVUs
  reconstruct  y_hat, the latents that fire, squared errors
  residual     the last residual stream with y_hat in the place of y
  losses       next-token losses of several such streams, and
               KL(clean || spliced) of the next token's distribution

The host adds up these values (`estimates.Tally`): each token belongs to one
document and one position, and is an outlier or not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_scope import sae, sites
from gemma_scope.activations import outliers
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.sae import released

Values = dict[str, jax.Array]  # [B, T] each, or [B, T, M] over targets

_LOGITS = 2**25  # of one stream at once, on a device


class Centres(NamedTuple):
  """References for the errors at one site.

  Attributes:
    mean_D: over all tokens that count.
    inlier_RD: over those that are no outliers, by each rule.
    weight_D: 1, or 0 for the dimensions of largest variance.
  """

  mean_D: jax.Array
  inlier_RD: jax.Array
  weight_D: jax.Array


@functools.partial(jax.jit, static_argnames='mesh')
def moments(
  taps: splice.Taps,
  keep_BT: jax.Array,
  rules: Sequence[outliers.Bounds],
  mesh: Mesh | None,
) -> dict[sites.Site, tuple[jax.Array, ...]]:
  """Sums over a batch at each site, in float32.

  Returns:
    site -> (sum of x, of x^2 and, by each rule, of the x that are no outliers)
    over the tokens that count: [D], [D], [R, D]; and under None how many count,
    in all and by each rule: [1 + R].
  """
  inlier = [keep_BT & ~outliers.is_outlier(taps, rule) for rule in rules]
  masks = [counted_BT[..., None] for counted_BT in (keep_BT, *inlier)]

  def sums(x_BTD):
    x = x_BTD.astype(jnp.float32)
    total, *inlier_sums = (
      jnp.sum(jnp.where(mask, x, 0), (0, 1)) for mask in masks
    )
    square = jnp.sum(jnp.where(masks[0], x * x, 0), (0, 1))
    return total, square, jnp.stack(inlier_sums)

  moments_of = {site: sums(x_BTD) for site, x_BTD in taps.items()}
  counts = jnp.stack([jnp.sum(mask) for mask in masks])
  return splice.everywhere((moments_of, counts), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def norms(x_BTD: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Euclidean norm of each row, [B, T]."""
  norms_BT = jnp.linalg.norm(x_BTD.astype(jnp.float32), axis=-1)
  return splice.everywhere(norms_BT, mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def fetched(x, mesh: Mesh | None):
  """Replicates arrays on every process, as float32."""
  x = jax.tree.map(lambda array: array.astype(jnp.float32), x)
  return splice.everywhere(x, mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def spread(
  taps: splice.Taps,
  centres: Mapping[sites.Site, Centres],
  rules: Sequence[outliers.Bounds],
  mesh: Mesh | None,
) -> tuple[jax.Array, dict[sites.Site, Values]]:
  """The denominators of relative errors, at each site in `centres`.

  Returns:
    Where a token is an outlier by each rule, [R, B, T]; and squared distances
    to the mean vector (`variance`), to the mean of that vector (`flat`), to the
    mean vector without the dimensions of largest variance (`variance_rest`),
    and to the mean of the inliers by each rule (`variance_inlier`, [B, T, R]).
  """
  outlier_RBT = jnp.stack([outliers.is_outlier(taps, rule) for rule in rules])
  values = {}
  for site, centre in centres.items():
    x_BTD = taps[site].astype(jnp.float32)
    square_BTD = (x_BTD - centre.mean_D) ** 2
    inlier = [jnp.sum((x_BTD - mean_D) ** 2, -1) for mean_D in centre.inlier_RD]
    values[site] = {
      'variance': jnp.sum(square_BTD, -1),
      'flat': jnp.sum((x_BTD - jnp.mean(centre.mean_D)) ** 2, -1),
      'variance_rest': square_BTD @ centre.weight_D,
      'variance_inlier': jnp.stack(inlier, -1),
    }
  return splice.everywhere((outlier_RBT, values), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def reconstruct(
  params: Mapping[str, jax.Array],
  x: tuple[jax.Array, ...],
  y: tuple[jax.Array, ...] | None,
  keep_BT: jax.Array,
  weight_MD: jax.Array,
  mesh: Mesh | None,
) -> tuple[tuple[jax.Array, ...], Values, jax.Array]:
  """y_hat of one SAE, y itself where it is not replaced.

  Args:
    params: released parameters.
    x: the activation [B, T, D] at each site.
    y: at each target; None where the SAE writes what it reads.
    keep_BT: where y is replaced.
    weight_MD: 0 for the dimensions of largest variance at each target, else 1.

  Returns:
    y_hat_BTD at each target in the dtype of y; `l0` and `l1` of each token,
    and of each target `error`, `error_rest` (without those dimensions),
    `cosine` and `norm_ratio`; and on how many replaced tokens each latent
    fired, [F] or [L, F].
  """
  several = params['W_enc'].ndim == 3

  def of_slice(keep_Bt, *parts):
    clean = parts[len(x) :] or parts
    x32 = released.stacked(parts[: len(x)], several)
    y32 = released.stacked(clean, several)
    f_BtF = sae.encode(params, x32)
    y_hat = sae.decode(params, f_BtF, x32)
    # Summed as float32: XLA's CPU is many times slower at summing booleans.
    active_BtF = (f_BtF > 0).astype(jnp.float32)
    latents = tuple(range(2, f_BtF.ndim))
    y_BtMD, made_BtMD = (
      array if several else array[:, :, None] for array in (y32, y_hat)
    )
    square_BtMD = (y_BtMD - made_BtMD) ** 2
    norm_y, norm_made = (
      jnp.maximum(jnp.linalg.norm(a, axis=-1), 1e-12)
      for a in (y_BtMD, made_BtMD)
    )
    values = {
      'l0': jnp.sum(active_BtF, latents),
      'l1': jnp.sum(f_BtF, latents),
      'error': jnp.sum(square_BtMD, -1),
      'error_rest': jnp.sum(square_BtMD * weight_MD, -1),
      'cosine': jnp.sum(y_BtMD * made_BtMD, -1) / (norm_y * norm_made),
      'norm_ratio': norm_made / norm_y,
    }
    y_hats = tuple(
      jnp.where(
        keep_Bt[..., None], made_BtD.astype(clean_values.dtype), clean_values
      )
      for made_BtD, clean_values in zip(
        jnp.moveaxis(made_BtMD, 2, 0), clean, strict=True
      )
    )
    counted = jnp.where(released.beside(keep_Bt, active_BtF), active_BtF, 0)
    return y_hats, values, jnp.sum(counted, (0, 1))

  # Which latents fire is decided in float32, whatever the accelerator prefers.
  with jax.named_scope('reconstruct'), jax.default_matmul_precision('highest'):
    y_hats, values, fired_nF = splice.by_slices(
      of_slice, mesh, keep_BT, *x, *(y or ())
    )
  y_hats, values = jax.tree.map(splice.join, (y_hats, values))
  return y_hats, *splice.everywhere((values, fired_nF.sum(0)), mesh)


@jax.jit
def without(keep_BT: jax.Array, outlier_RBT: jax.Array, rule) -> jax.Array:
  """`keep_BT` without the tokens that are outliers by rule number `rule`."""
  return keep_BT & ~jnp.take(outlier_RBT, rule, axis=0)


@jax.jit
def ablate(x_BTD: jax.Array, keep_BT: jax.Array, value_D) -> jax.Array:
  """`value` in the place of x where a token counts."""
  return jnp.where(keep_BT[..., None], value_D, x_BTD).astype(x_BTD.dtype)


@functools.partial(jax.jit, static_argnames=('gemma', 'target'))
def residual(gemma, params, tokens_BT, target, y_hat_BTD, before_BTD):
  """`splice.residual`, compiled once for each target."""
  return splice.residual(
    gemma, params, tokens_BT, target, y_hat_BTD, before_BTD
  )


@functools.partial(jax.jit, static_argnames=('gemma', 'mesh'))
def losses(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_BT: jax.Array,
  ends: tuple[jax.Array, ...],
  positions_t: jax.Array,
  mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
  """Losses of the next token, and KL from the first stream, in nats.

  Args:
    ends: last residual streams [B, T, D], the clean one first.
    positions_t: where losses are computed; not the last, which has no next
      token.

  Returns:
    Loss [B, t, n] and KL(first || each) [B, t, n] at these positions.
  """

  def of_slice(next_Bt, *ends_BtD):
    clean_BtV = gemma.unembed(params, ends_BtD[0]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(clean_BtV)
    p_BtV, results = jnp.exp(log_p), []
    for k, end_BtD in enumerate(ends_BtD):
      log_q = log_p
      if k:
        log_q = jax.nn.log_softmax(
          gemma.unembed(params, end_BtD).astype(jnp.float32)
        )
      loss = -jnp.take_along_axis(log_q, next_Bt[..., None], -1)[..., 0]
      results.append((loss, jnp.sum(p_BtV * (log_p - log_q), -1)))
    losses, kl = zip(*results, strict=True)
    return jnp.stack(losses, -1), jnp.stack(kl, -1)

  with jax.named_scope('losses'):
    next_Bt = tokens_BT[:, positions_t + 1]
    ends = [end_BTD[:, positions_t] for end_BTD in ends]
    rows = min(512, max(16, _LOGITS // gemma.config.vocab_size))
    slices = splice.by_slices(of_slice, mesh, next_Bt, *ends, rows=rows)
  return splice.everywhere(jax.tree.map(splice.join, slices), mesh)
