"""Many SAEs of one shape, trained together in one program.

A stack holds the members that share architecture and shape. Parameters, moments
and counters have a leading axis S. What differs between members (the sites they
read and write, sparsity, learning rate) is data. A step takes the members one
after another, in parallel over the mesh's axis 'sae': only one member's
activations are in memory at a time, and each takes a sparse or a dense step
(`objectives.value_and_grad`).

One step of one member, in this order, which matters:
  gradient of the loss
  -> remove the part of W_dec's gradient parallel to each row   (before Adam)
  -> Adam, by default with beta1 = 0, which keeps only the second moment
  -> update -> renormalise decoder rows (unless they are free)
  -> counters -> resample dead latents, if enabled
Source: arXiv 2408.05147 section 3.2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import sae, sites, specs
from gemma_scope.evaluation import estimates
from gemma_scope.training import objectives, optimizer, resampling

# Array -> mesh axes of its last dimensions, by the last part of its path; the
# optimiser's moments have the names of their parameters. The first dimension is
# S, and those in between (layers) are not sharded.
SHARDING = {
  'W_enc': ('latent', None),
  'W_dec': ('latent', None),
  'b_enc': ('latent',),
  'b_gate': ('latent',),
  'r_mag': ('latent',),
  'log_threshold': ('latent',),
  'threshold': ('latent',),
  'silent_tokens': ('latent',),
  'fired_share': ('latent',),
}

_SOFT_COSINE = 0.8  # of soft_frozen_decoder (arXiv 2602.14111)

# Metrics of each member; end-to-end fine-tuning adds its own.
METRICS = (
  'loss',
  'squared_error',
  'fvu',
  'l0',
  'dead',
  'dense',
  'sparse_steps',
  'steps_skipped',
)


class State(flax.struct.PyTreeNode):
  """The training state; every leaf has the leading axis S."""

  params: dict[str, jax.Array]
  moments: Any  # optax state
  silent_tokens: (
    jax.Array
  )  # [S, F] int32: tokens since a latent was last active
  fired_share: (
    jax.Array
  )  # [S, F] running mean of the fraction of rows it is active on
  theta: jax.Array  # [S] running mean of the batch's threshold (BatchTopK)
  coefficient: jax.Array  # [S] of adaptive_l1
  skipped: jax.Array  # [S] int32: steps in a row without a finite gradient


class Setting(NamedTuple):
  """Settings that differ between members; arrays with the axis S."""

  value: jax.Array  # [S] sparsity, see `objectives`
  learning_rate: jax.Array  # [S]
  # [S] index into the stack's sites; [S, L] for L layers, [S, 2] for two models
  reads: jax.Array
  writes: jax.Array  # index into the stack's targets
  null: jax.Array | None = None  # [S] 0, or 1 + the index in `specs.NULLS`


class Member(NamedTuple):
  """One member of a stack; no axis S."""

  state: State
  setting: Setting
  seed: jax.Array


@dataclasses.dataclass(frozen=True)
class Stack:
  """Members of one shape; `init` and `step` are pure.

  Attributes:
    module: the architecture at this shape.
    objective: the terms of its loss.
    sites: all sites that members read, in the order of `step`'s x_NBD.
    targets: all sites that members reconstruct, in the order of y_MBD.
    setting: per-member data.
    seeds: per-member seed of the initial parameters.
    optimizer: how it is trained.
  """

  module: sae.Autoencoder
  objective: objectives.Objective
  sites: tuple[sites.Site, ...]
  targets: tuple[sites.Site, ...]
  setting: Setting
  seeds: tuple[int, ...]
  optimizer: optimizer.Optimizer

  def init(self, key: jax.Array) -> State:
    """Initial state; a member's depends only on key, seed and shape."""
    module = self.module

    def init_member(seed):
      params = self._initial(key, seed)
      return State(
        params,
        self.optimizer.transform().init(params),
        silent_tokens=jnp.zeros(module.latent_shape, jnp.int32),
        fired_share=jnp.zeros(module.latent_shape),
        theta=jnp.zeros(()),
        coefficient=jnp.float32(0.01),
        skipped=jnp.zeros((), jnp.int32),
      )

    return jax.vmap(init_member)(jnp.asarray(self.seeds, jnp.uint32))

  def _initial(self, key: jax.Array, seed: jax.Array):
    """A member's parameters before training."""
    module = self.module
    lead = (1, module.layers) if module.layers else (1,)
    x_BD = jax.ShapeDtypeStruct((*lead, module.d_in), jnp.float32)
    return module.lazy_init(jax.random.fold_in(key, seed), x_BD)['params']

  def shardings(self, mesh: Mesh):
    """The sharding of every leaf of a state, from the table above."""
    state = jax.eval_shape(self.init, jax.random.key(0))

    def sharding_of(path, leaf):
      name = getattr(path[-1], 'key', None) or getattr(path[-1], 'name', '')
      last = SHARDING.get(name, ())
      middle = (None,) * (leaf.ndim - 1 - len(last))
      return mesh_lib.sharding(mesh, 'sae', *middle, *last)

    return jax.tree_util.tree_map_with_path(sharding_of, state)

  def step(
    self,
    state: State,
    x_NBD: jax.Array,
    y_MBD: jax.Array,
    step: jax.Array,
    key: jax.Array,
    mesh: Mesh | None = None,
  ) -> tuple[State, dict[str, jax.Array]]:
    """One step of all members.

    Args:
      state: of all members.
      x_NBD: rows of each of `self.sites`, scaled so that E|x|^2 = 1, float32.
      y_MBD: rows of each of `self.targets`, the same.
      step: int32, counted from 0.
      key: of the run, folded with `step` for random numbers.
      mesh: the devices; None for one.

    Returns:
      The next state, and metrics as arrays [S].
    """
    places = mesh.shape['sae'] if mesh else 1

    def of_place(state, setting, seeds):
      """Steps the members of one device of the axis 'sae', one by one."""

      def step_one(i, carry):
        state, metrics = carry
        member = jax.tree.map(
          lambda a: mesh_lib.row_major(
            jax.lax.dynamic_index_in_dim(a, i, 0, False)
          ),
          Member(state, setting, seeds),
        )
        rows = (
          rows_at(x_NBD, member.setting.reads, self.module),
          rows_at(y_MBD, member.setting.writes, self.module),
        )
        stepped = self.step_member(member, rows, step, key, gradient_of)
        return jax.tree.map(
          lambda a, updated: jax.lax.dynamic_update_index_in_dim(
            a, mesh_lib.row_major(updated), i, 0
          ),
          carry,
          stepped,
        )

      count = len(seeds)
      empty = {name: jnp.zeros(count) for name in METRICS}
      return jax.lax.fori_loop(0, count, step_one, (state, empty))

    members = state, self.setting, jnp.asarray(self.seeds, jnp.uint32)
    room = objectives.Room(self.optimizer.active_limit, mesh)
    if places > 1:
      # Members that run in parallel must take the same branch.
      room = room._replace(
        agree=lambda fits: jax.lax.pmin(fits.astype(jnp.int32), 'place') > 0
      )
    objective = self.objective
    if mesh:
      objective = dataclasses.replace(objective, shards=mesh.shape['latent'])
    gradient_of = functools.partial(
      objectives.value_and_grad, self.module, objective, room=room
    )
    if places == 1:
      return of_place(*members)
    split = jax.tree.map(lambda a: a.reshape(places, -1, *a.shape[1:]), members)
    stepped = jax.vmap(of_place, axis_name='place', spmd_axis_name='sae')
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stepped(*split))

  def step_member(self, member: Member, rows, step, key, gradient_of):
    """One step of one member.

    Args:
      member: its state, setting and seed, without the axis S.
      rows: x_BD and y_BD.
      step, key: see `step`.
      gradient_of: (params, `objectives.Batch`) -> ((loss, terms), gradient).

    Returns:
      Its next state and its metrics, scalars.
    """
    o, state, value = self.optimizer, member.state, member.setting.value
    if self.objective.penalty in objectives.TARGETS:
      value = o.l0_target(value, step)
    batch = objectives.Batch(
      *rows,
      value=value,
      coefficient=state.coefficient,
      warm_up=o.sparsity_factor(step),
      dead_F=state.silent_tokens > o.dead_after,
    )
    (_, terms), gradient = gradient_of(state.params, batch)
    # A gradient that is not finite changes only the decay of the moments.
    finite = jnp.isfinite(optax.tree.norm(gradient))
    params, moments = self._updated(member, gradient, finite, step, key)
    state = self._counted(member, terms, value, finite, step)
    state = state.replace(params=params, moments=moments)
    if o.resample_every:
      key = jax.random.fold_in(jax.random.fold_in(key, step), member.seed)
      batch = batch._replace(value=member.setting.value)
      state = self._resampled(state, batch, step, key)
    return state, self.report(state, terms)

  def _updated(self, member: Member, gradient, finite, step, key):
    """Parameters and moments after a step down the gradient."""
    o, state = self.optimizer, member.state
    with jax.named_scope('optimizer'):
      if self.module.unit_decoder:
        gradient['W_dec'] = sae.remove_parallel(
          gradient['W_dec'], state.params['W_dec']
        )
      gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
      direction, moments = o.transform().update(gradient, state.moments)
      rate = o.rate_factor(step) * finite * member.setting.learning_rate
      params = {
        name: p - rate * self._rate_of(name) * direction[name]
        for name, p in state.params.items()
      }
      params = self.module.constrained(params)
      if member.setting.null is not None:
        params = self._held(member, params, key)
    return params, moments

  def _held(self, member: Member, params, key):
    """Restores the part of a null that is not trained."""
    null, before = member.setting.null, member.state.params
    frozen_decoder, soft, frozen_encoder = (
      null == 1 + specs.NULLS.index(name)
      for name in ('frozen_decoder', 'soft_frozen_decoder', 'frozen_encoder')
    )
    W_dec = jax.lax.cond(
      soft,
      lambda W_dec: sae.near(
        W_dec, self._initial(key, member.seed)['W_dec'], _SOFT_COSINE
      ),
      lambda W_dec: W_dec,
      jnp.where(frozen_decoder, before['W_dec'], params['W_dec']),
    )
    W_enc = jnp.where(frozen_encoder, before['W_enc'], params['W_enc'])
    return {**params, 'W_dec': W_dec, 'W_enc': W_enc}

  def _counted(self, member: Member, terms, value, finite, step) -> State:
    """Updates counters, running threshold and L1 coefficient."""
    o, state = self.optimizer, member.state
    with jax.named_scope('counters'):
      rows = terms.rows
      silent_F = jnp.where(
        terms.fired_F > 0,
        0,
        jnp.minimum(state.silent_tokens, jnp.iinfo(jnp.int32).max - rows)
        + rows,
      )
      share_F = 0.99 * state.fired_share + 0.01 * terms.fired_F / rows
      # A mean of all steps so far, then of the last 1 / (1 - decay).
      weight = jnp.maximum(1 - o.theta_decay, 1 / (step + 1.0))
      measured = jnp.where(finite, terms.theta, state.theta)
      theta = state.theta + weight * (measured - state.theta)
      coefficient = state.coefficient
      if self.objective.penalty == 'adaptive_l1':
        excess = jnp.where(finite, jnp.clip(terms.l0 / value - 1, -1, 1), 0)
        factor = o.rate_factor(step) * finite
        coefficient *= jnp.exp(o.adaptive_rate * factor * excess)
    return state.replace(
      silent_tokens=silent_F,
      fired_share=share_F,
      theta=theta,
      coefficient=coefficient,
      skipped=jnp.where(finite, 0, state.skipped + 1),
    )

  def report(self, state: State, terms) -> dict[str, jax.Array]:
    """One member's metrics after a step."""
    return {
      'loss': terms.loss,
      'squared_error': terms.squared_error,
      'fvu': terms.fvu,
      'l0': terms.l0,
      'dead': jnp.mean(state.silent_tokens > self.optimizer.dead_after),
      'dense': jnp.mean(state.fired_share > estimates.DENSE),
      'sparse_steps': terms.sparse,
      'steps_skipped': jnp.float32(state.skipped),
      **terms.more,
    }

  def _resampled(self, state, batch, step, key) -> State:
    """Resamples dead latents every `resample_every` steps."""

    def resample(state):
      dead_F = state.silent_tokens > self.optimizer.dead_after
      params, moments = resampling.resample(
        self.module,
        state.params,
        state.moments,
        batch._replace(dead_F=dead_F),
        key,
      )
      silent_F = jnp.where(dead_F, 0, state.silent_tokens)
      return state.replace(
        params=params, moments=moments, silent_tokens=silent_F
      )

    interval = self.optimizer.resample_every
    due = (step > 0) & (step % interval == 0)
    return jax.lax.cond(due, resample, lambda state: state, state)

  def _rate_of(self, name: str) -> float:
    return self.optimizer.threshold_rate if name.endswith('threshold') else 1.0

  def member_params(self, state: State, index: int) -> dict[str, jax.Array]:
    """One member's released parameters, in normalised space."""
    params = {name: value[index] for name, value in state.params.items()}
    return self.module.released(
      params, state.theta[index], self.setting.value[index]
    )


def rows_at(
  x_NBD: jax.Array, index: jax.Array, module: sae.Autoencoder
) -> jax.Array:
  """Rows of one site [B, D], of L layers [B, L, D], of two models [B, 2 D]."""
  x = x_NBD[index]
  if index.ndim == 0:
    return x
  x = jnp.moveaxis(x, 0, 1)
  return x if module.layers else x.reshape(len(x), -1)


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
  key: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[tuple[State, ...], tuple[dict[str, jax.Array], ...]]:
  """One step of every stack on one batch: site -> x [B, D]."""

  def stacked(sites_read):
    return jnp.stack([rows[site] for site in sites_read])

  results = [
    stack.step(
      state, stacked(stack.sites), stacked(stack.targets), step, key, mesh
    )
    for stack, state in zip(stacks, states, strict=True)
  ]
  states, metrics = zip(*results, strict=True)
  return states, metrics
