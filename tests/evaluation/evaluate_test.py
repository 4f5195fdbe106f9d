"""The evaluation against a slow reference, and against what must hold."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gemma_scope import mesh, sites
from gemma_scope import sae as sae_lib
from gemma_scope.evaluation import (
  batches,
)
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from tests.helpers import forward
from tests.helpers.evaluations import (
  CONFIG,
  SITES,
  D,
  Reference,
  identity_sae,
  keep,
  measure,
  random_sae,
  text,
)


@pytest.fixture(scope='module')
def found(model, saes):
  return measure(model, saes, text(6))


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


def test_kl_and_the_fvus_equal_plain_sums(model, saes, found):
  gemma, params = model
  tokens_NT, keep_NT = text(6), keep(text(6))
  (arrays, card) = saes[3]
  site = sites.parse(card['sites'][0])
  out = forward.forward(gemma, params, tokens_NT, (site,))
  x_NTD = np.asarray(out.taps[site])
  made_NTD = np.asarray(
    sae_lib.decode(arrays, sae_lib.encode(arrays, x_NTD), x_NTD)
  )
  edit = forward.instead(np.where(keep_NT[..., None], made_NTD, x_NTD))
  spliced = forward.forward(gemma, params, tokens_NT, edits={site: edit})
  log_p, log_q = (
    special.log_softmax(np.asarray(o.logits_BTV, np.float64), -1)
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
  rest = (
    np.delete(error_RD, largest, 1).sum()
    / np.delete(square_RD, largest, 1).sum()
  )
  assert got['fvu_rest']['value'] == pytest.approx(rest, rel=1e-4)


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
  refused('all tokens of the text are special', tokens_NT=np.full((2, 5), 2))
  refused(r'found \[5\]', tokens_NT=np.full(5, 2))
