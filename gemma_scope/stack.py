"""Many SAEs of one shape, trained together: `vmap` over members.

A stack holds the members that share architecture, d_in and width. Parameters,
moments and counters carry a leading axis S; what differs between members (the
site they read, their coefficients, their learning rate) is data, so that one
program trains them all. There is no maths of SAEs in this file.

One step of one member, in this order, which matters:
  gradient of the loss
  -> decoder gradient loses its part parallel to each row   (before Adam)
  -> Adam with beta1 = 0: the second moment alone is kept
  -> update -> decoder rows back to norm 1
Source: arXiv 2408.05147 section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import objectives, sae, sites

# Array -> mesh axes after the leading axis of members, by the last part of its
# path; moments of the optimiser carry their parameter's name.
SHARDING = {
  'W_enc': (None, 'latent'),
  'W_dec': ('latent', None),
  'b_enc': ('latent',),
  'b_dec': (None,),
  'log_threshold': ('latent',),
  'threshold': ('latent',),
  'silent_tokens': ('latent',),
  'fired_share': ('latent',),
}


class State(flax.struct.PyTreeNode):
  """All that training changes; every leaf starts with the axis S."""

  params: dict[str, jax.Array]
  moments: Any  # optax state
  silent_tokens: jax.Array  # [S, F] int32: tokens since a latent last fired
  fired_share: jax.Array  # [S, F] running mean of the share of rows it fires on
  skipped: jax.Array  # [S] int32: steps dropped for a gradient not finite


class Setting(NamedTuple):
  """What differs between members, each field an array [S]."""

  sparsity: objectives.Sparsity
  learning_rate: jax.Array
  site: jax.Array  # index into the stack's sites


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

  def rate_factor(self, step: jax.Array) -> jax.Array:
    """Factor on the learning rate at `step`."""
    t = jnp.clip(step / max(self.warm_up, 1), 0, 1)
    up = 0.1 + 0.9 * (1 - jnp.cos(jnp.pi * t)) / 2 if self.warm_up else 1.0
    left = (self.steps - step) / max(self.decay, 1)
    return up * (jnp.clip(left, 0, 1) if self.decay else 1.0)

  def sparsity_factor(self, step: jax.Array) -> jax.Array:
    """Factor on the sparsity coefficients at `step`."""
    return jnp.clip(step / max(self.sparsity_warm_up, 1), 0, 1)

  def transform(self) -> optax.GradientTransformation:
    """Gradient -> direction, for one member."""
    clip = (
      optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    )
    adam = optax.scale_by_rms(
      self.b2, self.eps, eps_in_sqrt=False, bias_correction=True
    )
    return optax.chain(clip, adam)


@dataclasses.dataclass(frozen=True)
class Stack:
  """Members of one shape; `init` and `step` are pure.

  Attributes:
    module: the architecture at this shape.
    sites: sites that some member reads, in the order of `step`'s x_NBD.
    setting: per-member data.
    seeds: per-member seed of the initial parameters.
    optimizer: see `Optimizer`.
  """

  module: sae.Autoencoder
  sites: tuple[sites.Site, ...]
  setting: Setting
  seeds: tuple[int, ...]
  optimizer: Optimizer

  def init(self, key: jax.Array) -> State:
    """Initial state; a member's depends on (key, its seed, its shape) alone."""
    width = self.module.width
    x_BD = jax.ShapeDtypeStruct((1, self.module.d_in), jnp.float32)

    def init_member(seed):
      params = self.module.lazy_init(jax.random.fold_in(key, seed), x_BD)[
        'params'
      ]
      moments = self.optimizer.transform().init(params)
      return State(
        params,
        moments,
        silent_tokens=jnp.zeros((width,), jnp.int32),
        fired_share=jnp.zeros((width,)),
        skipped=jnp.zeros((), jnp.int32),
      )

    return jax.vmap(init_member)(jnp.asarray(self.seeds, jnp.uint32))

  def shardings(self, mesh: Mesh):
    """The sharding of every leaf of a state, from the table above."""
    state = jax.eval_shape(self.init, jax.random.key(0))

    def place(path, leaf):
      name = getattr(path[-1], 'key', None) or getattr(path[-1], 'name', '')
      axes = ('sae', *SHARDING.get(name, ()))[: leaf.ndim]
      return mesh_lib.place(mesh, *axes)

    return jax.tree_util.tree_map_with_path(place, state)

  def step(
    self, state: State, x_NBD: jax.Array, step: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    """One step of all members.

    Args:
      state: the members'.
      x_NBD: rows of each of `self.sites`, scaled so that E|x|^2 = 1, float32.
      step: int32, counted from 0.

    Returns:
      The next state, and metrics as arrays [S].
    """
    rate = self.optimizer.rate_factor(step)
    warm_up = self.optimizer.sparsity_factor(step)

    def member(state, setting):
      x_BD = x_NBD[setting.site]
      return self._step_member(state, x_BD, setting, rate, warm_up)

    return jax.vmap(member)(state, self.setting)

  def _step_member(self, state, x_BD, setting, rate, warm_up):
    (_, terms), gradient = jax.value_and_grad(
      lambda p: objectives.loss(
        self.module, p, x_BD, setting.sparsity, warm_up
      ),
      has_aux=True,
    )(state.params)
    with jax.named_scope('optimizer'):
      # A gradient that is not finite changes nothing but the moments' decay.
      finite = jnp.isfinite(optax.tree.norm(gradient))
      gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
      gradient['W_dec'] = sae.remove_parallel(
        gradient['W_dec'], state.params['W_dec']
      )
      direction, moments = self.optimizer.transform().update(
        gradient, state.moments
      )
      rate = rate * setting.learning_rate * finite
      params = {
        name: value - rate * self._rate_of(name) * direction[name]
        for name, value in state.params.items()
      }
      params['W_dec'] = sae.unit_rows(params['W_dec'])
    with jax.named_scope('counters'):
      rows = x_BD.shape[0]
      silent_F = jnp.where(
        terms.fired_F > 0,
        0,
        jnp.minimum(state.silent_tokens, jnp.iinfo(jnp.int32).max - rows)
        + rows,
      )
      share_F = 0.99 * state.fired_share + 0.01 * terms.fired_F / rows
    metrics = {
      'loss': terms.loss,
      'squared_error': terms.squared_error,
      'fvu': terms.fvu,
      'l0': terms.l0,
      'dead': jnp.mean(silent_F > self.optimizer.dead_after),
      'dense': jnp.mean(share_F > 0.1),
    }
    skipped = state.skipped + ~finite
    return State(params, moments, silent_F, share_F, skipped), metrics

  def _rate_of(self, name: str) -> float:
    return self.optimizer.threshold_rate if name.endswith('threshold') else 1.0

  def member_params(self, state: State, index: int) -> dict[str, jax.Array]:
    """One member's parameters in normalised space, with `threshold` itself."""
    params = {name: value[index] for name, value in state.params.items()}
    threshold = self.module.bind({'params': params}).threshold()
    params.pop('log_threshold', None)
    return {**params, 'threshold': threshold}


def init_all(stacks: Sequence[Stack], key: jax.Array, mesh: Mesh):
  """States of several stacks, made in their shardings."""
  shardings = tuple(stack.shardings(mesh) for stack in stacks)
  init = jax.jit(
    lambda key: tuple(stack.init(key) for stack in stacks),
    out_shardings=shardings,
  )
  return init(key)


def step_all(
  stacks: Sequence[Stack],
  states: tuple[State, ...],
  rows: Mapping[sites.Site, jax.Array],
  step: jax.Array,
) -> tuple[tuple[State, ...], tuple[dict[str, jax.Array], ...]]:
  """One step of every stack on one batch: site -> x [B, D]."""
  results = [
    stack.step(state, jnp.stack([rows[site] for site in stack.sites]), step)
    for stack, state in zip(stacks, states, strict=True)
  ]
  states, metrics = zip(*results, strict=True)
  return states, metrics
