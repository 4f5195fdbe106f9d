"""A card for a made-up SAE."""

from __future__ import annotations

D, F = 8, 24


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
