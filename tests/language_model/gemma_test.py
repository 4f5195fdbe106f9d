"""The language model as a pure function, and the reading of its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gemma_scope import mesh, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from tests.helpers import random_models

GEMMA2 = dataclasses.replace(
  random_models.GEMMA2,
  name='random',
  vocab_size=48,
  attn_softcap=50.0,
  final_softcap=30.0,
)
GEMMA3 = dataclasses.replace(
  random_models.GEMMA3,
  name='random3',
  vocab_size=48,
  num_layers=2,
  window=4,
  pattern='LG',
  query_scale_by_heads=True,
)
LAYER = 1
AT = tuple(sites.Site(LAYER, kind) for kind in sites.BLOCK_KINDS)
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 8)).astype(np.int32)
TOKENS[:, 0] = 2

# Billions of parameters: shared by Gemma's model cards and its configs.
COUNTS = {
  'gemma2-2b': 2.615,
  'gemma2-9b': 9.242,
  'gemma2-27b': 27.228,
  'gemma3-270m': 0.268,
  'gemma3-1b': 1.000,
  'gemma3-4b': 3.880,
  'gemma3-12b': 11.766,
  'gemma3-27b': 27.009,
}


@functools.cache
def model(config=GEMMA2, dtype='float32'):
  gemma = lm.Gemma(config)
  # Gains other than 1, so that a norm left out is seen.
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x + 0.3 * jax.random.normal(next(keys), x.shape)
      if path[-1].key == 'scale'
      else x
    ),
    gemma.init(jax.random.key(0)),
  )
  return gemma, jax.tree.map(lambda x: x.astype(dtype), params)


@functools.cache
def forward(config=GEMMA2):
  """(parameters, tokens) -> logits and every site of the last layer."""
  gemma, _ = model(config)
  return jax.jit(lambda p, tokens: gemma.forward(p, tokens, taps=AT))


@functools.cache
def plain(config=GEMMA2):
  return forward(config)(model(config)[1], TOKENS)


@functools.cache
def op_by_op():
  """The same, not compiled as a whole, in bfloat16."""
  gemma, params = model(dtype='bfloat16')
  return gemma.forward(params, TOKENS, taps=AT)


def test_flax_is_left_as_it_was():
  model()
  assert nn.Module.param.__module__.startswith('flax.')


# Op by op, not fused: there a site replaced by its own value is bitwise equal.
@pytest.mark.parametrize(
  'kind', [kind for kind in sites.BLOCK_KINDS if kind not in sites.READ_ONLY]
)
def test_own_value_changes_nothing(kind):
  gemma, params = model(dtype='bfloat16')
  site, out = sites.Site(LAYER, kind), op_by_op()
  seen = []

  def edit(x_BTD):
    seen.append(x_BTD.shape)
    return out.taps[site]

  edited = gemma.forward(params, TOKENS, edits={site: edit}).logits_BTV
  assert seen == [(*TOKENS.shape, site.width(gemma.config))]
  assert np.array_equal(edited, out.logits_BTV)
  zeroed = gemma.forward(params, TOKENS, edits={site: jnp.zeros_like})
  assert not np.allclose(zeroed.logits_BTV, out.logits_BTV, atol=1e-3)


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_own_value_under_jit(config):
  gemma, params = model(config)
  forward = jax.jit(
    lambda params, values: gemma.forward(
      params,
      TOKENS,
      taps=AT,
      edits={site: lambda _, x=x: x for site, x in values.items()},
    )
  )
  want = plain(config)
  own = {s: want.taps[s] for s in AT if s.kind not in sites.READ_ONLY}
  got = forward(params, own)
  np.testing.assert_allclose(got.logits_BTV, want.logits_BTV, atol=1e-5)
  for site in AT:
    np.testing.assert_allclose(got.taps[site], want.taps[site], atol=1e-5)


def test_a_model_made_twice_is_compiled_once():
  """Else each load of the same model would leave its programs in memory."""
  traced = []

  @functools.partial(jax.jit, static_argnums=0)
  def use(gemma, x):
    traced.append(gemma)
    return x

  pin = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for model in (lm.Gemma(GEMMA3), lm.Gemma(GEMMA3), lm.Gemma(GEMMA3)):
    use(model, 1.0)
  assert len(traced) == 1
  for model in (lm.Gemma(GEMMA2), lm.Gemma(GEMMA3, pin)):
    use(model, 1.0)
  assert len(traced) == 3


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_equals_the_package(config):
  gemma, params = model(config)
  apply = jax.jit(lambda params: gemma._model.apply({'params': params}, TOKENS))
  want = plain(config)
  np.testing.assert_allclose(want.logits_BTV, apply(params).logits, atol=1e-5)
  last = want.taps[sites.Site(config.num_layers - 1, 'resid_post')]
  logits_BTV = jax.jit(gemma.unembed)(params, last)
  np.testing.assert_allclose(logits_BTV, want.logits_BTV, atol=1e-6)


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_sites_are_what_they_say(config):
  _, params = model(config)
  taps = plain(config).taps
  x = {site.kind: np.asarray(taps[site], np.float64) for site in AT}
  layer = jax.tree.map(lambda a: np.asarray(a, np.float64), params['layer_1'])
  close = functools.partial(np.testing.assert_allclose, atol=2e-5)

  def norm(x_BTD, name):
    rms = np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-6)
    return x_BTD / rms * (1 + layer[name]['scale'])

  assert x['attn_out'].shape[-1] == config.num_heads * config.head_dim
  w_o = layer['attn']['attn_vec_einsum']['w'].reshape(-1, config.d_model)
  close(x['attn_in'], norm(x['resid_pre'], 'pre_attention_norm'))
  close(x['attn_raw'], x['attn_out'] @ w_o)
  close(x['attn_add'], norm(x['attn_raw'], 'post_attention_norm'))
  close(x['resid_mid'], x['resid_pre'] + x['attn_add'])
  close(x['mlp_in'], norm(x['resid_mid'], 'pre_ffw_norm'))
  gain = 1 + layer['pre_ffw_norm']['scale']
  close(x['mlp_in'], x['mlp_in_ungained'] * gain)
  close((x['mlp_in_ungained'] ** 2).mean(-1), 1.0)
  gating = layer['mlp']['gating_einsum']
  gating = gating.swapaxes(1, 2) if config.transpose_gating else gating
  gate, up = (x['mlp_in'] @ w for w in gating)
  close(x['mlp_hidden'], np.asarray(jax.nn.gelu(gate)) * up)
  close(x['mlp_raw'], x['mlp_hidden'] @ layer['mlp']['linear'])
  close(x['mlp_out'], norm(x['mlp_raw'], 'post_ffw_norm'))
  close(x['resid_post'], x['resid_mid'] + x['mlp_out'])


def test_taps_and_edits_do_not_leak():
  gemma, params = model()
  first, second = sites.Site(0, 'mlp_out'), sites.Site(1, 'mlp_out')

  # One traced function a call: what a stale trace would give back.
  def logits(scale):
    edits = None if scale is None else {first: lambda x: scale * x}
    forward = lambda p: gemma.forward(p, TOKENS, edits=edits).logits_BTV
    return np.asarray(jax.jit(forward)(params))

  def tap(site):
    forward = lambda p: gemma.forward(p, TOKENS, taps=(site,), logits=False)
    (value,) = jax.jit(forward)(params).taps.values()
    return np.asarray(value)

  zeroed, before, doubled, after = map(logits, (0.0, None, 2.0, None))
  assert np.array_equal(before, after)
  np.testing.assert_allclose(before, plain().logits_BTV, atol=1e-5)
  for one, other in ((zeroed, doubled), (zeroed, before), (doubled, before)):
    assert np.abs(one - other).max() > 1e-2
  assert np.abs(tap(first) - tap(second)).max() > 1e-2


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_causality(config):
  changed = TOKENS.copy()
  changed[:, 5] = 3 + (changed[:, 5] - 2) % 45
  got, want = forward(config)(model(config)[1], changed), plain(config)
  pairs = [(got.taps[site], want.taps[site]) for site in AT]
  for a, b in [*pairs, (got.logits_BTV, want.logits_BTV)]:
    assert np.array_equal(a[:, :5], b[:, :5])
    assert not np.allclose(a[:, 5], b[:, 5], atol=1e-4)
    assert not np.array_equal(a[:, 6:], b[:, 6:])


def test_padding_changes_nothing():
  _, params = model()
  pad = np.zeros((2, 3), np.int32)
  logits = lambda *tokens: forward()(params, np.hstack(tokens)).logits_BTV
  right = logits(TOKENS, pad)[:, :8]
  left = logits(pad, TOKENS)[:, 3:]
  np.testing.assert_allclose(right, plain().logits_BTV, atol=1e-5)
  np.testing.assert_allclose(left, plain().logits_BTV, atol=1e-5)


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_extending_a_cache_equals_one_pass(config):
  gemma, params = model(config)
  mask_TC = np.tril(np.ones((8, 8), bool))[None].repeat(2, 0)
  positions = np.arange(8)[None].repeat(2, 0)
  cache, extend = gemma.empty_cache(2, 8), jax.jit(gemma.extend)
  for part in (slice(0, 4), slice(4, 8)):  # longer than the window, together
    logits_BV, cache = extend(
      params,
      cache,
      TOKENS[:, part],
      positions_BT=positions[:, part],
      mask_BTC=mask_TC[:, part],
    )
    want = plain(config).logits_BTV[:, part.stop - 1]
    np.testing.assert_allclose(logits_BV, want, atol=1e-5)


def test_a_cache_keeps_its_shapes_and_dtypes():
  gemma, params = model(dtype='bfloat16')
  cache = gemma.empty_cache(2, 8)
  _, after = jax.eval_shape(
    lambda p, c: gemma.extend(
      p,
      c,
      TOKENS[:, :3],
      positions_BT=np.zeros((2, 3), int),
      mask_BTC=np.ones((2, 3, 8), bool),
    ),
    params,
    cache,
  )
  spell = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert spell(after) == spell(cache)


def test_later_layers_are_not_computed():
  gemma, params = model()

  def flops(**arguments):
    compiled = (
      jax.jit(lambda p: gemma.forward(p, TOKENS, **arguments))
      .lower(params)
      .compile()
    )
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost).get('flops', 0)

  first, second = (sites.Site(layer, 'resid_post') for layer in (0, 1))
  one = flops(taps=(first,), logits=False)
  two = flops(taps=(first, second), logits=False)
  full = flops(taps=(first, second))
  assert one < 0.6 * two < 0.6 * full
  run = functools.partial(gemma.forward, taps=(first,), logits=False)
  out = jax.eval_shape(run, params, TOKENS)
  assert out.logits_BTV is None and set(out.taps) == {first}


def test_refusals():
  gemma, params = model()
  run = functools.partial(gemma.forward, params, TOKENS)
  with pytest.raises(ValueError, match='model has layers 0 to 1'):
    run(taps=(sites.Site(2, 'mlp_out'),))
  with pytest.raises(ValueError, match='can be read but not edited'):
    run(edits={sites.Site(0, 'resid_mid'): lambda x: x})
  with pytest.raises(
    ValueError,
    match=r'shape \[2, 8, 16\] that it was given; it returned \[2, 8, 3\]',
  ):
    run(edits={sites.Site(0, 'mlp_out'): lambda x: x[..., :3]})
  with pytest.raises(ValueError, match='no site kind'):
    sites.Site(0, 'mlp')


def test_token_losses():
  tokens_BT = np.array([[2, 5, 6, 1, 0, 0], [0, 2, 7, 1, 2, 4]])
  logits_BTV = (
    np.random.default_rng(0).normal(size=(2, 6, 9)).astype(np.float32)
  )
  losses_BT, counts_BT = lm.token_losses(logits_BTV, tokens_BT)
  assert counts_BT.astype(int).tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 0, 1]]
  for b, t in np.ndindex(2, 5):
    z_V = logits_BTV[b, t].astype(np.float64)
    want = np.log(np.exp(z_V).sum()) - z_V[tokens_BT[b, t + 1]]
    assert float(losses_BT[b, t]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize('name', COUNTS)
def test_real_sizes(name):
  config = lm.SIZES[name]
  gemma = lm.Gemma(config)
  shapes = gemma.param_shapes
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert round(count / 1e9, 3) == COUNTS[name]
  layers = [key for key in shapes if key.startswith('layer_')]
  assert len(layers) == config.num_layers
  # One whole pattern of local and global layers stands for all.
  at = tuple(sites.Site(5, kind) for kind in sites.BLOCK_KINDS)
  taps = jax.eval_shape(
    lambda p, t: gemma.forward(p, t, taps=at, logits=False).taps,
    shapes,
    jax.ShapeDtypeStruct((2, 8), jnp.int32),
  )
  for site in at:
    assert taps[site].shape == (2, 8, site.width(config))
  logits_BTV = jax.eval_shape(gemma.unembed, shapes, taps[at[-1]])
  assert logits_BTV.shape == (2, 8, config.vocab_size)


# ------------------------------------------------------------- checkpoints


def numpy_tree(params):
  return jax.tree.map(np.asarray, params)


def flat_release(params):
  """Gemma's release layout: one level of keys with slashes above the leaves."""
  flat = {}
  for key, value in traverse_util.flatten_dict(params, sep='/').items():
    module, leaf = key.rsplit('/', 1)
    if leaf in ('linear', 'gating_einsum'):
      module, leaf = key, 'w'
    flat.setdefault(f'transformer/{module}', {})[leaf] = value
  return flat


def write_orbax(folder, tree):
  from orbax import checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder, tree)


def describe(folder, config=GEMMA2):
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dataclasses.asdict(config))
  (folder / 'config.json').write_text(text)


LAYOUTS = {
  'nested': (lambda tree: tree, ''),
  'wrapped': (lambda tree: {'params': tree}, ''),
  'flat': (flat_release, ''),
  'step': (lambda tree: tree, 'default'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_orbax_layouts(layout, tmp_path):
  params = numpy_tree(model()[1])
  shape, inside = LAYOUTS[layout]
  write_orbax(tmp_path / 'ckpt' / inside, shape(params))
  describe(tmp_path / 'ckpt')
  _, loaded = weights.load('random', str(tmp_path / 'ckpt'))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_orbax_cast_and_first_layers(tmp_path):
  gemma, params = model()
  write_orbax(tmp_path / 'ckpt', flat_release(numpy_tree(params)))
  describe(tmp_path / 'ckpt')
  loaded_gemma, loaded = weights.load(
    'random', str(tmp_path / 'ckpt'), dtype='bfloat16', num_layers=1
  )
  assert 'layer_0' in loaded and 'layer_1' not in loaded
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype('bfloat16')}
  at = (sites.Site(0, 'resid_post'),)
  got = loaded_gemma.forward(loaded, TOKENS, taps=at, logits=False)
  cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  want = gemma.forward(cast, TOKENS, taps=at, logits=False)
  assert np.array_equal(got.taps[at[0]], want.taps[at[0]])


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_sharded_equals_one_device(config, tmp_path):
  _, params = model(config)
  write_orbax(tmp_path / 'ckpt', numpy_tree(params))
  describe(tmp_path / 'ckpt', config)
  devices = mesh.make({'sae': 1, 'data': 4, 'latent': 2})
  gemma, sharded = weights.load(
    config.name, str(tmp_path / 'ckpt'), mesh=devices
  )
  whole = sum(x.nbytes for x in jax.tree.leaves(sharded))
  first = sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(sharded)
  )
  assert first < whole / 4  # most of it over 8 devices, the norms on each
  tokens_BT = np.concatenate([TOKENS, TOKENS[:, ::-1]])
  tokens_BT[:, 0] = 2
  placed = jax.device_put(tokens_BT, mesh.sharding(devices, 'data', None))
  got = jax.jit(lambda p, t: gemma.forward(p, t, taps=AT))(sharded, placed)
  want = forward(config)(params, tokens_BT)
  np.testing.assert_allclose(got.logits_BTV, want.logits_BTV, atol=2e-5)
  for site in AT:
    np.testing.assert_allclose(got.taps[site], want.taps[site], atol=2e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_safetensors_round_trip(dtype, tmp_path):
  _, params = model(GEMMA3, dtype)
  weights.save_safetensors(
    tmp_path, GEMMA3, numpy_tree(params), {'made': {'steps': 3}}
  )
  gemma, loaded = weights.load('random3', str(tmp_path), dtype=dtype)
  assert gemma.config == GEMMA3
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_refused_checkpoints(tmp_path):
  params = numpy_tree(model()[1])

  def refused(match, folder, name='random'):
    with pytest.raises(weights.CheckpointNotFound, match=match):
      weights.load(name, str(folder) if folder else '')

  refused('needs a checkpoint: set lm.checkpoint', '', 'gemma2-2b')
  refused(
    'No checkpoint of gemma2-2b at .*nowhere', tmp_path / 'nowhere', 'gemma2-2b'
  )
  refused("There is no model 'gemma9'", tmp_path, 'gemma9')
  empty = tmp_path / 'empty'
  describe(empty)
  refused('does not hold an Orbax checkpoint', empty)

  missing = {key: value for key, value in params.items() if key != 'final_norm'}
  write_orbax(tmp_path / 'missing', missing)
  describe(tmp_path / 'missing')
  refused(
    "has no parameter 'final_norm/scale': is it another", tmp_path / 'missing'
  )

  wide = dataclasses.replace(GEMMA2, d_ff=32)
  write_orbax(tmp_path / 'wrong', params)
  describe(tmp_path / 'wrong', wide)
  refused(r'has shape .* and the model wants', tmp_path / 'wrong')

  saved = tmp_path / 'saved'
  weights.save_safetensors(saved, GEMMA2, params, {})
  whole = (saved / 'model.safetensors').read_bytes()
  (saved / 'model.safetensors').write_bytes(whole[: len(whole) // 2])
  refused('is not a whole safetensors file', saved)
  (saved / 'model.safetensors').write_bytes(whole)
  describe(saved, dataclasses.replace(GEMMA2, num_layers=3))
  refused("has no parameter 'layer_2/", saved)
  (saved / 'config.json').write_text('{"name": "random", ')
  refused('config.json', saved)
  (saved / 'config.json').write_text('{"name": "random", "d_model": 16}')
  refused('config.json', saved)
