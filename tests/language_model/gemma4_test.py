"""Gemma 4: each of its kinds against the package, and every site's meaning."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gemma_scope import mesh, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import (
  gemma4,
  gemma_package,
  generate,
  splice,
  weights,
)
from tests.helpers import random_models
from tests.helpers.random_models import (
  GEMMA4,
  GEMMA4_DENSE,
  GEMMA4_E,
  GEMMA4_MOE,
  model,
)

pytestmark = random_models.needs_gemma4
each = pytest.mark.parametrize('config', GEMMA4, ids=lambda c: c.name)
TOKENS = np.random.default_rng(0).integers(3, 40, (2, 9)).astype(np.int32)
TOKENS[:, 0] = 2


def all_sites(config, layers=None):
  layers = range(config.num_layers) if layers is None else layers
  return [sites.Site(i, kind) for i in layers for kind in config.site_widths(i)]


@functools.cache
def forward(config):
  """(parameters, tokens) -> logits and every site of every layer, compiled."""
  gemma, _ = model(config)
  taps = all_sites(config)
  return jax.jit(lambda p, tokens: gemma.forward(p, tokens, taps=taps))


@functools.cache
def plain(config):
  return forward(config)(model(config)[1], TOKENS)


def with_unread(gemma, params):
  """The package's tree: it has keys of layers that attend to another's."""
  whole = jax.eval_shape(gemma._model.init, jax.random.key(0), TOKENS)['params']
  ours = traverse_util.flatten_dict(params, sep='/')
  flat = {
    name: ours.get(name, jnp.ones(shape.shape))
    for name, shape in traverse_util.flatten_dict(whole, sep='/').items()
  }
  assert set(ours) <= set(flat)
  return traverse_util.unflatten_dict(flat, sep='/')


def unit_expert_norms(params):
  """Gains of 1 where the package's router normalises twice."""
  return {
    name: {**layer, 'pre_ffw_norm': jax.tree.map(jnp.ones_like, norm)}
    if (norm := layer.get('pre_ffw_norm')) and 'mlp2' in layer
    else layer
    for name, layer in params.items()
  }


@each
def test_equals_the_package(config):
  gemma, params = model(config)
  params = unit_expert_norms(params)
  ours = forward(config)(params, TOKENS).logits_BTV
  apply = jax.jit(lambda params: gemma._model.apply({'params': params}, TOKENS))
  package = apply(with_unread(gemma, params))
  close(ours, package.logits)
  assert np.abs(package.logits).max() > 2


@each
def test_sites_are_what_they_say(config):
  gemma, params = model(config)
  out = plain(config)
  for layer in range(config.num_layers):
    _check_layer(config, layer, params[f'layer_{layer}'], out.taps)
  last = out.taps[sites.Site(config.num_layers - 1, 'resid_post')]
  close(gemma.unembed(params, last), out.logits_BTV)


def close(found, wanted, scale=1.0):
  scale *= max(float(np.abs(wanted).max()), 1e-3)
  np.testing.assert_allclose(found, wanted, atol=2e-5 * scale)


def _check_layer(config, layer, params, taps):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = {
    site.kind: np.asarray(value, np.float64)
    for site, value in taps.items()
    if site.layer == layer
  }
  assert {k: v.shape[-1] for k, v in x.items()} == config.site_widths(layer)
  rms = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  norm = lambda x, name: rms(x) * p[name]['scale']
  gelu = lambda x: np.asarray(jax.nn.gelu(x), np.float64)
  w_o = p['attn']['attn_vec_einsum']['w'].reshape(-1, config.d_model)
  close(x['attn_in'], norm(x['resid_pre'], 'pre_attention_norm'))
  close(x['attn_raw'], x['attn_out'] @ w_o)
  close(x['attn_add'], norm(x['attn_raw'], 'post_attention_norm'))
  close(x['resid_mid'], x['resid_pre'] + x['attn_add'])
  close(x['mlp_in_ungained'], rms(x['resid_mid']))
  mlp, before = p['mlp'], p['pre_ffw_norm']
  if config.experts:
    mlp, before = p['mlp2'], p['pre_ffw2_norm']
  close(x['mlp_in'], x['mlp_in_ungained'] * before['scale'])
  gate, up = (x['mlp_in'] @ w.T for w in mlp['gating_einsum'])
  close(x['mlp_hidden'], gelu(gate) * up)
  dense = x['mlp_hidden'] @ mlp['linear']
  if config.experts:
    close(x['experts_out'], _experts(config, p, x, gelu, norm))
    dense = norm(dense, 'post_ffw2_norm') + x['experts_out']
  close(x['mlp_raw'], dense)
  close(x['mlp_out'], norm(x['mlp_raw'], 'post_ffw_norm'))
  total = x['resid_mid'] + x['mlp_out'] + x.get('ple_out', 0)
  close(x['resid_post'], total * p['skip_scale'])


def _experts(config, p, x, gelu, norm):
  """experts_out, expert by expert; checks the router on the way."""
  moe = p['mlp']
  routed = x['mlp_in_ungained'] * moe['router_scale'] / config.d_model**0.5
  close(x['router_logits'], routed @ moe['router_logits']['w'])
  e = np.exp(x['router_logits'])
  kth = np.sort(e, -1)[..., -config.top_experts, None]
  e = np.where(e >= kth, e, 0)
  close(x['expert_shares'], e / e.sum(-1, keepdims=True))
  assert ((x['expert_shares'] > 0).sum(-1) == config.top_experts).all()
  inputs = x['mlp_in_ungained'] * p['pre_ffw_norm']['scale']
  total = 0
  for i in range(config.experts):
    gate, up = (inputs @ w.T for w in moe['gating_einsum']['w'][i])
    out = gelu(gate) * up @ moe['linear']['w'][i]
    total += x['expert_shares'][..., i, None] * moe['per_expert_scale'][i] * out
  return norm(total, 'post_ffw1_norm')


@each
def test_own_values_change_nothing_and_zeros_do(config):
  gemma, params = model(config)
  want = plain(config)
  layer = config.num_layers - 1  # it shares keys and values in E models
  at = [s for s in all_sites(config, [layer]) if s.kind not in sites.READ_ONLY]

  @jax.jit  # one program for all sites
  def run(on, values):
    edits = {
      site: lambda x, i=i: jnp.where(on[i], values[i], x)
      for i, site in enumerate(at)
    }
    return gemma.forward(params, TOKENS, taps=at, edits=edits)

  own = [want.taps[site] for site in at]
  for i, site in enumerate(at):
    on = np.arange(len(at)) == i
    out = run(on, own)
    close(out.logits_BTV, want.logits_BTV)
    for other in at:
      close(out.taps[other], want.taps[other])
    zeroed = run(on, [0 * x for x in own])
    assert np.abs(zeroed.logits_BTV - want.logits_BTV).max() > 1e-2, site


@each
def test_a_splice_of_the_own_value_changes_nothing(config):
  """Also where the block and later ones take keys from earlier layers."""
  gemma, params = model(config)
  taps, layer = plain(config).taps, config.num_layers // 2
  kinds = 'attn_out', 'mlp_out', 'ple_out', 'experts_out', 'resid_post'
  at = [
    sites.Site(layer, kind)
    for kind in kinds
    if kind in config.site_widths(layer)
  ]

  @jax.jit
  def spliced(scale):
    return [
      splice.residual(
        gemma,
        params,
        TOKENS,
        site,
        scale * taps[site],
        taps[splice.before(site)],
      )
      for site in at
    ]

  end = taps[splice.last(gemma)]
  for own, zero in zip(spliced(1.0), spliced(0.0), strict=True):
    close(own, end)
    assert np.abs(zero - end).max() > 1e-2


def test_shares_may_be_moved_to_experts_that_were_not_chosen():
  gemma, params = model(GEMMA4_MOE)
  site, shares = (sites.Site(0, k) for k in ('router_logits', 'expert_shares'))

  @jax.jit
  def run(sign, moved):
    """The router's logits times `sign`; `moved` shares, where there are any."""
    edits = {
      site: lambda x: sign * x,
      shares: lambda x: jnp.where(jnp.any(moved), moved, x),
    }
    return gemma.forward(params, TOKENS, taps=(shares,), edits=edits)

  own = plain(GEMMA4_MOE).taps[shares]
  turned = run(-1, jnp.zeros_like(own))  # the least likely experts
  chosen = np.asarray(turned.taps[shares])
  assert not np.any((chosen > 0) & (own > 0).all(-1)[..., None])
  moved = run(1, chosen)
  close(moved.logits_BTV, turned.logits_BTV)
  every = run(1, np.full_like(chosen, 1 / 8))
  assert np.abs(every.logits_BTV - turned.logits_BTV).max() > 1e-2


@each
def test_causality(config):
  _, params = model(config)
  changed = TOKENS.copy()
  changed[:, 5] = 3 + (changed[:, 5] - 2) % 37
  got, want = forward(config)(params, changed), plain(config)
  pairs = [(got.taps[site], want.taps[site]) for site in want.taps]
  for a, b in [*pairs, (got.logits_BTV, want.logits_BTV)]:
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert not np.allclose(a[:, 5], b[:, 5], atol=1e-4)
  # Beyond the window a token is seen through global layers alone.
  assert not np.array_equal(got.logits_BTV[:, 8], want.logits_BTV[:, 8])


def test_an_edit_reaches_the_layers_that_share_its_keys():
  """Layer 2 is the global one that layer 5 takes its keys and values from."""
  gemma, params = model(GEMMA4_E)
  assert [GEMMA4_E.kv_layer(i) for i in range(6)] == [0, 1, 2, 1, 1, 2]
  source, other = (sites.Site(i, 'attn_in') for i in (2, 0))
  taps = plain(GEMMA4_E).taps
  held = {i: taps[sites.Site(i, 'resid_pre')] for i in (3, 1)}

  @jax.jit
  def run(layer, turned):
    """`turned` times -1, and layer `layer` gets what it got."""
    own = lambda x, i: jnp.where(i == layer, held[i], x)
    hold = {
      sites.Site(i, 'resid_pre'): functools.partial(own, i=i) for i in held
    }
    turn = {
      site: lambda x, n=n: jnp.where(n == turned, -x, x)
      for n, site in enumerate((source, other))
    }
    edits = hold | turn
    return gemma.forward(params, TOKENS, edits=edits).logits_BTV

  # Layer 3 gets what it got, so that only keys and values tell.
  want = plain(GEMMA4_E).logits_BTV
  assert np.abs(run(3, 0) - want).max() > 1e-2
  # Layer 0's are nobody else's.
  close(run(1, 1), want)


@each
def test_extending_a_cache_equals_one_pass(config):
  gemma, params = model(config)
  mask_TC = np.tril(np.ones((8, 8), bool))[None].repeat(2, 0)
  positions = np.arange(8)[None].repeat(2, 0)
  extend = jax.jit(gemma.extend)
  cache = gemma.empty_cache(2, 8)
  for part in (slice(0, 4), slice(4, 8)):  # together longer than the window
    logits_BV, cache = extend(
      params,
      cache,
      TOKENS[:, part],
      positions_BT=positions[:, part],
      mask_BTC=mask_TC[:, part],
    )
    close(logits_BV, plain(config).logits_BTV[:, part.stop - 1])


@each
def test_greedy_with_cache_is_greedy_by_full_passes(config):
  gemma, params = model(config)
  prompts = [TOKENS[0, :1], TOKENS[0, :3], TOKENS[1, :4]]
  sampling = generate.Sampling(max_new_tokens=5, temperature=0)
  got = generate.generate(gemma, params, prompts, sampling)
  for prompt, reply in zip(prompts, got, strict=True):
    ids = [*map(int, prompt)]
    for _ in range(5):  # beyond the window of 4
      row = np.zeros_like(TOKENS)
      row[0, : len(ids)] = ids
      logits_BTV = forward(config)(params, row).logits_BTV
      ids.append(1 + int(np.argmax(logits_BTV[0, len(ids) - 1, 1:])))
    assert ids[len(prompt) :] == reply.tolist()


def flops(config, site, **more):
  gemma, params = model(config)
  run = lambda p: gemma.forward(p, TOKENS, taps=(site,), logits=False, **more)
  cost = jax.jit(run).lower(params).compile().cost_analysis()
  return (cost[0] if isinstance(cost, list) else cost)['flops']


def test_only_layers_that_are_read_are_computed():
  early, last = (sites.Site(i, 'resid_post') for i in (1, 5))
  shallow, deep = flops(GEMMA4_E, early), flops(GEMMA4_E, last)
  assert shallow < 0.5 * deep
  # A pass that starts at layer 5 needs layers 0 to 2 for keys and values.
  x = np.zeros((*TOKENS.shape, 16), np.float32)
  started = {sites.Site(5, 'resid_pre'): lambda _: x}
  rest = flops(GEMMA4_E, last, edits=started)
  assert shallow < rest < 0.75 * deep


def on_a_mesh(config):
  """A model whose parameters are split over eight devices."""
  devices = mesh.make({'sae': 1, 'data': 2, 'latent': 4})
  _, params = model(config)
  gemma = lm.Gemma(config, mesh.sharding(devices, 'data', None, None))
  flat = traverse_util.flatten_dict(params, sep='/')
  sharded = {
    name: jax.device_put(x, weights.sharding(devices, name, x.shape))
    for name, x in flat.items()
  }
  if config.experts:
    first = sharded['layer_0/mlp/linear/w'].addressable_shards[0].data
    assert first.shape[0] == config.experts // 4
  return gemma, traverse_util.unflatten_dict(sharded, sep='/')


@pytest.mark.parametrize('config', [GEMMA4_E, GEMMA4_MOE], ids=lambda c: c.name)
def test_sharded_equals_one_device(config):
  gemma, params = on_a_mesh(config)
  taps = all_sites(config, [config.num_layers - 1])
  got = jax.jit(lambda p, t: gemma.forward(p, t, taps=taps))(params, TOKENS)
  close(got.logits_BTV, plain(config).logits_BTV)
  for site in taps:
    close(got.taps[site], plain(config).taps[site])


@pytest.mark.parametrize('kind', sites.EXPERTS[:2])
def test_edits_of_experts_and_gradients_on_a_mesh(kind):
  """Of the logits a pass through other chosen experts, of shares all of them.

  Frozen gradients are those of attribution.
  """
  site, first = sites.Site(0, kind), sites.Site(0, 'resid_pre')

  def run(gemma, params):
    def loss(v):
      edits = {site: lambda x: -x, first: lambda x: x + v}
      logits = gemma.forward(
        params, TOKENS, edits=edits, frozen=True
      ).logits_BTV
      return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros(16))

  found, wanted = run(*on_a_mesh(GEMMA4_MOE)), run(*model(GEMMA4_MOE))
  for a, b in zip(found, wanted, strict=True):
    close(a, b, scale=5)
  moved = wanted[1] - plain(GEMMA4_MOE).logits_BTV
  assert np.abs(moved).max() > 1e-2 < np.abs(wanted[0]).max()


def test_frozen_gradients_are_those_of_fixed_norms_and_weights():
  """Linear but for the MLPs: with those held too, f(x) = f(0) + f'(x) x."""
  gemma, params = model(GEMMA4_DENSE)
  first, last = sites.Site(0, 'resid_pre'), sites.Site(1, 'resid_post')
  out = plain(GEMMA4_DENSE)
  held = {
    s: (lambda _, v=out.taps[s]: v)
    for s in (sites.Site(0, 'mlp_out'), sites.Site(1, 'mlp_out'))
  }

  def run(x):
    edits = {first: lambda _: x, **held}
    return gemma.forward(
      params, TOKENS, taps=(last,), edits=edits, logits=False, frozen=True
    ).taps[last]

  x = out.taps[first]
  change_of = jax.jit(jax.jvp, static_argnums=0)
  y, change = change_of(run, (x,), (x,))
  # What does not come from x comes from the two MLPs that were held.
  scale = [params[f'layer_{i}']['skip_scale'] for i in (0, 1)]
  mlps = [out.taps[sites.Site(i, 'mlp_out')] for i in (0, 1)]
  _, through = change_of(
    lambda z: gemma.forward(
      params,
      TOKENS,
      taps=(last,),
      logits=False,
      frozen=True,
      edits={
        sites.Site(1, 'resid_pre'): lambda _: z,
        sites.Site(1, 'mlp_out'): lambda _: mlps[1],
      },
    ).taps[last],
    (out.taps[sites.Site(1, 'resid_pre')],),
    (mlps[0] * scale[0],),
  )
  close(change + through + mlps[1] * scale[1], y, scale=5)


@pytest.mark.parametrize('name', gemma4.SIZES)
def test_sizes_are_those_of_the_package(name):
  gemma_package.gemma4()
  from gemma.gm.nn.gemma4 import _gemma4

  classes = {
    'gemma4-e2b': _gemma4.Gemma4_E2B,
    'gemma4-e4b': _gemma4.Gemma4_E4B,
    'gemma4-31b': _gemma4.Gemma4_31B,
    'gemma4-26b-a4b': _gemma4.Gemma4_26B_A4B,
  }
  config = lm.SIZES[name]
  ours = dataclasses.asdict(lm.Gemma(config)._model.config)
  theirs = dataclasses.asdict(classes[name]().config)
  sharing = (theirs['kv_cache_sharing_config'] or {}).get('frac_shared_layers')
  assert config.kv_shared == round((sharing or 0) * config.num_layers)
  apart = {'kv_cache_sharing_config', 'use_bidirectional_attention'}
  if not config.experts:  # what no layer then reads
    apart |= {'top_k_experts', 'moe_dense_hidden_dim'}
  if theirs['num_global_kv_heads'] is None:
    theirs['num_global_kv_heads'] = theirs['num_kv_heads']
  for field in set(theirs) - apart:
    assert ours[field] == theirs[field], field


@pytest.mark.parametrize(
  'name, billions, without_tables',
  [('gemma4-e2b', 4.629, 2.280), ('gemma4-26b-a4b', 25.233, 25.233)],
)
def test_counts_of_parameters(name, billions, without_tables):
  """Google: 2.3 B effective parameters in E2B, 25.2 B in 26B-A4B."""
  flat = traverse_util.flatten_dict(lm.Gemma(lm.SIZES[name]).param_shapes)
  counts = {key[-1]: 0.0 for key in flat}
  for key, shape in flat.items():
    counts[key[-1]] += np.prod(shape.shape, dtype=float) / 1e9
  assert round(sum(counts.values()), 3) == billions
  counts.pop('per_layer_embeddings', None)
  assert round(sum(counts.values()), 3) == without_tables


def test_weights_that_a_token_meets():
  """Google: 3.8 B active parameters in 26B-A4B, embeddings among them."""
  config = lm.SIZES['gemma4-26b-a4b']
  of_layers = sum(map(config.matmul_weights, range(config.num_layers)))
  embedding = config.vocab_size * config.d_model
  assert round((of_layers + embedding) / 1e9, 1) == 3.8


def test_what_a_model_lacks_is_a_sentence():
  gemma, params = model(GEMMA4_DENSE)
  for kind, words in (('ple_out', 'per-layer inputs'), ('experts_out', 'exp')):
    match = f'no {kind}/0 in a model without {words}'
    with pytest.raises(ValueError, match=match):
      gemma.forward(params, TOKENS, taps=(sites.Site(0, kind),))
  assert dataclasses.asdict(GEMMA4_E)['family'] == 'gemma4'
