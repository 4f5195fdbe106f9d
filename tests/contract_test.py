"""What every architecture and type of SAE must do, one test for all of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import config_fields, mesh, release, sae, sites
from gemma_scope.sae import architectures, fold
from gemma_scope.training import objectives, stack
from gemma_scope.training import optimizer as optimizer_lib
from tests.helpers import releases

pytestmark = pytest.mark.usefixtures('short_loops')
D, F, B, L = 8, 24, 64, 3
LOW, HIGH = 2.0, 6.0  # target L0s
RESAMPLED = 1000  # the step in which dead latents are


@dataclasses.dataclass(frozen=True)
class Case:
  """One architecture as one type of SAE."""

  type: str
  base: str
  penalty: str
  values: tuple[float, float] = (LOW, HIGH)  # in the order of rising L0
  skip: bool = False
  module: tuple = ()  # further options of the module
  objective: tuple = ()

  def __str__(self):
    words = (self.type, self.base, self.penalty)
    words += ('skip',) * self.skip
    return '-'.join((*words, *(name for name, _ in self.objective)))


JUMP = (('bandwidth', 0.2), ('initial_threshold', 0.1))
PREFIXES = (('prefixes', (2, 4, 8)),)
AUXK = (('auxk', 1 / 32),)
CASES = [
  Case('sae', 'jumprelu', 'target_l0', module=JUMP, objective=PREFIXES),
  Case('sae', 'jumprelu', 'l0', (0.1, 0.0), module=JUMP,
       objective=(('frequency', 0.1),)),
  Case('sae', 'jumprelu', 'target_l0', module=JUMP,
       objective=(('active_set', True),)),
  Case('crosscoder', 'batch_topk', 'k', objective=(('active_set', True),)),
  Case('sae', 'jumprelu', 'quadratic_frequency', (0.3, 0.0), module=JUMP),
  Case('sae', 'jumprelu', 'tanh', (1.0, 0.0),
       module=(*JUMP, ('unit_decoder', False)),
       objective=(('pre_act', 1e-3),)),
  Case('sae', 'topk', 'k', objective=AUXK),
  Case('sae', 'batch_topk', 'k', objective=PREFIXES),
  Case('sae', 'gated', 'l1', (1.0, 0.0)),
  Case('sae', 'relu', 'adaptive_l1'),
  Case('transcoder', 'jumprelu', 'target_l0', module=JUMP),
  Case('transcoder', 'topk', 'k', skip=True),
  Case('crosscoder', 'jumprelu', 'target_l0', module=JUMP, objective=PREFIXES),
  Case('crosscoder', 'topk', 'k', objective=AUXK),
  Case('clt', 'jumprelu', 'target_l0', module=JUMP, skip=True),
  Case('clt', 'batch_topk', 'k'),
]  # fmt: skip
# One of each pair of architecture and type: what a mesh does to it.
KINDS = list({(case.type, case.base): case for case in CASES}.values())


def covering(cases: list[Case]) -> list[Case]:
  """Some of the cases, with every architecture, type and active set of all."""
  chosen, seen = [], set()
  for case in cases:
    has = {case.type, case.base, 'active_set' in dict(case.objective)}
    if not has <= seen:
      chosen.append(case)
      seen |= has
  return chosen


# Of those whose objective the sparse way can serve: each costs seconds to
# compile.
SPARSE = covering([c for c in CASES if 'pre_act' not in dict(c.objective)])
every_case = pytest.mark.parametrize('case', CASES, ids=str)


def build(case: Case, values=None, seeds=(0, 1), reads=(0, 1), active_limit=0):
  """The stack of a case; single-site members read site 0 and 1.

  Sparse steps are compiled without the resampling of latents.
  """
  several = case.type in ('crosscoder', 'clt')
  own = case.type in ('sae', 'crosscoder')
  values = values or case.values
  module = architectures.ARCHITECTURES[case.base](
    d_in=D,
    d_out=D,
    width=F,
    layers=L if several else 0,
    pre_encoder_bias=own,
    tied=own,
    skip=case.skip,
    **dict(case.module),
  )
  objective = objectives.Objective(case.penalty, **dict(case.objective))
  if 'prefixes' in dict(case.objective) and not several:
    objective = dataclasses.replace(objective, prefixes=(6, 12, 24))
  at = [list(range(L))] * len(values) if several else list(reads)
  setting = stack.Setting(
    jnp.array(values), jnp.full((len(values),), 0.02), *[jnp.array(at)] * 2
  )
  optimizer = optimizer_lib.Optimizer(
    b2=0.9,
    eps=1e-8,
    clip=0.0,
    warm_up=5,
    decay=0,
    sparsity_warm_up=10,
    threshold_rate=2.0,
    steps=2000,
    dead_after=4 * B,
    theta_decay=0.9,
    adaptive_rate=0.1,
    resample_every=0 if active_limit else RESAMPLED,
    active_limit=active_limit,
  )
  kinds = ('resid_post',) * 2 if own else ('mlp_in', 'mlp_out')
  places = [tuple(sites.Site(n, kind) for n in range(L)) for kind in kinds]
  return stack.Stack(module, objective, *places, setting, seeds, optimizer)


@functools.cache
def data(steps=1):
  """x_NBD and y_NBD of each step: the sparse sums of a few directions."""

  @jax.jit
  def make(key):
    keys = jax.random.split(key, 3)
    made_of = jax.random.normal(keys[0], (2, L, 12, D))
    weights = jax.random.uniform(keys[1], (steps, B, 12))
    on = jax.random.bernoulli(keys[2], 0.2, weights.shape)
    both = jnp.einsum('sbg,ingd->isnbd', weights * on, made_of)
    mean = lambda x: jnp.mean(jnp.sum(x**2, -1))
    return [x / jnp.sqrt(mean(x)) for x in both]

  return jax.device_get(make(jax.random.key(7)))


def inputs(case: Case, step=0, steps=1):
  x, y = data(steps)
  return x[step], x[step] if case.type in ('sae', 'crosscoder') else y[step]


@functools.cache
def programs(case: Case, **options):
  """The stack of a case; its initial state and its step, for any members."""
  one = build(case, **options)

  def of(members):
    setting, seeds = members
    return dataclasses.replace(one, setting=setting, seeds=seeds)

  init = jax.jit(lambda members: of(members).init(jax.random.key(0)))
  step = jax.jit(lambda members, *arguments: of(members).step(*arguments))
  return one, init, step


def members_of(one: stack.Stack):
  """What differs between the members of a stack, as arrays."""
  return one.setting, np.array(one.seeds)


@functools.cache
def compiled(case: Case, **options):
  """The stack of a case, its initial state and its compiled step."""
  one, init, step = programs(case, **options)
  members = members_of(one)
  state = jax.device_get(init(members))
  return one, state, functools.partial(step, members)


KEY = jax.random.key(1)


@functools.cache
def train(case: Case, steps: int, **options):
  """State and L0s after some steps."""
  one, state, step = compiled(case, **options)
  l0 = []
  for i in range(steps):
    x, y = inputs(case, i % 20, 20)
    state, metrics = step(state, x, y, jnp.int32(i), KEY)
    l0.append(metrics['l0'])
  return one, jax.device_get(state), np.asarray(l0)


def rows_of(case: Case, index=0):
  """x and y of one member: [B, D], or [B, L, D]."""
  x, y = inputs(case)
  if case.type in ('crosscoder', 'clt'):
    return np.swapaxes(x, 0, 1), np.swapaxes(y, 0, 1)
  return x[index], y[index]


def member(state, index=0):
  """Parameters of one member, with biases that are not zero."""
  params = {name: p[index] for name, p in state.params.items()}
  for i, name in enumerate(('b_enc', 'b_dec', 'b_gate', 'r_mag')):
    if name in params:
      noise = np.random.default_rng(i).normal(size=params[name].shape)
      params[name] = params[name] + np.float32(0.05) * noise.astype(np.float32)
  return params


@every_case
def test_shapes_and_forward_is_decode_of_encode(case):
  one, state, _ = compiled(case)
  x, y = rows_of(case)

  @jax.jit
  def everything(params):
    bound = one.module.bind({'params': params})
    latents = bound.latents(x, HIGH)
    parts = [
      bound.write(latents.f_BF, part) for part in (slice(0, 3), slice(3, None))
    ]
    whole = bound.write(latents.f_BF)
    return latents, whole, sum(parts), whole + bound.offset(x), bound(x, HIGH)

  latents, whole, parts, y_hat, forward = everything(member(state))
  assert latents.f_BF.shape == (B, *one.module.latent_shape)
  assert np.prod(one.module.latent_shape) == F
  assert y_hat.shape == y.shape
  np.testing.assert_array_equal(forward, y_hat)
  np.testing.assert_array_equal(latents.active_BF, latents.f_BF > 0)
  np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize('centred', [False, True])
def test_released_is_the_module_on_raw_activations(case, centred, tmp_path):
  """Trained, folded, written, read back: the same function of C x + m."""
  one, state, _ = train(case, 12)
  state = state.replace(
    params={
      name: p + np.float32(0.01) if name in ('b_enc', 'b_dec') else p
      for name, p in state.params.items()
    }
  )
  x, _ = rows_of(case)

  @jax.jit
  def forward(state):
    own = {'params': {name: p[0] for name, p in state.params.items()}}
    bound = one.module.bind(own)
    f = bound.latents(x, case.values[0]).f_BF
    if case.base == 'batch_topk':
      z = bound.project(x) + bound.b_enc
      f = jnp.where(z > state.theta[0], z, 0)
    return bound.write(f) + bound.offset(x), one.member_params(state, 0)

  y_hat, params = forward(state)
  several = one.module.layers > 0
  own = case.type in ('sae', 'crosscoder')
  read = _normalisations((37.0, 3.0, 110.0), centred, seed=1)
  written = read if own else _normalisations((5.0, 41.0, 0.6), centred, seed=2)
  count = L if several else 1
  read, written = read[:count], written[:count]
  params = {name: np.asarray(p) for name, p in params.items()}
  params = fold.fold(
    params, read, written, pre_encoder_bias=one.module.pre_encoder_bias
  )
  if not one.module.unit_decoder:
    params = fold.fold_decoder_norm(params)
  kinds = ('resid_post',) * 2 if own else ('mlp_in', 'mlp_out')
  layers = range(count)
  card = {
    'name': str(case),
    'type': case.type,
    'sites': [f'{kinds[0]}/{n}' for n in layers],
    'targets': [f'{kinds[1]}/{n}' for n in layers],
    'architecture': case.base,
    'd_in': D,
    'd_out': D,
    'width': F,
    'seed': 0,
  }
  releases.save(tmp_path / 'release', [(params, card, None)])
  (loaded,) = release.load_all(tmp_path / 'release')
  loaded = loaded.load()
  assert set(loaded) == set(params)
  for name, value in loaded.items():
    np.testing.assert_array_equal(value, params[name], err_msg=name)

  def every(method, rows, normalisations):
    if not several:
      return getattr(normalisations[0], method)(np.asarray(rows))
    return np.stack(
      [
        getattr(n, method)(np.asarray(rows[:, i]))
        for i, n in enumerate(normalisations)
      ],
      1,
    )

  raw = every('undo', x, read)
  found = jax.jit(lambda p: sae.decode(p, sae.encode(p, raw), raw))(loaded)
  np.testing.assert_allclose(
    every('apply', found, written), y_hat, rtol=2e-4, atol=4e-5
  )


def _normalisations(scales, centred: bool, seed: int):
  """One a layer; the centres are as long as a row."""
  rng = np.random.default_rng(seed)
  return [
    fold.Normalisation(
      c,
      (c * rng.normal(size=D) / D**0.5).astype(np.float32) if centred else None,
    )
    for c in scales
  ]


@pytest.mark.parametrize('case', covering(KINDS), ids=str)
def test_a_member_is_trained_as_beside_another(case):
  """Its neighbour has another seed, target and site."""
  _, expected, _ = train(case, 6)
  members = members_of(
    build(case, values=case.values[1:] * 2, seeds=(5, 1), reads=(2, 1))
  )
  _, init, step = programs(case)
  state = init(members)
  for i in range(6):
    state, _ = step(members, state, *inputs(case, i, 20), jnp.int32(i), KEY)
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_allclose(a[1], b[1], rtol=1e-6, atol=1e-7)
  W_enc = state.params['W_enc']
  assert np.abs(W_enc[0] - expected.params['W_enc'][0]).max() > 0.1


@pytest.mark.parametrize('case', SPARSE, ids=str)
def test_the_sparse_way_is_the_dense_one(case):
  """Where all candidates have room; where they have not, it is not taken."""
  _, expected, _ = train(case, 4)
  one, state, step = compiled(case, active_limit=F)
  assert not one.objective.needs_all
  for i in range(4):
    x, y = inputs(case, i, 20)
    state, metrics = step(state, x, y, jnp.int32(i), KEY)
    assert np.all(metrics['sparse_steps'] == 1)
  _same(expected, state, rtol=2e-4, atol=2e-5)


def test_the_dense_way_where_the_sparse_one_has_no_room():
  case = SPARSE[0]
  _, expected, _ = train(case, 4)
  _, state, step = compiled(case, active_limit=1)
  for i in range(4):
    x, y = inputs(case, i, 20)
    state, metrics = step(state, x, y, jnp.int32(i), KEY)
    assert np.all(metrics['sparse_steps'] == 0)
  _same(expected, state, rtol=2e-5, atol=2e-6)


def _same(expected, state, **tolerance):
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize(
  'case, limit',
  [(case, 0) for case in KINDS]
  + [(case, F // 2) for case in {c.type: c for c in SPARSE}.values()],
  ids=str,
)
def test_sharded_is_unsharded(case, limit):
  _, expected, _ = train(case, 4)
  _, state, _ = compiled(case, active_limit=limit)
  shardings, step = on_mesh(case, limit)
  state = jax.device_put(state, shardings)
  for i in range(4):
    state, metrics = step(state, *inputs(case, i, 20), i)
    assert np.all(metrics['sparse_steps'] == (limit > 0))
  spec = state.params['W_enc'].sharding.spec
  assert spec[0] == 'sae' and spec[-2] == 'latent'
  _same(expected, state, rtol=2e-3, atol=2e-4)


@functools.cache
def on_mesh(case, limit, resampled=0):
  """The shardings of a case's state, and its compiled step, on eight devices.

  The step has the resampling of latents only where that is asked for, which
  takes long to compile.
  """
  place = mesh.make({'sae': 2, 'data': 2, 'latent': 2})
  one = build(case, active_limit=limit)
  optimizer = dataclasses.replace(one.optimizer, resample_every=resampled)
  one = dataclasses.replace(one, optimizer=optimizer)
  shardings = one.shardings(place)
  step = functools.partial(one.step, mesh=place)
  step = jax.jit(step, out_shardings=(shardings, None))
  on_rows = mesh.sharding(place, None, 'data', None)

  def run(state, x, y, i):
    x, y = jax.device_put((x, y), on_rows)
    return step(state, x, y, jnp.int32(i), KEY)

  return shardings, run


def test_resampling_on_a_mesh_is_that_of_one_device():
  case = KINDS[0]
  _, state, step = compiled(case)
  state = killed(state, silent=10 * B)
  expected, _ = step(state, *inputs(case), jnp.int32(RESAMPLED), KEY)
  shardings, step = on_mesh(case, 0, RESAMPLED)
  found, _ = step(jax.device_put(state, shardings), *inputs(case), RESAMPLED)
  assert np.all(np.asarray(found.params['b_enc'])[..., :4] > -90)
  _same(expected, found, rtol=2e-3, atol=2e-4)


@every_case
def test_gradient_is_the_slope_of_the_loss(case):
  """Where no latent changes sides: estimators of jumps have their own tests."""
  one, state, _ = compiled(case)
  params = member(state)
  x, y = (rows[:16] for rows in rows_of(case))  # few, or some latent flips
  dead = np.random.default_rng(3).random(one.module.latent_shape) < 0.3
  k = jnp.float32(case.values[0] or 0.1)

  @jax.jit
  def probe(moved):
    """Loss, gradient, and on which side of everything each latent is."""
    own = {**params, **moved}

    def loss(params):
      batch = objectives.Batch(x, y, k, jnp.float32(0.1), jnp.float32(1), dead)
      return objectives.loss(one.module, one.objective, params, batch)[0]

    latents = one.module.bind({'params': own}).latents(x, k)
    sides = latents.active_BF, latents.z_BF > 0, latents.z_BF > latents.theta
    return *jax.value_and_grad(loss)(own), sides

  (_, gradient, _), h = probe(params), 5e-4
  frozen = {'log_threshold'}
  if case.base == 'gated':  # its gate's error does not reach the decoder
    frozen |= {'W_dec', 'b_dec'}
  if 'auxk' in dict(case.objective):  # the error it explains is held still
    frozen |= {'W_dec', 'b_dec', 'W_enc', 'b_enc'}
  for name in sorted(set(params) - frozen):
    for seed in range(30):
      rng = np.random.default_rng(seed)
      direction = rng.normal(size=params[name].shape).astype(np.float32)
      if name == 'W_dec':
        direction *= params[name] != 0
      direction /= np.linalg.norm(direction)
      up, down = (
        probe({**params, name: params[name] + np.float32(sign * h) * direction})
        for sign in (1, -1)
      )
      if jax.tree.all(jax.tree.map(np.array_equal, up[2], down[2])):
        break
    else:
      raise AssertionError(f'no direction of {name} keeps the active set')
    slope = float(np.sum(np.asarray(gradient[name]) * direction))
    difference = float(up[0] - down[0]) / (2 * h)
    rounding = 2e-7 * float(up[0]) / h
    assert slope == pytest.approx(difference, rel=0.03, abs=4e-3 + rounding), (
      name
    )


@functools.cache
def auxk_gradients(case):
  """(parameters, dead, x, y) -> the term's gradient, as it is and by hand."""
  one, _, _ = compiled(case)

  @jax.jit
  def both(params, dead, x, y):
    batch = objectives.Batch(
      x, y, jnp.float32(LOW), jnp.float32(0.1), jnp.float32(1), dead
    )

    def loss(params, coefficient):
      objective = dataclasses.replace(one.objective, auxk=coefficient)
      return objectives.loss(one.module, objective, params, batch)[0]

    error = y - one.module.bind({'params': params})(x, LOW)
    axes = tuple(range(1, x.ndim))

    def by_hand(params):
      bound = one.module.bind({'params': params})
      f = jnp.where(dead, jax.nn.relu(bound.project(x) + bound.b_enc), 0)
      kept = jnp.minimum(dead.sum(), D // 2)
      order = jnp.sort(f.reshape(B, -1), -1)
      order = jnp.take(order, order.shape[1] - kept, axis=1)
      f = jnp.where(f >= order.reshape(-1, *(1,) * len(axes)), f, 0)
      left = jnp.mean(jnp.sum((error - bound.write(f)) ** 2, axes))
      variance = jnp.mean(jnp.sum((error - error.mean(0)) ** 2, axes))
      return 0.5 * left / variance

    found = jax.grad(lambda p: loss(p, 0.5) - loss(p, 0.0))(params)
    return found, jax.grad(by_hand)(params)

  return both


@pytest.mark.parametrize('count', [3, D // 2 + 3])  # D / 2 are wanted
@pytest.mark.parametrize('type_', ['sae', 'crosscoder'])
def test_auxk_explains_the_error_by_dead_latents_alone(type_, count):
  """Its gradient, against the term written out with the error as data."""
  case = Case(type_, 'topk', 'k', objective=(('auxk', 0.5),))
  one, state, _ = compiled(case)
  params = member(state)
  order = np.random.default_rng(3).permutation(one.module.width)
  dead = (order < count).reshape(one.module.latent_shape)
  found, expected = auxk_gradients(case)(params, dead, *rows_of(case))
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5)
  alive = ~dead
  assert not np.any(np.asarray(found['b_enc'])[alive])
  assert np.any(np.asarray(found['b_enc'])[~alive])


@every_case
def test_its_setting_moves_l0(case):
  _, state, l0 = train(case, 120)
  low, high = l0[-20:].mean(0)
  assert low < high - 0.5, (low, high)
  if case.penalty in ('k', 'adaptive_l1', 'target_l0', 'quadratic_l0'):
    np.testing.assert_allclose([low, high], case.values, rtol=0.25)


def killed(state, silent=0):
  """The state with the first four latents (of each layer) never to fire."""

  def first_four(array, value):
    array = array.copy()
    array[..., :4] = value
    return array

  biases = {
    name: first_four(state.params[name], -100)
    for name in ('b_enc', 'b_gate')
    if name in state.params
  }
  return state.replace(
    params={**state.params, **biases},
    silent_tokens=first_four(state.silent_tokens, silent),
  )


@every_case
def test_dead_latents_are_counted_in_tokens(case):
  _, state, step = compiled(case)
  state = killed(state)
  for i in range(5):
    x, y = inputs(case, i, 20)
    state, metrics = step(state, x, y, jnp.int32(i), KEY)
  silent = state.silent_tokens[..., :4]
  assert np.all(np.asarray(silent) == 5 * B)
  assert np.all(metrics['dead'] >= silent[0].size / F - 1e-6)


@pytest.mark.parametrize(
  'case', [c for c in CASES if c.type in ('crosscoder', 'clt')], ids=str
)
def test_layers_write_to_no_earlier_layer(case):
  one, state, _ = train(case, 6)
  params = {name: p[0] for name, p in state.params.items()}
  earlier = np.tril(np.ones((L, L)), -1).astype(bool)
  assert not np.any(np.asarray(params['W_dec'])[earlier])
  if case.base == 'jumprelu':  # TopK's layers compete for their places
    x, _ = rows_of(case)
    bound = one.module.bind({'params': params})
    other = x.copy()
    other[:, 2] += 1
    moved = bound(other) - bound(x)
    assert not np.any(moved[:, :2]) and np.any(moved[:, 2])


@every_case
def test_resampling_revives_the_dead_and_leaves_the_living(case):
  _, state, step = compiled(case)
  state = killed(state, silent=10 * B)
  x, y = inputs(case)
  before, _ = step(state, x, y, jnp.int32(RESAMPLED - 1), KEY)
  after, _ = step(state, x, y, jnp.int32(RESAMPLED), KEY)
  assert np.all(np.asarray(before.params['b_enc'])[..., :4] < -90)
  assert np.all(np.asarray(after.params['b_enc'])[..., :4] > -90)
  assert not np.any(np.asarray(after.silent_tokens)[..., :4])
  for name, value in after.params.items():
    assert np.all(np.isfinite(value)), name
    if name not in ('b_dec', 'W_skip', 'W_dec'):
      living = np.s_[..., 4:, :] if name == 'W_enc' else np.s_[..., 4:]
      np.testing.assert_allclose(
        value[living], before.params[name][living], rtol=1e-6, err_msg=name
      )
  norm = sae.decoder_norm(after.params['W_dec'][0])
  np.testing.assert_allclose(norm[..., :4], 1, rtol=1e-5)
  again, _ = step(after, x, y, jnp.int32(RESAMPLED + 1), KEY)
  fired = np.asarray(again.silent_tokens)[..., :4] == 0
  assert fired.mean() > 0.1


def test_every_architecture_and_type_is_held_to_the_contract():
  assert {case.base for case in CASES} == set(architectures.ARCHITECTURES)
  assert {case.base for case in CASES} == set(config_fields.ARCHITECTURES)
  assert {case.type for case in CASES} == set(sites.TYPES)
