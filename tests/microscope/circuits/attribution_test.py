"""Attributions: held to slopes, to removal, to sums and to planted causes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemma_scope import release
from gemma_scope.evaluation.saebench import scr_tpp
from gemma_scope.language_model import weights
from gemma_scope.microscope.circuits import (
  attribution,
  budget,
  effects,
  permutation_test,
)
from gemma_scope.microscope.circuits import intervene as iv
from tests.helpers import circuits, forward, random_saes

TOKENS_T, T = circuits.TOKENS_T, circuits.T
LOGIT = (7, 9)


@pytest.fixture(scope='module')
def model():
  return weights.load('tiny')


@pytest.fixture(scope='module')
def subjects(model):
  found = {}
  for name, member in circuits.MEMBERS.items():
    _, f_TF = circuits.values(model, name)
    found[name] = iv.subject(model, release.in_memory(*member), f_TF[1:].max(0))
  return found


@pytest.mark.parametrize('name', ['sae', 'transcoder', 'crosscoder', 'clt'])
def test_a_gradient_is_the_slope_of_a_small_change(model, subjects, name):
  """At one token, of a latent that fires there; both signs cancel curvature."""
  subject = subjects[name]
  found = attribution.search(subject, TOKENS_T, LOGIT, steps=4)
  _, f_TF = circuits.values(model, name)
  checked = 0
  for i in np.argsort(-np.abs(found['gradient']))[:8]:
    by_token = found['by_token'][i]
    t = int(np.argmax(np.abs(by_token)))
    small = 0.002 * f_TF[t, i] / subject.max_F[i]
    rows = iv.rows(
      subject, [[iv.Change(int(i), 'add', s * small)] for s in (1, -1)]
    )
    where_BT = np.arange(T)[None] == t
    measured = effects.effects(
      subject, np.array([TOKENS_T]), rows, logit=LOGIT, where_BT=where_BT
    ).logit_BT[:, T - 1]
    slope = (measured[0] - measured[1]) / 0.004
    assert slope == pytest.approx(by_token[t], rel=0.05, abs=2e-3)
    checked += abs(slope) > 0.01
  assert checked


@pytest.mark.parametrize('name', ['sae', 'transcoder', 'clt'])
def test_the_integral_adds_up(subjects, name):
  found = attribution.search(subjects[name], TOKENS_T, LOGIT, steps=60)
  parts = abs(found['latents']) + abs(found['error'])
  assert parts > 0.05 and abs(found['other']) < 0.03 * parts


def test_exact_effects_are_those_of_removal(subjects, model):
  subject, (params, _) = subjects['sae'], circuits.MEMBERS['sae']
  found = attribution.attribute(
    subject,
    TOKENS_T,
    LOGIT,
    settings=attribution.Search(top=3, others=2, shuffles=2),
  )

  def value(edits):
    output = forward.forward(*model, np.array([TOKENS_T]), edits=edits)
    logits_V = np.asarray(output.logits_BTV[0, -1])
    return float(logits_V[LOGIT[0]] - logits_V[LOGIT[1]])

  target = subject.place.targets[0]
  x_TD = circuits.values(model, 'sae')[0][target][0]
  plain = value({target: forward.instead(np.asarray(x_TD)[None])})
  assert found['value'] == pytest.approx(plain, abs=1e-4)
  for line in found['features']:
    # BOS is left alone by `exact`, and removal knows no such token.
    without = scr_tpp.edit(params, [line['feature']])
    after_TD = np.array(without(x_TD))
    after_TD[0] = x_TD[0]
    after = value({target: forward.instead(after_TD[None])})
    assert line['exact'] == pytest.approx(found['value'] - after, abs=2e-4)


def planted(model, strength: float):
  """An SAE whose latent 0 writes `strength` of logit 7 less logit 9."""
  gemma, lm_params = model
  params, card = random_saes.member(0, 'resid_post/3')
  table_VD = np.asarray(lm_params['embedder']['input_embedding'])
  gain_D = 1 + np.asarray(lm_params['final_norm']['scale'])
  cause_D = (table_VD[7] - table_VD[9]) * gain_D
  params['W_dec'][0] = cause_D / np.linalg.norm(cause_D)
  params['W_dec'][0] *= strength * np.linalg.norm(params['W_dec'][1])
  params['b_enc'][0] = 30  # it fires on all tokens
  return iv.subject(
    model, release.in_memory(params, card), np.ones(random_saes.F)
  )


def test_a_planted_cause_is_found_and_passes(model):
  found = attribution.attribute(
    planted(model, 2.0), TOKENS_T, LOGIT, settings=attribution.Search(top=3)
  )
  first = found['features'][0]
  assert first['feature'] == 0 and first['passes'] and first['p'] == 0.05
  assert first['exact'] > max(found['shuffled']) > 0
  assert first['exact'] > first['control'] > 0
  assert found['passing'][0] == 0 and found['verdict'][0].isdigit()
  assert abs(found['agreement']['integrated']['spearman']) > 0.5
  assert 'passes' in attribution.report(found)
  few = attribution.attribute(
    planted(model, 2.0),
    TOKENS_T,
    LOGIT,
    settings=attribution.Search(top=3, shuffles=5),
  )
  assert few['passing'] == [] and few['verdict'].startswith('Not tested')


def test_where_latents_mean_nothing_few_texts_show_any(model):
  """A random SAE: at most one text in twenty, give or take chance."""
  params, card = random_saes.member(0, 'resid_post/3')
  subject = iv.subject(
    model, release.in_memory(params, card), np.ones(random_saes.F)
  )
  texts, shown = 20, 0
  for seed in range(texts):
    rng = np.random.default_rng(seed)
    tokens_T = [2, *rng.integers(10, 4000, T - 1).tolist()]
    logit = tuple(map(int, rng.integers(10, 4000, 2)))
    found = attribution.attribute(
      subject,
      tokens_T,
      logit,
      settings=attribution.Search(top=2, others=0, steps=4, seed=seed),
    )
    shown += bool(found['passing'])
    assert found['passing'] or 'No ' in found['verdict']
  assert shown <= 3  # beyond that with a chance of 1 in 60, were it 5 %


def test_a_shuffle_keeps_lengths_and_layers(model):
  """What is measured of a shuffle: the largest of its own search."""
  params, card = circuits.MEMBERS['clt']
  subject = iv.subject(model, release.in_memory(params, card), np.ones(48))
  layer_F, norm_F = iv.decoders(subject)
  assert layer_F.tolist() == sorted([0, 1, 2] * 16)
  np.testing.assert_allclose(
    norm_F, np.linalg.norm(params['W_dec'].reshape(48, -1), axis=1), rtol=1e-5
  )
  found = attribution.search(subject, TOKENS_T, LOGIT, 1)
  slope = [found['slope']['gradient']]
  query = permutation_test.Query(subject, tuple(TOKENS_T), LOGIT)
  one, again, two = (
    permutation_test.largest(
      query,
      found['f'],
      slope,
      permutation_test.Shuffles(3, 4, by_token=by_token),
    )
    for by_token in (False, False, True)
  )
  np.testing.assert_array_equal(one, again)
  assert (one > 0).all() and (two > 0).all() and not np.allclose(one, two)
  assert permutation_test.p_value(0.0, one) == 1.0
  assert permutation_test.p_value(-2 * one.max(), one) == 0.2


def test_an_outlier_is_left_out_as_a_special_token_is(model, subjects):
  """Of a reading, of both predictions, of ablations and of shuffles."""
  params, card = circuits.MEMBERS['sae']
  taps, f_TF = circuits.values(model, 'sae')
  (site,) = subjects['sae'].place.sites
  norm_T = np.linalg.norm(np.asarray(taps[site][0]), axis=-1)
  t, bound = 1 + int(norm_T[1:].argmax()), np.sort(norm_T[1:])[-2:].mean()
  assert TOKENS_T.count(TOKENS_T[t]) == 1 and f_TF[t].any()

  def ruled(bound):
    rule = {'max_norm': 1.0, 'norm_bounds': {str(site): float(bound)}}
    ruled_sae = release.in_memory(params, card | {'outliers': rule})
    return iv.subject(model, ruled_sae, subjects['sae'].max_F)

  def attributed(subject):
    settings = attribution.Search(top=3, others=3, shuffles=3)
    return attribution.attribute(subject, TOKENS_T, LOGIT, settings=settings)

  reading = effects.read(ruled(bound), TOKENS_T)
  assert np.flatnonzero(reading.outlier_T).tolist() == [t]
  assert np.flatnonzero(~reading.counts_T).tolist() == [0, t]
  assert not effects.read(subjects['sae'], TOKENS_T).outlier_T.any()
  special = dataclasses.replace(subjects['sae'], special=(0, 1, 2, TOKENS_T[t]))
  assert attributed(ruled(bound)) == attributed(special)
  plain = attributed(subjects['sae'])
  assert attributed(ruled(bound)) != plain
  assert attributed(ruled(norm_T.max() + 1)) == plain


def test_a_logit_in_the_middle_is_of_what_was_read(subjects):
  """Latents after the position are no part of it."""
  found = attribution.attribute(
    subjects['sae'],
    TOKENS_T,
    LOGIT,
    position=5,
    settings=attribution.Search(top=3, shuffles=2),
  )
  cut = attribution.attribute(
    subjects['sae'],
    TOKENS_T[:6],
    LOGIT,
    settings=attribution.Search(top=3, shuffles=2),
  )
  assert found == cut and len(found['features'][0]['by_token']) == 6


def test_agreement():
  lines = [{'gradient': g, 'exact': 2 * g} for g in (1.0, -2.0, 3.0)]
  assert attribution.agreement(lines, 'gradient') == {
    'spearman': pytest.approx(1.0),
    'slope': pytest.approx(2.0),
  }
  flat = [{'gradient': g, 'exact': 0.0} for g in (1.0, -2.0, 3.0)]
  assert attribution.agreement(flat, 'gradient')['spearman'] is None


def test_what_is_not_there_is_said(subjects):
  with pytest.raises(ValueError, match='There is no token 4096'):
    attribution.attribute(subjects['sae'], TOKENS_T, (4096, None))
  with pytest.raises(ValueError, match='Position 16 is outside'):
    attribution.attribute(subjects['sae'], TOKENS_T, (1, None), position=16)


def test_a_small_budget_changes_no_number(subjects, monkeypatch):
  """Fewer rows a pass, or one: the same effects; less than one: a sentence."""
  subject = subjects['sae']
  settings = attribution.Search(top=2, others=2, shuffles=1)
  wide = attribution.attribute(subject, TOKENS_T, LOGIT, settings=settings)
  length = effects.padded_length(len(TOKENS_T))
  row = budget.gradient(subject.gemma, length)
  monkeypatch.setattr(budget, 'BUDGET', 2 * row - 1)
  assert budget.rows(budget.gradient, subject.gemma, length, 8) == 1
  thin = attribution.attribute(subject, TOKENS_T, LOGIT, settings=settings)
  for one, other in zip(wide['features'], thin['features'], strict=True):
    for key in ('gradient', 'integrated', 'exact'):
      assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4)
  monkeypatch.setattr(budget, 'BUDGET', row - 1)
  most = budget.longest(budget.gradient, subject.gemma)
  assert 0 < most < length
  with pytest.raises(ValueError, match=f'traced over at most {most} within'):
    attribution.attribute(subject, TOKENS_T, LOGIT, settings=settings)


def test_rows_of_a_pass_do_not_grow_with_the_square_of_the_text(model):
  for length in (16, 64, 256, 1024, 2048):
    count = budget.rows(budget.forward, model[0], length, 64)
    assert count & (count - 1) == 0
    assert count * budget.forward(model[0], length) <= budget.BUDGET
