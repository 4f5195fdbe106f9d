"""The loss of one SAE, a pure function of its parameters and a batch.

  L = mean_B |x - x_hat|^2
      + l0     L0                    Gemma Scope 1, equation 4
      + target (L0 / target_l0 - 1)^2     JumpReLU paper, target form
      + l1     mean_B sum_F f        the ReLU baseline

L0 is the batch mean of the number of active latents, whose gradient reaches the
thresholds alone. The squared error is summed over D and averaged over rows.
Every coefficient is data, so that members that differ in them share a program:
a term whose coefficient is 0 is simply not there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_scope import sae


class Sparsity(NamedTuple):
  """A member's sparsity setting; every field is a float32 scalar."""

  l0: jax.Array  # lambda of lambda |f|_0
  target: jax.Array  # lambda of lambda (|f|_0 / target_l0 - 1)^2
  target_l0: jax.Array  # L0*, 1 where unused
  l1: jax.Array  # lambda of lambda |f|_1


def sparsity(kind: str, value: float, strength: float = 1.0) -> Sparsity:
  """The setting that a config's words stand for.

  Args:
    kind: 'l0' or 'l1' (value is the coefficient) or 'target_l0' (value is L0*).
    value: see `kind`.
    strength: coefficient of the target form.
  """
  zero = Sparsity(*map(jnp.float32, (0.0, 0.0, 1.0, 0.0)))
  value, strength = jnp.float32(value), jnp.float32(strength)
  return {
    'l0': zero._replace(l0=value),
    'l1': zero._replace(l1=value),
    'target_l0': zero._replace(target=strength, target_l0=value),
  }[kind]


class Terms(NamedTuple):
  """What a step reports of one member; scalars but for `fired_F`."""

  loss: jax.Array
  squared_error: jax.Array  # mean over rows of |x - x_hat|^2
  fvu: jax.Array  # of this batch, around the batch's mean vector
  l0: jax.Array
  fired_F: jax.Array  # rows of this batch that each latent fired on


def loss(
  module: sae.Autoencoder,
  params: dict[str, Any],
  x_BD: jax.Array,
  setting: Sparsity,
  warm_up: jax.Array,
) -> tuple[jax.Array, Terms]:
  """Loss and report of one SAE on a batch.

  Args:
    module: the architecture.
    params: its parameters.
    x_BD: rows with E|x|^2 = 1, float32.
    setting: coefficients.
    warm_up: factor in [0, 1] on every sparsity coefficient.

  Returns:
    The scalar to differentiate, and `Terms`.
  """
  bound = module.bind({'params': params})
  z_BF = bound.pre_activations(x_BD)
  f_BF = bound.activate(z_BF)
  error_BD = x_BD - bound.decode(f_BF)
  with jax.named_scope('objective'):
    squared_error = jnp.mean(jnp.sum(jnp.square(error_BD), -1))
    active_BF = bound.active(z_BF)
    fired_F = jnp.sum(active_BF, 0)
    l0 = jnp.sum(fired_F) / x_BD.shape[0]
    penalty = (
      setting.l0 * l0
      + setting.target * jnp.square(l0 / setting.target_l0 - 1)
      + setting.l1 * jnp.mean(jnp.sum(f_BF, -1))
    )
    total = squared_error + warm_up * penalty
    variance = jnp.mean(jnp.sum(jnp.square(x_BD - jnp.mean(x_BD, 0)), -1))
  terms = Terms(total, squared_error, squared_error / variance, l0, fired_F)
  return total, jax.lax.stop_gradient(terms)
