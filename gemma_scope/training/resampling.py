"""Resampling: dead latents are reinitialised from badly reconstructed rows.

Bricken et al. (2023), "Towards Monosemanticity", appendix on training: every N
steps, each dead latent gets

  row      drawn from the batch, with probability ~ (squared error)^2
  W_dec    the row's target (y - b_dec), norm 1
  W_enc    the row's input (x - b_dec in an SAE), with norm 0.2 times the mean
           encoder norm of living latents
  theta    the quantile of the batch at which the latent is active as often as
           the average living latent; with the initial threshold, hundreds of
           new latents would be active on half of all rows
  others   as at initialisation; Adam's second moments are the means over
           living latents, since zeros, with the bias correction long over,
           would make the first steps 1 / sqrt(1 - b2) times too large; first
           moments (where b1 is not 0) are 0

Rows are drawn from the step's own batch, so that it stays a pure function of
(state, batch, step).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope import sae
from gemma_scope.sae import activation_functions as functions
from gemma_scope.training import objectives


def resample(
  module: sae.Autoencoder,
  params: dict[str, jax.Array],
  moments: Any,
  batch: objectives.Batch,
  key: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
  """Parameters and moments of one SAE, its dead latents reinitialised.

  Args:
    module: the architecture.
    params: its parameters.
    moments: the optimiser's, any tree whose leaves are named as `params`.
    batch: the step's rows, the value that TopK keeps, and which are dead.
    key: of the draw.
  """
  x_BD, y_BD, dead_F = batch.x_BD, batch.y_BD, batch.dead_F
  bound = module.bind({'params': params})
  f_BF = bound.latents(x_BD, batch.value).f_BF
  error_BD = y_BD - bound.write(f_BF) - bound.offset(x_BD)
  error_B = jnp.sum(jnp.square(error_BD), tuple(range(1, error_BD.ndim)))
  rows_F = jax.random.categorical(key, 2 * jnp.log(error_B), shape=dead_F.shape)
  read, written = _drawn(module, params['b_dec'], x_BD, y_BD, rows_F)
  alive_F = ~dead_F
  norm_F = jnp.linalg.norm(params['W_enc'], axis=-1)
  norm = jnp.sum(norm_F * alive_F) / jnp.maximum(jnp.sum(alive_F), 1)
  read /= jnp.maximum(jnp.linalg.norm(read, axis=-1, keepdims=True), 1e-12)
  lead = (module.layers,) if module.layers else ()
  shape = (1, *lead, module.d_in)
  start = module.init(jax.random.key(0), jnp.zeros(shape))['params']
  anew = {
    **start,
    'b_dec': params['b_dec'],
    'W_enc': 0.2 * norm * read,
    'W_dec': sae.unit_rows(written),
  }
  fired = jnp.sum((f_BF > 0) * alive_F) / jnp.maximum(jnp.sum(alive_F), 1)
  theta_F = _exceeded_by(module, anew, x_BD, jnp.maximum(fired, 1))
  anew = module.with_threshold(anew, theta_F)

  def of_latents(name, ndim):
    """`dead_F` broadcast to the parameter; None if it has no latent axis."""
    if name == 'W_enc':
      return dead_F[..., None]
    if name == 'W_dec':
      return dead_F[:, None, :, None] if ndim == 4 else dead_F[:, None]
    return None if name in ('b_dec', 'W_skip') else dead_F

  resampled = {}
  for name, value in params.items():
    dead = of_latents(name, value.ndim)
    resampled[name] = (
      value if dead is None else jnp.where(dead, anew[name], value)
    )

  def moment(path, leaf):
    name = getattr(path[-1], 'key', None)
    dead = of_latents(name, leaf.ndim) if name in params else None
    if dead is None:
      return leaf
    if any(getattr(key, 'name', '') == 'mu' for key in path):
      return jnp.where(dead, 0, leaf)  # a new latent has no direction yet
    alive = jnp.broadcast_to(~dead, leaf.shape)
    mean = jnp.sum(leaf * alive) / jnp.maximum(jnp.sum(alive), 1)
    return jnp.where(dead, mean, leaf)

  return resampled, jax.tree_util.tree_map_with_path(moment, moments)


def _drawn(module, b_dec, x_BD, y_BD, rows_F):
  """Input and output directions of each latent, from its row.

  Returns:
    [F, D] and [F, D_out]; with several layers [L, F, D] and [L, L, F, D_out].
  """
  x_BD = x_BD - b_dec if module.pre_encoder_bias else x_BD
  y_BD = y_BD - b_dec
  if not module.layers:
    return x_BD[rows_F], y_BD[rows_F]
  layers = range(module.layers)
  read = jnp.stack([x_BD[rows_F[layer], layer] for layer in layers])
  # Row l, f of [L, F, M, D] -> [L, M, F, D], nothing to earlier layers.
  written = jnp.swapaxes(y_BD[rows_F], 1, 2)
  return read, written * jnp.triu(jnp.ones((len(layers),) * 2))[..., None, None]


def _exceeded_by(module, params, x_BD, rows: jax.Array) -> jax.Array:
  """Thresholds [F] that x W_enc^T exceeds on the given number of rows.

  0 where fewer rows are positive.
  """
  projected_BF = module.apply({'params': params}, x_BD, method='project')
  next_F = jnp.minimum(jnp.round(rows) + 1, len(x_BD))
  theta_F = functions.kth_largest(jax.nn.relu(projected_BF), next_F, 0)
  return theta_F[0]
