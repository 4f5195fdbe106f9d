"""Small random Gemma models."""

from __future__ import annotations

import functools

import jax

from gemma_scope.language_model import gemma as lm

# Windows shorter than prompt and reply, so that local layers forget.
GEMMA2 = lm.Config(
    name='g2', vocab_size=40, d_model=16, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, d_ff=24, window=4, pattern='LG',
    attn_softcap=5.0, final_softcap=8.0, transpose_gating=False,
)  # fmt: skip


@functools.cache
def model(config):
  """Random; blocks outweigh the embedding, or the last token is repeated."""
  gemma = lm.Gemma(config)
  keys = iter(jax.random.split(jax.random.key(2), 100))

  def gain(path, x):
    if path[-1].key != 'scale':
      return x
    added = 6.0 if path[-2].key.startswith('post') else 0.0
    return x + added + 0.5 * jax.random.normal(next(keys), x.shape)

  params = gemma.init(jax.random.key(1))
  return gemma, jax.tree_util.tree_map_with_path(gain, params)
