"""Gemma 2 and 3: shapes, blocks and attention.

The blocks are the package's own. Without a cache the middle of their attention
is `attention.attend`, in blocks of queries; with one it is the package's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gemma_scope import sites
from gemma_scope.language_model import attention, gemma_package, gemma_shape
from gemma_scope.language_model import hooks as hooks_lib

_SCORE_INPUTS = ('q_einsum', 'kv_einsum', 'qkv_einsum')


@dataclasses.dataclass(frozen=True)
class Config(gemma_shape.Shape):
  """The shape of a Gemma 2 or 3 text model."""

  attn_softcap: float | None = None
  final_softcap: float | None = None
  transpose_gating: bool = True
  qk_norm: bool = False
  query_scale_by_heads: bool = False  # (d_model / num_heads)^-.5, 27B only
  global_rope_base: int = 10_000
  global_rope_factor: float = 1.0

  def site_widths(self, layer: int) -> dict[str, int]:
    """Width of every kind of site, the same in all layers."""
    del layer
    return sites.block_widths(
      self.d_model, self.num_heads * self.head_dim, self.d_ff
    )

  def mlp_row(self, layer: int) -> int:
    """Hidden units of an MLP that a token has at once."""
    del layer
    return self.d_ff

  def matmul_weights(self, layer: int) -> int:
    """Entries of the matrices of a layer; a token meets each once."""
    del layer
    heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
    return self.d_model * (heads + 3 * self.d_ff)


_FAMILIES = {
  'gemma2': {
    'vocab_size': 256_128,
    'pattern': 'LG',
    'attn_softcap': 50.0,
    'final_softcap': 30.0,
  },
  'gemma3': {
    'vocab_size': 262_144,
    'pattern': 'LLLLLG',
    'qk_norm': True,
    'global_rope_base': 1_000_000,
  },
}
# d_model, layers, heads, key heads, their width, d_ff, window.
_ROWS = {
  'gemma2-2b': (2304, 26, 8, 4, 256, 9216, 4096),
  'gemma2-9b': (3584, 42, 16, 8, 256, 14336, 4096),
  'gemma2-27b': (4608, 46, 32, 16, 128, 36864, 4096),
  'gemma3-270m': (640, 18, 4, 1, 256, 2048, 512),
  'gemma3-1b': (1152, 26, 4, 1, 256, 6912, 512),
  'gemma3-4b': (2560, 34, 8, 4, 256, 10240, 1024),
  'gemma3-12b': (3840, 48, 16, 8, 256, 15360, 1024),
  'gemma3-27b': (5376, 62, 32, 16, 128, 21504, 1024),
}
_MORE = {
  'gemma2-2b': {'transpose_gating': False},
  'gemma2-27b': {'query_scale_by_heads': True},
  'gemma3-4b': {'global_rope_factor': 8.0},
  'gemma3-12b': {'global_rope_factor': 8.0},
  'gemma3-27b': {'global_rope_factor': 8.0, 'query_scale_by_heads': True},
}
SIZES = {
  name: Config(
    name,
    **_FAMILIES[name.partition('-')[0]],
    **gemma_shape.from_row(row),
    **_MORE.get(name, {}),
  )
  for name, row in _ROWS.items()
}


def transformer(config: Config):
  """The package's module; its parameters are always passed in."""
  gm_nn = gemma_package.gemma3()
  scales = gm_nn.config.QueryPreAttentionNormalisation
  c = config
  return gm_nn.Transformer(
    config=gm_nn.config.TransformerConfig(
      **c.for_package(gm_nn.AttentionType),
      final_logit_softcap=c.final_softcap,
      attn_logits_soft_cap=c.attn_softcap,
      use_qk_norm=c.qk_norm,
      transpose_gating_einsum=c.transpose_gating,
      query_pre_attn_norm=(
        scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        if c.query_scale_by_heads
        else scales.BY_ONE_OVER_SQRT_HEAD_DIM
      ),
      global_base_frequency=c.global_rope_base,
      global_scale_factor=c.global_rope_factor,
    ),
    dtype=jnp.float32,
  )


def is_read(config: Config, name: str) -> bool:
  """Whether a parameter of the package's tree is part of the model: all are."""
  del config, name
  return True


def initial(config: Config, name: str) -> float | int:
  """A parameter's fan-in, an integer; or, a float, the value of all entries."""
  if name.endswith('scale'):  # the gain is 1 + scale
    return 0.0
  fan_in = {
    'input_embedding': config.d_model,
    'attn_vec_einsum/w': config.num_heads * config.head_dim,
    'mlp/linear': config.d_ff,
  }  # all others read the residual stream
  return next(
    (size for suffix, size in fan_in.items() if name.endswith(suffix)),
    config.d_model,
  )


def empty_cache(config: Config, batch: int, length: int) -> tuple:
  """Room for keys and values of `length` tokens: float32, as scores are."""
  heads = (batch, length, config.num_kv_heads, config.head_dim)
  layer = {
    'k': jnp.zeros(heads),
    'v': jnp.zeros(heads),
    'positions': jnp.zeros((batch, length), jnp.int32),
    'end_index': jnp.zeros((batch,), jnp.int32),  # the same in every row
  }
  return (layer,) * config.num_layers


def blocks(config: Config, model, caches, tokens_BT, positions_BT, mask, pin):
  """The package's loop over its blocks, beneath its `nn.jit`.

  Args:
    caches: one a block that is run; None where nothing is kept.
    mask: bool [B, T, keys], or None for a causal one.
    pin: says where the residual stream lives.

  Returns:
    The residual stream [B, T, D] after the last block, and the caches.
  """
  del config
  inputs = model._encode_and_get_inputs(
    tokens=tokens_BT, positions=positions_BT, attention_mask=mask
  )
  x_BTD, new_caches = pin(inputs.embeddings), []
  for block, cache in zip(model.blocks, caches, strict=False):
    cache, x_BTD = block(x_BTD, inputs.positions, cache, inputs.attention_mask)
    x_BTD = pin(x_BTD)
    new_caches.append(cache)
  return x_BTD, tuple(new_caches)


class Hooks(hooks_lib.Hooks):
  """See `hooks.Hooks`."""

  def inside(self, layer, path, module, call, args, kwargs):
    if path == ('attn',) and args[2] is None:  # x, positions, cache, mask
      return None, self._attention(module, args[0], args[1], args[3])
    if path[-1] in _SCORE_INPUTS:
      return self._scores(path[-1], call(*args, **kwargs).astype(jnp.float32))
    return super().inside(layer, path, module, call, args, kwargs)

  def gain(self, module):
    return 1 + module.get_variable('params', 'scale').astype(jnp.float32)

  def _scores(self, name: str, x):
    """Queries, keys and values, of which values alone have a frozen gradient.

    The leading axis of kv_einsum is (key, value), that of qkv_einsum all three.
    """
    if not self.frozen:
      return x
    frozen = jax.lax.stop_gradient(x)
    return frozen if name == 'q_einsum' else frozen.at[-1].set(x[-1])

  def _attention(self, module, x_BTD, positions_BT, mask_BTT):
    """What the package's `Attention` returns without a cache: [B, T, D]."""
    if module.use_qkv_einsum:
      q_BTNH, k_BSKH, v_BSKH = module.qkv_einsum('BTD,SNDH->SBTNH', x_BTD)
    else:
      q_BTNH = module.q_einsum('BTD,NDH->BTNH', x_BTD)
      k_BSKH, v_BSKH = module.kv_einsum('BSD,CKDH->CBSKH', x_BTD)
    if module.use_qk_norm:
      q_BTNH, k_BSKH = module._query_norm(q_BTNH), module._key_norm(k_BSKH)
    rope = module.rope_base_frequency, module.rope_scale_factor
    q_BTNH = attention.rotated(q_BTNH, positions_BT, *rope)
    q_BTNH *= module.query_pre_attn_scalar
    k_BSKH = attention.rotated(k_BSKH, positions_BT, *rope)
    if module.attn_type.name == 'LOCAL_SLIDING':
      mask_BTT = mask_BTT & attention.near(
        positions_BT, positions_BT, module.sliding_window_size
      )
    out_BTNH = attention.attend(
      q_BTNH, k_BSKH, v_BSKH, mask_BTT, module.attn_logits_soft_cap, self.causal
    )
    return module.attn_vec_einsum('BTNH,NHD->BTD', out_BTNH)
