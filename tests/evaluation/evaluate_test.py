"""The evaluation against a slow reference, and against what must hold."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh, sites
from gemma_scope import sae as sae_lib
from gemma_scope.evaluation import (
  batches,
  controls,
  evaluate,
  passes,
)
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice, weights
from gemma_scope.release import table
from tests.helpers import releases

CONFIG = lm.Config(
    name='random', vocab_size=48, d_model=16, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, d_ff=32, window=4, pattern='LG',
    final_softcap=30.0,
)  # fmt: skip
SPECIAL = (0, 1, 2)  # padding, EOS, BOS
SITES = ('attn_out/1', 'resid_post/0')
BATCH, D = 4, 16


@pytest.fixture(scope='module')
def model():
  gemma = lm.Gemma(CONFIG)
  params = gemma.init(jax.random.key(0))
  # Sharper logits than a random model's, so that a splice is felt.
  params['embedder']['input_embedding'] *= 3
  return gemma, params


def text(count, length=12, seed=0):
  tokens_NT = np.random.default_rng(seed).integers(3, 48, (count, length))
  tokens_NT[:, 0] = 2
  tokens_NT[1::3, 5] = 1
  tokens_NT[2::3, -3:] = 0
  return tokens_NT.astype(np.int32)


def keep(tokens_NT):
  return ~np.isin(tokens_NT, SPECIAL)


def card(site, name):
  return {'type': 'sae', 'sites': [site], 'targets': [site], 'name': name}


def random_sae(site, seed=0, width=24, name=''):
  rng = np.random.default_rng(seed)
  W_dec = rng.normal(size=(width, D))
  W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
  params = {
    'W_enc': W_dec.T * 0.7,
    'b_enc': rng.normal(size=width) * 0.1,
    'W_dec': W_dec,
    'b_dec': rng.normal(size=D) * 0.1,
    'threshold': np.full(width, 0.5),
  }
  params['b_enc'][0] = -1e6  # a latent that never fires
  params = {key: value.astype(np.float32) for key, value in params.items()}
  return params, card(site, name or f'{site}/{seed}')


def identity_sae(site):
  eye = np.eye(D, dtype=np.float32)
  params = {
    'W_enc': np.concatenate([eye, -eye], 1),
    'b_enc': np.zeros(2 * D, np.float32),
    'W_dec': np.concatenate([eye, -eye]),
    'b_dec': np.zeros(D, np.float32),
    'threshold': np.zeros(2 * D, np.float32),
  }
  return params, card(site, f'{site}/identity')


WATCH = batches.Watch()


def measure(model, saes, tokens_NT, watch=WATCH, **more):
  given = batches.Text(tokens_NT, keep, BATCH, **more)
  return evaluate.evaluate(*model, releases.saes(saes), given, watch=watch)


@pytest.fixture(scope='module')
def saes():
  return [random_sae(site, seed) for site in SITES for seed in (0, 1)]


@pytest.fixture(scope='module')
def found(model, saes):
  return measure(model, saes, text(6))


class Reference:
  """Loops over sequences and tokens; splices by a plain full forward pass."""

  def __init__(self, model, sae, tokens_NT, keep_bos=True):
    (gemma, params), (arrays, card) = model, sae
    site = sites.parse(card['sites'][0])
    out = gemma.forward(params, tokens_NT, taps=(site,))
    x_NTD = np.asarray(out.taps[site], np.float64)
    keep_NT = keep(tokens_NT)
    p = {key: value.astype(np.float64) for key, value in arrays.items()}
    mean_D = x_NTD[keep_NT].mean(0)
    x_hat_NTD, self.fired_F = x_NTD.copy(), np.zeros(len(p['b_enc']))
    active = error = variance = flat = 0.0
    for n, t in np.argwhere(keep_NT):
      z_F = x_NTD[n, t] @ p['W_enc'] + p['b_enc']
      f_F = np.where(z_F > p['threshold'], np.maximum(z_F, 0), 0)
      x_hat_NTD[n, t] = f_F @ p['W_dec'] + p['b_dec']
      self.fired_F += f_F > 0
      active += (f_F > 0).sum()
      error += ((x_NTD[n, t] - x_hat_NTD[n, t]) ** 2).sum()
      variance += ((x_NTD[n, t] - mean_D) ** 2).sum()
      flat += ((x_NTD[n, t] - x_NTD[keep_NT].mean()) ** 2).sum()
    if not keep_bos:
      z_NF = x_NTD[:, 0] @ p['W_enc'] + p['b_enc']
      f_NF = np.where(z_NF > p['threshold'], np.maximum(z_NF, 0), 0)
      x_hat_NTD[:, 0] = f_NF @ p['W_dec'] + p['b_dec']
    self.tokens = keep_NT.sum()
    self.l0 = active / self.tokens
    self.fvu, self.fvu_elementwise = error / variance, error / flat

    def loss(x_NTD):
      edits = {site: lambda _: jnp.asarray(x_NTD, jnp.float32)}
      spliced = gemma.forward(params, tokens_NT, edits=edits).logits_BTV
      return np.asarray(lm.token_losses(spliced, tokens_NT)[0], np.float64)

    self.counts_NT = keep_NT[:, 1:] & keep_NT[:, :-1]
    clean_NT = np.asarray(lm.token_losses(out.logits_BTV, tokens_NT)[0])
    self.delta_NT = np.where(self.counts_NT, loss(x_hat_NTD) - clean_NT, 0)
    self.delta = self.delta_NT.sum() / self.counts_NT.sum()
    self.clean = clean_NT[self.counts_NT].mean()
    keep_NT1 = keep_NT[..., None]
    ablated = [
      (loss(np.where(keep_NT1, value, x_NTD)) - clean_NT)[self.counts_NT].mean()
      for value in (0.0, mean_D)
    ]
    self.recovered = [(lost - self.delta) / lost for lost in ablated]
    self.mean_D = mean_D


def test_equals_the_slow_reference(model, saes, found):
  tokens_NT = text(6)
  for sae in (saes[0], saes[3]):
    want, got = Reference(model, sae, tokens_NT), found[sae[1]['name']]
    value = lambda key, got=got: got[key]['value']
    assert value('l0') == pytest.approx(want.l0, rel=1e-6)
    assert value('fvu') == pytest.approx(want.fvu, rel=1e-5)
    assert value('fvu_elementwise') == pytest.approx(
      want.fvu_elementwise, rel=1e-5
    )
    assert value('clean_loss') == pytest.approx(want.clean, rel=1e-5)
    assert value('delta_loss') == pytest.approx(want.delta, abs=2e-5)
    assert abs(want.delta) > 1e-2
    for key, share in zip(('zero', 'mean'), want.recovered, strict=True):
      assert value(f'loss_recovered_{key}') == pytest.approx(share, rel=2e-3)
    assert got['tokens'] == got['l0']['tokens'] == want.tokens
    assert got['delta_loss']['tokens'] == want.counts_NT.sum()
    assert got['sequences'] == 6
    frequency_F = want.fired_F / want.tokens
    assert got['dead'] == np.mean(frequency_F == 0) > 0
    assert got['dense'] == np.mean(frequency_F > 0.1)
    histogram = got['frequency_histogram']
    assert histogram['never'] + sum(histogram['counts']) == len(frequency_F)
    assert len(histogram['log10_edges']) == len(histogram['counts']) + 1 == 29
    curve = got['by_position']
    assert curve['position'][0] == 1 and np.all(np.diff(curve['position']) > 0)
    first = want.delta_NT[:, 1].sum() / want.counts_NT[:, 1].sum()
    assert curve['delta_loss'][0] == pytest.approx(first, abs=5e-5)


def test_bos_stays_clean(model, saes, found):
  sae = saes[3]  # at the residual stream
  clean = Reference(model, sae, text(6)).delta
  spliced = Reference(model, sae, text(6), keep_bos=False).delta
  assert abs(clean - spliced) > 1e-2
  got = found[sae[1]['name']]['delta_loss']['value']
  assert got == pytest.approx(clean, abs=2e-5)


def test_one_pass_for_all_equals_one_for_each(model, saes, found):
  alone = measure(model, saes[2:3], text(6))
  assert alone == {name: found[name] for name in alone}
  assert set(found) == {card['name'] for _, card in saes}


def test_metrics_are_json_with_an_interval_each(found):
  for metrics in found.values():
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    figures = [metrics, metrics['control']]
    for key in ('l0', 'fvu', 'delta_loss'):
      for figure in (one[key] for one in figures):
        assert figure['low'] < figure['value'] < figure['high']


@pytest.mark.parametrize('site', SITES)
def test_identity_loses_nothing(model, site):
  metrics = next(iter(measure(model, [identity_sae(site)], text(6)).values()))
  assert abs(metrics['delta_loss']['value']) < 1e-5
  assert metrics['fvu']['value'] < 1e-10
  assert metrics['l0']['value'] == pytest.approx(D, abs=0.01)
  for key in ('loss_recovered_zero', 'loss_recovered_mean', 'kl_score'):
    assert metrics[key]['value'] == pytest.approx(1, abs=1e-3)
  for key in ('cosine', 'norm_ratio'):
    assert metrics[key]['value'] == pytest.approx(1, abs=1e-5)
  assert metrics['kl']['value'] == pytest.approx(0, abs=1e-6)
  assert metrics['dense'] == 1


def test_the_mean_alone_explains_nothing(model):
  params, card = random_sae('resid_post/0')
  params['b_dec'] = Reference(model, (params, card), text(6)).mean_D
  params['b_dec'] = params['b_dec'].astype(np.float32)
  params['threshold'][:] = 1e30
  metrics = measure(model, [(params, card)], text(6))[card['name']]
  assert metrics['l0']['value'] == 0 and metrics['dead'] == 1
  assert metrics['fvu']['value'] == pytest.approx(1, rel=1e-5)
  assert metrics['loss_recovered_mean']['value'] == pytest.approx(0, abs=1e-3)
  # Its control never fires either, and is the same thing.
  assert metrics['control']['l0']['value'] == 0
  assert metrics['control']['fvu']['value'] == pytest.approx(1, rel=1e-5)


def test_intervals_cover(model, saes):
  tokens_NT = text(96, seed=5)
  name = saes[3][1]['name']
  whole = measure(model, saes[3:], tokens_NT)[name]
  parts = [
    measure(model, saes[3:], tokens_NT[i : i + 6])[name]
    for i in range(0, 96, 6)
  ]
  for key in ('delta_loss', 'fvu', 'l0'):
    truth = whole[key]['value']
    covered = [part[key]['low'] < truth < part[key]['high'] for part in parts]
    assert sum(covered) >= 12  # 16 of them; 95 % of 16 is 15.2
    width = lambda figure: figure['high'] - figure['low']
    assert (
      width(whole[key]) < np.median([width(part[key]) for part in parts]) / 2
    )


def test_controls_have_the_members_l0(model, saes, monkeypatch):
  monkeypatch.setattr(batches, '_SAMPLE_TOKENS', 1)  # 32 sequences of 96
  for metrics in measure(model, saes[2:], text(96)).values():
    assert set(metrics['controls']) == set(controls.KINDS)
    for kind, control in metrics['controls'].items():
      ratio = control['l0']['value'] / metrics['l0']['value']
      assert 0.93 < ratio < 1.07, kind
      assert 0 < control['fvu']['value'] < 1, kind
    fvu = {kind: c['fvu']['value'] for kind, c in metrics['controls'].items()}
    assert metrics['control']['fvu']['value'] == min(fvu.values())
    assert fvu[metrics['control']['kinds']['fvu']] == min(fvu.values())


def test_controls_are_spliced_on_a_third_of_many_batches(model, saes):
  (metrics,) = measure(model, saes[3:], text(4 * BATCH * 2)).values()
  tokens = [c['delta_loss']['tokens'] for c in metrics['controls'].values()]
  assert sum(tokens) == metrics['delta_loss']['tokens']
  for control in metrics['controls'].values():
    assert control['fvu']['tokens'] == metrics['fvu']['tokens']
    assert 0 < control['delta_loss']['tokens'] < sum(tokens)


def test_copies_of_a_document_are_not_new_draws(model, saes):
  """Each sequence four times: as one document, and as four sequences."""
  tokens_NT = np.repeat(text(12), 4, 0)
  name = saes[3][1]['name']
  documents_NT = np.repeat(np.arange(12), 4)[:, None] + 0 * tokens_NT
  once = measure(model, saes[3:], text(12))[name]
  apart = measure(model, saes[3:], tokens_NT)[name]
  whole = measure(model, saes[3:], tokens_NT, documents_NT=documents_NT)[name]
  assert (whole['clusters'], whole['clustered_by']) == (12, 'documents')
  assert (apart['clusters'], apart['clustered_by']) == (48, 'sequences')
  assert 'over 12 documents' in table.note([({}, whole)])
  assert 'rough' in table.note([({}, whole)])
  assert 'rough' not in table.note([({}, apart)])
  width = lambda metrics, key: metrics[key]['high'] - metrics[key]['low']
  for key in ('fvu', 'l0', 'delta_loss', 'kl', 'clean_loss'):
    assert whole[key]['value'] == pytest.approx(once[key]['value'], rel=1e-3)
    assert width(whole, key) == pytest.approx(width(once, key), rel=2e-3)
    assert width(apart, key) < 0.6 * width(whole, key)


def test_a_document_that_spans_sequences_is_one_draw(model, saes):
  tokens_NT = text(6)
  documents_NT = np.zeros_like(tokens_NT)
  documents_NT[:, 6:] = 1  # each sequence holds parts of both
  (metrics,) = measure(
    model, saes[3:], tokens_NT, documents_NT=documents_NT
  ).values()
  assert metrics['clusters'] == 2
  assert metrics['l0']['low'] < metrics['l0']['value'] < metrics['l0']['high']


def reconstructed(arrays, x):
  return np.asarray(sae_lib.decode(arrays, sae_lib.encode(arrays, x), x))


def test_kl_and_the_fvus_equal_plain_sums(model, saes, found):
  gemma, params = model
  tokens_NT, keep_NT = text(6), keep(text(6))
  (arrays, card) = saes[3]
  site = sites.parse(card['sites'][0])
  out = gemma.forward(params, tokens_NT, taps=(site,))
  x_NTD = np.asarray(out.taps[site])
  made_NTD = np.asarray(
    sae_lib.decode(arrays, sae_lib.encode(arrays, x_NTD), x_NTD)
  )
  spliced_NTD = jnp.asarray(np.where(keep_NT[..., None], made_NTD, x_NTD))
  spliced = gemma.forward(
    params, tokens_NT, edits={site: lambda _: spliced_NTD}
  )
  log_p, log_q = (
    np.asarray(jax.nn.log_softmax(o.logits_BTV), np.float64)
    for o in (out, spliced)
  )
  kl_NT = np.sum(np.exp(log_p) * (log_p - log_q), -1)
  counts_NT = np.zeros_like(keep_NT)
  counts_NT[:, :-1] = keep_NT[:, 1:] & keep_NT[:, :-1]
  got = found[card['name']]
  assert got['kl']['value'] == pytest.approx(kl_NT[counts_NT].mean(), rel=1e-3)
  assert got['kl']['value'] > 1e-3 and 0 < got['kl_score']['value'] < 1
  x_RD, made_RD = x_NTD[keep_NT], made_NTD[keep_NT]
  square_RD, error_RD = (x_RD - x_RD.mean(0)) ** 2, (x_RD - made_RD) ** 2
  variance_D = square_RD.sum(0)
  largest = np.argsort(-variance_D)[:4]
  described = got['largest_dimensions'][0]
  assert described['dimensions'] == largest.tolist()
  assert described['shares'][0] == pytest.approx(
    variance_D[largest[0]] / variance_D.sum(), rel=1e-4
  )
  rest = np.delete(error_RD, largest, 1).sum() / np.delete(
    square_RD, largest, 1).sum()  # fmt: skip
  assert got['fvu_rest']['value'] == pytest.approx(rest, rel=1e-4)


def test_rows_of_outlying_norm_are_left_out_of_one_fvu(model, saes):
  gemma, params = model
  (arrays, card) = saes[3]
  site = sites.parse(card['sites'][0])
  tokens_NT, keep_NT = text(6), keep(text(6))
  x_NTD = np.asarray(gemma.forward(params, tokens_NT, taps=(site,)).taps[site])
  x_RD = x_NTD[keep_NT]
  bound = float(np.quantile(np.linalg.norm(x_RD, axis=1), 0.9))
  ruled = {**card, 'outliers': {'max_norm': 1.0, 'norm_bounds': {
    card['sites'][0]: bound}}}  # fmt: skip
  (got,) = measure(model, [(arrays, ruled)], tokens_NT).values()
  inlier_R = np.linalg.norm(x_RD, axis=1) <= bound
  assert got['outliers']['rule'] == 'card'
  assert got['outliers']['tokens'] == (~inlier_R).sum() > 0
  x_RD = x_RD[inlier_R]
  made_RD = np.asarray(
    sae_lib.decode(arrays, sae_lib.encode(arrays, x_RD), x_RD)
  )
  want = ((x_RD - made_RD) ** 2).sum() / ((x_RD - x_RD.mean(0)) ** 2).sum()
  assert got['fvu_inliers']['value'] == pytest.approx(want, rel=1e-4)
  (without,) = measure(model, [(arrays, card)], tokens_NT).values()
  assert without['outliers']['rule'] == '4 medians'
  assert without['fvu'] == got['fvu']


def test_outliers_by_the_rule_of_the_card_stay_as_they_are(model, saes):
  """As BOS does: an SAE and its controls are spliced in at other tokens."""
  (arrays, card) = saes[3]
  rule = lambda bound: {
    **card,
    'outliers': {'max_norm': 1.0, 'norm_bounds': {card['sites'][0]: bound}},
  }
  tokens_NT = text(6)
  found = [
    next(iter(measure(model, [(arrays, each)], tokens_NT).values()))
    for each in (card, rule(1e9), rule(1e-9))
  ]
  plain, none_left, all_left = found
  assert none_left['delta_loss'] == plain['delta_loss']
  assert abs(plain['delta_loss']['value']) > 1e-3
  for figures in (all_left, *all_left['controls'].values()):
    assert abs(figures['delta_loss']['value']) < 1e-5
    assert abs(figures['kl']['value']) < 1e-5
  assert all_left['fvu'] == plain['fvu']


def test_trained_nulls_stand_beside_their_sae(model, saes):
  (params, card), (other, _) = saes[2:4]
  card = card | {'width': 24, 'architecture': 'jumprelu', 'seed': 0}
  null = card | {
    'name': 'null',
    'architecture': 'frozen_decoder_jumprelu',
    'null': 'frozen_decoder',
  }
  else_ = null | {'name': 'else', 'seed': 1}
  given = [(params, card), (other, null), (other, else_)]
  found = measure(model, given, text(6))
  beside = found[card['name']]['nulls']
  assert set(beside) == {'frozen_decoder'}
  for key, figure in beside['frozen_decoder'].items():
    assert figure == found['null'][key]
  assert 'nulls' not in found['null'] and 'nulls' not in found['else']


def test_losses_at_every_third_token_are_those_of_all(model, saes, found):
  name = saes[3][1]['name']
  (part,) = measure(model, saes[3:], text(24), loss_every=3).values()
  whole = measure(model, saes[3:], text(24))[name]
  assert part['fvu'] == whole['fvu'] and part['l0'] == whole['l0']
  share = part['kl']['tokens'] / whole['kl']['tokens']
  assert 0.25 < share < 0.4
  for key in ('delta_loss', 'kl', 'clean_loss'):
    low, high = part[key]['low'], part[key]['high']
    assert low < whole[key]['value'] < high, key
  # With a position in each batch: all of them together are all positions.
  given = batches.Text(text(24), keep, BATCH, loss_every=3)
  given = batches.Batches(given, None)
  seen = {int(t) for n in range(3) for t in given.loss_positions(n)}
  assert seen >= set(range(9)) and max(seen) <= 10


def test_settings_are_refused_before_training():
  batches.check(0, 0, 0)
  batches.check(8, 4, 128, data=2)
  for wrong, match in (
    ((8, 0, 128), 'batch of 0'),
    ((8, 4, 2), 'three tokens'),
    ((8, 15, 128, 2), 'cannot be split'),
  ):
    with pytest.raises(ValueError, match=match):
      batches.check(*wrong)


def test_layers_before_the_site_are_not_run_again():
  gemma = lm.Gemma(dataclasses.replace(CONFIG, num_layers=4))
  params = gemma.init(jax.random.key(0))
  tokens_BT = jnp.asarray(text(BATCH))
  x_BTD = jnp.zeros((*tokens_BT.shape, D))

  def flops(kind, layer):
    site = sites.Site(layer, kind)
    lowered = passes.residual.lower(
      gemma, params, tokens_BT, site, x_BTD, x_BTD
    )
    cost = lowered.compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)['flops']

  full = flops('resid_pre', 0)
  assert flops('mlp_out', 3) < 0.6 * full
  assert flops('attn_out', 3) < flops('attn_out', 2) < 0.9 * full


def test_slices_of_logits_and_latents_change_nothing(model, saes, monkeypatch):
  gemma, params = model
  tokens_BT = jnp.asarray(text(BATCH))
  site = sites.parse('resid_post/1')
  x_BTD = splice.taps(gemma, params, tokens_BT, (site,))[site]
  logits_BTV = gemma.unembed(params, x_BTD)  # as if the last layer's
  want, _ = lm.token_losses(logits_BTV, tokens_BT)
  keep_BT = tokens_BT > 2
  at = (saes[0][0], (x_BTD,), None, keep_BT, np.ones((1, D)), None)
  whole = passes.reconstruct.__wrapped__(*at)
  monkeypatch.setattr(splice, '_ROWS', 8)
  monkeypatch.setattr(passes, '_LOGITS', 8 * 48)
  ends, positions = (x_BTD, x_BTD), np.arange(tokens_BT.shape[1] - 1)
  loss, kl = passes.losses.__wrapped__(
    gemma, params, tokens_BT, ends, positions, None
  )
  for k in range(2):
    np.testing.assert_allclose(loss[..., k], want, atol=2e-5)
  np.testing.assert_allclose(kl, 0, atol=1e-6)
  parts = passes.reconstruct.__wrapped__(*at)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sharded_equals_one_device(model, saes, found):
  gemma, params = model
  devices = mesh.make({'sae': 1, 'data': 4, 'latent': 2})
  place = lambda path, x: jax.device_put(
    x, weights.sharding(devices, '/'.join(k.key for k in path), x.shape)
  )
  sharded = jax.tree_util.tree_map_with_path(place, params)
  pinned = lm.Gemma(CONFIG, mesh.sharding(devices, 'data', None, None))
  name = saes[3][1]['name']
  got = measure((pinned, sharded), saes[3:], text(6))[name]
  want = found[name]
  for key in ('l0', 'fvu', 'delta_loss', 'loss_recovered_zero'):
    for side in ('value', 'low', 'high'):
      assert got[key][side] == pytest.approx(
        want[key][side], rel=1e-3, abs=1e-4
      )
  for key in ('l0', 'fvu', 'delta_loss'):
    assert got['control'][key]['value'] == pytest.approx(
      want['control'][key]['value'], rel=0.02, abs=2e-3
    )


def test_bfloat16_model(model):
  gemma, params = model
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  sae = identity_sae('resid_post/0')
  metrics = measure((gemma, low), [sae], text(6))[sae[1]['name']]
  assert metrics['fvu']['value'] < 1e-10
  assert abs(metrics['delta_loss']['value']) < 2e-2


def test_progress_and_stopping(model, saes):
  seen = []
  watch = batches.Watch(progress=lambda *done: seen.append(done))
  measure(model, saes[3:], text(6), watch)
  done = [part for part, _ in seen]
  assert done == sorted(done) and done[-1] == 6
  assert {total for _, total in seen} == {6}
  assert np.diff([0, *done]).max() <= 1  # more often than once a batch

  class Stop(Exception):
    pass

  calls = iter(range(10))

  def poll():
    if next(calls) == 5:
      raise Stop

  with pytest.raises(Stop):
    measure(model, saes[3:], text(6), batches.Watch(poll=poll))


def test_what_does_not_fit_is_a_sentence(model, saes):
  params, card = saes[0]

  def refused(match, saes=None, tokens_NT=None, **changes):
    saes = [({**params, **changes}, card)] if saes is None else saes
    with pytest.raises(ValueError, match=match):
      measure(model, saes, text(6) if tokens_NT is None else tokens_NT)

  wide = np.zeros((20, 24), np.float32)
  refused(
    r'has W_enc \(20, 24\); expected \(16, 24\) .* as in random at attn_out/1',
    W_enc=wide,
  )
  refused('has NaN or infinity in b_enc', b_enc=np.full(24, np.nan, np.float32))
  refused('expected W_enc, b_enc', W_gate=wide)
  refused(r'has W_skip \(20, 24\); expected \(16, 16\)', W_skip=wide)
  far = ['mlp_out/2']
  refused(
    'model has layers 0 to 1',
    [(params, {**card, 'sites': far, 'targets': far})],
  )
  refused('writes the same', [(params, {**card, 'targets': far})])
  refused('2 of the SAEs are named', [saes[0], saes[0]])
  refused('no SAE was given', [])
  refused('sequence 0 starts with token 7', tokens_NT=np.full((2, 5), 7))
  refused('all to evaluate on are special', tokens_NT=np.full((2, 5), 2))
  refused(r'found \[5\]', tokens_NT=np.full(5, 2))
