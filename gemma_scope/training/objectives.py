"""The loss of one SAE, a pure function of its parameters and a batch.

  L = mean_B |y - y_hat|^2 + warm_up * sparsity + further terms

where p_i is the fraction of rows on which latent i is active, L0 = sum_i p_i,
and n_i its decoder norm (1 with unit decoders). `value` is the SAE's setting:
the target L0* if the penalty has a target. The penalties:

  l0                   value L0                        GS 1, equation 4
  target_l0            strength (L0 / L0* - 1)^2       JumpReLU paper
  quadratic_l0         strength (prefactor / L0*) (L0 - L0*)^2     GS 2, eq. 5
  quadratic_frequency  value sum_i p_i (1 + p_i / p_0)      GDM, update 2
  tanh                 value mean_B sum_i tanh(c f_i n_i)   Anthropic, Jan 2025
  l1                   value mean_B sum_i f_i n_i           ReLU, Gated
  k                    none: TopK and BatchTopK keep `value` latents per row
  adaptive_l1          l1, with a coefficient adapted until L0 = L0* (`stack`)

The gradients of L0 and p reach only the thresholds (all parameters if
`ste_to_input` is set). Gemma Scope 2 prints the prefactor 2; with 1/2 the slope
at 2 L0* is that of the linear penalty. Further terms, off if their coefficient
is 0:

  frequency   c sum_i max(p_i - limit, 0)     latents that are active too often
  pre_act     c mean_B sum_i max(theta_i - z_i, 0) n_i    Anthropic, Jan 2025
  auxk        c |e - e_hat|^2 / Var[e], e = y - y_hat, e_hat from the `auxk`
              largest dead latents (arXiv 2406.04093, appendix A.2)

Gemma Scope 2 has an unpublished penalty on latents of high frequency; our own
form of it is `frequency`: the L0 penalty on the excess over a limit.

With `active_set` the error is the mean of two: |y - f W_dec - b_dec|^2, and the
same after one gradient step on the active latents:
  f1 = relu(f + a W_dec (y - y_hat))   where f > 0
  a  = |g|^2 / |g W_dec|^2             g = W_dec (y - y_hat) there
Decoders are then trained on latents closer to the least squares solution. The
released SAE does not have this step.

A Matryoshka SAE (arXiv 2503.17547) takes the mean of the error over nested
prefixes of its latents, the last of which is all of them. A Gated SAE adds the
error of its gate, decoded with frozen decoders, and an L1 penalty on the gate.

`value_and_grad` takes a sparse step (`sparse`) if all candidates of a batch
fit, and otherwise the dense step. Both give the same result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_scope import sae
from gemma_scope.sae import activation_functions, sparse
from gemma_scope.training import prefixes

# The penalties whose value is a target L0.
_TINY = 1e-12
TARGETS = ('target_l0', 'quadratic_l0', 'k', 'adaptive_l1')


@dataclasses.dataclass(frozen=True)
class Objective:
  """The terms of the loss; the same for all members of a stack.

  Attributes:
    penalty: the form of the sparsity term, see above.
    strength: coefficient of the forms that have a target.
    prefactor: of quadratic_l0.
    p0: frequency at which quadratic_frequency's second term equals the first.
    tanh_scale: c of tanh.
    frequency, frequency_limit: coefficient and limit of the frequency term.
    pre_act: coefficient.
    auxk, auxk_latents: coefficient; how many dead latents, 0 for d_out / 2.
    active_set: also train the reconstruction after one step on the active
      latents.
    prefixes: ends of the Matryoshka prefixes, of each layer's latents; the
      last is all of them.
    shards: number of devices that share the latents of each layer.
  """

  penalty: str
  strength: float = 1.0
  prefactor: float = 2.0
  p0: float = 0.01
  tanh_scale: float = 4.0
  frequency: float = 0.0
  frequency_limit: float = 0.1
  pre_act: float = 0.0
  auxk: float = 0.0
  auxk_latents: int = 0
  active_set: bool = False
  prefixes: tuple[int, ...] = ()
  shards: int = 1

  @property
  def needs_all(self) -> bool:
    """Whether latents far below their threshold have a gradient."""
    return bool(self.pre_act)


class Terms(NamedTuple):
  """Results of a step of one member; scalars except `fired_F`."""

  loss: jax.Array
  squared_error: jax.Array  # mean over rows of |y - y_hat|^2
  fvu: jax.Array  # of this batch, around the batch's mean vector
  l0: jax.Array
  fired_F: (
    jax.Array
  )  # number of rows of this batch on which each latent was active
  rows: jax.Array  # int32, of this batch
  theta: jax.Array  # the smallest latent that BatchTopK kept
  sparse: jax.Array  # 1 for a sparse step, else 0
  more: dict[str, jax.Array]  # scalars that `fidelity` reports


class Batch(NamedTuple):
  """The inputs of the loss of one SAE, besides its parameters."""

  x_BD: jax.Array  # rows, E|x|^2 = 1, float32; [B, L, D] with several layers
  y_BD: jax.Array  # to reconstruct: x itself, or a transcoder's target
  value: jax.Array  # the member's sparsity setting
  coefficient: jax.Array  # of adaptive_l1
  warm_up: jax.Array  # factor in [0, 1] on the sparsity and frequency terms
  dead_F: jax.Array  # bool, which latents count as dead


class Encoded(NamedTuple):
  """x W_enc^T if it is known, for all latents or for the candidates."""

  projected: jax.Array
  candidates: sparse.Candidates | None = None


class Room(NamedTuple):
  """When a step is sparse.

  Attributes:
    limit: maximum number of candidates per row (in each layer and each shard of
      latents); 0 for dense steps.
    mesh: the devices; None for one.
    agree: whether the batches of all SAEs that run in parallel fit.
  """

  limit: int = 0
  mesh: Mesh | None = None
  agree: Callable[[jax.Array], jax.Array] = lambda fits: fits


def loss(
  module: sae.Autoencoder,
  objective: Objective,
  params: dict[str, Any],
  batch: Batch,
  encoded: Encoded | None = None,
  fidelity: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None,
) -> tuple[jax.Array, Terms]:
  """Loss and report of one SAE on a batch.

  Args:
    module: the architecture.
    objective: the terms.
    params: the module's parameters.
    batch: see `Batch`.
    encoded: x W_enc^T if it is known.
    fidelity: maps the reconstruction term and y_hat_BD to the term that
      replaces it, and metrics; None keeps the reconstruction term.

  Returns:
    The scalar to differentiate, and `Terms`.
  """
  bound = module.bind({'params': params})
  x_BD, y_BD = batch.x_BD, batch.y_BD
  projected, candidates = encoded or Encoded(bound.project(x_BD))
  latents = bound.activate(projected, batch.value, candidates)
  # Per-latent values for each row, and sums over rows: [F] -> [B, F] -> [F].
  if candidates is None:
    at_latents, over_rows = lambda v: v, lambda a: jnp.sum(a, 0)
  else:
    at_latents, over_rows = candidates.at, candidates.total
  with jax.named_scope('objective'):
    remaining_BD = y_BD - bound.offset(x_BD)
    errors = []
    for added_BD in _added(bound, objective, latents.f_BF, candidates):
      remaining_BD = remaining_BD - added_BD
      errors.append(_mean_square(remaining_BD))
    squared_error = errors[-1]
    reconstruction, more = sum(errors) / len(errors), {}
    if objective.active_set:
      step_BD = bound.write(
        _active_set_step(bound, latents, remaining_BD, candidates),
        candidates=candidates,
      )
      reconstruction = (
        reconstruction + _mean_square(remaining_BD - step_BD)
      ) / 2
    if fidelity is not None:
      reconstruction, more = fidelity(reconstruction, y_BD - remaining_BD)
    rows = x_BD.shape[0]
    fired_F = over_rows(latents.active_BF)
    norms = 1.0 if module.unit_decoder else at_latents(bound.norms())
    penalty = _penalty(objective, latents, fired_F / rows, norms, batch)
    total = reconstruction + batch.warm_up * penalty
    if latents.gate_BF is not latents.f_BF:
      total += _gate_error(
        module, params, latents.gate_BF, x_BD, y_BD, candidates
      )
    if objective.pre_act:
      short_BF = jax.nn.relu(latents.theta - latents.z_BF) * norms
      total += objective.pre_act * jnp.sum(short_BF) / rows
    if objective.auxk:
      z_BF = latents.z_BF if candidates is None else None
      total += objective.auxk * _auxk(
        objective, module, params, batch, remaining_BD, z_BF
      )
    variance = _mean_square(y_BD - jnp.mean(y_BD, 0))
  terms = Terms(
    total,
    squared_error,
    squared_error / variance,
    jnp.sum(fired_F) / rows,
    fired_F,
    jnp.int32(rows),
    jnp.float32(latents.least),
    jnp.float32(candidates is not None),
    more,
  )
  return total, jax.lax.stop_gradient(terms)


def value_and_grad(
  module: sae.Autoencoder,
  objective: Objective,
  params: dict[str, Any],
  batch: Batch,
  room: Room,
):
  """`loss` and its gradient in `params`; a sparse step if that is exact.

  Returns:
    ((loss, `Terms`), gradient).
  """
  full_loss = functools.partial(loss, module, objective, batch=batch)
  if not room.limit or objective.needs_all:
    return jax.value_and_grad(full_loss, has_aux=True)(params)

  def of_encoded(params, projected, candidates):
    return full_loss(params, encoded=Encoded(projected, candidates))

  gradient = jax.value_and_grad(of_encoded, argnums=(0, 1), has_aux=True)
  bound = module.bind({'params': params})
  fused = bound.encode_candidates(batch.x_BD, room.limit, room.mesh)
  if fused is None:
    # Both branches share the encoder's matmul.
    projected_BF, transpose = jax.vjp(
      lambda params: module.apply(
        {'params': params}, batch.x_BD, method='project'
      ),
      params,
    )
    candidates = sparse.Candidates.of_mask(
      bound.may_act(projected_BF, batch.value, 4 * room.limit),
      room.limit,
      room.mesh,
      module.matmul_dtype,
    )
  else:
    candidates, kept_BK = fused
  fits = candidates.most <= candidates.count
  if objective.auxk:  # a sparse step knows no other latents
    fits &= jnp.sum(batch.dead_F) <= _few(objective, module)

  def sparse_way(params):
    projected_BK = candidates.values(projected_BF) if fused is None else kept_BK
    result, (gradients, outer_BK) = gradient(params, projected_BK, candidates)
    bound = module.bind({'params': params})
    encoder = bound.encoder_gradient(outer_BK, batch.x_BD, candidates)
    return result, {
      **gradients,
      **{n: gradients[n] + g for n, g in encoder.items()},
    }

  def dense_way(params):
    if fused is not None:
      return jax.value_and_grad(full_loss, has_aux=True)(params)
    result, (gradients, outer_BF) = gradient(params, projected_BF, None)
    (encoder,) = transpose(outer_BF)
    return result, jax.tree.map(jnp.add, gradients, encoder)

  return jax.lax.cond(room.agree(fits), sparse_way, dense_way, params)


def _mean_square(x_BD) -> jax.Array:
  """Mean over rows of the squared norm, all layers together."""
  return jnp.sum(jnp.square(x_BD)) / x_BD.shape[0]


def _added(bound, objective, f_BF, candidates):
  """What each Matryoshka prefix adds, or all latents at once."""
  if not objective.prefixes:
    return [bound.write(f_BF, candidates=candidates)]
  ends, shards = objective.prefixes, objective.shards
  return prefixes.added(bound, ends, shards, f_BF, candidates)


def _penalty(objective, latents, p_F, norms, batch) -> jax.Array:
  """Sparsity and frequency terms of one member."""
  l0, o = jnp.sum(p_F), objective
  value, rows = batch.value, batch.x_BD.shape[0]
  match o.penalty:
    case 'l0':
      penalty = value * l0
    case 'target_l0':
      penalty = o.strength * jnp.square(l0 / value - 1)
    case 'quadratic_l0':
      penalty = o.strength * o.prefactor / value * jnp.square(l0 - value)
    case 'quadratic_frequency':
      penalty = value * jnp.sum(p_F * (1 + p_F / o.p0))
    case 'tanh':
      bent_BF = jnp.tanh(o.tanh_scale * latents.f_BF * norms)
      penalty = value * jnp.sum(bent_BF) / rows
    case 'l1' | 'adaptive_l1':
      weight = value if o.penalty == 'l1' else batch.coefficient
      penalty = weight * jnp.sum(latents.gate_BF * norms) / rows
    case 'k':
      penalty = jnp.float32(0)
    case _:
      raise ValueError(f'There is no penalty {o.penalty!r}.')
  if o.frequency:
    excess_F = jax.nn.relu(p_F - o.frequency_limit)
    penalty += o.frequency * jnp.sum(excess_F)
  return penalty


def _active_set_step(bound, latents, error_BD, candidates) -> jax.Array:
  """Change of the active latents in one step with exact line search."""
  f_BF = latents.f_BF
  fires_BF = jax.lax.stop_gradient(latents.active_BF) > 0
  slope_BF = jnp.where(fires_BF, bound.read(error_BD, candidates), 0)
  along_BD = bound.write(slope_BF, candidates=candidates)
  axes = tuple(
    range(1, f_BF.ndim)
  )  # includes layers: D and F have the same number of axes
  length_B = jnp.sum(jnp.square(slope_BF), axes, keepdims=True)
  length_B /= jnp.maximum(
    jnp.sum(jnp.square(along_BD), axes, keepdims=True), _TINY
  )
  return jnp.where(fires_BF, jax.nn.relu(f_BF + length_B * slope_BF) - f_BF, 0)


def _gate_error(module, params, gate_BF, x_BD, y_BD, candidates) -> jax.Array:
  """Error of a Gated SAE's gate, decoded with a frozen decoder."""
  decoder = ('W_dec', 'b_dec', 'W_skip')
  frozen = {
    name: jax.lax.stop_gradient(p) if name in decoder else p
    for name, p in params.items()
  }
  bound = module.bind({'params': frozen})
  gate_BD = bound.write(gate_BF, candidates=candidates)
  return _mean_square(y_BD - gate_BD - bound.offset(x_BD))


def _few(objective, module) -> int:
  """So many dead latents are all chosen, in every row."""
  if module.layers:
    return 0
  return min(objective.auxk_latents or module.d_out // 2, module.width)


def _auxk(objective, module, params, batch, error_BD, z_BF):
  """Fraction of the error's variance that the dead latents do not explain.

  The largest dead latents of each row are chosen; where there are no more than
  are wanted, only their rows of the parameters are read. Without z_BF (in a
  sparse step, which has no more dead latents) that is the only way.
  """
  error_BD = jax.lax.stop_gradient(error_BD)
  count, few = jnp.sum(batch.dead_F), _few(objective, module)

  def by_all(params):
    wanted = objective.auxk_latents or module.d_out // 2
    f_BF = jnp.where(batch.dead_F, jax.nn.relu(z_BF), 0)
    kept = jnp.clip(count, 1, wanted)
    least = activation_functions.kth_of_row(f_BF, kept)
    f_BF = jnp.where(f_BF >= least, f_BF, 0)
    return module.bind({'params': params}).write(f_BF)

  def by_few(params):
    (index_K,) = jnp.nonzero(batch.dead_F, size=few, fill_value=0)
    dead = {
      name: p if name in ('b_dec', 'W_skip') else p[index_K]
      for name, p in params.items()
    }
    bound = module.clone(width=few).bind({'params': dead})
    z_BK = bound.activate(bound.project(batch.x_BD), batch.value).z_BF
    return bound.write(jnp.where(jnp.arange(few) < count, jax.nn.relu(z_BK), 0))

  if not few:  # a sparse step has no dead latents then
    explained_BD = 0 if z_BF is None else by_all(params)
  elif z_BF is not None:
    explained_BD = jax.lax.cond(count <= few, by_few, by_all, params)
  else:
    explained_BD = by_few(params)
  remaining = _mean_square(error_BD - explained_BD)
  variance = _mean_square(error_BD - jnp.mean(error_BD, 0))
  share = remaining / jnp.maximum(variance, 1e-12)
  return jnp.where(count > 0, share, 0)
