"""The control beside every figure: an untrained member of the same type and L0.

  z = (x - m) / s  W_enc,  columns of W_enc random with norm 1
  f = z 1[z > theta],      y_hat = m' + g f W_dec

m and m' are the means of what is read and what is written, s the root mean
square of x - m, and theta one number for all latents, chosen so that the mean
L0 is that of the member beside it. In what writes the sites that it reads, SAEs
and crosscoders, W_dec = W_enc^T, in crosscoders towards every later layer too;
in transcoders and CLTs W_dec is random as well, rows of norm 1. An affine skip
is zero before training, hence here. An untrained member knows no scale either:
g, one for each target, is the one that leaves least squared error, which can
only help the control.

theta is found in two steps on a calibration sample: the quantile of some z, and
then a count over the whole sample on a grid around it.

Inside this module there always is an axis L or M of layers, 1 where a member
reads one site.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import sites
from gemma_scope.language_model import splice
from gemma_scope.sae import released

Means = Mapping[sites.Site, np.ndarray]

_QUANTILE = 2**20  # values that the first step sorts
# Around the quantile; L0 falls with about the tenth power of theta.
_GRID = np.geomspace(0.8, 1.25, 9).astype(np.float32)


class Setting(NamedTuple):
  """What a control is made of, beside its key and the means."""

  scale: tuple[float, ...]  # s of each site, in its units
  threshold: float
  gain: tuple[float, ...]  # g of each target, in its units


class Batch(NamedTuple):
  """Raw activations [B, T, D] by site, and where they count [B, T]."""

  taps: Mapping[sites.Site, jax.Array]
  keep_BT: jax.Array


@functools.partial(jax.jit, static_argnames=('place', 'width'))
def _random(key, place: sites.Wiring, width: int, x_D, y_D):
  """W_enc [L, D, F] and W_dec [L, F, M, D], of norm 1 a latent and target."""
  layers = len(place.sites)
  shape = layers, width // layers

  def directions(key, shape, like_D):
    w = jax.random.uniform(key, (*shape, len(like_D)), minval=-1, maxval=1)
    return w / jnp.linalg.norm(w, axis=-1, keepdims=True)

  W_LFD = directions(key, shape, x_D)
  if place.sites == place.targets:
    W_dec = jnp.broadcast_to(
      W_LFD[:, :, None], (*shape, layers, W_LFD.shape[-1])
    )
  else:
    W_dec = directions(jax.random.fold_in(key, 1), (*shape, layers), y_D)
  later_LM = jnp.triu(jnp.ones((layers, layers)))
  return jnp.swapaxes(W_LFD, 1, 2), W_dec * later_LM[:, None, :, None]


@functools.partial(jax.jit, static_argnames=('place', 'width', 'mesh'))
def make(
  key: jax.Array,
  place: sites.Wiring,
  means: Means,
  width: int,
  setting: Setting,
  mesh: Mesh | None,
) -> dict[str, jax.Array]:
  """The control as released parameters, `width` latents on raw activations."""
  x_LD = jnp.stack([means[site] for site in place.sites])
  y_MD = jnp.stack([means[site] for site in place.targets])
  W_enc, W_dec = _random(key, place, width, x_LD[0], y_MD[0])
  W_enc = W_enc / jnp.stack(setting.scale)[:, None, None]
  with jax.default_matmul_precision('highest'):
    b_enc = -jnp.einsum('ld,ldf->lf', x_LD, W_enc)
  params = {
    'W_enc': W_enc,
    'b_enc': b_enc,
    'W_dec': W_dec * jnp.stack(setting.gain)[:, None],
    'b_dec': y_MD,
    'threshold': jnp.full(b_enc.shape, setting.threshold, jnp.float32),
  }
  if not place.several:
    params = {key: array[0] for key, array in params.items()}
    params['W_dec'] = params['W_dec'][:, 0]
  if mesh is None:
    return params
  where = released.shardings(mesh, params)
  return jax.lax.with_sharding_constraint(params, where)


def _z(params, x_BtLD):
  """Pre-activations, of released parameters, always [B, t, L, F]."""
  if params['W_enc'].ndim == 2:
    z = x_BtLD[..., 0, :] @ params['W_enc'] + params['b_enc']
    return z[..., None, :]
  z = jnp.einsum('...ld,ldf->...lf', x_BtLD, params['W_enc'])
  return z + params['b_enc']


@functools.partial(jax.jit, static_argnames='mesh')
def _squares(x: tuple[jax.Array, ...], means_LD, keep_BT, mesh: Mesh | None):
  """Sum of |x - m|^2 at each site over the tokens that count; [L]."""
  found = []
  for x_BTD, mean_D in zip(x, means_LD, strict=True):
    square_BT = jnp.sum((x_BTD.astype(jnp.float32) - mean_D) ** 2, -1)
    found.append(jnp.sum(jnp.where(keep_BT, square_BT, 0)))
  return splice.everywhere(jnp.stack(found), mesh)


@functools.partial(jax.jit, static_argnames=('rows', 'mesh'))
def _some_z(params, x, keep_BT, rows: int, mesh: Mesh | None):
  """z of up to `rows` rows that count (others -inf), and how many rows."""
  keep_R = keep_BT.reshape(-1)
  # A fixed shuffle spreads them over the batch; those that count come first.
  order = np.random.default_rng(0).permutation(len(keep_R))
  order = jnp.asarray(order)[jnp.argsort(~keep_R[order], stable=True)][:rows]
  x = [x_BTD.reshape(len(keep_R), -1)[order] for x_BTD in x]
  with jax.default_matmul_precision('highest'):
    z_RLF = _z(params, released.stacked(x, True))
  z_RLF = jnp.where(keep_R[order][:, None, None], z_RLF, -jnp.inf)
  return splice.everywhere((z_RLF, keep_R[order].sum()), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def _active(params, x, keep_BT, thresholds_K, mesh: Mesh | None):
  """How many latents exceed each threshold, summed over tokens; [K]."""

  def count(keep_Bt, *parts):
    z = _z(params, released.stacked(parts, True))
    z = jnp.where(released.beside(keep_Bt, z), z, -jnp.inf)

    def above(threshold):
      return jnp.sum((z > threshold).astype(jnp.float32))

    return jax.lax.map(above, thresholds_K)

  with jax.default_matmul_precision('highest'):
    active_nK = splice.by_slices(count, mesh, keep_BT, *x)
  return splice.everywhere(active_nK.sum(0), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def _fit(params, threshold, x, y, keep_BT, mesh: Mesh | None):
  """Sums of <y - m', f W_dec> and |f W_dec|^2 at each target; [2, M]."""
  d_out = params['b_dec'].shape[-1]
  b_MD = params['b_dec'].reshape(-1, d_out)
  W_dec = params['W_dec'].reshape(-1, len(b_MD), d_out)

  def sums(keep_Bt, *parts):
    z = _z(params, released.stacked(parts[: len(x)], True))
    f_BtF = jnp.where(z > threshold, z, 0).reshape(*keep_Bt.shape, -1)
    f_BtF = jnp.where(keep_Bt[..., None], f_BtF, 0)
    found = []
    for m, y_BtD in enumerate(parts[len(x) :] or parts):
      w_BtD = f_BtF @ W_dec[:, m]
      along = jnp.sum((y_BtD.astype(jnp.float32) - b_MD[m]) * w_BtD)
      found.append(jnp.stack([along, jnp.sum(w_BtD**2)]))
    return jnp.stack(found, 1)

  with jax.default_matmul_precision('highest'):
    sums_n2M = splice.by_slices(sums, mesh, keep_BT, *x, *(y or ()))
  return splice.everywhere(sums_n2M.sum(0), mesh)


def calibrate(
  key: jax.Array,
  place: sites.Wiring,
  means: Means,
  width: int,
  active: Sequence[float],
  sample: Sequence[Batch],
  mesh: Mesh | None,
) -> list[Setting]:
  """The setting of a control for each entry of `active`.

  Args:
    key: of W_enc and W_dec; the same for all.
    place: what it reads and writes.
    means: m and m' of its sites and targets, float32.
    width: latents, of all layers.
    active: the L0 to meet, summed over the sample's tokens. Where it is more
      than any positive threshold would do, the threshold is 0.
    sample: activations at least at the sites and targets.
    mesh: where the language model lies.
  """
  means = {site: means[site] for site in {*place.sites, *place.targets}}
  tokens = sum(int(batch.keep_BT.sum()) for batch in sample)
  x = [(tuple(b.taps[s] for s in place.sites), b.keep_BT) for b in sample]
  y = [None] * len(sample)
  if place.sites != place.targets:
    y = [tuple(b.taps[s] for s in place.targets) for b in sample]
  at = [means[site] for site in place.sites]
  squares = jax.device_get([_squares(b[0], at, b[1], mesh=mesh) for b in x])
  square_L = np.maximum(np.asarray(squares, np.float64).sum(0), 1e-30)
  one = (1.0,) * len(place.targets)
  scale = tuple(map(float, np.sqrt(square_L / tokens)))
  params = make(key, place, means, width, Setting(scale, 0.0, one), mesh)

  rows = max(1, _QUANTILE // width // len(sample))
  some = [_some_z(params, *batch, rows=rows, mesh=mesh) for batch in x]
  z = np.concatenate([np.asarray(z).reshape(-1) for z, _ in some])
  z = np.sort(z)[::-1]
  share = sum(int(n) for _, n in some) / tokens
  settings = []
  for target in active:
    if target <= 0:
      settings.append(Setting(scale, float('inf'), (0.0,) * len(one)))
      continue
    guess = z[min(int(target * share), np.isfinite(z).sum() - 1)]
    grid_K = np.maximum(guess, 0) * _GRID
    found = [_active(params, *batch, grid_K, mesh=mesh) for batch in x]
    found_K = np.asarray(jax.device_get(found), np.float64).sum(0)
    # Straight in logarithms; reversed, because np.interp wants a rising axis.
    logs = [np.log(np.maximum(a[::-1], 1e-30)) for a in (found_K, grid_K)]
    threshold = float(np.float32(np.exp(np.interp(np.log(target), *logs))))
    fits = [
      _fit(params, threshold, b[0], written, b[1], mesh=mesh)
      for b, written in zip(x, y, strict=True)
    ]
    along_M, square_M = np.asarray(jax.device_get(fits), np.float64).sum(0)
    with np.errstate(divide='ignore', invalid='ignore'):
      gain_M = np.where(square_M > 0, along_M / square_M, 0.0)
    settings.append(Setting(scale, threshold, tuple(map(float, gain_M))))
  return settings
