"""The activations of one SAE on a batch of tokens, and its outlier tokens.

outlier_norms  the tokens of a batch that the card's rule leaves out
Encoder        the latents that fire on each of the others
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae
from gemma_scope.microscope.index.statistics import Firings, Outliers
from gemma_scope.sae import released
from gemma_scope.sae.kernels import plain


@jax.jit
def outlier_norms(rows, bounds, keep_BT):
  """The largest norm of each outlier token, 0 elsewhere [B, T]."""
  norm_BT = jnp.zeros(keep_BT.shape)
  for x_BTD, bound in zip(rows, bounds, strict=True):
    own_BT = jnp.linalg.norm(x_BTD.astype(jnp.float32), axis=-1)
    outlier_BT = keep_BT & (own_BT > bound)
    norm_BT = jnp.maximum(norm_BT, jnp.where(outlier_BT, own_BT, 0))
  return norm_BT


class Encoder:
  """Encodes a batch with one SAE: K activations a token, more when needed.

  Args:
    load: returns the SAE's parameters, on the devices.
    width: how many latents it has.
  """

  def __init__(self, load: Callable[[], Mapping[str, jax.Array]], width: int):
    self._load, self._width, self._room = load, width, 64

  def __call__(
    self, x, keep_BT, norm_BT, sequences_B
  ) -> tuple[Firings, Outliers]:
    params = self._load()
    while True:
      room = min(self._room, self._width)
      i_RK, f_RK, count_R, fired_F = map(
        np.asarray, _encode(params, x, keep_BT, norm_BT > 0, room)
      )
      if count_R.max() <= room:
        break
      self._room = 1 << int(count_R.max() - 1).bit_length()
    token, slot = np.nonzero(np.arange(room) < count_R[:, None])
    row, position = np.divmod(token, keep_BT.shape[1])
    fires = Firings(
      latent=i_RK[token, slot].astype(np.int64),
      value=f_RK[token, slot],
      sequence=sequences_B[row].astype(np.int32),
      position=position.astype(np.int32),
    )
    norm_BT = np.asarray(norm_BT)
    row, position = np.nonzero(norm_BT)
    return fires, Outliers(
      sequences_B[row].astype(np.int32),
      position.astype(np.int32),
      norm_BT[row, position],
      fired_F.astype(np.int64),
    )


@functools.partial(jax.jit, static_argnames='room')
def _encode(params, x, keep_BT, outlier_BT, room: int):
  """Encodes a batch of R = B T tokens; outliers are kept apart.

  Returns:
    The latents that fire on each token and their activations [R, K]; how many
    fire [R]; on how many outliers each latent fires [F].
  """
  x = released.stacked(x, params['W_enc'].ndim == 3)
  with jax.default_matmul_precision('highest'):
    f_RF = sae.encode(params, x).reshape(keep_BT.size, -1)
  counts_R1 = (keep_BT & ~outlier_BT).reshape(-1, 1)
  i_RK, count_R = plain.select((f_RF > 0) & counts_R1, room)
  fired_F = jnp.sum((f_RF > 0) & outlier_BT.reshape(-1, 1), 0)
  return i_RK, jnp.take_along_axis(f_RF, i_RK, 1), count_R, fired_F
