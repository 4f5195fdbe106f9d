"""What follows the last step: thresholds at the target L0, decoders anew.

Training leaves L0 a few per cent off its target (a penalty gives way to the
error), and decoders that trail the latents that they are multiplied with. Both
have exact answers for frozen encoders, from the rows of the last n steps:

  thresholds  in each batch of B rows, the factor on theta (JumpReLU), the
              threshold (BatchTopK) or the shift of b_gate (Gated) at which
              k B latents fire; its mean over the batches
  decoders    (G + ridge) dW = mean f (y - y_hat),  G = mean f f^T
              around the means, b_dec from the means

The ridge holds each decoder where training left it, as if it had been right on
`_PRIOR` more firings: what is rare hardly moves. Solved by conjugate gradients
with the diagonal of G as preconditioner, one matmul with G [F, F] an iteration.
Latents and L0 stay as they are: b_enc takes up what b_dec moves by, and the
norms of the new decoders are folded where the SAE is released.

All of it is a function of the config and the last step: a run that is stopped
here does it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites, specs
from gemma_scope.training import stack

_PRIOR = 10.0  # firings that a decoder's present value counts for
_ITERATIONS = 60  # at most
_TOLERANCE = 1e-4  # of the residual, against the right-hand side

Rows = Mapping[sites.Site, jax.Array]


class Batches:
  """The first batches of the run's last chunk, normalised, from the start.

  Args:
    feed: `chunks.Feed`.
    step: the run's last, from 0.
    count: how many, if the chunk has as many.
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


def meet_l0(
  one: stack.Stack,
  state: stack.State,
  batches: Iterable[Rows],
  mesh: Mesh | None = None,
) -> stack.State:
  """The state with thresholds at which its members have their target L0.

  Args:
    one: the stack; its penalty has a target.
    state: after the last step.
    batches: normalised rows by site, the same for all stacks.
    mesh: the state keeps its sharding on it.
  """

  @jax.jit
  def of_batch(state, rows):
    def of_member(member):
      params, setting = member
      x_BD = _at(rows, one.sites, setting.reads)
      return one.module.threshold_at(params, x_BD, setting.value)

    return jax.lax.map(of_member, (state.params, one.setting))

  values_S = [of_batch(state, rows) for rows in batches]
  mean_S = jnp.mean(jnp.stack(values_S), 0)
  params, theta_S = jax.jit(jax.vmap(one.module.with_threshold_at))(
    state.params, state.theta, mean_S
  )
  return _placed(one, state.replace(params=params, theta=theta_S), mesh)


class Sums(NamedTuple):
  """Means over the rows so far: N latents of all layers, outputs [M]."""

  ff_NN: jax.Array
  fe_NM: jax.Array  # e = y - y_hat
  f_N: jax.Array
  e_M: jax.Array
  fires_N: jax.Array
  batches: jax.Array


def refit_decoders(
  one: stack.Stack,
  state: stack.State,
  batches: Callable[[], Iterable[Rows]],
  mesh: Mesh | None = None,
) -> stack.State:
  """The state with decoders and b_dec that minimise the squared error.

  Args:
    one: the stack.
    state: after the last step.
    batches: gives normalised rows by site, from the start for each member.
    mesh: G's rows lie on its 'latent' axis.
  """
  module = one.module
  shape = module.latent_shape
  N = int(jnp.prod(jnp.array(shape)))
  M = module.d_out * max(module.layers, 1)
  by_latent = _by_latent(mesh)

  @functools.partial(jax.jit, donate_argnums=0)
  def add(sums, params, setting, rows):
    x_BD = _at(rows, one.sites, setting.reads)
    y_BD = _at(rows, one.targets, setting.writes)
    bound = module.bind({'params': params})
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

  @jax.jit
  def solved(params, sums, rows_seen):
    n = sums.batches
    f_N, e_M = sums.f_N / n, sums.e_M / n
    fires = jnp.maximum(jnp.sum(sums.fires_N), 1) / rows_seen
    ridge = _PRIOR / rows_seen * jnp.trace(sums.ff_NN) / n / fires
    causal_NM = _causal(module).reshape(N, M)

    def apply(v_NM):
      """(G + ridge) v, around the means, on the entries that may write."""
      g_NM = _matmul(sums.ff_NN, v_NM) / n - f_N[:, None] * (f_N @ v_NM)
      return causal_NM * (g_NM + ridge * v_NM)

    right_NM = causal_NM * (sums.fe_NM / n - f_N[:, None] * e_M)
    diagonal_N = jnp.diagonal(sums.ff_NN) / n - f_N**2 + ridge
    diagonal_N = jnp.maximum(diagonal_N, 1e-12)  # where nothing ever fired
    change_NM = conjugate_gradients(apply, right_NM, diagonal_N[:, None])
    lead = shape[:-1]
    change = change_NM.reshape(*shape, *lead, module.d_out)
    if lead:  # [L, F, M, D] -> [L, M, F, D]
      change = jnp.swapaxes(change, 1, 2)
    b_dec = params['b_dec'] + (e_M - f_N @ change_NM).reshape(
      params['b_dec'].shape
    )
    W_dec = params['W_dec'] + change
    return module.with_b_dec({**params, 'W_dec': W_dec}, b_dec)

  @jax.jit
  def empty():
    zero_NN, zero_NM = jnp.zeros((N, N)), jnp.zeros((N, M))
    return Sums(
      by_latent(zero_NN), by_latent(zero_NM), jnp.zeros(N), jnp.zeros(M),
      jnp.zeros(N), jnp.zeros(()),
    )  # fmt: skip

  params = dict(state.params)
  null_S = one.setting.null
  frozen = [1 + specs.NULLS.index(n) for n in specs.NULLS if 'decoder' in n]
  for i in range(len(one.seeds)):
    if null_S is not None and int(null_S[i]) in frozen:
      continue
    member = {name: value[i] for name, value in state.params.items()}
    setting = jax.tree.map(lambda a, i=i: a[i], one.setting)
    sums, rows_seen = empty(), 0
    for rows in batches():
      sums = add(sums, member, setting, rows)
      rows_seen += len(next(iter(rows.values())))
    new = solved(member, sums, jnp.float32(rows_seen))
    params = {name: p.at[i].set(new[name]) for name, p in params.items()}
  return _placed(one, state.replace(params=params), mesh)


def _placed(one: stack.Stack, state: stack.State, mesh: Mesh | None):
  """The state in its sharding."""
  if mesh is None:
    return state
  return jax.jit(lambda state: state, out_shardings=one.shardings(mesh))(state)


def conjugate_gradients(apply, right_NM, diagonal_N1) -> jax.Array:
  """x with apply(x) = right, for each column by itself.

  Args:
    apply: a symmetric positive definite linear map of [N, M].
    right_NM: right-hand sides.
    diagonal_N1: of the map, the preconditioner.
  """
  dot = lambda a, b: jnp.sum(a * b, 0)  # noqa: E731
  ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)  # noqa: E731
  enough = _TOLERANCE**2 * jnp.sum(jnp.square(right_NM))

  def going(carry):
    i, _, left_NM, *_ = carry
    return (i < _ITERATIONS) & (jnp.sum(jnp.square(left_NM)) > enough)

  def iterate(carry):
    i, x_NM, left_NM, along_NM, size_M = carry
    image_NM = apply(along_NM)
    length_M = ratio(size_M, dot(along_NM, image_NM))
    x_NM += length_M * along_NM
    left_NM -= length_M * image_NM
    scaled_NM = left_NM / diagonal_N1
    new_M = dot(left_NM, scaled_NM)
    along_NM = scaled_NM + ratio(new_M, size_M) * along_NM
    return i + 1, x_NM, left_NM, along_NM, new_M

  scaled_NM = right_NM / diagonal_N1
  start = (
    jnp.int32(0), jnp.zeros_like(right_NM), right_NM, scaled_NM,
    dot(right_NM, scaled_NM),
  )  # fmt: skip
  return jax.lax.while_loop(going, iterate, start)[1]


def _at(rows: Rows, at: tuple[sites.Site, ...], index) -> jax.Array:
  return stack.rows_at(jnp.stack([rows[site] for site in at]), index)


def _matmul(a, b):
  return jnp.matmul(a, b, precision='highest')


def _mean_product(a_BN, b_BM):
  return jnp.einsum('bn,bm->nm', a_BN, b_BM, precision='highest') / len(a_BN)


def _causal(module) -> jax.Array:
  """1 where a latent may write, [L, F, L, D] or [F, D]."""
  *lead, latents = module.latent_shape
  shape = (*lead, latents, *lead, module.d_out)
  if not lead:
    return jnp.ones(shape)
  later_LL = jnp.triu(jnp.ones((*lead, *lead)))
  return jnp.broadcast_to(later_LL[:, None, :, None], shape)


def _by_latent(mesh: Mesh | None):
  """Constrains an array's first axis to the mesh's latents."""
  if mesh is None:
    return lambda a: a
  place = mesh_lib.sharding(mesh, 'latent', None)
  return lambda a: jax.lax.with_sharding_constraint(a, place)
