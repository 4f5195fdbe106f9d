"""Causal cards: exact effects, and how often their verdicts are wrong."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from gemma_scope import sae
from gemma_scope.language_model import splice, weights
from gemma_scope.microscope.circuits import (
  card_plan,
  causal_card,
  effects,
  intervene,
  packed_edits,
)
from gemma_scope.microscope.index import build
from tests.helpers import random_saes

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
  (index,) = build.build(*model, [(params, card)], text, build.How(8))
  subject = intervene.subject(*model, params, card, index.max_F)
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
  # The small vocabulary is among the likeliest tokens as a whole.
  wide = dataclasses.replace(SMALL, likeliest=10**6)
  assert wide.likeliest > model[0].config.vocab_size
