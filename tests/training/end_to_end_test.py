"""Fine-tuning through the model: its loss, its gradient, what it gains."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.activations import harvest
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice, weights
from gemma_scope.runtime import lease as lease_lib
from gemma_scope.sae import architectures, fold
from gemma_scope.text import tokenizers
from gemma_scope.training import end_to_end, loop, objectives, stack
from gemma_scope.training import optimizer as optimizer_lib

N, T, D = 8, 9, 16
MODEL = lm.Config(
  name='random',
  vocab_size=48,
  d_model=D,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  window=4,
  pattern='LG',
  qk_norm=True,
)
RESID, MLP = sites.Site(0, 'resid_post'), sites.Site(1, 'mlp_out')
IN, OUT = sites.Site(0, 'mlp_in'), sites.Site(0, 'mlp_out')
AT = (RESID, MLP, IN, OUT)
NORMAL = {
  RESID: fold.Normalisation(5.0, np.linspace(-1, 1, D, dtype=np.float32)),
  MLP: fold.Normalisation(2.0),
  IN: fold.Normalisation(3.0),
  OUT: fold.Normalisation(1.0, np.linspace(0, 1, D, dtype=np.float32)),
}
KEY = jax.random.key(3)
SPECIAL = tokenizers.Special((0, 1, 2))
OPTIMIZER = optimizer_lib.Optimizer(
  b2=0.9,
  eps=1e-8,
  clip=0.0,
  warm_up=0,
  decay=0,
  sparsity_warm_up=1,
  threshold_rate=2.0,
  steps=100,
  dead_after=300,
  theta_decay=0.999,
  adaptive_rate=0.01,
)
PENALTIES = {
  'relu': ('l1', 0.0),
  'jumprelu': ('target_l0', 4.0),
  'batch_topk': ('k', 3.0),
}


@functools.cache
def model():
  gemma = lm.Gemma(MODEL)
  return gemma, jax.jit(gemma.init)(jax.random.key(0))


TOKENS = np.random.default_rng(1).integers(3, 48, (N, T)).astype(np.int32)
TOKENS[:, 0] = 2
TOKENS[2, 5:] = TOKENS[6, 3] = 1  # these do not count
KEEP = SPECIAL.keep(TOKENS)
BATCH = {'tokens': jnp.asarray(TOKENS), 'keep': jnp.asarray(KEEP)}


def make(kind='sae', base='jumprelu', cls=stack.Stack, **changes):
  """Three SAEs at two sites, not in their order, or one transcoder."""
  own = kind == 'sae'
  at = (1, 0, 1) if own else (0,)
  reads, writes = ((RESID, MLP),) * 2 if own else ((IN,), (OUT,))
  options = {'bandwidth': 0.2} if base == 'jumprelu' else {}
  module = architectures.ARCHITECTURES[base](
    d_in=D, d_out=D, width=2 * D, pre_encoder_bias=own, tied=own, **options
  )
  penalty, value = PENALTIES[base]
  setting = stack.Setting(
    jnp.full(len(at), value), jnp.full(len(at), 0.01), *[jnp.array(at)] * 2
  )
  return cls(
    module,
    objectives.Objective(penalty),
    reads,
    writes,
    setting,
    tuple(range(len(at))),
    dataclasses.replace(OPTIMIZER, **changes),
  )


def step_of(stacks, gemma, mesh=None):
  @jax.jit
  def take(states, params, batch, step, beta):
    model = end_to_end.Model(gemma, params, NORMAL, beta, mesh)
    return end_to_end.step_all(model, stacks, states, batch, step, KEY)

  return take


@functools.cache
def mixed():
  """Two stacks, their initial states and their compiled step."""
  stacks = make(), make('transcoder', 'batch_topk', resample_every=2)
  states = jax.jit(lambda: tuple(one.init(KEY) for one in stacks))()
  return stacks, states, step_of(stacks, model()[0])


def assert_close(a, b, **tolerance):
  leaves = jax.tree_util.tree_leaves_with_path(a)
  for (path, x), y in zip(leaves, jax.tree.leaves(b), strict=True):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, err_msg=name, **tolerance)


def test_beta_zero_is_the_ordinary_step():
  gemma, params = model()
  before = jax.tree.map(np.array, params)
  stacks, a, take = mixed()
  # The rows of the batch, chosen one by one.
  index = np.resize(np.flatnonzero(KEEP), N * (T - 1))
  taps = jax.device_get(splice.taps(gemma, params, TOKENS, AT))
  rows = {
    s: NORMAL[s].apply(x.reshape(N * T, -1)[index]) for s, x in taps.items()
  }
  ordinary = jax.jit(functools.partial(stack.step_all, stacks))
  b = a
  for step in range(3):
    a, metrics = take(a, params, BATCH, jnp.int32(step), 0.0)
    b, expected = ordinary(b, rows, jnp.int32(step), KEY)
  assert all(m.pop('kl').min() > 0 for m in metrics)
  assert_close(metrics, expected, rtol=2e-4)
  assert_close(a, b, rtol=1e-3, atol=1e-4)
  assert_close(params, before, rtol=0)  # the model is as it was


def test_a_batch_that_is_not_finite_changes_no_parameter():
  _, states, take = mixed()
  bad = jax.tree.map(lambda x: x, model()[1])
  table = bad['embedder']['input_embedding']
  bad['embedder']['input_embedding'] = table.at[TOKENS[0, 4]].set(jnp.inf)
  after, metrics = take(states, bad, BATCH, jnp.int32(1), 1.0)
  # Its rows are left out, but the loss went through them.
  assert all(np.isfinite(m['squared_error']).all() for m in metrics)
  for old, new in zip(states, after, strict=True):
    assert new.skipped.tolist() == [1] * len(new.skipped)
    assert_close(old.params, new.params, rtol=1e-6, atol=1e-7)


def test_a_mesh_gives_one_devices_result():
  stacks, a, take = mixed()
  _, params = model()
  mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  flat = traverse_util.flatten_dict(params, sep='/')
  places = {n: weights.sharding(mesh, n, x.shape) for n, x in flat.items()}
  split = traverse_util.unflatten_dict(jax.device_put(flat, places), sep='/')
  b = jax.device_put(a, tuple(one.shardings(mesh) for one in stacks))
  batch = jax.device_put(BATCH, mesh_lib.sharding(mesh, 'data', None))
  pin = mesh_lib.sharding(mesh, 'data', None, None)
  sharded = step_of(stacks, lm.Gemma(MODEL, pin), mesh)
  for step in range(2):
    a, expected = take(a, params, BATCH, jnp.int32(step), 1.0)
    b, metrics = sharded(b, split, batch, jnp.int32(step), 1.0)
  assert_close(metrics, expected, rtol=1e-3)
  a, b = ([state.params for state in states] for states in (a, b))
  assert_close(b, a, rtol=1e-3, atol=2e-4)


class Probe(stack.Stack):
  """A stack whose step leaves its gradient in the place of its parameters."""

  def _updated(self, member, gradient, finite, step, key):
    return gradient, member.state.moments


@functools.cache
def probe(kind):
  """A stack of ReLUs and (parameters, beta) -> gradient, metrics."""
  gemma, params = model()
  one = make(kind, 'relu', Probe)
  take = step_of((one,), gemma)
  state = jax.jit(one.init)(KEY)

  def at(moved, beta):
    moved = (state.replace(params=moved),)
    (after,), (metrics,) = take(moved, params, BATCH, jnp.int32(0), beta)
    return after.params, metrics

  return one, state.params, at


both = pytest.mark.parametrize('kind', ['sae', 'transcoder'])


def mean_kl(*logits_BTV):
  log_p, log_q = map(jax.nn.log_softmax, logits_BTV)
  kl_BT = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
  return jnp.sum(kl_BT * KEEP) / KEEP.sum()


@both
def test_kl_is_that_of_the_spliced_model(kind):
  """Against whole logits, and each member's reconstruction by itself."""
  gemma, lm_params = model()
  one, params, at = probe(kind)
  _, metrics = at(params, 1.0)

  @jax.jit
  def expected(member, read, target):
    clean = gemma.forward(lm_params, TOKENS, taps=AT)
    x_RD = jnp.stack([NORMAL[s].apply(clean.taps[s]) for s in one.sites])[read]
    y_hat = one.module.apply({'params': member}, x_RD.reshape(N * T, D))
    y_hat_BTD = y_hat.reshape(N, T, D)

    def edit(i, normal):
      here = KEEP[..., None] & (target == i)
      return lambda y_BTD: jnp.where(here, normal.undo(y_hat_BTD), y_BTD)

    edits = {s: edit(i, NORMAL[s]) for i, s in enumerate(one.targets)}
    spliced = gemma.forward(lm_params, TOKENS, edits=edits)
    return mean_kl(clean.logits_BTV, spliced.logits_BTV)

  for i in range(len(one.seeds)):
    member = jax.tree.map(lambda a, i=i: a[i], params)
    wanted = expected(member, one.setting.reads[i], one.setting.writes[i])
    assert wanted > 1e-3
    np.testing.assert_allclose(metrics['kl'][i], wanted, rtol=1e-3)


@both
@pytest.mark.parametrize('beta', [0.0, 1.0, 1e4])
def test_gradient_against_finite_differences(kind, beta):
  """Of (E + alpha beta KL) / (1 + beta) with alpha held; 1e4 is KL alone."""
  _, params, at = probe(kind)
  gradient, found = at(params, beta)
  alpha = found['squared_error'] / (found['kl'] + 1e-8)
  keys = iter(jax.random.split(KEY, 3))
  for name in ('W_enc', 'W_dec', 'b_dec'):
    # Along the gradient and a random direction.
    g = gradient[name]
    axes = tuple(range(1, g.ndim))
    v = jax.random.normal(next(keys), g.shape)
    v = v / jnp.linalg.norm(v) + g / jnp.linalg.norm(g)
    h = 3e-3
    up, down = (
      at({**params, name: params[name] + d * v}, beta)[1] for d in (h, -h)
    )
    error, kl = (up[n] - down[n] for n in ('squared_error', 'kl'))
    slope = (error + alpha * beta * kl) / (1 + beta) / (2 * h)
    np.testing.assert_allclose(
      jnp.sum(g * v, axes), slope, rtol=0.03, atol=1e-3, err_msg=name
    )


def test_a_perfect_reconstruction_has_no_kl():
  one, params, at = probe('sae')
  S, eye = len(one.seeds), jnp.eye(D)
  exact = jax.tree.map(jnp.zeros_like, params) | {
    'W_enc': jnp.stack([jnp.concatenate([eye, -eye])] * S),
    'W_dec': jnp.stack([jnp.concatenate([eye, -eye])] * S),
  }
  gradient, metrics = at(exact, 1.0)
  np.testing.assert_allclose(metrics['kl'], 0, atol=1e-6)
  assert_close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-5)


def test_divergence_and_its_gradient_are_those_of_whole_logits():
  gemma, params = model()
  keys = jax.random.split(KEY)
  a, b = (jax.random.normal(key, (N, T, D)) for key in keys)

  def plain(spliced_BTD):
    return mean_kl(*(gemma.unembed(params, x) for x in (a, spliced_BTD)))

  def ours(spliced_BTD):
    return end_to_end.divergence(gemma, params, a, spliced_BTD, BATCH['keep'])

  ours = jax.jit(jax.value_and_grad(ours))
  expected, slope = jax.jit(jax.value_and_grad(plain))(b)
  value, gradient = ours(b)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
  value, gradient = ours(a)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def chunks_of(gemma, params, site, rows, mesh, **sizes):
  sizes |= dict(seq_len=rows.shape[1], dtype='float32')
  layout = harvest.Layout.of(**sizes)
  text = harvest.Text(lambda start, n: rows[start : start + n], SPECIAL.keep)
  source = harvest.ModelSource(gemma, params, (site,), text, layout, mesh)
  return chunks_lib.Chunks(source, 0, mesh)


def test_the_feed_is_a_function_of_the_step():
  gemma, params = model()
  mesh = mesh_lib.make({'sae': 1, 'data': -1, 'latent': 1})
  rows = np.random.default_rng(0).integers(1, 48, (64, T)).astype(np.int32)
  rows[:, 0] = 2
  rows[16:24] = 1  # nothing counts in step 2
  chunks = chunks_of(
    gemma, params, RESID, rows, mesh, chunk_rows=64, batch=64, lm_batch=8
  )
  feed, ordinary = (
    end_to_end.Feed(chunks, 8, mesh),
    chunks_lib.Feed(chunks, 100),
  )
  found = feed.at(1)
  np.testing.assert_array_equal(found['tokens'], rows[8:16])
  np.testing.assert_array_equal(found['keep'], SPECIAL.keep(rows[8:16]))
  left_out = int((rows[8:16, 1:] < 3).sum())
  assert feed.left_out == {
    'special': left_out,
    'not_finite': 0,
  }
  np.testing.assert_array_equal(feed.at(1)['tokens'], found['tokens'])
  with pytest.raises(ValueError, match='step 2 are left out'):
    feed.at(2)
  ordinary.at(0)
  assert feed.normalisation() == ordinary.normalisation()
  assert feed.normalisation(scale='sqrt_d') == {RESID: fold.Normalisation(4.0)}


def test_what_cannot_be_is_refused():
  config = tiny.get_config('sites=resid_post')
  config.end_to_end.beta, config.train.batch = 1.0, 254
  config_lib.check(config, None, (1, 2, 1))
  with pytest.raises(config_lib.ConfigError, match='data axis'):
    config_lib.check(config, None, (1, 4, 1))
  for field, value, word in (
    ('end_to_end.beta', -1.0, 'at least 0'),
    ('collection.type', 'crosscoder', 'one site'),
    ('activations.store', 'somewhere', 'itself'),
    ('train.batch', 256, '254'),
  ):
    wrong = config.copy_and_resolve_references()
    wrong.update_from_flattened_dict({field: value})
    with pytest.raises(config_lib.ConfigError, match=word):
      config_lib.check(wrong)


LIBRARY = pathlib.Path(os.__file__).parent


def test_a_stopped_run_ends_bitwise_where_it_would_have(tmp_path):
  source = (LIBRARY / 'argparse.py').read_text()
  for part in range(8):
    (tmp_path / f'{part}.txt').write_text(source[5000 * part :][:5000])
  small = dataclasses.replace(MODEL, vocab_size=4096, num_layers=1)
  params = jax.jit(lm.Gemma(small).init)(KEY)
  weights.save_safetensors(tmp_path / 'lm', small, jax.device_get(params), {})
  config = tiny.get_config('layers=0;sites=mlp_out;widths=32;sparsity=4')
  config.lm.update(name=MODEL.name, checkpoint=str(tmp_path / 'lm'))
  config.text.update(source=f'files:{tmp_path}/*.txt', seq_len=9)
  config.activations.update(chunk_rows=64, lm_batch=8)
  config.end_to_end.update(beta=1.0, sequences=8)
  config.train.update(batch=64, steps=6, warm_up=2, decay=2, sparsity_warm_up=2)

  def run(name, stop):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    interrupt = mock.Mock(at_step=lambda step: step == stop)
    with lease_lib.Lease(folder) as lease:
      loop.keep_config(config, folder)
      return loop.train(config, folder, lease, interrupt)

  whole = run('whole', None)
  assert not run('parts', 3).done
  parts = run('parts', None)
  assert (
    whole.done and parts.done and whole.normalisation == parts.normalisation
  )
  assert_close(whole.states, parts.states, rtol=0)


def made_for(site, rate, steps, warm_up):
  """A stack of one SAE on the embedded model."""
  module = architectures.JumpReLU(
    128, 128, 128, bandwidth=0.02, initial_threshold=0.05
  )
  optimizer = dataclasses.replace(
    OPTIMIZER,
    b2=0.999,
    warm_up=10,
    decay=steps // 2,
    steps=steps,
    sparsity_warm_up=warm_up,
  )
  setting = stack.Setting(*map(jnp.array, ([16.0], [rate], [0], [0])))
  objective = objectives.Objective('target_l0')
  return stack.Stack(
    module, objective, (site,), (site,), setting, (0,), optimizer
  )


def test_it_lowers_the_kl_at_the_same_l0():
  """Against as many ordinary steps on the same batches, from the same start."""
  site, length, steps = sites.Site(2, 'resid_post'), 33, 50
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 1}, jax.devices()[:1])
  gemma, params = weights.load('tiny', mesh=mesh)
  tokenizer = tokenizers.Tokenizer(weights.TINY / 'tokenizer.model')
  names = ('argparse', 'inspect', 'tarfile', '_pydecimal')
  ids = [tokenizer.encode((LIBRARY / f'{n}.py').read_text()) for n in names]
  ids = np.concatenate(ids)[: 1000 * (length - 1)].reshape(1000, -1)
  rows = np.pad(ids, ((0, 0), (1, 0)), constant_values=2).astype(np.int32)
  rows = np.random.default_rng(0).permutation(rows)
  chunks = chunks_of(
    gemma, params, site, rows, mesh, chunk_rows=2**13, batch=256, lm_batch=32
  )
  feed, tokens = chunks_lib.Feed(chunks, 100), end_to_end.Feed(chunks, 4, mesh)
  normalisation = tokens.normalisation()
  plain, tuned = made_for(site, 1.2e-2, 80, 25), made_for(site, 3e-3, steps, 1)
  take = jax.jit(plain.step)
  (state,) = stack.init_all((plain,), KEY, mesh)
  for step in range(80):
    x_NBD = normalisation[site].apply(feed.at(step)[site][None])
    state, _ = take(state, x_NBD, x_NBD, jnp.int32(step), KEY)
  (start,) = stack.init_all((tuned,), KEY, mesh)
  start = start.replace(params=state.params)
  start = jax.device_put(start, tuned.shardings(mesh))
  sequences = [tokens.at(200 + step) for step in range(steps)]

  @jax.jit
  def tune(state, params, batch, step, beta):
    model = end_to_end.Model(gemma, params, normalisation, beta, mesh)
    return end_to_end.step_all(model, (tuned,), (state,), batch, step, KEY)

  def ends_at(beta):
    state, found = start, []
    for step, batch in enumerate(sequences):
      (state,), (metrics,) = tune(state, params, batch, jnp.int32(step), beta)
      found.append((metrics['kl'][0], metrics['l0'][0]))
    return np.mean(found[-steps // 3 :], 0)

  (kl_0, l0_0), (kl, l0) = ends_at(0.0), ends_at(1.0)
  print(f'KL {kl_0:.3f} -> {kl:.3f}, L0 {l0_0:.1f} -> {l0:.1f}')
  assert kl < 0.95 * kl_0
  assert abs(l0 / l0_0 - 1) < 0.05
