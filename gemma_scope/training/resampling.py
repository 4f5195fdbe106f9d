"""Dead latents begun anew from the inputs that an SAE explains worst.

Bricken et al. (2023), "Towards Monosemanticity", appendix on training: every N
steps each dead latent gets

  row      drawn from the batch with probability ~ its squared error, squared
  W_dec    the row's target (y - b_dec), norm 1
  W_enc    the row's input (x - b_dec in an SAE), with 0.2 of the mean encoder
           norm of the living
  others   as at the start of training; Adam's moments those of the mean living
           latent: were they 0, with the bias correction long over, the first
           steps would be 1 / sqrt(1 - b2) times too long

Rows are drawn from the step's own batch, so that it stays a pure function of
(state, batch, step).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope import sae


def resample(
  module: sae.Autoencoder,
  params: dict[str, jax.Array],
  moments: Any,
  x_BD: jax.Array,
  y_BD: jax.Array,
  dead_F: jax.Array,
  k: jax.Array,
  key: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
  """Parameters and moments of one SAE with its dead latents begun anew.

  Args:
    module: the architecture.
    params: its parameters.
    moments: the optimiser's, any tree whose leaves are named as `params`.
    x_BD, y_BD: the step's rows and targets, [B, D] or [B, L, D].
    dead_F: bool, [F] or [L, F].
    k: what TopK keeps.
    key: of the draw.
  """
  bound = module.bind({'params': params})
  error_BD = y_BD - bound(x_BD, k)
  error_B = jnp.sum(jnp.square(error_BD), tuple(range(1, error_BD.ndim)))
  rows_F = jax.random.categorical(key, 2 * jnp.log(error_B), shape=dead_F.shape)
  x_BD = x_BD - params['b_dec'] if module.pre_encoder_bias else x_BD
  y_BD = y_BD - params['b_dec']
  if module.layers:
    layers = range(module.layers)
    read = jnp.stack([x_BD[rows_F[layer], layer] for layer in layers])
    # Row l, f of [L, F, M, D] -> [L, M, F, D], nothing to earlier layers.
    written = jnp.swapaxes(y_BD[rows_F], 1, 2)
    written *= jnp.triu(jnp.ones((len(layers),) * 2))[:, :, None, None]
  else:
    read, written = x_BD[rows_F], y_BD[rows_F]
  alive_F = ~dead_F
  norm_F = jnp.linalg.norm(params['W_enc'], axis=-1)
  norm = jnp.sum(norm_F * alive_F) / jnp.maximum(jnp.sum(alive_F), 1)
  read /= jnp.maximum(jnp.linalg.norm(read, axis=-1, keepdims=True), 1e-12)
  lead = (module.layers,) if module.layers else ()
  shape = (1, *lead, module.d_in)
  start = module.init(jax.random.key(0), jnp.zeros(shape))['params']
  anew = {
    **start,
    'W_enc': 0.2 * norm * read,
    'W_dec': sae.unit_rows(written),
  }

  def of_latents(name, ndim):
    """`dead_F` shaped like the parameter; None where it has no latents."""
    if name == 'W_enc':
      return dead_F[..., None]
    if name == 'W_dec':
      return dead_F[:, None, :, None] if ndim == 4 else dead_F[:, None]
    return None if name in ('b_dec', 'W_skip') else dead_F

  new = {}
  for name, old in params.items():
    dead = of_latents(name, old.ndim)
    new[name] = old if dead is None else jnp.where(dead, anew[name], old)

  def moment(path, leaf):
    name = getattr(path[-1], 'key', None)
    dead = of_latents(name, leaf.ndim) if name in params else None
    if dead is None:
      return leaf
    alive = jnp.broadcast_to(~dead, leaf.shape)
    mean = jnp.sum(leaf * alive) / jnp.maximum(jnp.sum(alive), 1)
    return jnp.where(dead, mean, leaf)

  return new, jax.tree_util.tree_map_with_path(moment, moments)
