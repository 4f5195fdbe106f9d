"""Gemma 3 270M from its GGUF file, held to what `transformers` makes of it.

The fixtures are written by gemma_fixtures/make_270m.py and make_tokens.py. The
tests need the model's packages: `launch/setup.sh gemma3-270m`, as CI does.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from gemma_scope import sites
from gemma_scope.language_model import packages, weights
from gemma_scope.text import tokenizers

FIXTURES = pathlib.Path(__file__).parent / 'gemma_fixtures'
sys.path.insert(0, str(FIXTURES))
import corpus_270m  # noqa: E402

sys.path.pop(0)

NAME = 'gemma3-270m'
TEXTS = 'prose', 'code', 'chat', 'spaces'
SITES = 'attn_out', 'mlp_out', 'resid_post'


@pytest.fixture(scope='module', autouse=True)
def _packages():
  pytest.importorskip('gguf', reason='gguf is not installed')
  try:
    packages.path(NAME)
  except packages.PackageNotFound as error:
    pytest.skip(f'Gemma 3 270M: {error}')


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.Tokenizer(str(weights.tokenizer(NAME)))


@pytest.fixture(scope='module')
def expected():
  with np.load(FIXTURES / 'gemma3_270m.npz') as file:
    return dict(file)


@pytest.fixture(scope='module')
def differences(expected):
  """For each text: of each site and of the logits, relative to the largest."""
  gemma, params = weights.load(NAME)
  wanted = [sites.Site(layer, kind) for layer in range(18) for kind in SITES]

  @jax.jit
  def run(params, tokens_BT, at_N, ids_K):
    out = gemma.forward(params, tokens_BT, taps=wanted, logits=False)
    last_ND = out.taps[sites.Site(17, 'resid_post')][0, at_N]
    logits_NV = gemma.unembed(params, last_ND[None])[0]
    taps = {str(site): x[0, at_N] for site, x in out.taps.items()}
    log_sum_N = jax.scipy.special.logsumexp(logits_NV, 1)
    return logits_NV[:, ids_K], log_sum_N, logits_NV.argmax(1), taps

  found = {}
  for text in TEXTS:
    want = {key: expected[f'{text}/{key}'] for key in ('tokens', 'at', 'ids')}
    # The short ones in one shape: no token sees the padding after it.
    more = max(0, 112 - want['tokens'].shape[1])
    tokens = np.pad(want['tokens'], ((0, 0), (0, more)))
    out = run(params, tokens, want['at'], want['ids'])
    logits, log_sum, largest, taps = jax.device_get(out)
    np.testing.assert_array_equal(largest, expected[f'{text}/largest'])
    rows = {'logits': (logits, expected[f'{text}/logits'])}
    rows['log_sum'] = log_sum, expected[f'{text}/log_sum']
    for site, x_ND in taps.items():
      kind, layer = site.split('/') if site[0] != 'l' else site.split('.')
      rows[site] = (
        corpus_270m.projections(x_ND),
        expected[f'{text}/{kind}'][int(layer)],
      )
    found[text] = {
      name: float(np.abs(a - b).max() / np.abs(b).max())
      for name, (a, b) in rows.items()
    }
  return found


@pytest.mark.parametrize('text', TEXTS)
def test_logits_and_sites_are_those_of_transformers(text, differences):
  found = differences[text]
  assert len(found) == 2 + 18 * 3
  assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize('text', TEXTS)
def test_the_same_texts_give_the_same_tokens(text, expected, tokenizer):
  ids = tokenizer.encode(corpus_270m.texts()[text])
  np.testing.assert_array_equal(ids, expected[f'{text}/tokens'][0, 1:])


def test_tokens_of_a_corpus_are_those_of_the_fast_tokenizer(tokenizer):
  """Prose, code, digits, emoji, CJK and white space, mixed at random."""
  known = json.loads((FIXTURES / 'gemma3_270m_tokens.json').read_text())
  total = 0
  for name, document in corpus_270m.documents().items():
    ids = tokenizer.encode(document)
    found = hashlib.sha256(ids.astype('<i4').tobytes()).hexdigest()
    assert [len(ids), found] == known[name], name
    total += len(ids)
  assert total > 100_000 and set(known) == set(corpus_270m.documents())


def test_long_runs_of_spaces_are_cut_from_the_left(tokenizer):
  """As by Gemma's own tokenizer; see corpus_270m.py."""
  for count in range(1, 80):
    runs = tokenizer.pieces(tokenizer.encode('x' + ' ' * count + '\n'))[1:-1]
    full, rest = divmod(count, 31)
    assert [len(run) for run in runs] == [31] * full + [rest] * (rest > 0)


def test_the_quantisation_is_named():
  assert weights.quantisation(NAME) == 'GGUF Q4_K_M (Q8_0, Q5_0, Q4_K, Q6_K)'
