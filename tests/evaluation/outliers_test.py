"""Rows of outlying norm: left out of one FVU, not spliced in."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope import sae as sae_lib
from gemma_scope import sites
from gemma_scope.language_model import splice
from tests.helpers.evaluations import keep, measure, text


def test_rows_of_outlying_norm_are_left_out_of_one_fvu(model, saes):
  gemma, params = model
  (arrays, card) = saes[3]
  site = sites.parse(card['sites'][0])
  tokens_NT, keep_NT = text(6), keep(text(6))
  x_NTD = np.asarray(splice.taps(gemma, params, tokens_NT, (site,))[site])
  x_RD = x_NTD[keep_NT]
  bound = float(np.quantile(np.linalg.norm(x_RD, axis=1), 0.9))
  ruled = {
    **card,
    'outliers': {'max_norm': 1.0, 'norm_bounds': {card['sites'][0]: bound}},
  }
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
  gemma, params = model
  site = sites.parse(card['sites'][0])
  x_BTD = splice.taps(gemma, params, tokens_NT, (site,))[site]
  norm_n = np.linalg.norm(x_BTD, axis=-1)[keep(tokens_NT)]
  figures_of = lambda card: next(
    iter(measure(model, [(arrays, card)], tokens_NT).values())
  )
  plain, none_left_out = figures_of(card), figures_of(rule(1e9))
  assert none_left_out['delta_loss'] == plain['delta_loss']
  assert none_left_out['l0'] == plain['l0']
  assert abs(plain['delta_loss']['value']) > 1e-3
  # All but two tokens are left out.
  few = figures_of(rule(float(np.sort(norm_n)[1]) * 1.000001))
  assert few['outliers']['tokens'] == norm_n.size - 2
  assert few['l0']['tokens'] == few['tokens'] == 2
  for figures in (few, *few['controls'].values()):
    ratio = figures['delta_loss']['value'] / plain['delta_loss']['value']
    assert abs(ratio) < 0.2
  assert few['fvu'] == plain['fvu']
  with pytest.raises(ValueError, match='all tokens of this text are outliers'):
    figures_of(rule(1e-9))
