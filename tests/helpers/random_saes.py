"""Random SAEs of a given site, type and width."""

from __future__ import annotations

import numpy as np

from gemma_scope import sites
from gemma_scope.language_model import weights

N, T, D, F = 24, 20, 128, 40


def member(seed: int, site: str, width: int = F, layers: int = 0, k: int = 0):
  """(params, card): random, sparse on the tiny model's activations."""
  rng = np.random.default_rng(seed)
  lead = (layers,) * bool(layers)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  d = sites.parse(site).width(weights.read_config('tiny', ''))
  params = {
    'W_enc': draw(*lead, d, width),
    'b_enc': draw(*lead, width),
    'W_dec': draw(*lead, width, *lead, d),
    'b_dec': draw(*lead, d),
    'threshold': np.full((*lead, width), 14, np.float32),
  }
  if k:
    params |= {'k': np.float32(k), 'threshold': np.zeros(width, np.float32)}
  kind = site.split('/')[0]
  site_names = (
    [f'{kind}/{layer}' for layer in range(layers)] if layers else [site]
  )
  card = {
    'name': f'{site}_{seed}',
    'type': 'crosscoder' if layers else 'sae',
    'sites': site_names,
    'targets': site_names,
    'd_in': d,
    'd_out': d,
    'width': width * (layers or 1),
    'architecture': 'jumprelu',
  }
  return params, card
