"""Attention in blocks of queries, against all scores at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import sites
from gemma_scope.language_model import attention
from tests.helpers import random_models
from tests.helpers.random_models import GEMMA2, model

GEMMA3 = dataclasses.replace(
  random_models.GEMMA3, num_layers=2, window=4, pattern='LG'
)
LENGTH = 37
LAST = sites.Site(1, 'resid_post')


@pytest.fixture
def short_blocks(monkeypatch):
  monkeypatch.setattr(attention, '_SHORTEST', 8)


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_blocks_change_nothing(config, short_blocks):
  """Ten queries a block; padding before, in and after the text."""
  gemma, params = model(config)
  tokens_BT = np.random.default_rng(0).integers(3, 40, (3, LENGTH))
  tokens_BT[0, :5] = tokens_BT[1, 12:14] = tokens_BT[2, 30:] = 0
  causal_TT = np.tril(np.ones((LENGTH, LENGTH), bool))
  mask_BTT = causal_TT & (tokens_BT != 0)[:, None, :]

  def loss(params, mask_BTT):
    out = gemma.forward(params, tokens_BT, taps=(LAST,), mask_BTT=mask_BTT)
    counts_BT1 = (tokens_BT != 0)[..., None]
    x_BTD = jnp.where(counts_BT1, out.taps[LAST], 0)
    return jnp.sum(jnp.sin(x_BTD)), x_BTD

  grad = jax.value_and_grad(loss, has_aux=True)
  (_, x), gradient = jax.jit(grad)(params, None)
  # All scores at once: a mask that is given is not known to be causal.
  (_, whole_x), whole_gradient = jax.jit(grad)(params, mask_BTT)
  np.testing.assert_allclose(x, whole_x, atol=5e-4)  # of 30
  for a, b in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(whole_gradient), strict=True
  ):
    assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


def test_fewer_scores_are_formed(short_blocks):
  gemma, params = model(GEMMA3)

  def flops(mask_BTT):
    run = jax.jit(lambda t: gemma.forward(params, t, mask_BTT=mask_BTT))
    analysis = run.lower(jnp.ones((1, 512), jnp.int32)).compile()
    return analysis.cost_analysis()['flops']

  assert flops(None) < 0.85 * flops(np.ones((1, 512, 512), bool))
