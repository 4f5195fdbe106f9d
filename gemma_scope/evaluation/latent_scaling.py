"""Which latents of a crosscoder of two models belong to one of them.

Latent j writes f_j d_j to the first model and f_j d'_j to the second. The
relative norm compares its two decoders:

  rho_j = (1 + (|d'_j| - |d_j|) / max(|d_j|, |d'_j|)) / 2

  below 0.1 only in the first model, 0.4 to 0.6 in both, above 0.9 only in the
  second; between these bounds neither

A short decoder does not show that a model lacks the concept: training for
sparsity can shrink it away ("complete shrinkage"), or give each model a latent
of its own for the same concept ("latent decoupling"). Latent scaling asks the
rows themselves. With o_j the decoder in the model that j writes most to, its
own, and a target y,

  beta_j(y) = argmin_b sum |b f_j o_j - y|^2
            = sum f_j <o_j, y> / (|o_j|^2 sum f_j^2)        sums over rows

is fitted in both models to

  error           what all latents but j leave of the activation: the error of
                  the reconstruction, with what j writes to that model added
  reconstruction  what all latents together write to that model, without bias

and nu = beta in the other model / beta in its own. A large nu_error: the other
model's error holds what j writes, whose decoder there was shrunk. A large
nu_reconstruction: other latents write the same to the other model where j is
active. An exclusive latent is specific where nu_error < 0.2 and
nu_reconstruction < 0.5; else it is an artefact of sparsity.

Rows and decoders of each model are in units of its scale C, so that neither
model counts more. Source: arXiv 2504.02922, sections 2 and 3; the thresholds
are theirs. There the reconstruction includes the bias; a constant vector would
then count as shared where activations are not centred.

Axes: M models (2), the rest as everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import sae
from gemma_scope.language_model import splice

EXCLUSIVE = 0.9  # relative norm in the model that has the latent, at least
SHARED = (0.4, 0.6)
MOST_ERROR, MOST_RECONSTRUCTION = 0.2, 0.5  # of nu, in a specific latent
MODELS = ('first', 'second')


class Decoders(NamedTuple):
  """Decoders of a crosscoder of two models, each in units of its scale.

  Attributes:
    d_MFD: what latents write to each model.
    own_F: the model that each writes most to, 0 or 1.
    own_FD: its decoder there.
    scale_M: C of each model.
  """

  d_MFD: np.ndarray
  own_F: np.ndarray
  own_FD: np.ndarray
  scale_M: np.ndarray

  @classmethod
  def of(
    cls, params: Mapping[str, np.ndarray], scales: Sequence[float]
  ) -> Decoders:
    """From released parameters, whose W_dec is [F, 2 D]."""
    scale_M = np.asarray(scales, np.float32)
    halves = np.split(np.asarray(params['W_dec'], np.float32), len(scales), 1)
    d_MFD = np.stack(halves) / scale_M[:, None, None]
    own_F = np.linalg.norm(d_MFD, axis=-1).argmax(0)
    return cls(d_MFD, own_F, d_MFD[own_F, np.arange(len(own_F))], scale_M)

  def relative_norm(self) -> np.ndarray:
    """rho [F]; 1/2 where both decoders are zero."""
    first_F, second_F = np.linalg.norm(self.d_MFD, axis=-1)
    most_F = np.maximum(np.maximum(first_F, second_F), 1e-30)
    return (1 + (second_F - first_F) / most_F) / 2


class Sums(NamedTuple):
  """Sums over rows that count, added up over batches by `add`."""

  rows: Any
  fired_F: Any  # rows on which a latent is active
  square_F: Any  # f^2
  error_MF: Any  # f <o, x - x_hat>
  written_MF: Any  # f <o, sum_i f_i d_i>
  squared_error_M: Any  # |x - x_hat|^2
  norm_M: Any  # |x|^2
  x_MD: Any  # x

  def add(self, more_sums: Sums) -> Sums:
    return Sums(*(a + b for a, b in zip(self, more_sums, strict=True)))

  def fvu(self) -> np.ndarray:
    """Fraction of variance unexplained in each model, [M]."""
    mean_MD = self.x_MD / self.rows
    variance_M = self.norm_M - self.rows * np.square(mean_MD).sum(-1)
    return self.squared_error_M / variance_M


@functools.partial(jax.jit, static_argnames='mesh')
def sums(
  params: Mapping[str, jax.Array],
  decoders: Decoders,
  x: tuple[jax.Array, jax.Array],
  keep_BT: jax.Array,
  mesh: Mesh | None = None,
) -> Sums:
  """The sums over a batch, float32.

  Args:
    params: released, of the crosscoder.
    decoders: its decoders.
    x: the activation [B, T, D] in each model.
    keep_BT: which rows count.
    mesh: the devices; None for one.
  """
  scale_M, own_FD = decoders.scale_M, decoders.own_FD

  def of_slice(keep_Bt, *parts):
    parts = [model_x.astype(jnp.float32) for model_x in parts]
    x_BtD = jnp.concatenate(parts, -1)
    f_BtF = sae.encode(params, x_BtD) * keep_Bt[..., None]
    reconstructed = jnp.split(sae.decode(params, f_BtF), len(parts), -1)
    scaled, errors, along = [], [], []
    for m, (x_m, made_BtD) in enumerate(zip(parts, reconstructed, strict=True)):
      scaled.append(x_m * keep_Bt[..., None] / scale_M[m])
      error_BtD = (x_m - made_BtD) * keep_Bt[..., None] / scale_M[m]
      written_BtD = f_BtF @ decoders.d_MFD[m]
      errors.append(error_BtD)
      along.append(
        [
          jnp.sum(f_BtF * (y_BtD @ own_FD.T), (0, 1))
          for y_BtD in (error_BtD, written_BtD)
        ]
      )
    error_MF, written_MF = (
      jnp.stack(column) for column in zip(*along, strict=True)
    )
    x_MBtD, error_MBtD = jnp.stack(scaled), jnp.stack(errors)
    return Sums(
      jnp.sum(keep_Bt.astype(jnp.float32)),
      jnp.sum((f_BtF > 0).astype(jnp.float32), (0, 1)),
      jnp.sum(jnp.square(f_BtF), (0, 1)),
      error_MF,
      written_MF,
      jnp.sum(jnp.square(error_MBtD), (1, 2, 3)),
      jnp.sum(jnp.square(x_MBtD), (1, 2, 3)),
      jnp.sum(x_MBtD, (1, 2)),
    )

  with jax.default_matmul_precision('highest'):
    slices = splice.by_slices(of_slice, mesh, keep_BT, *x)
  total = jax.tree.map(lambda array: jnp.sum(array, 0), slices)
  return splice.everywhere(total, mesh)


class Scaling(NamedTuple):
  """The test's figures, [F]; nan for latents that never fired.

  Attributes:
    rho_F: relative norm.
    own_F: the model that a latent writes most to, 0 or 1.
    nu_error_F, nu_reconstruction_F: see above.
    beta_MF: the fit to the error in each model: how much of the activation
      there is along what the latent writes to its own.
    fired_F: rows on which it was active.
  """

  rho_F: np.ndarray
  own_F: np.ndarray
  nu_error_F: np.ndarray
  nu_reconstruction_F: np.ndarray
  beta_MF: np.ndarray
  fired_F: np.ndarray

  @property
  def fired(self) -> np.ndarray:
    """Which latents were ever active."""
    return self.fired_F > 0

  @property
  def exclusive(self) -> np.ndarray:
    """Which latents have a decoder in one model only."""
    distance_F = np.maximum(self.rho_F, 1 - self.rho_F)
    return self.fired & (distance_F > EXCLUSIVE)

  @property
  def shared(self) -> np.ndarray:
    """Which latents have decoders of like norm in both."""
    low, high = SHARED
    return self.fired & (self.rho_F >= low) & (self.rho_F <= high)

  @property
  def shrunk(self) -> np.ndarray:
    """Which exclusive latents the other model's error holds too."""
    return self.exclusive & ~(self.nu_error_F < MOST_ERROR)

  @property
  def decoupled(self) -> np.ndarray:
    """Which exclusive latents other latents write to the other model."""
    return self.exclusive & ~(self.nu_reconstruction_F < MOST_RECONSTRUCTION)

  @property
  def specific(self) -> np.ndarray:
    """Which latents are exclusive and no artefact of sparsity."""
    return self.exclusive & ~self.shrunk & ~self.decoupled


def scaling(total: Sums, decoders: Decoders) -> Scaling:
  """The test, from sums over all rows."""
  own_F, own_FD = decoders.own_F, decoders.own_FD.astype(np.float64)
  square_F = np.asarray(total.square_F, np.float64)
  overlap_MF = np.einsum('mfd,fd->mf', decoders.d_MFD, own_FD)
  latents = np.arange(len(own_F))

  def ratio(beta_MF):
    own_beta, other_beta = beta_MF[own_F, latents], beta_MF[1 - own_F, latents]
    return np.where(own_beta > 0, other_beta / own_beta, np.nan)

  with np.errstate(divide='ignore', invalid='ignore'):
    bottom_F = np.square(own_FD).sum(-1) * square_F
    beta_MF = (total.error_MF + overlap_MF * square_F) / bottom_F
    return Scaling(
      decoders.relative_norm(),
      own_F,
      ratio(beta_MF),
      ratio(total.written_MF / bottom_F),
      beta_MF,
      np.asarray(total.fired_F),
    )


def alike(scaled: Scaling, chosen: Sequence[int]) -> list[int]:
  """For each of `chosen`, another shared latent that fires about as often.

  Returns:
    Fewer where there are fewer shared latents.
  """
  unmatched = list(np.flatnonzero(scaled.shared))
  log_F = np.log(np.maximum(scaled.fired_F, 1))
  matches = []
  for latent in chosen:
    if not unmatched:
      break
    nearest = min(
      unmatched, key=lambda candidate: abs(log_F[candidate] - log_F[latent])
    )
    unmatched.remove(nearest)
    matches.append(int(nearest))
  return matches
