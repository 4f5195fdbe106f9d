"""Gemma 2 and 3 as a pure function: forward(params, tokens, taps, edits).

The modules are those of the `gemma` package; this file drives their blocks one
by one, reads (taps) and replaces (edits) activations at any `Site`, and stops
after the last layer that somebody asked for:

  x = embed(tokens);  for block in blocks[:n]: x = block(x);  unembed(norm(x))

Taps and edits are arguments, never ambient state. `Transformer.__call__` is an
`nn.jit` whose cache does not know about interceptors: hooks put around it
return the values of an earlier trace. We therefore run beneath it.

Norms and attention scores are computed in float32 whatever the parameters'
dtype (the package computes them in the parameters' dtype, which in bfloat16
nearly doubles the error of the logits).

`extend` is the same walk for the next tokens of rows whose keys and values
are kept in a cache.

This is the only file that imports `gemma`, and only when a model is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from gemma_scope import sites
from gemma_scope.language_model import arguments, hooks

Params = dict[str, Any]
Edit = hooks.Edit
Cache = tuple[dict[str, jax.Array], ...]  # one of each layer


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a Gemma text model, in this project's words."""

  name: str
  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  window: int
  pattern: str  # one letter a layer, repeated: L local (sliding), G global
  attn_softcap: float | None = None
  final_softcap: float | None = None
  transpose_gating: bool = True
  qk_norm: bool = False
  query_scale_by_heads: bool = False  # (d_model / num_heads)^-.5, 27B only
  global_rope_base: int = 10_000
  global_rope_factor: float = 1.0


def _gemma2(name, d, layers, heads, kv, head_dim, d_ff, **more) -> Config:
  return Config(
      name, 256_128, d, layers, heads, kv, head_dim, d_ff, 4096, 'LG',
      attn_softcap=50.0, final_softcap=30.0, **more,
  )  # fmt: skip


def _gemma3(name, d, layers, heads, kv, head_dim, d_ff, window, **more):
  return Config(
      name, 262_144, d, layers, heads, kv, head_dim, d_ff, window, 'LLLLLG',
      qk_norm=True, global_rope_base=1_000_000, **more,
  )  # fmt: skip


SIZES = {
    config.name: config
    for config in (
        _gemma2('gemma2-2b', 2304, 26, 8, 4, 256, 9216, transpose_gating=False),
        _gemma2('gemma2-9b', 3584, 42, 16, 8, 256, 14336),
        _gemma2(
            'gemma2-27b', 4608, 46, 32, 16, 128, 36864,
            query_scale_by_heads=True,
        ),
        _gemma3('gemma3-270m', 640, 18, 4, 1, 256, 2048, 512),
        _gemma3('gemma3-1b', 1152, 26, 4, 1, 256, 6912, 512),
        _gemma3(
            'gemma3-4b', 2560, 34, 8, 4, 256, 10240, 1024,
            global_rope_factor=8.0,
        ),
        _gemma3(
            'gemma3-12b', 3840, 48, 16, 8, 256, 15360, 1024,
            global_rope_factor=8.0,
        ),
        _gemma3(
            'gemma3-27b', 5376, 62, 32, 16, 128, 21504, 1024,
            global_rope_factor=8.0, query_scale_by_heads=True,
        ),
    )
}  # fmt: skip


class Output(NamedTuple):
  logits_BTV: jax.Array | None
  taps: dict[sites.Site | str, jax.Array]  # each [B, T, D of the site]


@contextlib.contextmanager
def _without_tensorflow():
  """kauldron imports TensorFlow for the name `tf.Tensor` alone: stand in."""
  if 'tensorflow' in sys.modules:
    yield
    return
  stand_in = types.ModuleType('tensorflow')
  stand_in.Tensor = type('Tensor', (), {})
  stand_in.__spec__ = types.SimpleNamespace(
    name='tensorflow', loader=None, origin=None, submodule_search_locations=[]
  )
  sys.modules['tensorflow'] = stand_in
  try:
    yield
  finally:
    del sys.modules['tensorflow']


@contextlib.contextmanager
def _restored(owner, name: str):
  """Puts back an attribute that is replaced inside."""
  before = getattr(owner, name)
  try:
    yield
  finally:
    setattr(owner, name, before)


@functools.cache
def _gemma_nn():
  """`gemma.gm.nn`, imported on first use and without TensorFlow.

  On import gemma replaces `nn.Module.param` by one that demands a shape, for
  every Flax module of the process; that is undone here.
  """
  with _without_tensorflow(), _restored(nn.Module, 'param'):
    try:
      from gemma import gm
    except ImportError as error:
      raise ImportError(
        'The language model needs the gemma package, which is not installed: '
        'run launch/setup.sh, or pip install --no-deps -r requirements.txt.'
      ) from error
    _ = gm.nn.Transformer, gm.nn.config.TransformerConfig  # imported lazily
    from kauldron import kd

    _ = kd.nn.Identity
  return gm.nn


class Gemma:
  """A Gemma text model without its parameters, which are always passed in.

  Args:
    config: the model's shape.
    activation_sharding: where the residual stream [B, T, D] lives; pin it when
      parameters are sharded over the batch's axis (FSDP), or XLA moves the
      batch away.
  """

  def __init__(
    self,
    config: Config,
    activation_sharding: jax.sharding.Sharding | None = None,
  ):
    self.config = config
    self._pin = (
      (lambda x: x)
      if activation_sharding is None
      else lambda x: jax.lax.with_sharding_constraint(x, activation_sharding)
    )
    gm_nn = _gemma_nn()
    kinds = {
      'L': gm_nn.AttentionType.LOCAL_SLIDING,
      'G': gm_nn.AttentionType.GLOBAL,
    }
    scales = gm_nn.config.QueryPreAttentionNormalisation
    c = config
    self._model = gm_nn.Transformer(
      config=gm_nn.config.TransformerConfig(
        num_embed=c.vocab_size,
        embed_dim=c.d_model,
        hidden_dim=c.d_ff,
        num_heads=c.num_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.num_kv_heads,
        final_logit_softcap=c.final_softcap,
        attn_logits_soft_cap=c.attn_softcap,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=c.qk_norm,
        attention_types=tuple(
          kinds[c.pattern[i % len(c.pattern)]] for i in range(c.num_layers)
        ),
        sliding_window_size=c.window,
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

  @functools.cached_property
  def param_shapes(self) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s (float32)."""
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    init = functools.partial(jax.eval_shape, self._model.init)
    return dict(init(jax.random.key(0), tokens)['params'])

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters: normal, variance 1 / fan-in, unit gains."""
    c = self.config
    fan_in = {
      'input_embedding': c.d_model,
      'attn_vec_einsum/w': c.num_heads * c.head_dim,
      'mlp/linear': c.d_ff,
    }  # all others read the residual stream
    flat = traverse_util.flatten_dict(self.param_shapes, sep='/')
    params = {}
    for i, (name, shape) in enumerate(sorted(flat.items())):
      if name.endswith('scale'):  # the gain is 1 + scale
        params[name] = jnp.zeros(shape.shape)
        continue
      inputs = next(
        (n for end, n in fan_in.items() if name.endswith(end)), c.d_model
      )
      draw = jax.random.normal(jax.random.fold_in(key, i), shape.shape)
      params[name] = draw * inputs**-0.5
    return traverse_util.unflatten_dict(params, sep='/')

  def forward(
    self,
    params: Params,
    tokens_BT: jax.Array,
    *,
    taps: Collection[sites.Site | str] = (),
    edits: Mapping[sites.Site | str, Edit] | None = None,
    logits: bool = True,
    positions_BT: jax.Array | None = None,
    mask_BTT: jax.Array | None = None,
    frozen: bool = False,
  ) -> Output:
    """One pass; pure, so that jit, grad and vmap of it are what they seem.

    Args:
      params: the tree of `param_shapes`; its dtype is the compute dtype.
      tokens_BT: integers, as an array or nested lists; 0 is padding and is
        never attended to.
      taps: sites to return, each as [B, T, D] in the compute dtype; a `Site`
        or its text, such as 'resid_post/2'.
      edits: site -> function from [B, T, D] to the same shape; a tap of an
        edited site returns the edited value.
      logits: False stops after the last tapped layer and forms no logits.
      positions_BT, mask_BTT: for packed documents; by default positions count
        the tokens that are not padding, and attention is causal.
      frozen: no gradient through norms' denominators and attention's weights.

    Returns:
      `Output`; logits are float32, taps have the keys that were given.

    Raises:
      ValueError, TypeError: a site that this model does not have, tokens,
        parameters or an edited value of another shape.
    """
    c, causal, wanted = self.config, mask_BTT is None, arguments.taps(taps)
    edits = arguments.edits(edits)
    visits = hooks.Hooks(c, wanted.values(), edits, frozen, causal)
    depth = c.num_layers
    if not logits:
      depth = 1 + max((site.layer for site in visits.taps), default=-1)
    tokens_BT = arguments.tokens(tokens_BT, c.vocab_size)
    arguments.params(params, self.param_shapes, depth, logits)
    arguments.shape('positions_BT', positions_BT, tokens_BT.shape)
    both = (*tokens_BT.shape, tokens_BT.shape[1])
    arguments.shape('mask_BTT', mask_BTT, both)
    with nn.intercept_methods(visits.intercept):
      logits_BTV = self._model.apply(
          {'params': params}, tokens_BT, positions_BT, mask_BTT, depth, logits,
          self._pin, method=_walk,
      )  # fmt: skip
    values = {given: visits.values[site] for given, site in wanted.items()}
    return Output(logits_BTV, values)

  def empty_cache(self, batch: int, length: int) -> Cache:
    """Room for the keys and values of `length` tokens in each of B rows.

    float32, as scores are: 8 bytes a token, layer, key head and head width.
    """
    c = self.config
    heads = (batch, length, c.num_kv_heads, c.head_dim)
    layer = {
      'k': jnp.zeros(heads),
      'v': jnp.zeros(heads),
      'positions': jnp.zeros((batch, length), jnp.int32),
      'end_index': jnp.zeros((batch,), jnp.int32),  # the same in every row
    }
    return (layer,) * c.num_layers

  def extend(
    self,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array,
    mask_BTC: jax.Array,
    edits: Mapping[sites.Site | str, Edit] | None = None,
  ) -> tuple[jax.Array, Cache]:
    """The next T tokens of every row, written to the cache's next T slots.

    Args:
      cache: from `empty_cache`, with C slots, or from an earlier call.
      tokens_BT: int32.
      positions_BT: each token's position in its own row.
      mask_BTC: the slots that each token attends to; its own is one of them.
      edits: as in `forward`, for these T tokens.

    Returns:
      Logits [B, V] of the last token, float32, and the new cache.
    """
    visits = hooks.Hooks(self.config, (), arguments.edits(edits))
    with nn.intercept_methods(visits.intercept):
      return self._model.apply(
          {'params': params}, cache, tokens_BT, positions_BT, mask_BTC,
          self._pin, method=_extend,
      )  # fmt: skip

  def unembed(
    self, params: Params, x_BTD: jax.Array, tokens_K: Any = None
  ) -> jax.Array:
    """Final norm, tied unembedding (of K tokens), soft-cap: float32 logits."""
    arguments.shape('x_BTD', x_BTD, (*x_BTD.shape[:-1], self.config.d_model))
    visits = hooks.Hooks(self.config, (), {})
    with nn.intercept_methods(visits.intercept):
      return self._model.apply(
        {'params': params}, x_BTD, tokens_K, method=_unembed
      )


def _walk(model, tokens_BT, positions_BT, mask_BTT, depth, logits, pin):
  caches = (None,) * depth
  x_BTD, _ = _blocks(model, caches, tokens_BT, positions_BT, mask_BTT, pin)
  return _unembed(model, x_BTD) if logits else None


def _extend(model, caches, tokens_BT, positions_BT, mask_BTC, pin):
  x_BTD, caches = _blocks(model, caches, tokens_BT, positions_BT, mask_BTC, pin)
  return _unembed(model, x_BTD[:, -1:])[:, 0], caches


def _blocks(model, caches, tokens_BT, positions_BT, mask_BTC, pin):
  """`Transformer.__call__` for text, beneath its `nn.jit`: a block a cache."""
  inputs = model._encode_and_get_inputs(
    tokens=tokens_BT, positions=positions_BT, attention_mask=mask_BTC
  )
  x_BTD, after = pin(inputs.embeddings), []
  for block, cache in zip(model.blocks, caches, strict=False):
    cache, x_BTD = block(x_BTD, inputs.positions, cache, inputs.attention_mask)
    x_BTD = pin(x_BTD)
    after.append(cache)
  return x_BTD, tuple(after)


def _unembed(model, x_BTD, tokens_K=None):
  # As `embedder.decode`, but sums stay float32: in bfloat16 logits of 16 to 32
  # would be multiples of an eighth.
  table_VD = model.embedder.input_embedding_table
  table_VD = table_VD if tokens_K is None else table_VD[tokens_K]
  logits_BTV = jnp.einsum(
    '...d,vd->...v',
    model.final_norm(x_BTD),
    table_VD.astype(x_BTD.dtype),
    preferred_element_type=jnp.float32,
  )
  cap = model.config.final_logit_softcap
  return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def token_losses(
  logits_BTV: jax.Array,
  tokens_BT: jax.Array,
  *,
  pad_id: int = 0,
  bos_id: int = 2,
) -> tuple[jax.Array, jax.Array]:
  """Next-token loss in nats, and where it counts; both [B, T - 1].

  Entry t is the loss of token t + 1 given tokens 0..t. It does not count where
  the target is padding or BOS, nor where the context's last token is padding.
  """
  targets = tokens_BT[:, 1:]
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV[:, :-1].astype(jnp.float32), targets
  )
  counts = (targets != pad_id) & (targets != bos_id)
  return losses, counts & (tokens_BT[:, :-1] != pad_id)
