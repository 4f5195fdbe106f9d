"""Cards, parameters and metrics of made-up SAEs, and releases of them."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap

import numpy as np

import gemma_scope
from gemma_scope import release

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
D, F = 8, 24
MEMBER = 'resid_post/layer_2/width_24/average_l0_5'


def card(site='resid_post/2', seed=0, target=5.0, **more):
  return {
    'type': 'sae',
    'sites': [site],
    'targets': [site],
    'model': 'tiny',
    'architecture': 'jumprelu',
    'd_in': D,
    'd_out': D,
    'width': F,
    'sparsity': {'kind': 'target_l0', 'value': target},
    'seed': seed,
    'scales': {site: 3.5},
    'tokens': 4096,
    'steps': 10,
    'text': {'source': 'embedded', 'sha256': 'ab' * 32},
    'code': '0.1.0',
    'name': f'{site}/width_24/target_l0_{target:g}/seed_{seed}',
  } | more


def saes(rows) -> list[release.Released]:
  """SAEs in memory, each given as (params, card) or (params, card, metrics)."""
  return [release.in_memory(*row) for row in rows]


def save(folder, rows, **options) -> bool:
  """`release.save` of such."""
  return release.save(folder, saes(rows), **options)


def params_of(seed=0, d_in=D, width=F, d_out=None):
  rng = np.random.default_rng(seed)
  d_out = d_out or d_in
  W_dec = rng.normal(size=(width, d_out))
  W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
  params = {
    'W_enc': rng.normal(size=(d_in, width)),
    'b_enc': 0.1 * rng.normal(size=width),
    'W_dec': W_dec,
    'b_dec': 0.3 * rng.normal(size=d_out),
    'threshold': rng.uniform(0.05, 0.5, size=width),
  }
  return {key: array.astype(np.float32) for key, array in params.items()}


def figure(value):
  return {'value': value, 'low': 0.9 * value, 'high': 1.2 * value, 'tokens': 99}


def metrics_of(l0=5.2, fvu=0.31, delta=0.02):
  twin = {'l0': figure(l0), 'fvu': figure(0.9), 'delta_loss': figure(1.5)}
  return {
    'l0': figure(l0),
    'fvu': figure(fvu),
    'delta_loss': figure(delta),
    'dead': 0.125,
    'tokens': 61440,
    'control': twin,
  }


def files_in(root):
  return [path for path in root.rglob('*') if path.is_file()]


def python(code):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
