"""Taking out a latent is an edit of a plain forward pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import special

from gemma_scope import sites
from gemma_scope.evaluation import batches, latent_ablation
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from tests.helpers import forward
from tests.helpers.evaluations import BATCH, CONFIG, D, keep, text

SITE = sites.parse('resid_post/0')
WIRING = sites.Wiring('crosscoder', *[(SITE, SITE.of_second())] * 2)
CHOSEN = [3, 0, 7, 2, 5]  # a group, and one more


@pytest.fixture(scope='module')
def models(model):
  gemma, params = model
  other = lm.Gemma(CONFIG)
  other_params = jax.tree.map(lambda a: 1.3 * a, params)
  return latent_ablation.Models.of(
    ((gemma, params), (other, other_params)), None
  )


def test_effects_are_those_of_an_edited_forward_pass(models):
  assert models.gemmas[0] is models.gemmas[1]  # one compilation
  rng = np.random.default_rng(0)
  width = 9
  params = {
    'W_enc': rng.normal(size=(2 * D, width)),
    'b_enc': np.zeros(width),
    'threshold': np.full(width, 0.5),
    'W_dec': rng.normal(size=(width, 2 * D)),
    'b_dec': np.zeros(2 * D),
  }
  params = {key: a.astype(np.float32) for key, a in params.items()}
  tokens_NT = text(BATCH)
  keep_NT = keep(tokens_NT)
  x = [
    np.asarray(splice.taps(models.gemmas[0], p, tokens_NT, (SITE,))[SITE])
    for p in models.params
  ]
  # Rows that are outliers in the second model alone are left as they are.
  norms_NT = np.linalg.norm(x[1], axis=-1)
  bound = float(np.quantile(norms_NT[keep_NT], 0.8))
  pair = latent_ablation.Pair(params, WIRING, {SITE.of_second(): bound})
  vectors = rng.normal(size=(2, len(CHOSEN), D)).astype(np.float32)
  shown = latent_ablation.Ablation(
    models, pair, CHOSEN, vectors, lambda ids: ' '.join(map(str, ids))
  )
  ticks = []
  found = shown.run(
    batches.Batches(batches.Text(tokens_NT, keep, BATCH), None),
    lambda: ticks.append(0),
  )
  assert len(found) == len(CHOSEN) and len(ticks) == 2 * len(CHOSEN)

  usable_NT = keep_NT & (norms_NT <= bound)
  z = np.concatenate(x, -1) @ params['W_enc']
  f = np.where(z > 0.5, z, 0) * usable_NT[..., None]
  counted_NT = keep_NT[:, :-1] & keep_NT[:, 1:]
  for k, latent in enumerate(CHOSEN):
    where_NT = counted_NT & (f[:, :-1, latent] > 0)
    for m, name in enumerate(('first', 'second')):
      changed = x[m] - f[..., latent, None] * vectors[m, k]
      clean, without = (
        forward.forward(
          models.gemmas[m], models.params[m], tokens_NT, edits={SITE: edit}
        ).logits_BTV
        for edit in map(forward.instead, (x[m], changed))
      )
      loss = [
        np.asarray(forward.losses(logits, tokens_NT))
        for logits in (clean, without)
      ]
      p, q = (
        special.log_softmax(np.asarray(logits), -1)
        for logits in (clean, without)
      )
      kl = (np.exp(p) * (p - q)).sum(-1)[:, :-1]
      effect = found[k]['effect'][name]
      assert effect['kl']['tokens'] == where_NT.sum() > 0
      np.testing.assert_allclose(
        effect['kl']['value'], kl[where_NT].mean(), rtol=1e-3
      )
      np.testing.assert_allclose(
        effect['loss']['value'], (loss[1] - loss[0])[where_NT].mean(),
        rtol=1e-3, atol=1e-5,
      )  # fmt: skip
    n, t = np.unravel_index(f[..., latent].argmax(), keep_NT.shape)
    value, example = found[k]['examples'][0]
    assert value == pytest.approx(f[n, t, latent], rel=1e-5)
    assert example.split()[-1] == str(tokens_NT[n, t])
