"""How members are trained: Adam with beta1 = 0, and the schedules of a run.

Source: arXiv 2408.05147 section 3.2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """How members are trained; the same for a whole run.

  Attributes:
    b2, eps: Adam's (b1 is 0).
    clip: bound on the norm of a member's gradient; 0 for none.
    warm_up: steps of the cosine warm-up, from 0.1 to 1 of the learning rate.
    decay: last steps over which the learning rate falls linearly to 0.
    sparsity_warm_up: steps over which the coefficients rise linearly from 0.
    threshold_rate: factor on the learning rate of thresholds.
    steps: length of the run.
    dead_after: tokens without firing after which a latent counts as dead.
    initial_l0, l0_steps: a target L0 starts at `initial_l0` and falls linearly
      to the member's over `l0_steps` (0: it is the member's from the start).
    theta_decay: of the running mean of BatchTopK's threshold.
    adaptive_rate: how fast adaptive_l1's coefficient moves, a step.
    resample_every: steps between resamplings of dead latents; 0: never.
    active_limit: see `objectives.value_and_grad`.
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

  def rate_factor(self, step: jax.Array) -> jax.Array:
    """Factor on the learning rate at `step`."""
    t = jnp.clip(step / max(self.warm_up, 1), 0, 1)
    up = 0.1 + 0.9 * (1 - jnp.cos(jnp.pi * t)) / 2 if self.warm_up else 1.0
    left = (self.steps - step) / max(self.decay, 1)
    return up * (jnp.clip(left, 0, 1) if self.decay else 1.0)

  def sparsity_factor(self, step: jax.Array) -> jax.Array:
    """Factor on the sparsity coefficients at `step`."""
    return jnp.clip(step / max(self.sparsity_warm_up, 1), 0, 1)

  def l0_target(self, value: jax.Array, step: jax.Array) -> jax.Array:
    """The target L0 at `step` of a member whose own is `value`."""
    if not self.l0_steps:
      return value
    left = jnp.clip(1 - step / self.l0_steps, 0, 1)
    return value + left * jnp.maximum(self.initial_l0 - value, 0)

  def transform(self) -> optax.GradientTransformation:
    """Gradient -> direction, for one member."""
    clip = (
      optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    )
    adam = optax.scale_by_rms(
      self.b2, self.eps, eps_in_sqrt=False, bias_correction=True
    )
    return optax.chain(clip, adam)
