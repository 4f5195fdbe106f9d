"""The small random model, and four SAEs at two of its sites."""

from __future__ import annotations

import jax
import pytest

from gemma_scope.language_model import gemma as lm
from tests.helpers.evaluations import CONFIG, SITES, random_sae


@pytest.fixture(scope='session')
def model():
  gemma = lm.Gemma(CONFIG)
  params = gemma.init(jax.random.key(0))
  # Sharper logits than a random model's, so that a splice is felt.
  params['embedder']['input_embedding'] *= 3
  return gemma, params


@pytest.fixture(scope='session')
def saes():
  return [random_sae(site, seed) for site in SITES for seed in (0, 1)]
