"""One sparse autoencoder: its activation functions and Flax modules.

  z = (x - b_dec) W_enc + b_enc          pre-activations, x with E|x|^2 = 1
  f = activation(z)                      latents, sparse
  x_hat = f W_dec + b_dec                reconstruction, |W_dec[i]| = 1

JumpReLU (arXiv 2407.14435; Gemma Scope, arXiv 2408.05147 equation 3):
  f = z H(z - theta), theta > 0, H(0) = 0.
Its gradient in theta is an expectation that a kernel density estimate of z at
theta replaces: with K(u) = 1 for |u| < 1/2, bandwidth eps,
  d step(z) / d theta     = -(1/eps)     K((z - theta) / eps)
  d jumprelu(z) / d theta = -(theta/eps) K((z - theta) / eps)
Both read z itself, not the value after the jump (that would halve the window).
`step` has no gradient in z, `jumprelu` the true one, H(z - theta).

The maths here is for one SAE and one axis of rows; `stack` maps it over many.
Parameter names are those of Gemma Scope's files.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp


def _window(z, theta, bandwidth):
  return (jnp.abs(z - theta) < bandwidth / 2).astype(z.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _step(z, theta, bandwidth):
  return (z > theta).astype(z.dtype)


def _step_forward(z, theta, bandwidth):
  return _step(z, theta, bandwidth), (z, theta)


def _step_backward(bandwidth, saved, g):
  z, theta = saved
  return jnp.zeros_like(z), -g * _window(z, theta, bandwidth) / bandwidth


_step.defvjp(_step_forward, _step_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _jumprelu(z, theta, bandwidth):
  return jnp.where(z > theta, z, 0)


def _jumprelu_forward(z, theta, bandwidth):
  return _jumprelu(z, theta, bandwidth), (z, theta)


def _jumprelu_backward(bandwidth, saved, g):
  z, theta = saved
  in_window = _window(z, theta, bandwidth)
  return jnp.where(z > theta, g, 0), -g * in_window * theta / bandwidth


_jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)

# The custom gradients are elementwise on broadcast arrays, so that they survive
# vmap and sharding; the sum over rows is the transpose of the broadcast.


def step(z_BF: jax.Array, theta_F: jax.Array, bandwidth: float) -> jax.Array:
  """H(z - theta) with the straight-through gradient in theta; [B, F]."""
  return _step(z_BF, jnp.broadcast_to(theta_F, z_BF.shape), bandwidth)


def jumprelu(
  z_BF: jax.Array, theta_F: jax.Array, bandwidth: float
) -> jax.Array:
  """z H(z - theta) with the straight-through gradient in theta; [B, F]."""
  return _jumprelu(z_BF, jnp.broadcast_to(theta_F, z_BF.shape), bandwidth)


def unit_rows(w_FD: jax.Array) -> jax.Array:
  """Rows scaled to Euclidean norm 1 (a zero row stays zero)."""
  norm_F1 = jnp.linalg.norm(w_FD, axis=-1, keepdims=True)
  return w_FD / jnp.maximum(norm_F1, 1e-12)


def remove_parallel(g_FD: jax.Array, w_FD: jax.Array) -> jax.Array:
  """The part of each row of g orthogonal to the unit row of w.

  Applied to the decoder's gradient before Adam, so that the moments never see
  the direction that renormalising takes back (arXiv 2408.05147 section 3.2).
  """
  return g_FD - jnp.sum(g_FD * w_FD, -1, keepdims=True) * w_FD


def _he_uniform_unit_rows(key, shape, dtype=jnp.float32):
  return unit_rows(nn.initializers.he_uniform(in_axis=-2)(key, shape, dtype))


def _constant(value):
  """An initialiser in the form that Flax calls it."""
  return lambda key, shape, dtype=jnp.float32: jnp.full(shape, value, dtype)


class Autoencoder(nn.Module):
  """What all architectures share: an affine encoder and an affine decoder.

  A subclass says how pre-activations become latents (`activate`), what counts
  as active (`active`, with whatever gradient sparsity is trained by), and at
  which value a latent jumps at inference (`threshold`).

  Attributes:
    d_in: width D of the input and of the reconstruction.
    width: number of latents F.
    pre_encoder_bias: whether the encoder sees x - b_dec (SAEs do, transcoders
      do not; arXiv 2408.05147 section 3.2 and appendix B).
    matmul_dtype: dtype of the matmuls' inputs; they accumulate in float32.
  """

  d_in: int
  width: int
  pre_encoder_bias: bool = True
  matmul_dtype: str = 'float32'

  def setup(self):
    # W_enc starts as the transpose of the unit-norm W_dec, and is untied.
    self.W_dec = self.param(
      'W_dec', _he_uniform_unit_rows, (self.width, self.d_in)
    )
    self.W_enc = self.param(
      'W_enc', _constant(self.W_dec.T), (self.d_in, self.width)
    )
    self.b_enc = self.param('b_enc', nn.initializers.zeros, (self.width,))
    self.b_dec = self.param('b_dec', nn.initializers.zeros, (self.d_in,))

  def _matmul(self, a, b):
    dtype = jnp.dtype(self.matmul_dtype)
    return jnp.matmul(
      a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
    )

  def pre_activations(self, x_BD: jax.Array) -> jax.Array:
    """z [B, F] of x [B, D], float32."""
    with jax.named_scope('encoder'):
      if self.pre_encoder_bias:
        x_BD = x_BD - self.b_dec
      return self._matmul(x_BD, self.W_enc) + self.b_enc

  def decode(self, f_BF: jax.Array) -> jax.Array:
    """Reconstruction [B, D] of latents [B, F], float32."""
    with jax.named_scope('decoder'):
      return self._matmul(f_BF, self.W_dec) + self.b_dec

  def encode(self, x_BD: jax.Array) -> jax.Array:
    """Latents f [B, F] of x [B, D]."""
    return self.activate(self.pre_activations(x_BD))

  def __call__(self, x_BD: jax.Array) -> jax.Array:
    """Reconstruction [B, D] of x [B, D]."""
    return self.decode(self.encode(x_BD))


class JumpReLU(Autoencoder):
  """Gemma Scope's SAE: one learned threshold a latent, trained by `step`.

  Attributes:
    bandwidth: eps, the full width of the kernel's window around theta.
    initial_threshold: theta before training.
    log_threshold: train log(theta), which keeps theta positive but moves it by
      a factor of e in 1 / learning rate steps at the least; False trains theta
      itself, and a theta below 0 acts as 0 (`threshold` clips it).
  """

  bandwidth: float = 0.001
  initial_threshold: float = 0.001
  log_threshold: bool = True

  def setup(self):
    super().setup()
    # One parameter name, whichever way it is trained: the trained value is
    # log(theta) or theta, always float32.
    value = self.initial_threshold
    self.raw_threshold = self.param(
      'log_threshold' if self.log_threshold else 'threshold',
      _constant(jnp.log(value) if self.log_threshold else value),
      (self.width,),
    )

  def threshold(self) -> jax.Array:
    """theta [F]."""
    if self.log_threshold:
      return jnp.exp(self.raw_threshold)
    return jnp.maximum(self.raw_threshold, 0)

  def activate(self, z_BF):
    return jumprelu(z_BF, self.threshold(), self.bandwidth)

  def active(self, z_BF):
    """1 where a latent fires, with its gradient in theta; [B, F]."""
    return step(z_BF, self.threshold(), self.bandwidth)


class ReLU(Autoencoder):
  """The baseline: f = max(z, 0), made sparse by an L1 penalty on f."""

  def threshold(self) -> jax.Array:
    return jnp.zeros((self.width,))

  def activate(self, z_BF):
    return jax.nn.relu(z_BF)

  def active(self, z_BF):
    """1 where a latent fires; no gradient; [B, F]."""
    return (z_BF > 0).astype(z_BF.dtype)


ARCHITECTURES = {'jumprelu': JumpReLU, 'relu': ReLU}

# A trained SAE, ours or a published one, is a mapping of arrays in Gemma
# Scope's names that acts on raw activations; these two lines are all of it.


def encode(params: Mapping[str, jax.Array], x_BD: jax.Array) -> jax.Array:
  """Latents [..., F] of raw activations [..., D] (released parameters)."""
  z_BF = x_BD @ params['W_enc'] + params['b_enc']
  return jnp.where(z_BF > params['threshold'], jax.nn.relu(z_BF), 0)


def decode(params: Mapping[str, jax.Array], f_BF: jax.Array) -> jax.Array:
  """Raw reconstruction [..., D] of latents [..., F] (released parameters)."""
  return f_BF @ params['W_dec'] + params['b_dec']
