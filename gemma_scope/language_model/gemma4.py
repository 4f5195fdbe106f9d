"""Gemma 4, its text part: shapes, blocks and attention.

How its blocks differ from those of Gemma 2 and 3:

  - global layers have heads of another width than sliding ones, and another
    number of key heads; in 31B and 26B-A4B their values are their keys, before
    the norms and the rotation. Global layers rotate a quarter of the pairs;
  - the last layers of E2B and E4B have no keys and values: they attend to
    those of the last layer of their kind that has (`Config.kv_layer`);
  - values have a norm, without gain; gains are the scale itself, not 1 + scale;
    scores are not divided by the root of the heads' width;
  - E2B and E4B have per-layer inputs, 26B-A4B has experts: see `sites`;
  - a block's output is multiplied by a number, skip_scale.

The blocks are those of the `gemma` package but for the attention and the
router of the experts. Version 4.0.1 of the package differs from Gemma 4 in two
points:

  - the router normalises what the experts' norm has already normalised and
    scaled. Hugging Face's modeling_gemma4, llama.cpp and later versions of the
    package (unnormalized_x in gm/nn/gemma4/_moe.py, "avoiding a double norm")
    give it the residual stream, and so does this file;
  - it takes the experts from approx_max_k, which on TPUs may miss one. Here
    they are the k largest.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import ClassVar

import jax
import jax.numpy as jnp

from gemma_scope import sites
from gemma_scope.language_model import (
  attention,
  experts,
  gemma_package,
  gemma_shape,
)
from gemma_scope.language_model import hooks as hooks_lib

_LOCAL_ROPE_BASE = 10_000


@dataclasses.dataclass(frozen=True)
class Config(gemma_shape.Shape):
  """The shape of a Gemma 4 text model."""

  global_kv_heads: int
  global_head_dim: int = 512
  k_is_v: bool = False  # in global layers
  kv_shared: int = 0  # last layers without keys and values of their own
  shared_d_ff: int = 0  # of those layers; 0: d_ff
  ple_dim: int = 0  # width of the per-layer inputs; 0: there are none
  experts: int = 0
  top_experts: int = 0
  expert_d_ff: int = 0
  final_softcap: float | None = 30.0
  global_rope_base: int = 1_000_000
  global_rope_share: float = 0.25
  family: str = 'gemma4'  # tells its JSON from that of other generations

  transpose_gating: ClassVar[bool] = True  # gating matrices are [2, d_ff, D]

  def heads(self, layer: int) -> tuple[int, int]:
    """Number of key heads, and width of every head, in a layer."""
    if self.is_global(layer):
      return self.global_kv_heads, self.global_head_dim
    return self.num_kv_heads, self.head_dim

  def kv_layer(self, layer: int) -> int:
    """The layer whose keys and values a layer attends to."""
    with_own_kv = self.num_layers - self.kv_shared
    if layer < with_own_kv:
      return layer
    kind = self.is_global(layer)
    return max(i for i in range(with_own_kv) if self.is_global(i) == kind)

  def hidden(self, layer: int) -> int:
    """Width of the MLP's hidden layer; that of the dense branch."""
    shares = self.kv_layer(layer) != layer
    return self.shared_d_ff if shares and self.shared_d_ff else self.d_ff

  def site_widths(self, layer: int) -> dict[str, int]:
    """Width of every kind of site that this layer has."""
    _, head_dim = self.heads(layer)
    widths = sites.block_widths(
      self.d_model, self.num_heads * head_dim, self.hidden(layer)
    )
    if self.ple_dim:
      widths['ple_out'] = self.d_model
    if self.experts:
      widths |= dict.fromkeys(sites.EXPERTS, self.experts)
      widths['experts_out'] = self.d_model
    return widths

  def mlp_row(self, layer: int) -> int:
    """Hidden units that a token has at once, all its experts' with inputs."""
    experts = self.top_experts * (self.expert_d_ff + self.d_model)
    return self.hidden(layer) + experts + self.ple_dim

  def matmul_weights(self, layer: int) -> int:
    """Entries of the matrices of a layer that one token meets."""
    kv_heads, head_dim = self.heads(layer)
    kv = (1 if self.k_is_v and self.is_global(layer) else 2) * kv_heads
    if self.kv_layer(layer) != layer:
      kv = 0
    attn = (2 * self.num_heads + kv) * head_dim
    mlp = 3 * (self.hidden(layer) + self.top_experts * self.expert_d_ff)
    # The per-layer input is projected from the embedding, gated, projected.
    return self.d_model * (attn + mlp + self.experts + 3 * self.ple_dim)


# d_model, layers, heads, key heads, their width, d_ff, window.
_ROWS = {
  'gemma4-e2b': (1536, 35, 8, 1, 256, 6144, 512),
  'gemma4-e4b': (2560, 42, 8, 2, 256, 10240, 512),
  'gemma4-31b': (5376, 60, 32, 16, 256, 21504, 1024),
  'gemma4-26b-a4b': (2816, 30, 16, 8, 256, 2112, 1024),
}
_MORE = {
  'gemma4-e2b': {
    'pattern': 'LLLLG',
    'global_kv_heads': 1,
    'ple_dim': 256,
    'kv_shared': 20,
    'shared_d_ff': 12288,
  },
  'gemma4-e4b': {'global_kv_heads': 2, 'ple_dim': 256, 'kv_shared': 18},
  'gemma4-31b': {'global_kv_heads': 4, 'k_is_v': True},
  'gemma4-26b-a4b': {
    'global_kv_heads': 2,
    'k_is_v': True,
    'experts': 128,
    'top_experts': 8,
    'expert_d_ff': 704,
  },
}
SIZES = {
  name: Config(
    name,
    262_144,
    **gemma_shape.from_row(row),
    **{'pattern': 'LLLLLG', **_MORE[name]},
  )
  for name, row in _ROWS.items()
}


def transformer(config: Config):
  """The package's module; its parameters are always passed in."""
  package, c = gemma_package.gemma4(), config
  sharing = None
  if c.kv_shared:
    # The package rounds the number of layers that do not share down.
    sharing = package.config.KVCacheSharingConfig(
      frac_shared_layers=(c.kv_shared - 0.5) / c.num_layers,
      share_global=True,
      share_local=True,
    )
  return package.transformer.Transformer(
    config=package.config.TransformerConfig(
      **c.for_package(package.modules.AttentionType),
      final_logit_softcap=c.final_softcap,
      num_global_kv_heads=c.global_kv_heads,
      global_key_size=c.global_head_dim,
      k_eq_v_global=c.k_is_v,
      global_rope_proportion=c.global_rope_share,
      local_rope_proportion=1.0,
      local_base_frequency=_LOCAL_ROPE_BASE,
      global_base_frequency=c.global_rope_base,
      per_layer_input_dim=c.ple_dim,
      kv_cache_sharing_config=sharing,
      override_kv_shared_ffw_hidden=c.shared_d_ff or None,
      enable_moe=bool(c.experts),
      num_experts=c.experts,
      expert_dim=c.expert_d_ff,
      top_k_experts=c.top_experts,
      moe_dense_hidden_dim=c.d_ff,
    ),
    dtype=jnp.float32,
  )


def is_read(config: Config, name: str) -> bool:
  """Whether a parameter of the package's tree is part of the model.

  The package keeps keys and values of layers that attend to another's.
  """
  match = re.match(r'layer_(\d+)/attn/(kv_einsum|k_einsum|key_norm)/', name)
  return not match or config.kv_layer(int(match[1])) == int(match[1])


def initial(config: Config, name: str) -> float | int:
  """A parameter's fan-in, an integer; or, a float, the value of all entries."""
  if name.endswith('scale'):
    return 1.0
  layer = re.match(r'layer_(\d+)/', name)
  if name.endswith('attn_vec_einsum/w'):
    return config.num_heads * config.heads(int(layer[1]))[1]
  if re.search(r'/mlp2?/linear$', name):
    return config.hidden(int(layer[1]))
  fan_in = {
    'mlp/linear/w': config.expert_d_ff,
    'per_layer_projection/w': config.ple_dim,
    'per_layer_embeddings': config.ple_dim,
    'per_layer_model_projection/w': 1,  # the package divides by the root of D
  }  # all others read the residual stream
  return next(
    (size for suffix, size in fan_in.items() if name.endswith(suffix)),
    config.d_model,
  )


def empty_cache(config: Config, batch: int, length: int) -> tuple:
  """As in `gemma3`; None for a layer that attends to another's keys."""

  def layer(i: int):
    if config.kv_layer(i) != i:
      return None
    heads = (batch, length, *config.heads(i))
    return {
      'k': jnp.zeros(heads),
      'v': jnp.zeros(heads),
      'positions': jnp.zeros((batch, length), jnp.int32),
      'end_index': jnp.zeros((), jnp.int32),
    }

  return tuple(map(layer, range(config.num_layers)))


def blocks(config: Config, model, caches, tokens_BT, positions_BT, mask, pin):
  """As in `gemma3`: the residual stream after the last block, and the caches.

  Keys and values go from a block to those that share them, so that XLA drops
  the layers that nothing reads, and no others.
  """
  inputs = model._encode_and_get_inputs(
    tokens=tokens_BT, positions=positions_BT, attention_mask=mask
  )
  x_BTD, layer_caches = pin(inputs.embeddings), []
  for i, (block, cache) in enumerate(zip(model.blocks, caches, strict=False)):
    source = config.kv_layer(i)
    ple_BTP = inputs.per_layer_inputs[:, :, i] if config.ple_dim else None
    layer_cache, x_BTD = block(
      x_BTD,
      inputs.positions,
      cache,
      inputs.attention_mask,
      ple_BTP,
      kv_shared_cache=None if source == i else layer_caches[source],
    )
    x_BTD = pin(x_BTD)
    layer_caches.append(layer_cache)
  pairs = zip(caches, layer_caches, strict=True)
  caches = (None if cache is None else new_cache for cache, new_cache in pairs)
  return x_BTD, tuple(caches)


class Hooks(hooks_lib.Hooks):
  """See `hooks.Hooks`."""

  def __init__(self, config: Config, *arguments, **more):
    super().__init__(config, *arguments, **more)
    self._normed: dict[int, jax.Array] = {}  # mlp_in_ungained of each layer
    self.sites_of = {
      **super().sites_of,
      ('post_per_layer_input_norm',): (None, 'ple_out'),
    }
    if config.experts:
      # The dense branch is called mlp2, and comes first.
      self.sites_of |= {
        ('pre_ffw2_norm',): ('resid_mid', 'mlp_in'),
        ('pre_ffw_norm',): (None, None),
        ('mlp',): (None, None),
        ('mlp', 'router_logits'): (None, 'router_logits'),
        ('post_ffw1_norm',): (None, 'experts_out'),
        ('post_ffw_norm',): ('mlp_raw', 'mlp_out'),
      }

  def inside(self, layer, path, module, call, args, kwargs):
    if path == ('attn',):
      return self._attention(layer, module, *args)
    if path == ('pre_ffw2_norm',):
      return self._first_norm(layer, module, args[0])
    if self.config.experts and path == ('pre_ffw_norm',):
      x_BTD = self._normed[layer] * self.gain(module)
      return x_BTD.astype(args[0].dtype)
    if self.config.experts and path == ('mlp',):
      return self._experts(layer, module, args[0])
    return super().inside(layer, path, module, call, args, kwargs)

  def gain(self, module):
    if not module.with_scale:
      return jnp.float32(1)
    return module.get_variable('params', 'scale').astype(jnp.float32)

  def _first_norm(self, layer: int, module, x_BTD):
    """The norm of the dense branch, one of two norms of resid_mid.

    Its output without the gain also feeds the router and the experts' norm.
    """

    def keep(normed_BTD):
      self._normed[layer] = self.visit(layer, 'mlp_in_ungained', normed_BTD)
      return self._normed[layer]

    x_BTD = self.visit(layer, 'resid_mid', x_BTD)
    return self.visit(layer, 'mlp_in', self.norm(module, x_BTD, keep))

  def _experts(self, layer: int, module, x_BTD):
    """What the package's MoERagged returns, but for its router: see above."""
    scale_D = module.router_scale.astype(jnp.float32)
    routed_BTD = self._normed[layer] * scale_D * x_BTD.shape[-1] ** -0.5
    logits_BTE = module.router_logits('gsd,de->gse', routed_BTD)
    k = module.num_experts_per_datapoint
    shares_BTE = self.visit(
      layer, 'expert_shares', experts.shares(logits_BTE, k)
    )
    weights = experts.Weights(
      module.gating_einsum(), module.linear(), module.per_expert_scale
    )
    if sites.Site(layer, 'expert_shares') in self.edits:
      return experts.of_all(x_BTD, shares_BTE, weights, self.place)
    return experts.of_chosen(x_BTD, shares_BTE, k, weights, self.place)

  def _attention(
    self, layer, module, x_BTD, positions_BT, cache, mask, shared_kv
  ):
    """What the package's `Attention` returns, in float32 between its matrices.

    Args:
      cache: of this layer, or None.
      shared_kv: keys, values and their positions of another layer, or None.

    Returns:
      This layer's keys and values, and its output [B, T, D].
    """
    rotated = functools.partial(
      attention.rotated,
      base=module.rope_base_frequency,
      share=module.rope_proportion,
    )
    stop = jax.lax.stop_gradient if self.frozen else lambda x: x
    q_BTNH = module.q_einsum('BTD,NDH->BTNH', x_BTD).astype(jnp.float32)
    q_BTNH = stop(rotated(module.query_norm(q_BTNH), positions_BT))
    kv = shared_kv
    if kv is None:
      if module.k_eq_v:
        k_BSKH = v_BSKH = module.k_einsum('BSD,KDH->BSKH', x_BTD)
      else:
        k_BSKH, v_BSKH = module.kv_einsum('BSD,CKDH->CBSKH', x_BTD)
      k_BSKH = module.key_norm(k_BSKH.astype(jnp.float32))
      kv = {
        'k': stop(rotated(k_BSKH, positions_BT)),
        'v': module.value_norm(v_BSKH.astype(jnp.float32)),
        'positions': positions_BT,
      }
    if cache is not None:
      kv = _written(cache, kv)
    if not self.config.is_global(layer):
      mask = mask & attention.near(
        positions_BT, kv['positions'], module.sliding_window_size
      )
    out_BTNH = attention.attend(
      q_BTNH, kv['k'], kv['v'], mask, None, self.causal
    )
    return kv, module.attn_vec_einsum('BTNH,NHD->BTD', out_BTNH)


def _written(cache: dict, entries: dict) -> dict:
  """A layer's cache with the next tokens' entries in its next slots."""
  start = cache['end_index']
  written = {
    name: jax.lax.dynamic_update_slice_in_dim(cache[name], value, start, 1)
    for name, value in entries.items()
  }
  return {**written, 'end_index': start + entries['k'].shape[1]}
