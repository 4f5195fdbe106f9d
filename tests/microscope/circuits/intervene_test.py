"""Changes inside the model, held to numpy, to each other and to no change."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from scipy import special

from gemma_scope import mesh, release
from gemma_scope.evaluation.saebench import scr_tpp
from gemma_scope.language_model import generate, splice, weights
from gemma_scope.microscope.circuits import effects
from gemma_scope.microscope.circuits import intervene as iv
from tests.helpers import forward
from tests.helpers.circuits import MEMBERS, TOKENS_T, F, T, values


@pytest.fixture(scope='module')
def model():
  return weights.load('tiny')


@pytest.fixture(scope='module')
def subjects(model):
  found = {}
  for name, member in MEMBERS.items():
    _, f_TF = values(model, name)
    found[name] = iv.subject(model, release.in_memory(*member), f_TF[1:].max(0))
  return found


def firing(subject, model, name, count=2):
  """The latents that fire on most tokens."""
  _, f_TF = values(model, name)
  return [int(i) for i in np.argsort(-(f_TF[1:] > 0).sum(0))[:count]]


def tapped(subject, rows, where_BT):
  """The residual stream that is unembedded, and each target of the SAE."""
  tokens_BT = np.array([TOKENS_T] * len(rows.feature_BK))
  at = tuple(sorted({*subject.place.targets, splice.last(subject.gemma)}))
  return forward.changed(subject, tokens_BT, rows, where_BT, at, True).taps


@pytest.mark.parametrize('name', MEMBERS)
def test_equals_numpy_at_the_first_target(model, subjects, name):
  """A row for each kind of change, two latents in each, from token 3 on."""
  subject, (params, _) = subjects[name], MEMBERS[name]
  taps, f_TF = values(model, name)
  layers = len(subject.place.sites)
  chosen = [i for i in np.argsort(-f_TF.sum(0)) if i < F // layers][:2]
  kinds = ('add', 'clamp', 'ablate', 'project_out')
  rows = iv.rows(
    subject,
    [
      [iv.Change(int(i), kind, 0.6 + k) for k, i in enumerate(chosen)]
      for kind in kinds
    ],
  )
  where_BT = np.broadcast_to(np.arange(T) > 2, (len(kinds), T))
  target = subject.place.targets[0]
  got_BTD = tapped(subject, rows, where_BT)[target]
  y_TD = np.asarray(taps[target][0], np.float64)
  W_dec = params['W_dec'][0, :, 0] if layers > 1 else params['W_dec']
  W_KD = W_dec[chosen].astype(np.float64)
  f_TK, top_K = f_TF[:, chosen], subject.max_F[chosen] * [0.6, 1.6]
  written = {
    'add': 0 * f_TK + top_K,
    'clamp': top_K - f_TK,
    'ablate': -f_TK,
    'project_out': -y_TD @ np.linalg.pinv(W_KD),
  }
  for kind, got_TD in zip(kinds, got_BTD, strict=True):
    want_TD = y_TD + written[kind] @ W_KD
    want_TD[:3] = y_TD[:3]
    assert np.abs(want_TD - y_TD).max() > 1e-2
    np.testing.assert_allclose(got_TD, want_TD, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize('name', MEMBERS)
def test_no_change_is_the_plain_pass_bit_for_bit(model, subjects, name):
  subject = subjects[name]
  _, f_TF = values(model, name)
  (one, other), silent = firing(subject, model, name), int(f_TF.max(0).argmin())
  nothing = [iv.Change(i, 'add', 0.0) for i in (one, other)]
  rows = iv.rows(subject, [[], nothing, [iv.Change(silent)], [iv.Change(one)]])
  where_BT = np.ones((4, T), bool)
  where_BT[3] = False
  at = splice.last(subject.gemma)
  got = tapped(subject, rows, where_BT)[at]
  tokens_BT = np.array([TOKENS_T] * 4)
  want = splice.taps(*model, tokens_BT, (at,))[at]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  y_BTD = np.random.default_rng(0).normal(size=(4, T, 128)).astype(np.float32)
  if name in ('sae', 'attention'):
    edits = iv.edits(subject.place, subject.params, rows, where_BT)
    same_BTD = np.asarray(jax.jit(edits[subject.place.targets[0]])(y_BTD))
    same = [0, 1, 3]
    np.testing.assert_array_equal(same_BTD[same], y_BTD[same])


@pytest.mark.parametrize('name', ['sae', 'clt'])
def test_what_comes_before_a_change_is_as_it_was(model, subjects, name):
  subject, at = subjects[name], 9
  one = firing(subject, model, name, 1)[0]
  where_BT = np.arange(T)[None] >= at
  rows = iv.rows(subject, [[iv.Change(one, 'clamp', 3.0)]])
  found = effects.effects(
    subject, np.array([TOKENS_T]), rows, where_BT=where_BT
  )
  kl_T, change_T = found.kl_BT[0], (found.loss_BT - found.clean_loss_BT)[0]
  assert np.abs(kl_T[:at]).max() < 1e-5 < kl_T[at]
  assert np.abs(change_T[:at]).max() < 1e-4 < np.abs(change_T[at : T - 1]).max()


def test_special_tokens_are_left_alone(model, subjects):
  subject = subjects['sae']
  rows = iv.rows(subject, [[iv.Change(0, 'clamp', 3.0)]])
  found = effects.effects(subject, np.array([[2, 0, 0, 0]]), rows)
  assert np.abs(found.kl_BT).max() < 1e-5


@pytest.mark.parametrize('name', ['sae', 'transcoder'])
def test_outlier_tokens_are_not_steered(model, subjects, name):
  """Bounds between the norms of a text: tokens above them stay as they are."""
  subject = subjects[name]
  taps, _ = values(model, name)
  site, target = subject.place.sites[0], subject.place.targets[0]
  norm_T = np.linalg.norm(taps[site][0], axis=-1)
  bound = 1.001 * float(np.median(norm_T[1:]))  # no token at the bound itself
  bounded = dataclasses.replace(subject, norm_bounds={site: bound})
  rows = iv.rows(bounded, [[iv.Change(0, 'clamp', 3.0)]])
  where_1T = np.arange(T)[None] > 0
  edits = iv.edits(
    bounded.place, bounded.params, rows, where_1T, norm_bounds={site: bound}
  )
  tokens_1T = np.array([TOKENS_T])
  run = jax.jit(
    lambda: subject.gemma.forward(
      subject.lm_params, tokens_1T, taps=(target,), edits=edits, logits=False
    )
  )
  after = run().taps[target][0]
  moved_T = np.abs(np.asarray(after) - taps[target][0]).max(-1) > 1e-3
  wanted_T = (norm_T <= bound) & where_1T[0]
  assert 3 < wanted_T.sum() < T - 3
  np.testing.assert_array_equal(moved_T, wanted_T)
  # Effects and steered text follow the same rule.
  found = effects.effects(bounded, tokens_1T, rows)
  first = int(np.flatnonzero(wanted_T)[0])
  assert np.abs(found.kl_BT[0, 1:first]).max(initial=0) < 1e-4
  np.testing.assert_array_equal(found.counts_BT[0, :T], wanted_T)
  none = dataclasses.replace(subject, norm_bounds={site: 1e-3})
  sampling = generate.Sampling(max_new_tokens=4, temperature=0.0)
  steered = effects.steer(
    none, TOKENS_T, [iv.Change(0, 'clamp', 9.0)], sampling
  )
  assert steered['steered']['ids'] == steered['default']['ids']
  wide = dataclasses.replace(subject, norm_bounds={site: 1e9})
  free = effects.steer(wide, TOKENS_T, [iv.Change(0, 'clamp', 9.0)], sampling)
  assert free['steered']['ids'] != free['default']['ids']


def test_losses_and_kl_are_those_of_the_logits(model, subjects):
  subject = subjects['sae']
  changes = [[iv.Change(i, 'clamp', 2.0)] for i in range(2)]
  rows = iv.rows(subject, changes)
  found = effects.effects(subject, np.array([TOKENS_T]), rows, logit=(7, 9))
  tokens_BT = np.array([TOKENS_T] * 2)
  logits = [
    np.asarray(forward.changed(subject, tokens_BT, rows, where_BT).logits_BTV)
    for where_BT in (tokens_BT != 2, np.zeros((2, T), bool))
  ]
  plain = forward.forward(*model, tokens_BT).logits_BTV
  np.testing.assert_allclose(logits[1], plain, rtol=1e-4, atol=1e-4)
  q, p = (special.log_softmax(a, -1) for a in logits)
  np.testing.assert_allclose(
    found.kl_BT[:, :T], (np.exp(p) * (p - q)).sum(-1), atol=1e-4
  )
  losses = forward.losses(logits[0], tokens_BT)
  np.testing.assert_allclose(
    found.loss_BT[:, : T - 1], losses, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    found.logit_BT[:, :T], logits[0][..., 7] - logits[0][..., 9], atol=1e-4
  )
  np.testing.assert_allclose(
    found.clean_logit_BT[:, :T],
    logits[1][..., 7] - logits[1][..., 9],
    atol=1e-4,
  )


def test_ablation_is_what_removal_does(model, subjects):
  subject, (params, _) = subjects['sae'], MEMBERS['sae']
  chosen = firing(subject, model, 'sae')
  rows = iv.rows(subject, [[iv.Change(i) for i in chosen]])
  at = splice.last(subject.gemma)
  got = tapped(subject, rows, np.ones((1, T), bool))[at]
  edits = {subject.place.targets[0]: scr_tpp.edit(params, chosen)}
  run = jax.jit(
    lambda: subject.gemma.forward(
      subject.lm_params, np.array([TOKENS_T]), taps=(at,), edits=edits
    )
  )
  want = run().taps[at]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['sae', 'crosscoder', 'clt'])
def test_a_control_is_as_long_and_another_latents(subjects, name):
  subject, (params, _) = subjects[name], MEMBERS[name]
  alive = np.flatnonzero(subject.max_F)
  layers = len(subject.place.sites)
  pairs = alive[: 2 * (len(alive) // 2)].reshape(-1, 2).tolist()
  rows = iv.rows(subject, [[iv.Change(i) for i in pair] for pair in pairs])
  other = iv.control(subject, rows, seed=1)
  per = subject.width // layers
  np.testing.assert_array_equal(other.writer_BK // per, rows.feature_BK // per)
  for row, writers in zip(rows.feature_BK, other.writer_BK, strict=True):
    assert len({*row, *writers}) == 4 and set(writers) <= set(alive)
  W_dec = params['W_dec'].reshape(subject.width, -1)
  if name == 'crosscoder':  # what it writes at its own layer
    W_dec = np.einsum('lfld->lfd', params['W_dec']).reshape(-1, 128)
  norm = np.linalg.norm(W_dec, axis=1)
  np.testing.assert_allclose(
    norm[other.writer_BK] * other.gain_BK, norm[rows.feature_BK], rtol=1e-5
  )


def test_no_control_without_another_latent(model):
  params, card = MEMBERS['sae']
  subject = iv.subject(
    model, release.in_memory(params, card), np.arange(F) == 3
  )
  with pytest.raises(ValueError, match='another latent that fired in the same'):
    iv.control(subject, iv.rows(subject, [[iv.Change(3)]]))


def test_a_residual_crosscoder_is_written_once(model):
  """The same decoder at all layers, ablated: gone once, not at each layer."""
  params, card = MEMBERS['crosscoder']
  params = {key: array.copy() for key, array in params.items()}
  params['W_dec'][0, 0] = params['W_dec'][0, 0, :1]
  params['b_enc'][0, 0] = 30  # it fires on all tokens
  subject = iv.subject(model, release.in_memory(params, card), np.ones(48))
  last = subject.place.targets[-1]
  first, tokens_1T = subject.place.sites[0], np.array([TOKENS_T])
  x_TD = np.asarray(splice.taps(*model, tokens_1T, (first,))[first][0])
  z_T = x_TD @ params['W_enc'][0, :, 0] + params['b_enc'][0, 0]
  f_T = np.where(z_T > 14, z_T, 0)
  assert (f_T > 0).sum() > 5
  without_TD = x_TD - f_T[:, None] * params['W_dec'][0, 0, 0]
  edits = {first: forward.instead(without_TD[None].astype(np.float32))}
  want = forward.forward(*model, tokens_1T, (last,), edits).taps[last]
  rows = iv.rows(subject, [[iv.Change(0)]])
  got = tapped(subject, rows, np.ones((1, T), bool))[last]
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-3)


def test_equal_and_zero_decoders_are_projected_out(model):
  params, card = MEMBERS['sae']
  params = params | {'W_dec': params['W_dec'].copy()}
  params['W_dec'][1], params['W_dec'][2] = params['W_dec'][0], 0
  subject = iv.subject(model, release.in_memory(params, card), np.ones(F))
  out = lambda *latents: [iv.Change(i, 'project_out') for i in latents]
  rows = iv.rows(subject, [out(0), out(0, 1), out(0, 2)])
  at = subject.place.targets[0]
  one, two, three = tapped(subject, rows, np.ones((3, T), bool))[at]
  np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(three, one, rtol=1e-3, atol=1e-4)


def test_dose_response_starts_at_nothing_and_grows(model, subjects):
  subject = subjects['sae']
  one = firing(subject, model, 'sae', 1)[0]
  found = effects.dose_response(
    subject,
    TOKENS_T,
    iv.Change(one, 'add'),
    strengths=(0.0, 0.5, 2.0),
    logit=(7, None),
    controls=3,
  )
  assert [line['strength'] for line in found] == [0.0, 0.5, 2.0]
  assert abs(found[0]['kl']) < 1e-5 and abs(found[0]['delta_logit']) < 1e-4
  assert found[0]['kl'] < found[1]['kl'] < found[2]['kl']
  for line in found[1:]:
    mean, least, most = line['control']['kl']
    assert 0 < least <= mean <= most


def test_steering_keeps_the_default_and_says_its_cost(model, subjects):
  subject = subjects['sae']
  one = firing(subject, model, 'sae', 1)[0]
  settings = generate.Sampling(12, 0.8, seed=5, stop=[1], forbid=[2])
  found = effects.steer(
    subject, TOKENS_T, [iv.Change(one, 'add', 3.0)], settings
  )
  (plain,) = generate.generate(*model, [TOKENS_T], settings)
  assert found['default']['ids'] == plain.tolist()
  assert found['steered']['ids'] != found['default']['ids']
  assert found['steered']['kl'] > 0.01
  nothing = effects.steer(
    subject, TOKENS_T, [iv.Change(one, 'add', 0)], settings
  )
  assert nothing['steered']['ids'] == nothing['default']['ids']
  assert nothing['steered']['kl'] < 1e-4
  assert nothing['default']['perplexity'] > 1


def test_a_reading_is_the_encoders(model, subjects):
  _, f_TF = values(model, 'sae')
  found = effects.read(subjects['sae'], TOKENS_T, top=5)
  want = -np.sort(-f_TF, 1)[:, :5]
  np.testing.assert_allclose(found.value_TK, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(found.l0_T, (f_TF > 0).sum(1))
  assert found.counts_T.tolist() == [False] + [True] * (T - 1)
  assert (found.unexplained_T > 0).all()


def test_a_mesh_changes_nothing(model):
  devices = mesh.make({'sae': 1, 'data': 1, 'latent': 8})
  params, card = MEMBERS['sae']
  found = []
  for where in (None, devices):
    loaded = weights.load('tiny', mesh=where) if where else model
    subject = iv.subject(
      loaded, release.in_memory(params, card), np.ones(F), mesh=where
    )
    rows = iv.rows(subject, [[iv.Change(3, 'clamp', 2.0), iv.Change(5)]])
    found.append(effects.effects(subject, np.array([TOKENS_T]), rows).kl_BT)
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (iv.Change(F), 'There is no latent 40'),
    (iv.Change(0, 'boost'), "There is no change 'boost'"),
    (iv.Change(0, 'add', float('nan')), 'The strength must be between'),
    (iv.Change(1, 'clamp', 1.0), 'never fired'),
  ],
)
def test_what_cannot_be_done_is_said(model, change, said):
  subject = iv.subject(
    model, release.in_memory(*MEMBERS['sae']), np.arange(F) == 0
  )
  with pytest.raises(ValueError, match=said):
    iv.rows(subject, [[change]])
  with pytest.raises(ValueError, match='changed twice'):
    iv.rows(subject, [[iv.Change(0), iv.Change(0)]])


def test_topk_over_layers_is_refused(model):
  params, card = MEMBERS['crosscoder']
  with pytest.raises(ValueError, match='TopK SAE over several layers'):
    iv.subject(
      model,
      release.in_memory(params | {'k': np.float32(3)}, card),
      np.ones(48),
    )
