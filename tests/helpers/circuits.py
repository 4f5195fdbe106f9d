"""SAEs, transcoders and a CLT on the embedded model, and a text."""

from __future__ import annotations

import jax
import numpy as np

from gemma_scope import sae, sites
from gemma_scope.language_model import splice
from tests.helpers import random_saes

T, F = 16, 40
# Of W_dec: as in a file, nothing is written to an earlier layer.
EARLIER_ARE_ZERO = np.triu(np.ones((3, 3), np.float32))[:, None, :, None]
TOKENS_T = [2, *np.random.default_rng(3).integers(10, 4000, T - 1).tolist()]


def transcoder(seed: int):
  params, card = random_saes.member(seed, 'mlp_in/1')
  return params, card | {'type': 'transcoder', 'targets': ['mlp_out/1']}


def crosscoder(seed: int):
  params, card = random_saes.member(seed, 'resid_post/0', 16, layers=3)
  params['W_dec'] *= EARLIER_ARE_ZERO
  return params, card


def clt(seed: int):
  params, card = random_saes.member(seed, 'mlp_in/0', 16, layers=3)
  targets = [f'mlp_out/{i}' for i in range(3)]
  params['W_dec'] *= EARLIER_ARE_ZERO
  return params, card | {'type': 'clt', 'targets': targets}


MEMBERS = {
  'sae': random_saes.member(0, 'resid_post/1'),
  'attention': random_saes.member(1, 'attn_out/2'),
  'topk': random_saes.member(2, 'resid_post/1', k=3),
  'transcoder': transcoder(3),
  'crosscoder': crosscoder(4),
  'clt': clt(5),
}


def values(model, name):
  """Taps at the sites and latents [T, F] of the plain pass."""
  params, card = MEMBERS[name]
  wiring = sites.wiring_of(card)
  taps = splice.taps(
    *model, np.array([TOKENS_T]), tuple({*wiring.sites, *wiring.targets})
  )
  x = np.stack([taps[site][0] for site in wiring.sites], -2)
  with jax.default_matmul_precision('highest'):
    f = np.asarray(sae.encode(params, x if wiring.several else x[:, 0]))
  return taps, f.reshape(T, -1)
