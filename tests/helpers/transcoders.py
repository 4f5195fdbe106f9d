"""Random transcoders and a CLT in their models."""

from __future__ import annotations

import numpy as np

from gemma_scope import release
from gemma_scope.microscope.circuits import intervene as iv
from tests.helpers import circuits
from tests.helpers.replacement import tiny


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


def clt():
  params, card = circuits.MEMBERS['clt']
  rng = np.random.default_rng(0)
  skip = rng.normal(size=(3, 128, 128)).astype(np.float32) / 128
  params = params | {'W_skip': skip, 'W_dec': params['W_dec'] / 128}
  return [iv.subject(tiny(), release.in_memory(params, card), np.ones(48))]
