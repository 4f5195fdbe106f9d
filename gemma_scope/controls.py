"""The control beside every figure: an untrained SAE of the same shape and L0.

  z = (x - m) W_enc,  W_enc = W_dec^T, rows of W_dec random with norm 1
  f = z 1[z > theta],  x_hat = m + g f W_dec

W_dec is the SAE's own initialisation, m the mean activation, and theta one
number for all latents, chosen so that the mean L0 is that of the member beside
it. An untrained SAE knows no scale either: g is the one that leaves least
squared error, which can only help the control.

theta is found in two steps on a calibration sample: the quantile of some z, and
then a count over the whole sample on a grid around it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import sae, splice

_QUANTILE = 2**20  # values that the first step sorts
# Around the quantile; L0 falls with about the tenth power of theta.
_GRID = np.geomspace(0.8, 1.25, 9).astype(np.float32)


class Setting(NamedTuple):
  """What a control is made of, beside its key and the mean."""

  threshold: float
  gain: float


@functools.partial(jax.jit, static_argnames=('width', 'mesh'))
def make(key, mean_D, width: int, threshold, gain, mesh: Mesh | None):
  """The control as released parameters, `width` latents on raw activations."""
  (d_in,) = mean_D.shape
  module = sae.JumpReLU(d_in=d_in, width=width)
  params = module.init(key, jnp.zeros((1, d_in)))['params']
  with jax.default_matmul_precision('highest'):
    b_enc_F = -mean_D @ params['W_enc']
  params = {
    'W_enc': params['W_enc'],
    'b_enc': b_enc_F,
    'W_dec': gain * params['W_dec'],
    'b_dec': mean_D,
    'threshold': jnp.full((width,), threshold, jnp.float32),
  }
  if mesh is None:
    return params
  where = splice.shardings(mesh, width)
  return jax.lax.with_sharding_constraint(params, where)


@functools.partial(jax.jit, static_argnames=('rows', 'mesh'))
def _some_z(params, x_BTD, keep_BT, rows: int, mesh: Mesh | None):
  """z of up to `rows` rows that count (others -inf), and how many rows."""
  x_RD, keep_R = x_BTD.reshape(-1, x_BTD.shape[-1]), keep_BT.reshape(-1)
  # A fixed shuffle spreads them over the batch; those that count come first.
  order = np.random.default_rng(0).permutation(len(keep_R))
  order = jnp.asarray(order)[jnp.argsort(~keep_R[order], stable=True)][:rows]
  with jax.default_matmul_precision('highest'):
    z_RF = x_RD[order].astype(jnp.float32) @ params['W_enc'] + params['b_enc']
  z_RF = jnp.where(keep_R[order][:, None], z_RF, -jnp.inf)
  return splice.everywhere((z_RF, keep_R[order].sum()), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def _active(params, x_BTD, keep_BT, thresholds_K, mesh: Mesh | None):
  """How many latents exceed each threshold, summed over tokens; [K]."""

  def count(x_BtD, keep_Bt):
    z_BtF = x_BtD.astype(jnp.float32) @ params['W_enc'] + params['b_enc']
    z_BtF = jnp.where(keep_Bt[..., None], z_BtF, -jnp.inf)

    def above(threshold):
      return jnp.sum((z_BtF > threshold).astype(jnp.float32))

    return jax.lax.map(above, thresholds_K)

  with jax.default_matmul_precision('highest'):
    active_nK = splice.by_slices(count, mesh, x_BTD, keep_BT)
  return splice.everywhere(active_nK.sum(0), mesh)


@functools.partial(jax.jit, static_argnames='mesh')
def _fit(params, x_BTD, keep_BT, mesh: Mesh | None):
  """Sums of <x - m, y> and |y|^2 for y = f W_dec."""

  def sums(x_BtD, keep_Bt):
    x_BtD = x_BtD.astype(jnp.float32)
    y_BtD = sae.encode(params, x_BtD) @ params['W_dec']
    y_BtD = jnp.where(keep_Bt[..., None], y_BtD, 0)
    along = jnp.sum((x_BtD - params['b_dec']) * y_BtD)
    return jnp.stack([along, jnp.sum(y_BtD**2)])

  with jax.default_matmul_precision('highest'):
    sums_n2 = splice.by_slices(sums, mesh, x_BTD, keep_BT)
  return splice.everywhere(sums_n2.sum(0), mesh)


def calibrate(
  key: jax.Array,
  mean_D: np.ndarray,
  width: int,
  active: Sequence[float],
  sample: Sequence[tuple[jax.Array, jax.Array]],
  mesh: Mesh | None,
) -> list[Setting]:
  """Threshold and gain of a control for each entry of `active`.

  Args:
    key: of W_dec; the same for all.
    mean_D: m, float32.
    width: latents F.
    active: the L0 to meet, summed over the sample's tokens. Where it is more
      than any positive threshold would do, the threshold is 0.
    sample: raw activations [B, T, D] and where they count.
    mesh: where the language model lies.
  """
  params = make(key, mean_D, width, 0.0, 1.0, mesh)
  rows = max(1, _QUANTILE // width // len(sample))
  some = [_some_z(params, *batch, rows=rows, mesh=mesh) for batch in sample]
  z = np.sort(np.concatenate([np.asarray(z).reshape(-1) for z, _ in some]))[
    ::-1
  ]
  share = sum(int(n) for _, n in some) / sum(int(k.sum()) for _, k in sample)
  settings = []
  for target in active:
    if target <= 0:
      settings.append(Setting(float('inf'), 0.0))
      continue
    guess = z[min(int(target * share), np.isfinite(z).sum() - 1)]
    grid_K = np.maximum(guess, 0) * _GRID
    found = [_active(params, *batch, grid_K, mesh=mesh) for batch in sample]
    found_K = np.asarray(jax.device_get(found), np.float64).sum(0)
    # Straight in logarithms; reversed, because np.interp wants a rising axis.
    logs = [np.log(np.maximum(a[::-1], 1e-30)) for a in (found_K, grid_K)]
    threshold = np.float32(np.exp(np.interp(np.log(target), *logs)))
    trial = {**params, 'threshold': jnp.full((width,), threshold, jnp.float32)}
    fits = jax.device_get([_fit(trial, *batch, mesh=mesh) for batch in sample])
    along, square = np.asarray(fits, np.float64).sum(0)
    gain = along / square if square > 0 else 0.0
    settings.append(Setting(float(threshold), float(gain)))
  return settings
