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

This is the only file that imports `gemma`, and only when a model is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from gemma_scope import sites

Params = dict[str, Any]
Edit = Callable[[jax.Array], jax.Array]


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
  taps: dict[sites.Site, jax.Array]  # each [B, T, D of the site]


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
    taps: Collection[sites.Site] = (),
    edits: Mapping[sites.Site, Edit] | None = None,
    logits: bool = True,
    positions_BT: jax.Array | None = None,
    mask_BTT: jax.Array | None = None,
  ) -> Output:
    """One pass; pure, so that jit, grad and vmap of it are what they seem.

    Args:
      params: the tree of `param_shapes`; its dtype is the compute dtype.
      tokens_BT: int32; 0 is padding and is never attended to.
      taps: sites to return, each as [B, T, D] in the compute dtype.
      edits: site -> function from [B, T, D] to the same shape; a tap of an
        edited site returns the edited value.
      logits: False stops after the last tapped layer and forms no logits.
      positions_BT, mask_BTT: for packed documents; by default positions count
        the tokens that are not padding, and attention is causal.

    Returns:
      `Output`; logits are float32.

    Raises:
      ValueError: a tap or an edit at a site that this model does not have.
    """
    hooks = _Hooks(self.config, taps, edits or {})
    depth = self.config.num_layers
    if not logits:
      depth = 1 + max((site.layer for site in hooks.taps), default=-1)
    with nn.intercept_methods(hooks.intercept):
      logits_BTV = self._model.apply(
          {'params': params}, tokens_BT, positions_BT, mask_BTT, depth, logits,
          self._pin, method=_walk,
      )  # fmt: skip
    return Output(logits_BTV, hooks.values)

  def unembed(self, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Final norm, tied unembedding and soft-cap: x_BTD -> float32 logits."""
    hooks = _Hooks(self.config, (), {})
    with nn.intercept_methods(hooks.intercept):
      return self._model.apply({'params': params}, x_BTD, method=_unembed)


def _walk(model, tokens_BT, positions_BT, mask_BTT, depth, logits, pin):
  """`Transformer.__call__` for text, beneath its `nn.jit`, `depth` layers."""
  inputs = model._encode_and_get_inputs(
    tokens=tokens_BT, positions=positions_BT, attention_mask=mask_BTT
  )
  x_BTD = pin(inputs.embeddings)
  for block in model.blocks[:depth]:
    _, x_BTD = block(x_BTD, inputs.positions, None, inputs.attention_mask)
    x_BTD = pin(x_BTD)
  return _unembed(model, x_BTD) if logits else None


def _unembed(model, x_BTD):
  logits_BTV = model.embedder.decode(model.final_norm(x_BTD))
  logits_BTV = logits_BTV.astype(jnp.float32)
  cap = model.config.final_logit_softcap
  return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


# Submodule of a block -> the sites of its input and of its output.
_SITES_OF = {
  ('pre_attention_norm',): (None, 'attn_in'),
  ('attn', 'attn_vec_einsum'): ('attn_out', 'attn_raw'),
  ('post_attention_norm',): (None, 'attn_add'),
  ('pre_ffw_norm',): ('resid_mid', 'mlp_in'),
  ('mlp',): (None, 'mlp_raw'),
  ('post_ffw_norm',): (None, 'mlp_out'),
}
_SCORE_INPUTS = ('q_einsum', 'kv_einsum', 'qkv_einsum')


class _Hooks:
  """Taps and edits of one trace; made for one forward pass and then dropped."""

  def __init__(self, config, taps, edits):
    self.taps = frozenset(taps)
    self.edits = dict(edits)
    self.values: dict[sites.Site, jax.Array] = {}
    for site in self.taps | set(self.edits):
      site.check(config)
    for site in self.edits:
      if site.kind in sites.READ_ONLY:
        raise ValueError(f'{site} can be read but not edited.')

  def _visit(self, layer: int, kind: str | None, x):
    """Edits x [B, T, ...], then records it; other values pass through."""
    site = sites.Site(layer, kind) if kind else None
    if site not in self.taps and site not in self.edits:
      return x
    x_BTD = x.reshape(*x.shape[:2], -1)
    if site in self.edits:
      edited = self.edits[site](x_BTD)
      if edited.shape != x_BTD.shape:
        raise ValueError(
          f'The edit at {site} returned {edited.shape} for {x_BTD.shape}.'
        )
      x_BTD = edited.astype(x.dtype)
    if site in self.taps:
      self.values[site] = x_BTD
    return x_BTD.reshape(x.shape)

  def intercept(self, call, args, kwargs, context):
    """The Flax interceptor: every method call of every submodule comes here."""
    module = context.module
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    root, *path = module.path or ('',)
    if not root.startswith('layer_'):
      return (
        _norm(module, args[0]) if _is_norm(module) else call(*args, **kwargs)
      )
    layer, path = int(root.removeprefix('layer_')), tuple(path)
    if not path:  # the block itself: (x, positions, cache, mask) -> (cache, x)
      x_BTD = self._visit(layer, 'resid_pre', args[0])
      cache, x_BTD = call(x_BTD, *args[1:], **kwargs)
      return cache, self._visit(layer, 'resid_post', x_BTD)
    if path == ('mlp',) and type(module).__name__ != 'FeedForward':
      # `share_scope` gives both einsums inside the MLP the MLP's own path.
      if module.weight_name == 'linear':
        args = (args[0], self._visit(layer, 'mlp_hidden', args[1]))
      return call(*args, **kwargs)
    before, after = _SITES_OF.get(path, (None, None))
    if _is_norm(module):
      x = self._visit(layer, before, args[0])
      ungained = 'mlp_in_ungained' if after == 'mlp_in' else None
      visit = functools.partial(self._visit, layer, ungained)
      return self._visit(layer, after, _norm(module, x, visit))
    if path[-1] in _SCORE_INPUTS:
      return call(*args, **kwargs).astype(jnp.float32)
    if path[-1] == 'attn_vec_einsum':  # (equation, heads [B, T, K, H])
      heads = args[1].astype(module.get_variable('params', 'w').dtype)
      args = (args[0], self._visit(layer, before, heads))
    return self._visit(layer, after, call(*args, **kwargs))


def _is_norm(module) -> bool:
  return type(module).__name__ == 'RMSNorm'


def _norm(module, x, visit_ungained=lambda x: x):
  """Gemma's RMSNorm in float32: x / rms(x) * (1 + scale)."""
  dtype = x.dtype
  x = x.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
  x = visit_ungained(x)
  gain = 1 + module.get_variable('params', 'scale').astype(jnp.float32)
  return (x * gain).astype(dtype)


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
