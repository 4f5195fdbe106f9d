"""The closing phase: thresholds at the target L0, decoders by least squares.

Training ends with an L0 a few per cent off its target, where the penalty and
the error balance, and with decoders that lag behind the latents. With a frozen
encoder both have a direct solution, from batches of the last chunk of rows:

  thresholds  the factor on theta (JumpReLU), the threshold (BatchTopK) or the
              shift of b_gate (Gated) at which a batch of B rows has k B active
              latents, averaged over the batches
  decoders    (G + ridge) dW = mean f (y - y_hat),  G = mean f f^T,
              both centred; b_dec follows from the means

The ridge pulls each decoder towards its trained value, with the weight of
`_PRIOR` activations of that latent, so that rare latents hardly move. The
solver is conjugate gradients, preconditioned with the diagonal of G: one matmul
with G [F, F] per iteration. Latents and L0 do not change: b_enc compensates for
the change of b_dec, and the decoder norms are folded at release.

The result is a function of the config and the last step, so a run that is
stopped in this phase repeats it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites, specs
from gemma_scope.training import objectives, stack

_PRIOR = 10.0  # activations that the trained decoder counts for
_ITERATIONS = 60  # at most
_TOLERANCE = 1e-4  # of the residual, against the right-hand side

Rows = Mapping[sites.Site, jax.Array]


class Batches:
  """Iterates over the first batches of the run's last chunk, normalised.

  Args:
    feed: `chunks.Feed`.
    step: the run's last, from 0.
    count: number of batches, at most.
    normalisation: of each site, on the devices.
    poll: called between batches; may raise.
  """

  def __init__(self, feed, step: int, count: int, normalisation, poll):
    self._feed = feed
    self._first, self._last = feed.of_chunk(step, count)
    self._poll = poll
    self._normalise = jax.jit(
      lambda batch: {
        site: normalisation[site].apply(x_BD.astype(jnp.float32))
        for site, x_BD in batch.items()
      }
    )

  def __call__(self) -> Iterator[Rows]:
    for step in range(self._first, self._last):
      self._poll()
      yield self._normalise(self._feed.at(step, self._poll))


def close(
  train: ConfigDict,
  stacks: Sequence[stack.Stack],
  states: Sequence[stack.State],
  batches: Callable[[], Iterable[Rows]],
  mesh: Mesh,
  report: Callable[[str], None],
) -> tuple[stack.State, ...]:
  """The states after the phases that the config's section `train` asks for."""
  closed = []
  for stack_, state in zip(stacks, states, strict=True):
    if train.meet_l0 and stack_.objective.penalty in objectives.TARGETS:
      report(
        f'setting the thresholds of {len(stack_.seeds)} SAEs to the target L0'
      )
      state = meet_l0(stack_, state, batches(), mesh)
    if train.refit_decoders:
      report(
        f'fitting the decoders of {len(stack_.seeds)} SAEs by least squares'
      )
      state = refit_decoders(stack_, state, batches, mesh)
    closed.append(state)
  return tuple(closed)


def meet_l0(
  stack_: stack.Stack,
  state: stack.State,
  batches: Iterable[Rows],
  mesh: Mesh | None = None,
) -> stack.State:
  """Sets the thresholds so that each member has its target L0.

  Args:
    stack_: the stack; its penalty has a target.
    state: after the last step.
    batches: normalised rows by site, the same for all stacks.
    mesh: the state keeps its sharding on it.
  """

  @jax.jit
  def of_batch(state, rows):
    def of_member(member):
      params, setting = member
      x_BD = _at(rows, stack_.sites, setting.reads, stack_.module)
      return stack_.module.threshold_at(params, x_BD, setting.value)

    return jax.lax.map(of_member, (state.params, stack_.setting))

  values_S = [of_batch(state, rows) for rows in batches]
  mean_S = jnp.mean(jnp.stack(values_S), 0)
  params, theta_S = jax.jit(jax.vmap(stack_.module.with_threshold_at))(
    state.params, state.theta, mean_S
  )
  return _placed(stack_, state.replace(params=params, theta=theta_S), mesh)


class Sums(NamedTuple):
  """Sums over batches of their means: N latents, M outputs of all layers."""

  ff_NN: jax.Array
  fe_NM: jax.Array  # e = y - y_hat
  f_N: jax.Array
  e_M: jax.Array
  fires_N: jax.Array
  batches: jax.Array


def refit_decoders(
  stack_: stack.Stack,
  state: stack.State,
  batches: Callable[[], Iterable[Rows]],
  mesh: Mesh | None = None,
) -> stack.State:
  """Sets decoders and b_dec to the least squares solution.

  Args:
    stack_: the stack.
    state: after the last step.
    batches: iterates over normalised rows by site, once for each member.
    mesh: the rows of G are sharded over its 'latent' axis.
  """
  by_latent = _by_latent(mesh)
  add = jax.jit(functools.partial(_add, stack_, by_latent), donate_argnums=0)
  solve = jax.jit(functools.partial(_solve, stack_.module))
  empty = jax.jit(functools.partial(_empty, stack_.module, by_latent))
  params = dict(state.params)
  null_S = stack_.setting.null
  frozen = [
    1 + specs.NULLS.index(null) for null in specs.NULLS if 'decoder' in null
  ]
  for i in range(len(stack_.seeds)):
    if null_S is not None and int(null_S[i]) in frozen:
      continue
    member = {name: value[i] for name, value in state.params.items()}
    setting = jax.tree.map(lambda a, i=i: a[i], stack_.setting)
    sums, rows_seen = empty(), 0
    for rows in batches():
      sums = add(sums, member, setting, rows)
      rows_seen += len(next(iter(rows.values())))
    solved = solve(member, sums, jnp.float32(rows_seen))
    params = {name: p.at[i].set(solved[name]) for name, p in params.items()}
  return _placed(stack_, state.replace(params=params), mesh)


def _sizes(module) -> tuple[int, int]:
  """N, latents of all layers, and M, outputs of all layers."""
  return math.prod(module.latent_shape), module.d_out * max(module.layers, 1)


def _empty(module, by_latent) -> Sums:
  N, M = _sizes(module)
  return Sums(
    by_latent(jnp.zeros((N, N))),
    by_latent(jnp.zeros((N, M))),
    jnp.zeros(N),
    jnp.zeros(M),
    jnp.zeros(N),
    jnp.zeros(()),
  )


def _add(stack_, by_latent, sums, params, setting, rows) -> Sums:
  """The sums with a batch added."""
  N, M = _sizes(stack_.module)
  x_BD = _at(rows, stack_.sites, setting.reads, stack_.module)
  y_BD = _at(rows, stack_.targets, setting.writes, stack_.module)
  bound = stack_.module.bind({'params': params})
  f_BF = bound.latents(x_BD, setting.value).f_BF
  e_BM = (y_BD - bound.write(f_BF) - bound.offset(x_BD)).reshape(-1, M)
  f_BN = f_BF.reshape(-1, N)
  batch = Sums(
    by_latent(_mean_product(f_BN, f_BN)),
    by_latent(_mean_product(f_BN, e_BM)),
    jnp.mean(f_BN, 0),
    jnp.mean(e_BM, 0),
    jnp.sum(f_BN > 0, 0).astype(jnp.float32),
    jnp.float32(1),
  )
  return jax.tree.map(jnp.add, sums, batch)


def _solve(module, params, sums, rows_seen):
  """One member's parameters with the decoders of least squares."""
  N, M = _sizes(module)
  n = sums.batches
  f_N, e_M = sums.f_N / n, sums.e_M / n
  fires = jnp.maximum(jnp.sum(sums.fires_N), 1) / rows_seen
  ridge = _PRIOR / rows_seen * jnp.trace(sums.ff_NN) / n / fires
  causal_NM = _causal(module).reshape(N, M)

  def apply(v_NM):
    """(G + ridge) v with G centred, on the entries that may be nonzero."""
    g_NM = _matmul(sums.ff_NN, v_NM) / n - f_N[:, None] * (f_N @ v_NM)
    return causal_NM * (g_NM + ridge * v_NM)

  right_NM = causal_NM * (sums.fe_NM / n - f_N[:, None] * e_M)
  diagonal_N = jnp.diagonal(sums.ff_NN) / n - f_N**2 + ridge
  diagonal_N = jnp.maximum(diagonal_N, 1e-12)  # where no latent was active
  change_NM = conjugate_gradients(apply, right_NM, diagonal_N[:, None])
  *lead, latents = module.latent_shape
  change = change_NM.reshape(*lead, latents, *lead, module.d_out)
  if lead:  # [L, F, M, D] -> [L, M, F, D]
    change = jnp.swapaxes(change, 1, 2)
  moved = (e_M - f_N @ change_NM).reshape(params['b_dec'].shape)
  W_dec = params['W_dec'] + change
  return module.with_b_dec({**params, 'W_dec': W_dec}, params['b_dec'] + moved)


def _placed(stack_: stack.Stack, state: stack.State, mesh: Mesh | None):
  """Restores the sharding of the state."""
  if mesh is None:
    return state
  return jax.jit(lambda state: state, out_shardings=stack_.shardings(mesh))(
    state
  )


def conjugate_gradients(apply, right_NM, diagonal_N1) -> jax.Array:
  """Solves apply(x) = right, each column separately.

  Args:
    apply: a symmetric positive definite linear map of [N, M].
    right_NM: right-hand sides.
    diagonal_N1: the diagonal of the map, used as preconditioner.
  """
  dot = lambda a, b: jnp.sum(a * b, 0)  # noqa: E731
  ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)  # noqa: E731
  enough = _TOLERANCE**2 * jnp.sum(jnp.square(right_NM))

  def unfinished(carry):
    i, _, residual_NM, *_ = carry
    return (i < _ITERATIONS) & (jnp.sum(jnp.square(residual_NM)) > enough)

  def iterate(carry):
    i, x_NM, residual_NM, along_NM, size_M = carry
    image_NM = apply(along_NM)
    length_M = ratio(size_M, dot(along_NM, image_NM))
    x_NM += length_M * along_NM
    residual_NM -= length_M * image_NM
    scaled_NM = residual_NM / diagonal_N1
    new_M = dot(residual_NM, scaled_NM)
    along_NM = scaled_NM + ratio(new_M, size_M) * along_NM
    return i + 1, x_NM, residual_NM, along_NM, new_M

  scaled_NM = right_NM / diagonal_N1
  start = (
    jnp.int32(0),
    jnp.zeros_like(right_NM),
    right_NM,
    scaled_NM,
    dot(right_NM, scaled_NM),
  )
  return jax.lax.while_loop(unfinished, iterate, start)[1]


def _at(
  rows: Rows, sites_read: tuple[sites.Site, ...], index, module
) -> jax.Array:
  stacked_NBD = jnp.stack([rows[site] for site in sites_read])
  return stack.rows_at(stacked_NBD, index, module)


def _matmul(a, b):
  return jnp.matmul(a, b, precision='highest')


def _mean_product(a_BN, b_BM):
  return jnp.einsum('bn,bm->nm', a_BN, b_BM, precision='highest') / len(a_BN)


def _causal(module) -> jax.Array:
  """1 where a latent writes, 0 to earlier layers; [L, F, L, D] or [F, D]."""
  *lead, latents = module.latent_shape
  shape = (*lead, latents, *lead, module.d_out)
  if not lead:
    return jnp.ones(shape)
  later_LL = jnp.triu(jnp.ones((*lead, *lead)))
  return jnp.broadcast_to(later_LL[:, None, :, None], shape)


def _by_latent(mesh: Mesh | None):
  """A function that shards an array's first axis over latents."""
  if mesh is None:
    return lambda a: a
  place = mesh_lib.sharding(mesh, 'latent', None)
  return lambda a: jax.lax.with_sharding_constraint(a, place)
