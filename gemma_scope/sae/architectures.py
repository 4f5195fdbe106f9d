"""The architectures: from pre-activations to latents.

Each is an `Autoencoder` that defines `activate`, the latents that can have a
gradient (`bound` or `may_act`) and the released parameters, which are those of
a JumpReLU for all but TopK. `meets_l0` is the penalty that trains it to a
target L0 (`training/objectives`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope.sae import activation_functions as functions
from gemma_scope.sae import autoencoder


class JumpReLU(autoencoder.Autoencoder):
  """Gemma Scope's SAE: one learned threshold per latent.

  Attributes:
    bandwidth: eps, the full width of the kernel's window around theta.
    initial_threshold: theta before training.
    log_threshold: train log(theta). It stays positive, but changing it by a
      factor of e takes at least 1 / learning_rate steps. False trains theta
      itself, clipped at 0 after each update.
    ste_to_input: also send the straight-through gradient to the encoder.
  """

  meets_l0 = 'target_l0'

  bandwidth: float = 0.001
  initial_threshold: float = 0.001
  log_threshold: bool = True
  ste_to_input: bool = False

  def setup(self):
    super().setup()
    value = self.initial_threshold
    value = jnp.log(value) if self.log_threshold else value
    self.raw = self.param(
      self._raw, autoencoder.constant(value), self.latent_shape
    )

  @property
  def _raw(self) -> str:
    """Name of the threshold's parameter, which is always float32."""
    return 'log_threshold' if self.log_threshold else 'threshold'

  def _theta(self, raw: jax.Array) -> jax.Array:
    if self.log_threshold:
      return jnp.exp(raw)
    # Straight-through: clipping the gradient too would leave theta at 0.
    return raw + jax.lax.stop_gradient(jnp.maximum(-raw, 0))

  def _raw_of(self, theta: jax.Array) -> jax.Array:
    return jnp.log(theta) if self.log_threshold else theta

  def threshold(self) -> jax.Array:
    """Thresholds theta, [F]."""
    return self._theta(self.raw)

  def activate(self, projected, k, candidates=None):
    z = projected + _at(candidates, self.b_enc)
    theta = _at(candidates, self.threshold())
    f = functions.jumprelu(z, theta, self.bandwidth, self.ste_to_input)
    active = functions.step(z, theta, self.bandwidth, self.ste_to_input)
    return autoencoder.Latents(z, f, active, f, theta, _ZERO)

  def bound(self):
    return self.b_enc, self.threshold() - self.bandwidth / 2

  def released(self, params, theta, k):
    shared = super().released(params, theta, k)
    return {**shared, 'threshold': self._theta(params[self._raw])}

  def trainable(self, released):
    theta = jnp.asarray(released['threshold'])
    # The threshold 0 of a ReLU has no logarithm, and a tiny one hardly moves.
    theta = jnp.where(theta > 0, theta, self.initial_threshold)
    return {**super().trainable(released), self._raw: self._raw_of(theta)}

  def constrained(self, params):
    params = super().constrained(params)
    if self.log_threshold:
      return params
    return {**params, self._raw: jnp.maximum(params[self._raw], 0)}

  def with_threshold(self, params, theta):
    # 0: too few rows are positive to tell; use the initial threshold.
    theta = jnp.where(theta > 0, theta, self.initial_threshold)
    return {**params, self._raw: self._raw_of(theta)}

  def threshold_at(self, params, x, k):
    bound = self.bind({'params': params})
    z = bound.project(x) + params['b_enc']
    ratio = z / jnp.maximum(bound.threshold(), _TINY)
    return jnp.log(jnp.maximum(functions.kth_of_batch(ratio, k), _TINY))

  def with_threshold_at(self, params, theta, value):
    """Multiplies all thresholds by exp(value)."""
    theta_new = self._theta(params[self._raw]) * jnp.exp(value)
    return {**params, self._raw: self._raw_of(theta_new)}, theta


class ReLU(autoencoder.Autoencoder):
  """f = max(z, 0), made sparse by an L1 penalty (Bricken et al., 2023)."""

  meets_l0 = 'adaptive_l1'

  def activate(self, projected, k, candidates=None):
    z = projected + _at(candidates, self.b_enc)
    f = jax.nn.relu(z)
    return autoencoder.Latents(z, f, _fires(f), f, _ZERO, _ZERO)

  def bound(self):
    return self.b_enc, _ZERO

  def with_threshold(self, params, theta):
    return {**params, 'b_enc': -theta}


class TopK(autoencoder.Autoencoder):
  """The k largest latents of a row (arXiv 2406.04093)."""

  meets_l0 = 'k'

  def activate(self, projected, k, candidates=None):
    z = projected + _at(candidates, self.b_enc)
    ranked = z if candidates is None else candidates.together(z)
    f = jnp.where(z >= functions.kth_of_row(ranked, k), jax.nn.relu(z), 0)
    return autoencoder.Latents(z, f, _fires(f), f, _ZERO, _ZERO)

  def may_act(self, projected, k, blocks):
    z = projected + self.b_enc
    return (z > 0) & (z >= functions.kth_of_row(z, k, blocks))

  def released(self, params, theta, k):
    return {**super().released(params, theta, k), 'k': jnp.float32(k)}


class BatchTopK(autoencoder.Autoencoder):
  """The k B largest latents of a batch (arXiv 2412.06410).

  It is released as a JumpReLU whose threshold is the running mean of the
  smallest value kept, because at inference a row must not depend on its batch.
  """

  meets_l0 = 'k'

  def activate(self, projected, k, candidates=None):
    z = projected + _at(candidates, self.b_enc)
    least = functions.kth_of_batch(z, k)
    f = jnp.where(z >= least, jax.nn.relu(z), 0)
    return autoencoder.Latents(z, f, _fires(f), f, least, least)

  def may_act(self, projected, k, blocks):
    z = projected + self.b_enc
    return (z > 0) & (z >= functions.kth_of_batch(z, k, blocks))

  def released(self, params, theta, k):
    shared = super().released(params, theta, k)
    return {**shared, 'threshold': jnp.full(self.latent_shape, theta)}

  def threshold_at(self, params, x, k):
    z = self.bind({'params': params}).project(x) + params['b_enc']
    return functions.kth_of_batch(z, k)

  def with_threshold_at(self, params, theta, value):
    return params, value


class Gated(autoencoder.Autoencoder):
  """The gate decides which latents are active (arXiv 2404.16014).

    gate = x' W_enc + b_gate        z = exp(r_mag) x' W_enc + b_enc
    f = relu(z) 1[gate > 0]         x' = x - b_dec in an SAE

  Gate and magnitude share W_enc, so z = exp(r_mag) (gate - b_gate) + b_enc.
  This is a JumpReLU with weights exp(r_mag) W_enc and threshold
  b_enc - exp(r_mag) b_gate, which is what is released.
  """

  meets_l0 = 'adaptive_l1'

  def setup(self):
    super().setup()
    zeros = nn.initializers.zeros
    self.b_gate = self.param('b_gate', zeros, self.latent_shape)
    self.r_mag = self.param('r_mag', zeros, self.latent_shape)

  def activate(self, projected, k, candidates=None):
    gate = projected + _at(candidates, self.b_gate)
    gain = jnp.exp(_at(candidates, self.r_mag))
    z = gain * projected + _at(candidates, self.b_enc)
    f = jnp.where(gate > 0, jax.nn.relu(z), 0)
    return autoencoder.Latents(z, f, _fires(f), jax.nn.relu(gate), _ZERO, _ZERO)

  def bound(self):
    return self.b_gate, _ZERO

  def released(self, params, theta, k):
    shared = super().released(params, theta, k)
    gain = jnp.exp(params['r_mag'])
    threshold = params['b_enc'] - gain * params['b_gate']
    return {
      **shared,
      'W_enc': shared['W_enc'] * gain[..., None, :],
      'threshold': jnp.maximum(threshold, 0),  # f = relu(z) anyway
    }

  def with_threshold(self, params, theta):
    return {**params, 'b_gate': -theta}

  def _moved(self, params, by):
    gain = jnp.exp(params['r_mag'])
    return {
      **params,
      'b_enc': params['b_enc'] + gain * by,
      'b_gate': params['b_gate'] + by,
    }

  def threshold_at(self, params, x, k):
    projected = self.bind({'params': params}).project(x)
    z = jnp.exp(params['r_mag']) * projected + params['b_enc']
    # exp: `kth_of_batch` ranks values >= 0, and the gate may be below.
    gate = jnp.where(z > 0, jnp.exp(projected + params['b_gate']), 0)
    return jnp.log(jnp.maximum(functions.kth_of_batch(gate, k), _TINY))

  def with_threshold_at(self, params, theta, value):
    return {**params, 'b_gate': params['b_gate'] - value}, theta

  def trainable(self, released):
    b_gate = jnp.asarray(released['b_enc'] - released['threshold'])
    shared = super().trainable(released)
    return {**shared, 'b_gate': b_gate, 'r_mag': jnp.zeros_like(b_gate)}


_ZERO = np.float32(0)
_TINY = 1e-6


def _at(candidates, values):
  """Per-latent values [F], looked up at the candidates where there are any."""
  return values if candidates is None else candidates.at(values)


def _fires(f):
  """1 where a latent is active; no gradient."""
  return (f > 0).astype(f.dtype)


ARCHITECTURES = {
  'jumprelu': JumpReLU,
  'topk': TopK,
  'batch_topk': BatchTopK,
  'gated': Gated,
  'relu': ReLU,
}
