"""Edits of many prompts, held to `intervene`, to algebra and to no change."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope import release
from gemma_scope.language_model import weights
from gemma_scope.microscope.circuits import (
  attribution,
  effects,
  prompt_sets,
)
from gemma_scope.microscope.circuits import intervene as iv
from gemma_scope.text import tokenizers
from tests.helpers.circuits import MEMBERS, values
from tests.helpers.forward import forward

TEXTS = ['def read(self):', 'import os', 'for line in lines:\n  return line']


@pytest.fixture(scope='module')
def model():
  return weights.load('tiny')


@pytest.fixture(scope='module')
def prompts():
  return prompt_sets.tokens(
    tokenizers.Tokenizer(weights.tokenizer('tiny')), TEXTS
  )


@pytest.fixture(scope='module')
def subject(model):
  _, f_TF = values(model, 'sae')
  return iv.subject(model, release.in_memory(*MEMBERS['sae']), f_TF[1:].max(0))


@pytest.fixture(scope='module')
def fired(subject, prompts):
  """The latents that fire most on the last of the prompts."""
  row = prompts[0][2, : prompts[1][2] + 1]
  found = effects.read(subject, row, top=3)
  return sorted(set(found.feature_TK[1:][found.value_TK[1:] > 0].tolist()))


def test_logits_do_not_depend_on_padding_or_batches(model, prompts):
  tokens_NT, last_N = prompts
  all_NV = prompt_sets.logits(model, tokens_NT, last_N, batch=2)
  for n in range(3):
    alone = forward(*model, tokens_NT[n : n + 1, : last_N[n] + 1])
    np.testing.assert_allclose(
      all_NV[n], alone.logits_BTV[0, -1], rtol=0, atol=1e-4
    )
  some_NK = prompt_sets.logits(model, tokens_NT, last_N, [7, 900])
  np.testing.assert_allclose(some_NK, all_NV[:, [7, 900]], rtol=0, atol=1e-4)


def test_ablation_is_that_of_intervene(model, subject, prompts, fired):
  tokens_NT, last_N = prompts
  (site,) = subject.place.sites
  edits = {site: prompt_sets.ablation(MEMBERS['sae'][0], fired)}
  got_N2 = prompt_sets.logits(model, tokens_NT, last_N, [7, 900], edits)
  rows = iv.rows(subject, [[iv.Change(i) for i in fired]] * 3)
  want = effects.effects(subject, tokens_NT, rows, np.arange(3), logit=(7, 900))
  at_last = np.arange(3), last_N
  np.testing.assert_allclose(
    got_N2[:, 0] - got_N2[:, 1], want.logit_BT[at_last], rtol=0, atol=1e-3
  )
  assert np.abs(want.logit_BT - want.clean_logit_BT)[at_last].max() > 0.01
  loss_NT = prompt_sets.losses(model, tokens_NT, edits, batch=2)
  counts_NT = tokens_NT[:, 1:] > 0
  assert (np.isnan(loss_NT) == ~counts_NT).all()
  length = loss_NT.shape[1]
  np.testing.assert_allclose(
    loss_NT[counts_NT], want.loss_BT[:, :length][counts_NT], rtol=0, atol=1e-3
  )


def test_projection_and_addition():
  rng = np.random.default_rng(0)
  x_BTD, d_KD = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 8))
  x_BTD = x_BTD.astype(np.float32)
  dependent_KD = np.stack([d_KD[0], d_KD[1], d_KD[0] + d_KD[1]])
  out_BTD = np.asarray(prompt_sets.projection(dependent_KD)(x_BTD))
  np.testing.assert_array_equal(out_BTD[:, 0], x_BTD[:, 0])
  np.testing.assert_allclose(out_BTD[:, 1:] @ d_KD.T, 0, atol=1e-5)
  # What is orthogonal to the directions stays.
  q_D = np.linalg.svd(d_KD)[2][-1]
  np.testing.assert_allclose(out_BTD @ q_D, x_BTD @ q_D, atol=1e-5)
  # The part of a centre along the directions stays.
  centred_BTD = np.asarray(prompt_sets.projection(d_KD, q_D + d_KD[0])(x_BTD))
  np.testing.assert_allclose(
    centred_BTD[:, 1:] @ d_KD.T,
    np.broadcast_to(d_KD[0] @ d_KD.T, (2, 3, 2)),
    atol=1e-4,
  )
  added_BTD = np.asarray(prompt_sets.addition(d_KD[0])(x_BTD))
  np.testing.assert_array_equal(added_BTD[:, 0], x_BTD[:, 0])
  np.testing.assert_allclose(
    added_BTD[:, 1:], x_BTD[:, 1:] + d_KD[0], atol=1e-6
  )


@pytest.mark.parametrize('minus', [900, None])
def test_attributions_are_the_gradients_of_a_single_text(
  subject, prompts, minus
):
  tokens_NT, last_N = prompts
  got_NF = prompt_sets.attributions(
    subject, tokens_NT, last_N, (7, minus), batch=2
  )
  for n in range(3):
    ids = tokens_NT[n, : last_N[n] + 1].tolist()
    one = attribution.search(subject, ids, (7, minus), steps=1)
    np.testing.assert_allclose(got_NF[n], one['gradient'], rtol=0, atol=1e-3)
  assert np.abs(got_NF).max() > 0.01


@pytest.mark.parametrize('name', ['topk', 'crosscoder', 'clt'])
def test_other_saes_are_refused(name):
  params, _ = MEMBERS[name]
  with pytest.raises(ValueError, match='one site with thresholds'):
    prompt_sets.ablation(params, [0])
