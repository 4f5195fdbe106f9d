"""SAEs written as other tools write them."""

from __future__ import annotations

import pathlib

import numpy as np

D, F = 12, 32


def rows(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_member(kind: str):
  """(params, card) of this project, small and random."""
  lead = (3,) if 'several' in kind else ()
  transcoder = kind in ('transcoder', 'skip') or 'several' in kind
  d_out = D + 2 if transcoder else D
  params = {
    'W_enc': rows(1, *lead, D, F),
    'b_enc': rows(2, *lead, F),
    'W_dec': rows(3, *lead, F, *lead, d_out),
    'b_dec': rows(4, *lead, d_out),
    'threshold': np.abs(rows(5, *lead, F)),
  }
  for layer in range(len(lead) and 3):
    params['W_dec'][layer, :, :layer] = 0
  if 'skip' in kind:
    params['W_skip'] = rows(6, *lead, D, d_out)
  if kind == 'topk':
    params |= {'k': np.float32(5), 'threshold': np.zeros(F, np.float32)}
  layers = range(3) if lead else [3]
  reads, writes = 'mlp_in', 'mlp_out'
  if not transcoder:
    reads = writes = 'resid_post'
  type_ = 'clt' if lead else 'transcoder' if transcoder else 'sae'
  card = {
    'name': kind,
    'type': type_,
    'sites': [f'{reads}/{layer}' for layer in layers],
    'targets': [f'{writes}/{layer}' for layer in layers],
    'd_in': D,
    'd_out': d_out,
    'width': F * len(layers),
    'model': 'gemma3-1b',
    'architecture': 'topk' if kind == 'topk' else 'jumprelu',
  }
  return params, card


def for_saelens(kind: str):
  """The same; TransformerLens reads a norm before its gain."""
  params, card = make_member(kind)
  if card['type'] == 'transcoder':
    card['sites'] = ['mlp_in_ungained/3']
  return params, card


def same(actual, expected):
  assert set(actual) == set(expected)
  for key in actual:
    np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


def gemma_scope_1_folder(root: pathlib.Path, path: str, lower=False, **arrays):
  params, _ = make_member('jumprelu')
  folder = root / path
  folder.mkdir(parents=True)
  stored = {**params, **arrays}
  if lower:
    stored = {key.lower(): value for key, value in stored.items()}
  np.savez(folder / 'params.npz', **stored)
  return str(folder), params
