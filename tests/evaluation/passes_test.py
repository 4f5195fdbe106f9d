"""What a pass computes: some positions, some layers, in slices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh, sites
from gemma_scope.evaluation import (
  batches,
  passes,
)
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from tests.helpers.evaluations import BATCH, CONFIG, D, keep, measure, text


def test_losses_at_every_third_token_are_those_of_all(model, saes):
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


def test_a_batch_that_cannot_be_split_is_refused():
  devices = mesh.make({'sae': 1, 'data': 2, 'latent': 4})
  assert len(batches.Batches(batches.Text(text(8), keep, 4), devices)) == 2
  for wrong in (0, 3):
    with pytest.raises(ValueError, match=f'batch of {wrong} .* data axis .2.'):
      batches.Batches(batches.Text(text(8), keep, wrong), devices)
  with pytest.raises(ValueError, match='T at least 3'):
    batches.Batches(batches.Text(text(8)[:, :2], keep, 4), None)


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
