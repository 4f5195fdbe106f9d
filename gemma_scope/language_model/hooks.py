"""Taps and edits of one forward pass, as a Flax interceptor.

  x -> pre_attention_norm -> attn -> ... -> post_ffw_norm -> x
       every submodule's call of every block passes through `Hooks.intercept`,
       which edits and then records the values at the sites asked for

A `Hooks` belongs to one trace and records values of that trace. Norms and the
inputs of attention scores are computed in float32 here.

If frozen, the denominators of norms and the attention weights have no gradient.
The model is then linear, except for its MLPs.

A generation of Gemma has a subclass, which knows its norms and its attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp

from gemma_scope import sites

Edit = Callable[[jax.Array], jax.Array]


class Hooks:
  """Taps and edits of one trace; made for one forward pass and then dropped.

  Args:
    config: of the model.
    taps, edits: sites to record, and functions that replace a value.
    frozen: no gradient through norms' denominators and attention's weights.
    causal: no token attends to a later one, so that those scores are left out.
    place: where the residual stream [B, T, D] lives, if that is known.

  Raises:
    ValueError: a site that this model does not have, or may only be read.
  """

  # Submodule of a block -> the sites of its input and of its output.
  sites_of: Mapping[tuple[str, ...], tuple[str | None, str | None]] = {
    ('pre_attention_norm',): (None, 'attn_in'),
    ('attn', 'attn_vec_einsum'): ('attn_out', 'attn_raw'),
    ('post_attention_norm',): (None, 'attn_add'),
    ('pre_ffw_norm',): ('resid_mid', 'mlp_in'),
    ('mlp',): (None, 'mlp_raw'),
    ('post_ffw_norm',): (None, 'mlp_out'),
  }

  def __init__(
    self,
    config: sites.Dimensions,
    taps: Collection[sites.Site],
    edits: Mapping[sites.Site, Edit],
    frozen: bool = False,
    causal: bool = False,
    place: jax.sharding.NamedSharding | None = None,
  ):
    self.config, self.frozen, self.causal = config, frozen, causal
    self.place = place
    self.taps = frozenset(taps)
    self.edits = dict(edits)
    self.values: dict[sites.Site, jax.Array] = {}
    for site in self.taps | set(self.edits):
      if site.second:
        raise ValueError(
          f'{site} is in the second of two models, and there is one here.'
        )
      site.check(config)
    for site in self.edits:
      if site.kind in sites.READ_ONLY:
        raise ValueError(f'{site} can be read but not edited.')

  def visit(self, layer: int, kind: str | None, x):
    """Edits x [B, T, ...], then records it; other values pass through."""
    site = sites.Site(layer, kind) if kind else None
    if site not in self.taps and site not in self.edits:
      return x
    x_BTD = x.reshape(*x.shape[:2], -1)
    if site in self.edits:
      edited = self.edits[site](x_BTD)
      if edited is None or jnp.shape(edited) != x_BTD.shape:
        raise ValueError(
          f'The edit at {site} must return the shape {list(x_BTD.shape)} that '
          f'it was given; it returned {_described(edited)}.'
        )
      edited = jnp.asarray(edited)
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
      if _is_norm(module):
        return self.norm(module, args[0])
      return call(*args, **kwargs)
    layer, path = int(root.removeprefix('layer_')), tuple(path)
    if not path:  # the block itself: (x, positions, cache, ...) -> (cache, x)
      x_BTD = self.visit(layer, 'resid_pre', args[0])
      cache, x_BTD = call(x_BTD, *args[1:], **kwargs)
      return cache, self.visit(layer, 'resid_post', x_BTD)
    if len(path) == 1 and hasattr(module, 'weight_name'):
      # `share_scope` gives both einsums inside an MLP the MLP's own path.
      if module.weight_name == 'linear':
        args = (args[0], self.visit(layer, 'mlp_hidden', args[1]))
      if module.weight_name in ('linear', 'gating_einsum'):
        return call(*args, **kwargs)
    return self.inside(layer, path, module, call, args, kwargs)

  def inside(
    self, layer: int, path: tuple[str, ...], module, call, args, kwargs
  ):
    """A call of a submodule at `path` in the block of `layer`."""
    input_kind, output_kind = self.sites_of.get(path, (None, None))
    if _is_norm(module):
      x = self.visit(layer, input_kind, args[0])
      ungained = 'mlp_in_ungained' if output_kind == 'mlp_in' else None
      visit = functools.partial(self.visit, layer, ungained)
      return self.visit(layer, output_kind, self.norm(module, x, visit))
    if path[-1] == 'attn_vec_einsum':  # (equation, heads [B, T, K, H])
      heads = args[1].astype(module.get_variable('params', 'w').dtype)
      args = (args[0], self.visit(layer, input_kind, heads))
    return self.visit(layer, output_kind, call(*args, **kwargs))

  def norm(self, module, x, visit_ungained=lambda x: x):
    """RMSNorm in float32: x / rms(x) times the generation's gain."""
    dtype = x.dtype
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    x = x * (jax.lax.stop_gradient(scale) if self.frozen else scale)
    x = visit_ungained(x)
    return (x * self.gain(module)).astype(dtype)

  def gain(self, module):
    """What a norm's output is multiplied by, float32."""
    raise NotImplementedError


def _described(value) -> str:
  return 'None' if value is None else str(list(jnp.shape(value)))


def _is_norm(module) -> bool:
  return type(module).__name__ == 'RMSNorm'
