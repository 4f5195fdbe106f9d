"""Adam, as published with beta1 = 0, and the schedules of a run.

Source: arXiv 2408.05147 section 3.2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Hyperparameters of training; the same for all members of a run.

  Attributes:
    b2, eps: Adam's.
    clip: maximum norm of a member's gradient; 0 for no clipping.
    warm_up: steps of the cosine warm-up, from 0.1 to 1 of the learning rate.
    decay: number of final steps with linear decay of the learning rate to 0.
    sparsity_warm_up: steps of linear warm-up of the sparsity coefficients.
    threshold_rate: factor on the learning rate of thresholds.
    steps: length of the run.
    dead_after: a latent is dead after so many tokens without activation.
    initial_l0, l0_steps: the target L0 starts at `initial_l0` and falls
      linearly to the member's over `l0_steps`; 0 for a constant target.
    theta_decay: decay of the running mean of BatchTopK's threshold.
    adaptive_rate: rate of change of adaptive_l1's coefficient, per step.
    resample_every: steps between resamplings of dead latents; 0: never.
    active_limit: see `objectives.Room`.
    b1: Adam's; 0 keeps no first moment.
  """

  b2: float
  eps: float
  clip: float
  warm_up: int
  decay: int
  sparsity_warm_up: int
  threshold_rate: float
  steps: int
  dead_after: int
  theta_decay: float
  adaptive_rate: float
  initial_l0: float = 0.0
  l0_steps: int = 0
  resample_every: int = 0
  active_limit: int = 0
  b1: float = 0.0

  def rate_factor(self, step: jax.Array) -> jax.Array:
    """Factor on the learning rate at `step`."""
    t = jnp.clip(step / max(self.warm_up, 1), 0, 1)
    warm_up_factor = (
      0.1 + 0.9 * (1 - jnp.cos(jnp.pi * t)) / 2 if self.warm_up else 1.0
    )
    remaining = (self.steps - step) / max(self.decay, 1)
    return warm_up_factor * (jnp.clip(remaining, 0, 1) if self.decay else 1.0)

  def sparsity_factor(self, step: jax.Array) -> jax.Array:
    """Factor on the sparsity coefficients at `step`."""
    return jnp.clip(step / max(self.sparsity_warm_up, 1), 0, 1)

  def l0_target(self, value: jax.Array, step: jax.Array) -> jax.Array:
    """The target L0 at `step` of a member with target `value`."""
    if not self.l0_steps:
      return value
    remaining = jnp.clip(1 - step / self.l0_steps, 0, 1)
    return value + remaining * jnp.maximum(self.initial_l0 - value, 0)

  def transform(self) -> optax.GradientTransformation:
    """The optax transformation of one member's gradient."""
    clip = (
      optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    )
    if self.b1:
      return optax.chain(clip, optax.scale_by_adam(self.b1, self.b2, self.eps))
    # The same at b1 = 0, without the memory of a first moment.
    adam = optax.scale_by_rms(
      self.b2, self.eps, eps_in_sqrt=False, bias_correction=True
    )
    return optax.chain(clip, adam)
