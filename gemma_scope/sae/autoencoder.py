"""One sparse autoencoder in training: a Flax module.

  z = (x - b_dec) W_enc + b_enc          pre-activations, x with E|x|^2 = 1
  f = activation(z)                      latents, sparse
  y_hat = f W_dec + b_dec (+ x W_skip)   reconstruction, |W_dec[i]| = 1

An SAE reconstructs its own input, y = x. A transcoder reads the input of an MLP
and reconstructs its output, without b_dec in the encoder, with a skip if asked.

Several layers, L of them (Gemma Scope 2): x is [B, L, D], each layer has its
own encoder and F latents, and a latent of layer l writes to the layers m >= l:

  f[l] = activation(z[l])       y_hat[m] = sum_{l <= m} f[l] W_dec[l, m]

a weakly causal crosscoder where y = x, a cross-layer transcoder (CLT) where y
is the MLPs' outputs. A latent's decoder is its rows to all layers together.

The maths is for one SAE, rows first; latents are all axes after the rows.
`stack` maps it over many. Parameter names are those of Gemma Scope's files, but
W_enc is trained as [F, D], a row a latent like W_dec's, and released as [D, F].

Latents of a batch are dense, or only `sparse.Candidates`. In that case [B, F]
below is [B, K], and per-latent values are looked up for each candidate.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_scope.sae import decoders, sparse


class Latents(NamedTuple):
  """Encoder output for a batch; arrays are [B, F] or [B, L, F]."""

  z_BF: jax.Array  # pre-activations
  f_BF: jax.Array  # latents
  active_BF: jax.Array  # 1 where active, with the straight-through gradient
  gate_BF: jax.Array  # input of the L1 penalty: f, or the gate of a Gated SAE
  theta: jax.Array  # thresholds that z was compared with
  least: jax.Array  # smallest value that BatchTopK kept, a scalar; else 0


def _he_uniform(key, shape, dtype=jnp.float32):
  """Random unit decoders; a latent writes to no earlier layer."""
  W_dec = nn.initializers.he_uniform(in_axis=-2)(key, shape, dtype)
  if len(shape) == 4:
    W_dec *= jnp.triu(jnp.ones(shape[:2]))[:, :, None, None]
  return decoders.unit_rows(W_dec)


def _he_uniform_encoder(key, shape, dtype=jnp.float32):
  W_enc = nn.initializers.he_uniform(in_axis=-1, out_axis=-2)(key, shape, dtype)
  return W_enc / jnp.linalg.norm(W_enc, axis=-1, keepdims=True)


def constant(value):
  """A Flax initialiser that returns `value` in every entry."""
  return lambda key, shape, dtype=jnp.float32: jnp.full(shape, value, dtype)


def _matmul(dtype: str, terms: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """A product with inputs in `dtype`, accumulated in float32."""
  a, b = a.astype(dtype), b.astype(dtype)
  return jnp.einsum(terms, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(dtype, x, bias, W_enc):
  """(x - bias) W_enc^T. x is data and gets no gradient."""
  terms = 'bld,lfd->blf' if x.ndim == 3 else 'bd,fd->bf'
  return _matmul(dtype, terms, x - bias, W_enc)


def _project_forward(dtype, x, bias, W_enc):
  return _project(dtype, x, bias, W_enc), (x, bias, W_enc)


def _project_backward(dtype, saved, g):
  x, bias, W_enc = saved
  terms = 'blf,bld->lfd' if x.ndim == 3 else 'bf,bd->fd'
  # The bias needs the sum over rows only; autodiff would run a sixth matmul.
  of_bias = _of_bias(jnp.sum(g, 0), W_enc) if bias.ndim else bias
  return (
    jnp.zeros_like(x),
    of_bias,
    _matmul(dtype, terms, g, x - bias),
  )


_project.defvjp(_project_forward, _project_backward)


def _of_bias(g_F: jax.Array, W_enc: jax.Array) -> jax.Array:
  """Gradient of the bias from the gradient of z, summed over rows."""
  return -jnp.einsum('...f,...fd->...d', g_F, W_enc)


class Autoencoder(nn.Module):
  """The part all architectures share: an affine encoder and decoder.

  A subclass (`architectures`) defines `activate`, from pre-activations to
  latents, and converts to released parameters (`released`) and back
  (`trainable`).

  Attributes:
    d_in, d_out: widths of the input and of the reconstruction.
    width: number of latents, of all layers together.
    layers: 0 for one site, L for L layers.
    pre_encoder_bias: whether the encoder sees x - b_dec (SAEs do, transcoders
      do not; arXiv 2408.05147 section 3.2 and appendix B).
    tied: W_enc is initialised to W_dec (not in transcoders).
    skip: adds an affine path from input to output, W_skip, initialised to 0.
    unit_decoder: decoders keep norm 1; else sparsity weighs latents by the
      norm.
    matmul_dtype: dtype of the matmuls' inputs; they accumulate in float32.
  """

  d_in: int
  d_out: int
  width: int
  layers: int = 0
  pre_encoder_bias: bool = True
  tied: bool = True
  skip: bool = False
  unit_decoder: bool = True
  matmul_dtype: str = 'float32'

  @property
  def latent_shape(self) -> tuple[int, ...]:
    """[F], or [L, F]."""
    if not self.layers:
      return (self.width,)
    return self.layers, self.width // self.layers

  def setup(self):
    *lead, latents = self.latent_shape
    self.W_dec = self.param(
      'W_dec', _he_uniform, (*lead, *lead, latents, self.d_out)
    )
    shape = (*lead, latents, self.d_in)
    if self.tied:
      self.W_enc = self.param(
        'W_enc', constant(decoders.own_layer(self.W_dec)), shape
      )
    else:
      self.W_enc = self.param('W_enc', _he_uniform_encoder, shape)
    zeros = nn.initializers.zeros
    self.b_enc = self.param('b_enc', zeros, self.latent_shape)
    self.b_dec = self.param('b_dec', zeros, (*lead, self.d_out))
    if self.skip:
      self.W_skip = self.param('W_skip', zeros, (*lead, self.d_in, self.d_out))

  def _matmul(self, terms, a, b):
    return _matmul(self.matmul_dtype, terms, a, b)

  def project(self, x: jax.Array) -> jax.Array:
    """x W_enc^T, the encoder without its biases; [B, F], float32."""
    with jax.named_scope('encoder'):
      bias = self.b_dec if self.pre_encoder_bias else jnp.zeros(())
      return _project(self.matmul_dtype, x, bias, self.W_enc)

  def encoder_gradient(
    self, g: jax.Array, x: jax.Array, candidates: sparse.Candidates
  ) -> dict[str, jax.Array]:
    """Parameter gradients of `project`, given the candidates' gradient."""
    with jax.named_scope('encoder'):
      if not self.pre_encoder_bias:
        return {'W_enc': candidates.encoder_gradient(g, x)}
      return {
        'W_enc': candidates.encoder_gradient(g, x - self.b_dec),
        'b_dec': _of_bias(candidates.total(g), self.W_enc),
      }

  def write(
    self,
    f: jax.Array,
    part: slice = slice(None),
    candidates: sparse.Candidates | None = None,
  ) -> jax.Array:
    """f W_dec over the latents `part` of each layer, without bias."""
    with jax.named_scope('decoder'):
      if candidates is not None:
        if part != slice(None):
          shape = self.latent_shape
          index = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
          index = candidates.at(index)
          stop = shape[-1] if part.stop is None else part.stop
          f = jnp.where((index >= (part.start or 0)) & (index < stop), f, 0)
        return candidates.write(f, self.W_dec)
      f = f[..., part]
      if not self.layers:
        return self._matmul('bf,fd->bd', f, self.W_dec[part])
      # One matmul per target layer, over the layers that write to it.
      return jnp.stack(
        [
          self._matmul(
            'blf,lfd->bd', f[:, : m + 1], self.W_dec[: m + 1, m, part]
          )
          for m in range(self.layers)
        ],
        axis=1,
      )

  def write_blocks(self, f: jax.Array, count: int) -> jax.Array:
    """`write` of each of `count` equal parts of a layer's latents, [K, B, D].

    A part that lies in one shard of the latents is written there.
    """
    width = self.latent_shape[-1] // count
    f = f.reshape(*f.shape[:-1], count, width)
    W_dec = self.W_dec.reshape(*self.W_dec.shape[:-2], count, width, self.d_out)
    with jax.named_scope('decoder'):
      if not self.layers:
        return self._matmul('bkf,kfd->kbd', f, W_dec)
      return jnp.stack(
        [
          self._matmul('blkf,lkfd->kbd', f[:, : m + 1], W_dec[: m + 1, m])
          for m in range(self.layers)
        ],
        axis=2,
      )

  def read(
    self, y: jax.Array, candidates: sparse.Candidates | None = None
  ) -> jax.Array:
    """y W_dec^T: the dot product of each row with each decoder."""
    with jax.named_scope('decoder'):
      if candidates is not None:
        return candidates.read(y, self.W_dec)
      if not self.layers:
        return self._matmul('bd,fd->bf', y, self.W_dec)
      return jnp.stack(
        [
          self._matmul('bmd,mfd->bf', y[:, l:], self.W_dec[l, l:])
          for l in range(self.layers)
        ],
        axis=1,
      )

  def offset(self, x: jax.Array) -> jax.Array:
    """The output without latents: b_dec (+ x W_skip)."""
    if not self.skip:
      return self.b_dec
    terms = 'bld,lde->ble' if self.layers else 'bd,de->be'
    return self.b_dec + self._matmul(terms, x, self.W_skip)

  def norms(self) -> jax.Array:
    """Decoder norms, the weights of latents in sparsity terms."""
    if self.unit_decoder:
      return jnp.ones(self.latent_shape)
    return decoders.decoder_norm(self.W_dec)

  def latents(self, x: jax.Array, k: jax.Array | float = 1.0) -> Latents:
    """Latents of x; TopK and BatchTopK keep `k` of them per row."""
    return self.activate(self.project(x), k)

  def activate(
    self,
    projected: jax.Array,
    k: jax.Array,
    candidates: sparse.Candidates | None = None,
  ) -> Latents:
    """Latents from x W_enc^T, for all latents or the candidates only."""
    raise NotImplementedError

  def bound(self) -> tuple[jax.Array, jax.Array] | None:
    """(bias, lower bound): gradients vanish where x W_enc^T + bias is below.

    One value per latent each; None where the bound depends on the batch.
    """
    return None

  def may_act(
    self, projected: jax.Array, k: jax.Array, blocks: int
  ) -> jax.Array:
    """Mask of the entries that may have a gradient; may include a few more.

    Args:
      projected: x W_enc^T, dense.
      k: how many TopK and BatchTopK keep.
      blocks: see `activation_functions.kth_of_row`.
    """
    bias, least = self.bound()
    return projected + bias > least

  def encode_candidates(
    self, x: jax.Array, count: int, mesh: Mesh | None
  ) -> tuple[sparse.Candidates, jax.Array] | None:
    """Candidates above `bound` and their x W_enc^T; None without a kernel."""
    kernel = sparse.encoder(mesh, self.d_in, self.matmul_dtype)
    bound = self.bound()
    if kernel is None or bound is None:
      return None
    x = x - self.b_dec if self.pre_encoder_bias else x
    with jax.named_scope('encoder'):
      bound = sparse.Bound(self.W_enc, *bound)
      make = sparse.Candidates.of_encoder
      return make(kernel, x, bound, count, mesh, self.matmul_dtype)

  def __call__(self, x: jax.Array, k: jax.Array | float = 1.0) -> jax.Array:
    """Reconstruction [B, D_out] of x [B, D]."""
    return self.write(self.latents(x, k).f_BF) + self.offset(x)

  def released(self, params, theta, k) -> dict[str, jax.Array]:
    """Released parameters, for `released.encode` and `released.decode`.

    Args:
      params: of one SAE of this module.
      theta: running mean of BatchTopK's threshold.
      k: number of latents that TopK keeps.
    """
    shared = ('W_enc', 'b_enc', 'W_dec', 'b_dec', 'W_skip')
    arrays = {name: params[name] for name in shared if name in params}
    arrays['W_enc'] = jnp.swapaxes(arrays['W_enc'], -1, -2)
    arrays['threshold'] = jnp.zeros(self.latent_shape)
    if self.layers:
      arrays['W_dec'] = jnp.swapaxes(arrays['W_dec'], 1, 2)
    return arrays

  def trainable(self, released: Mapping[str, jax.Array]):
    """Trainable parameters with the same function: inverse of `released`."""
    names = ('W_enc', 'b_enc', 'W_dec', 'b_dec')
    arrays = {name: jnp.asarray(released[name]) for name in names}
    arrays['W_enc'] = jnp.swapaxes(arrays['W_enc'], -1, -2)
    if self.layers:
      arrays['W_dec'] = jnp.swapaxes(arrays['W_dec'], 1, 2)
    if self.skip:
      arrays['W_skip'] = jnp.asarray(
        released.get('W_skip', jnp.zeros((self.d_in, self.d_out)))
      )
      lead = (self.layers,) * bool(self.layers)
      shape = (*lead, self.d_in, self.d_out)
      arrays['W_skip'] = jnp.broadcast_to(arrays['W_skip'], shape)
    return arrays

  def constrained(self, params: dict[str, jax.Array]):
    """Projects parameters onto the allowed set, after an update."""
    if not self.unit_decoder:
      return params
    return {**params, 'W_dec': decoders.unit_rows(params['W_dec'])}

  def with_threshold(self, params: dict[str, jax.Array], theta: jax.Array):
    """Sets the thresholds: latents are active where x W_enc^T > theta.

    Returns `params` unchanged for TopK and BatchTopK, which rank latents.

    Args:
      params: of this module, with all encoder biases at 0.
      theta: [F] or [L, F], at least 0.
    """
    return params

  def with_b_dec(self, params: dict[str, jax.Array], b_dec: jax.Array):
    """Changes b_dec and keeps the latents as they are."""
    if not self.pre_encoder_bias:
      return {**params, 'b_dec': b_dec}
    terms = 'ld,lfd->lf' if self.layers else 'd,fd->f'
    shift = jnp.einsum(terms, b_dec - params['b_dec'], params['W_enc'])
    return {**self._moved(params, shift), 'b_dec': b_dec}

  def _moved(self, params, by: jax.Array):
    """Compensates for an x W_enc^T that decreases by `by`, [F]."""
    return {**params, 'b_enc': params['b_enc'] + by}

  def threshold_at(
    self, params: dict[str, jax.Array], x: jax.Array, k: jax.Array
  ) -> jax.Array:
    """The threshold change at which this batch has an L0 of k, a scalar.

    See `with_threshold_at`. 0 for TopK and ReLU, which have no threshold.
    """
    return jnp.zeros(())

  def with_threshold_at(self, params, theta: jax.Array, value: jax.Array):
    """(params, running threshold) after the change of `threshold_at`."""
    return params, theta

  def flops(self, rows: int) -> int:
    """Dense FLOPs of a training step: five matmuls, 2 B D F each."""
    pairs = (self.layers + 1) / 2 if self.layers else 1
    return int(2 * rows * self.width * (2 * self.d_in + 3 * pairs * self.d_out))
