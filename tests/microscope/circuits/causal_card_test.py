"""Causal cards: exact effects, and how often their verdicts are wrong."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from gemma_scope import release, sites
from gemma_scope.language_model import splice, weights
from gemma_scope.microscope.circuits import (
  card_plan,
  card_results,
  card_statistics,
  causal_card,
  effects,
  intervene,
  prompt_sets,
)
from gemma_scope.microscope.index import build
from tests.helpers import random_saes

NONE, OTHER, LENS = card_statistics.VERDICTS
N, T = 24, 24
SMALL = card_plan.Settings(contexts=4, scored=3, controls=3, pool=16)


@pytest.fixture(scope='module')
def model():
  return weights.load('tiny')


@pytest.fixture(scope='module')
def text():
  rng = np.random.default_rng(5)
  sequences_NT = rng.integers(10, 4000, (N, T)).astype(np.int32)
  sequences_NT[:, 0] = 2
  documents_NT = np.repeat(np.arange(N, dtype=np.int32)[:, None], T, 1)
  about = {'name': 'test', 'sha256': '0' * 64, 'split': 'train'}
  return build.Text(sequences_NT, sequences_NT != 2, documents_NT, about)


def measured(model, text, params, card, settings=SMALL):
  """The index, the plan and the measurements of an SAE."""
  sae = release.in_memory(params, card)
  (index,) = build.build(*model, [sae], text, build.How(8))
  subject = intervene.subject(model, sae, index.max_F)
  plan = card_plan.Plan(subject, index, settings)
  found = causal_card.Measured(subject.width, settings)
  for _ in causal_card.measure(subject, plan, found):
    pass
  return subject, plan, found


@pytest.mark.parametrize('site', ['resid_post/1', 'mlp_out/2', 'attn_out/1'])
def test_effects_are_those_of_whole_passes(model, text, site):
  """Each ablation, against the unpacked pass of `effects`."""
  params, card = random_saes.member(3, site)
  subject, plan, found = measured(model, text, params, card)
  arrays = found.arrays
  compared = 0
  for sequence, edits in plan.by_sequence.items():
    mine = [edit for edit in edits if edit.kind == 0][:2]
    if not mine or compared > 12:
      continue
    rows = intervene.rows(
      subject, [[intervene.Change(edit.feature)] for edit in mine]
    )
    position_E = np.array([edit.position for edit in mine])
    where_ET = position_E[:, None] == np.arange(T)
    tokens_1T = plan.index.sequences_NT[sequence][None]
    want = effects.effects(subject, tokens_1T, rows, where_BT=where_ET)
    for e, edit in enumerate(mine):
      at = 0, edit.feature, edit.slot
      last = min(edit.position + SMALL.scored, T)
      kl = want.kl_BT[e, edit.position : last].mean()
      np.testing.assert_allclose(arrays['kl'][at], kl, rtol=2e-2, atol=1e-5)
      scored = slice(edit.position, min(last, T - 1))
      loss_T = (want.loss_BT - want.clean_loss_BT)[e, scored]
      if len(loss_T):
        np.testing.assert_allclose(
          arrays['loss'][at], loss_T.mean(), rtol=1e-2, atol=1e-4
        )
      compared += 1
  assert compared > 8
  assert (arrays['kl'][np.isfinite(arrays['kl'])] > 0).all()


def test_a_sample_is_of_features_that_fire(model, text):
  params, card = random_saes.member(3, 'resid_post/1')
  sae = release.in_memory(params, card)
  (index,) = build.build(*model, [sae], text, build.How(8))
  subject = intervene.subject(model, sae, index.max_F)
  few = dataclasses.replace(SMALL, sample=7)
  whole, part = (card_plan.Plan(subject, index, s) for s in (SMALL, few))
  chosen = set(part.tested.tolist())
  assert len(chosen) == 7 and chosen < set(whole.alive.tolist())
  ablations = lambda plan: {
    (sequence, edit)
    for sequence, edits in plan.by_sequence.items()
    for edit in edits
    if edit.kind == 0 and edit.feature in chosen
  }
  assert ablations(part) == ablations(whole)
  assert {
    edit.feature for edits in part.by_sequence.values() for edit in edits
  } == chosen
  # Controls come from all features that fire.
  for feature in chosen:
    np.testing.assert_array_equal(
      part.directions(feature), whole.directions(feature)
    )


def discoveries(model, text, params, card, settings=SMALL):
  _, plan, found = measured(model, text, params, card, settings)
  return card_results.results(found, plan.index)


def test_random_saes_show_no_more_effects_than_alpha(model, text):
  """All hypotheses are null: an SAE with any discovery has a rate of 1."""
  few = dataclasses.replace(SMALL, contexts=2, scored=1, lists=5, pool=4)
  found = [
    discoveries(model, text, *random_saes.member(seed, 'resid_post/1'), few)
    for seed in range(10)
  ]
  assert min(f['summary']['tested'] for f in found) > 30
  wrong = [
    f['summary']['tested'] > f['summary']['verdicts'][NONE] for f in found
  ]
  print(f'random SAEs with a discovery: {sum(wrong)} of {len(wrong)}')
  assert sum(wrong) <= 2  # at 0.05, more than 2 of 10 have a chance of 1 %
  # The p-values of features that mean nothing are not too small as a whole.
  p = [card['p'] for f in found for card in f['cards'].values()]
  assert np.mean(np.array(p) <= 0.1) < 0.15


def test_a_trained_encoder_with_a_frozen_decoder_shows_none(model, text):
  params, card = random_saes.member(1, 'resid_post/1', k=4)
  x_RD = rows(model, text)
  centre_D = x_RD.mean(0)
  norm = np.linalg.norm(params['W_dec'], axis=1, keepdims=True)
  W_dec = jnp.asarray(params['W_dec'] / norm * x_RD.std())

  def loss(encoder):
    z_RF = (x_RD - centre_D) @ encoder
    least_R1 = jax.lax.top_k(z_RF, 4)[0][:, -1:]
    f_RF = jnp.where(z_RF >= least_R1, jax.nn.relu(z_RF), 0)
    return jnp.mean(jnp.square(x_RD - centre_D - f_RF @ W_dec))

  encoder, before = W_dec.T / jnp.sum(W_dec[0] ** 2), None
  optimizer = optax.adam(1e-2)
  state = optimizer.init(encoder)

  @jax.jit
  def step(encoder, state):
    value, gradient = jax.value_and_grad(loss)(encoder)
    updates, state = optimizer.update(gradient, state)
    return value, optax.apply_updates(encoder, updates), state

  for _ in range(150):
    value, encoder, state = step(encoder, state)
    before = before or float(value)
  assert float(value) < min(before, 0.95 * np.mean((x_RD - centre_D) ** 2))
  params = params | {
    'W_enc': np.asarray(encoder),
    'b_enc': np.asarray(-centre_D @ encoder),
    'W_dec': np.asarray(W_dec),
    'b_dec': centre_D,
  }
  summary = discoveries(model, text, params, card)['summary']
  assert summary['tested'] > 30
  assert summary['verdicts'][NONE] == summary['tested']


def rows(model, text):
  """Activations of all tokens that count, [R, D]."""
  site = 'resid_post/1'
  taps = splice.taps(*model, text.sequences_NT, (sites.parse(site),))
  (x_NTD,) = taps.values()
  return np.asarray(x_NTD)[text.keep_NT]


def test_planted_latents_are_found(model):
  """Latents that fire on a token and write the model's own prediction."""
  planted, alphabet = 12, 40
  _, lm_params = model
  rng = np.random.default_rng(0)
  tokens_V2 = np.stack([np.full(600, 2), rng.integers(10, 4000, 600)], 1)
  logits_V = prompt_sets.logits(model, tokens_V2, np.ones(600, int), batch=600)
  sure_V = special.softmax(logits_V, -1).max(-1)
  order = np.argsort(-sure_V)
  own_P = tokens_V2[order[:planted], 1]
  others = rng.choice(tokens_V2[order[200:], 1], alphabet - planted, False)
  choices = np.concatenate([own_P, others])
  sequences_NT = rng.choice(choices, (40, T)).astype(np.int32)
  sequences_NT[:, 0] = 2
  sequences_NT[:, 1::2] = rng.choice(own_P, sequences_NT[:, 1::2].shape)
  documents_NT = np.repeat(np.arange(40, dtype=np.int32)[:, None], T, 1)
  about = {'name': 'test', 'sha256': '0' * 64, 'split': 'train'}
  text = build.Text(sequences_NT, sequences_NT != 2, documents_NT, about)
  params, card = random_saes.member(7, 'resid_post/1', 120)
  x_RD, token_R = rows(model, text), sequences_NT[text.keep_NT]
  table_VD = np.asarray(lm_params['embedder']['input_embedding'])
  gain_D = 1 + np.asarray(lm_params['final_norm']['scale'])
  for i, token in enumerate(own_P):
    reads_D = x_RD[token_R == token].mean(0) - x_RD[token_R != token].mean(0)
    reads_D /= np.linalg.norm(reads_D)
    z_R = x_RD @ reads_D
    at = np.flatnonzero(token_R == token)[:20]
    likeliest = logits_V[order[i]].argmax()
    params['W_enc'][:, i], params['b_enc'][i] = reads_D, 0
    params['threshold'][i] = np.quantile(z_R[token_R != token], 0.99)
    writes_D = table_VD[likeliest] * gain_D
    params['W_dec'][i] = writes_D / np.linalg.norm(writes_D)
    params['W_dec'][i] *= x_RD.std() * 4 / np.median(z_R[at])
  settings = dataclasses.replace(SMALL, controls=8, scored=1)
  found = discoveries(model, text, params, card, settings)
  verdicts = [found['cards'][i]['verdict'] for i in range(planted)]
  recall = np.mean([verdict != NONE for verdict in verdicts])
  wrong = [
    i
    for i, one in found['cards'].items()
    if i >= planted and one['verdict'] != NONE
  ]
  print(f'recall {recall:.2f} of {planted} planted, {len(wrong)} wrong')
  assert recall >= 0.75
  assert len(wrong) <= 1
