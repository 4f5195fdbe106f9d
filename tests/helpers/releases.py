"""A card for a made-up SAE, and releases of such."""

from __future__ import annotations

from gemma_scope import release

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


def saes(rows) -> list[release.Released]:
  """SAEs in memory, each given as (params, card) or (params, card, metrics)."""
  return [release.in_memory(*row) for row in rows]


def save(folder, rows, **options) -> bool:
  """`release.save` of such."""
  return release.save(folder, saes(rows), **options)
