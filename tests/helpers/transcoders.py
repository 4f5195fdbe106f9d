"""Random transcoders and CLTs in their models."""

from __future__ import annotations

import numpy as np

from gemma_scope import release
from gemma_scope.microscope.circuits import intervene as iv


def transcoders(model, skip: bool, layers, d: int, width=60, threshold=14.0):
  """Random transcoders of some layers; `d` the model's width."""
  subjects = []
  for layer in layers:
    rng = np.random.default_rng(layer)
    draw = lambda *shape, r=rng: r.normal(size=shape).astype(np.float32)
    params = {
      'W_enc': draw(d, width),
      'b_enc': draw(width),
      'W_dec': draw(width, d) / d,
      'b_dec': draw(d) / d,
      'threshold': np.full(width, threshold, np.float32),
    }
    if skip:
      params['W_skip'] = draw(d, d) / d
    card = {
      'type': 'transcoder',
      'sites': [f'mlp_in/{layer}'],
      'targets': [f'mlp_out/{layer}'],
    }
    subjects.append(
      iv.subject(model, release.in_memory(params, card), np.ones(width))
    )
  return subjects


def clt(model, layers: int, d: int, width: int, threshold: float):
  """A random CLT with a skip path; `d` the model's width."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  later_LL = np.triu(np.ones((layers, layers), np.float32))
  params = {
    'W_enc': draw(layers, d, width),
    'b_enc': draw(layers, width),
    'W_dec': draw(layers, width, layers, d) / d * later_LL[:, None, :, None],
    'b_dec': draw(layers, d) / d,
    'W_skip': draw(layers, d, d) / d,
    'threshold': np.full((layers, width), threshold, np.float32),
  }
  card = {
    'type': 'clt',
    'sites': [f'mlp_in/{layer}' for layer in range(layers)],
    'targets': [f'mlp_out/{layer}' for layer in range(layers)],
  }
  max_F = np.ones(layers * width)
  return [iv.subject(model, release.in_memory(params, card), max_F)]
