"""Small random Gemma models."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata

import jax
import pytest

from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import gemma4

# Windows shorter than prompt and reply, so that local layers forget.
GEMMA2 = lm.Config(
  name='g2',
  vocab_size=40,
  d_model=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_ff=24,
  window=4,
  pattern='LG',
  attn_softcap=5.0,
  final_softcap=8.0,
  transpose_gating=False,
)
GEMMA3 = lm.Config(
  name='g3',
  vocab_size=40,
  d_model=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=1,
  head_dim=8,
  d_ff=24,
  window=3,
  pattern='LLG',
  qk_norm=True,
  global_rope_base=1_000_000,
  global_rope_factor=8.0,
)

# The three kinds of Gemma 4; windows and heads as above. Per-layer inputs are
# wide, or some token's gates are all closed and its norm divides by nothing.
_GEMMA4 = dict(
  vocab_size=40,
  d_model=16,
  num_heads=4,
  head_dim=8,
  d_ff=24,
  window=4,
  global_kv_heads=1,
  global_head_dim=16,
  final_softcap=8.0,
)
GEMMA4_E = gemma4.Config(
  name='g4_e',
  num_layers=6,
  num_kv_heads=1,
  pattern='LLG',
  kv_shared=3,
  shared_d_ff=32,
  ple_dim=24,
  **_GEMMA4,
)
GEMMA4_DENSE = gemma4.Config(
  name='g4_dense',
  num_layers=2,
  num_kv_heads=2,
  pattern='LG',
  k_is_v=True,
  **_GEMMA4,
)
GEMMA4_MOE = dataclasses.replace(
  GEMMA4_DENSE, name='g4_moe', experts=8, top_experts=3, expert_d_ff=12
)
GEMMA4 = GEMMA4_E, GEMMA4_DENSE, GEMMA4_MOE
HAS_GEMMA4 = int(importlib.metadata.version('gemma').split('.')[0]) >= 4
needs_gemma4 = pytest.mark.skipif(
  not HAS_GEMMA4, reason='Gemma 4 needs version 4 of the gemma package'
)


@functools.cache
def model(config):
  """Random; blocks outweigh the embedding, or the last token is repeated."""
  gemma = lm.Gemma(config)
  keys = iter(jax.random.split(jax.random.key(2), 200))
  post = 1.0 if isinstance(config, gemma4.Config) else 6.0

  def gain(path, x):
    if not path[-1].key.endswith('scale'):
      return x
    offset = post if path[-2].key.startswith('post') else 0.0
    if path[-1].key == 'skip_scale':
      offset = -0.5 * x
    return x + offset + 0.5 * jax.random.normal(next(keys), x.shape)

  params = gemma.init(jax.random.key(1))
  return gemma, jax.tree_util.tree_map_with_path(gain, params)
