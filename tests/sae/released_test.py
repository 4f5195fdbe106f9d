"""Encode and decode of released SAEs: what does not fit is one sentence."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from gemma_scope import release, sae
from tests.helpers import random_saes

D, F = 128, 40


def params(**more):
  return random_saes.member(0, 'resid_post/1')[0] | more


def test_lists_are_arrays():
  x = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
  f = sae.encode(params(), x)
  np.testing.assert_array_equal(sae.encode(params(), x.tolist()), f)
  np.testing.assert_array_equal(
    sae.decode(params(), np.asarray(f).tolist()), sae.decode(params(), f)
  )


ROWS, LATENTS = np.zeros((3, D)), np.zeros((3, F))
SEVERAL = random_saes.member(0, 'resid_post/0', 16, layers=2)[0]


@pytest.mark.parametrize(
  ('call', 'error', 'said'),
  [
    (
      lambda: sae.encode(params(), ROWS[:, 1:]),
      ValueError,
      r'Activations of shape \[3, 127\] .* takes \[\.\.\., 128\]',
    ),
    (
      lambda: jax.jit(sae.encode)(params(), ROWS[:, 1:]),
      ValueError,
      r'Activations of shape \[3, 127\]',
    ),
    (
      lambda: sae.encode(SEVERAL, ROWS),
      ValueError,
      r'takes \[\.\.\., 2, 128\]',
    ),
    (
      lambda: sae.decode(params(), LATENTS[:, 1:]),
      ValueError,
      r'Latents of shape \[3, 39\] .* takes \[\.\.\., 40\]',
    ),
    (
      lambda: sae.decode(SEVERAL, LATENTS),
      ValueError,
      r'takes \[\.\.\., 2, 16\]',
    ),
    (
      lambda: sae.decode(params(W_skip=np.zeros((D, D))), LATENTS),
      ValueError,
      'needs the input x too',
    ),
    (
      lambda: sae.encode((params(), {}), ROWS),
      TypeError,
      r'such as `release\.load\(path\)\[0\]`; found a tuple',
    ),
    (
      lambda: sae.encode(release.in_memory(params(), {}), ROWS),
      TypeError,
      'found a Released',
    ),
    (
      lambda: sae.encode({'W_dec': 0, 'b_dec': 0}, ROWS),
      ValueError,
      'W_enc is missing among W_dec, b_dec',
    ),
    (
      lambda: sae.decode({}, LATENTS),
      ValueError,
      'W_dec is missing among none',
    ),
  ],
)
def test_what_does_not_fit_is_one_sentence(call, error, said):
  with pytest.raises(error, match=said) as caught:
    call()
  assert len(str(caught.value).splitlines()) == 1
