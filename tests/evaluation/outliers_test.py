"""Rows of outlying norm: left out of one FVU, not spliced in."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope import sae as sae_lib
from gemma_scope import sites
from tests.helpers.evaluations import keep, measure, text


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
