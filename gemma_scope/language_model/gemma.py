"""Gemma as a pure function: forward(params, tokens, taps, edits).

The modules are those of the `gemma` package; this project drives their blocks
one by one, reads (taps) and replaces (edits) activations at any `Site`, and
stops after the last layer that somebody asked for:

  x = embed(tokens);  for block in blocks[:n]: x = block(x);  unembed(norm(x))

Taps and edits are arguments, never ambient state. `Transformer.__call__` is an
`nn.jit` whose cache does not know about interceptors: hooks put around it
return the values of an earlier trace. We therefore run beneath it.

Norms and attention scores are computed in float32 whatever the parameters'
dtype (the package computes them in the parameters' dtype, which in bfloat16
nearly doubles the error of the logits).

`extend` is the same walk for the next tokens of rows whose keys and values
are kept in a cache.

What differs by generation (shapes, blocks, attention, caches) is in `gemma3`,
for Gemma 2 and 3, and in `gemma4`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from gemma_scope import sites
from gemma_scope.language_model import arguments, gemma3, gemma4, hooks

Params = dict[str, Any]
Edit = hooks.Edit
Cache = tuple[dict[str, jax.Array] | None, ...]  # one of each layer
Config = gemma3.Config
AnyConfig = gemma3.Config | gemma4.Config

SIZES: dict[str, AnyConfig] = {**gemma3.SIZES, **gemma4.SIZES}
_GENERATIONS = {gemma3.Config: gemma3, gemma4.Config: gemma4}


def config_class(fields: Mapping[str, Any]) -> type[AnyConfig]:
  """The generation's `Config` that was written to JSON with these fields."""
  is_4 = fields.get('family') == gemma4.Config.family
  return gemma4.Config if is_4 else gemma3.Config


class Output(NamedTuple):
  logits_BTV: jax.Array | None
  taps: dict[sites.Site | str, jax.Array]  # each [B, T, D of the site]


class Gemma:
  """A Gemma text model without its parameters, which are always passed in.

  Two of one shape and sharding are equal: what is compiled for one, where the
  model is a static argument, serves the other, and is kept once.

  Args:
    config: the model's shape.
    activation_sharding: where the residual stream [B, T, D] lives; pin it when
      parameters are sharded over the batch's axis (FSDP), or XLA moves the
      batch away.
  """

  def __init__(
    self,
    config: AnyConfig,
    activation_sharding: jax.sharding.NamedSharding | None = None,
  ):
    self.config, self._place = config, activation_sharding
    self._pin = (
      (lambda x: x)
      if activation_sharding is None
      else lambda x: jax.lax.with_sharding_constraint(x, activation_sharding)
    )
    self._generation = _GENERATIONS[type(config)]
    self._model = self._generation.transformer(config)
    self._key = config, activation_sharding

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Gemma) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)

  @property
  def param_shapes(self) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s (float32)."""
    return traverse_util.unflatten_dict(_flat_shapes(self.config), sep='/')

  def _initialised(self, key: jax.Array, tokens: jax.Array) -> Params:
    """The parameters of the package's own initialisation, all of them."""
    caches = (None,) * self.config.num_layers
    return self._model.init(
      key, caches, tokens, None, None, True, method=self._walk
    )['params']

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters: normal, variance 1 / fan-in, unit gains."""
    params = {}
    shapes = sorted(_flat_shapes(self.config).items())
    for i, (name, shape) in enumerate(shapes):
      fan_in = self._generation.initial(self.config, name)
      if isinstance(fan_in, float):
        params[name] = jnp.full(shape.shape, fan_in)
        continue
      params[name] = _drawn(key, i, fan_in**-0.5, shape.shape)
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
    config, causal, tapped = self.config, mask_BTT is None, arguments.taps(taps)
    edits = arguments.edits(edits)
    visits = self._hooks(tapped.values(), edits, frozen, causal)
    depth = config.num_layers
    if not logits:
      depth = 1 + max((site.layer for site in visits.taps), default=-1)
    tokens_BT = arguments.tokens(tokens_BT, config.vocab_size)
    arguments.params(params, self.param_shapes, depth, logits)
    arguments.shape('positions_BT', positions_BT, tokens_BT.shape)
    mask_shape = (*tokens_BT.shape, tokens_BT.shape[1])
    arguments.shape('mask_BTT', mask_BTT, mask_shape)
    with nn.intercept_methods(visits.intercept):
      logits_BTV = self._model.apply(
        {'params': params},
        (None,) * depth,
        tokens_BT,
        positions_BT,
        mask_BTT,
        logits,
        method=self._walk,
      )
    values = {tap: visits.values[site] for tap, site in tapped.items()}
    return Output(logits_BTV, values)

  def empty_cache(self, batch: int, length: int) -> Cache:
    """Room for the keys and values of `length` tokens in each of B rows.

    float32, as scores are: 8 bytes a token, layer, key head and head width.
    """
    return self._generation.empty_cache(self.config, batch, length)

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
    visits = self._hooks((), arguments.edits(edits))
    with nn.intercept_methods(visits.intercept):
      return self._model.apply(
        {'params': params},
        cache,
        tokens_BT,
        positions_BT,
        mask_BTC,
        method=self._extend,
      )

  def unembed(
    self, params: Params, x_BTD: jax.Array, tokens_K: Any = None
  ) -> jax.Array:
    """Final norm, tied unembedding (of K tokens), soft-cap: float32 logits."""
    arguments.shape('x_BTD', x_BTD, (*x_BTD.shape[:-1], self.config.d_model))
    visits = self._hooks((), {})
    with nn.intercept_methods(visits.intercept):
      return self._model.apply(
        {'params': params}, x_BTD, tokens_K, method=_unembed
      )

  def _hooks(self, *arguments) -> hooks.Hooks:
    return self._generation.Hooks(self.config, *arguments, place=self._place)

  def _walk(self, model, caches, tokens_BT, positions_BT, mask, logits):
    x_BTD, _ = self._generation.blocks(
      self.config, model, caches, tokens_BT, positions_BT, mask, self._pin
    )
    return _unembed(model, x_BTD) if logits else None

  def _extend(self, model, caches, tokens_BT, positions_BT, mask):
    x_BTD, caches = self._generation.blocks(
      self.config, model, caches, tokens_BT, positions_BT, mask, self._pin
    )
    return _unembed(model, x_BTD[:, -1:])[:, 0], caches


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


@functools.partial(jax.jit, static_argnums=3)
def _drawn(key, i, scale, shape):
  """Normal numbers: one program for all parameters of a shape."""
  return scale * jax.random.normal(jax.random.fold_in(key, i), shape)


def gain(params: Params, norm: Mapping[str, jax.Array]) -> jax.Array:
  """What a norm multiplies by, float32; `norm` is its entry in `params`.

  It is 1 + scale in Gemma 2 and 3, and the scale itself in Gemma 4, whose
  layers have a skip_scale.
  """
  scale = jnp.asarray(norm['scale'], jnp.float32)
  return scale if 'skip_scale' in params['layer_0'] else 1 + scale


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


@functools.cache  # to trace a deep model takes seconds
def _flat_shapes(config: AnyConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the parameters that the generation's code reads, by path."""
  model = Gemma(config)
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  tree = jax.eval_shape(model._initialised, jax.random.key(0), tokens)
  return {
    name: shape
    for name, shape in traverse_util.flatten_dict(tree, sep='/').items()
    if model._generation.is_read(config, name)
  }
