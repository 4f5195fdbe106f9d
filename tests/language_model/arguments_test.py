"""What callers may pass to a forward pass, and what they are told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import sites
from gemma_scope.language_model import weights
from tests.helpers.random_models import GEMMA2, model

TOKENS = [[2, 5, 6, 7], [2, 9, 0, 0]]


@pytest.fixture(scope='module')
def forward():
  gemma, params = model(GEMMA2)
  return lambda tokens=TOKENS, params=params, **more: gemma.forward(
    params, tokens, **more
  )


def test_sites_may_be_text_and_tokens_lists(forward):
  site = sites.Site(1, 'resid_post')
  want = forward(np.array(TOKENS, np.int32), taps=(site,))
  for tokens in (TOKENS, np.array(TOKENS, np.int64), jnp.asarray(TOKENS)):
    out = forward(tokens, taps=['resid_post/1', site])
    assert set(out.taps) == {'resid_post/1', site}
    np.testing.assert_array_equal(out.taps['resid_post/1'], want.taps[site])
    np.testing.assert_array_equal(out.logits_BTV, want.logits_BTV)
  one = forward(taps='resid_post/1', logits=False)
  np.testing.assert_array_equal(one.taps['resid_post/1'], want.taps[site])


def test_an_edit_at_a_text_is_one_at_its_site(forward):
  site = sites.Site(0, 'mlp_out')
  by_text = forward(edits={'mlp_out/0': jnp.zeros_like}).logits_BTV
  by_site = forward(edits={site: lambda x: np.zeros(x.shape)}).logits_BTV
  np.testing.assert_array_equal(by_text, by_site)
  assert not np.allclose(by_text, forward().logits_BTV)


def test_tokens_of_a_traced_pass_are_not_read(forward):
  out = jax.jit(lambda tokens: forward(tokens).logits_BTV)(jnp.asarray(TOKENS))
  np.testing.assert_allclose(out, forward().logits_BTV, atol=1e-5)


@pytest.mark.parametrize(
  'arguments, words',
  [
    ({'tokens': [2, 5, 6]}, r'shape \[B, T\], .* found \[3\]'),
    ({'tokens': [[2, 5], [2]]}, 'differ in length'),
    ({'tokens': [[2.0, 5.0]]}, 'are integers; found float64'),
    ({'tokens': 'text'}, r'found \[\]'),
    ({'tokens': [[2, 40]]}, 'Token 40 is not in the vocabulary of 40'),
    ({'tokens': [[2, -1]]}, 'Token -1 is not'),
    ({'taps': ['resid_post']}, 'kind/layer, as in resid_post/12'),
    ({'taps': ['resid_pots/1']}, "no site kind 'resid_pots'"),
    ({'taps': ['resid_post/2']}, 'layers 0 to 1'),
    ({'taps': [3]}, 'A site is a Site or text'),
    ({'edits': {'resid_post/1': 0.0}}, 'found a float'),
    ({'edits': {'resid_post/1': lambda x: None}}, 'it returned None'),
    ({'edits': {'resid_post/1': lambda x: x[:, 1:]}}, r'returned \[2, 3, 16\]'),
    (
      {
        'edits': {
          'mlp_out/1': lambda x: x,
          sites.Site(1, 'mlp_out'): lambda x: x,
        }
      },
      'Two edits are given at mlp_out/1',
    ),
    ({'mask_BTT': np.ones((2, 3, 3), bool)}, r'expected \[2, 4, 4\]'),
    ({'positions_BT': np.arange(4)}, r'positions_BT has shape \[4\]'),
  ],
)
def test_mistakes_get_a_sentence(forward, arguments, words):
  with pytest.raises((ValueError, TypeError), match=words) as refusal:
    forward(**arguments)
  assert '\n' not in str(refusal.value)


def test_parameters_of_another_model_or_too_few(forward):
  gemma, params = model(GEMMA2)
  fewer = {key: x for key, x in params.items() if key != 'layer_1'}
  with pytest.raises(ValueError, match='lack layer_1/.*load more layers'):
    forward(params=fewer)
  # What stops before it does not read it.
  forward(params=fewer, taps=['resid_post/0'], logits=False)
  with pytest.raises(TypeError, match='as weights.load returns it; found a tu'):
    forward(params=(gemma, params))
  other = {**params, 'final_norm': {'scale': jnp.zeros(3)}}
  with pytest.raises(ValueError, match=r'final_norm/scale has shape \[3\]'):
    forward(params=other)
  with pytest.raises(ValueError, match=r'expected \[1, 2, 16\]'):
    gemma.unembed(params, jnp.zeros((1, 2, 8)))


def test_a_dtype_that_is_none():
  with pytest.raises(ValueError, match="such as 'float32' .* found 'float31'"):
    weights.load('tiny', dtype='float31')
