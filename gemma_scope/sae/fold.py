"""Scales and decoder norms, moved into a trained member's parameters.

Training saw the input x / A and the target y / C, with A and C the root mean
square norms of the sites read and written (A = C, x = y in an SAE):

  z = (x/A - b_dec) W_enc + b_enc              f = relu(z) 1[z > threshold]
  y_hat/C = f W_dec + b_dec + (x/A) W_skip

without `- b_dec` where the encoder has no such bias. A release acts on raw
activations, with latents C times as large and W_dec as it was:

  W_enc' = C/A W_enc    b_enc' = C (b_enc - b_dec W_enc)    b_dec' = C b_dec
  W_skip' = C/A W_skip  threshold' = C threshold
  =>  z' = x W_enc' + b_enc' = C z,  f' = C f,  y_hat = f' W_dec + b_dec' + ...

(arXiv 2408.05147, appendix A). With several layers each has its own A and C,
the latents of layer l are C_l times as large, and from l to m

  W_dec'[l, :, m] = C_m / C_l W_dec[l, :, m]

TopK (`k`) ranks the latents of all layers against each other, so that there
all of them grow by the same factor instead, the geometric mean of the C.

numpy only, float32 in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Params = dict[str, np.ndarray]

_BLOCK = 1 << 12  # latents at a time in float64


def fold(
  params: Mapping[str, np.ndarray],
  scales_in: Sequence[float],
  scales_out: Sequence[float],
  *,
  pre_encoder_bias: bool,
) -> Params:
  """Moves the scales of the sites into a member trained on x / A and y / C.

  Args:
    params: W_enc [D, F], b_enc [F], W_dec [F, D_out], b_dec [D_out],
      threshold [F], at will W_skip [D, D_out] and k []; or of L layers, with a
      leading axis L, W_dec [L, F, L, D_out].
    scales_in: A of each site read, in its own units; one, or L.
    scales_out: C of each site written.
    pre_encoder_bias: training's encoder saw x/A - b_dec (SAEs, crosscoders),
      not x/A (transcoders, CLTs).

  Returns:
    float32 parameters that act on raw x and give raw y_hat.

  Raises:
    ValueError: a scale that is none, or too many or too few of them.
  """
  p, A, C, unit = _units(params, scales_in, scales_out)
  shift = _shift(p) if pre_encoder_bias else 0.0
  return p | {
    'W_enc': _times(p['W_enc'], unit / A, 2),
    'b_enc': _times(p['b_enc'] - shift, unit, 1),
    'threshold': _times(p['threshold'], unit, 1),
    **_outputs(p, C / A, C, C / unit[:, None]),
  }


def unfold(
  params: Mapping[str, np.ndarray],
  scales_in: Sequence[float],
  scales_out: Sequence[float],
  *,
  pre_encoder_bias: bool,
) -> Params:
  """The inverse of `fold`: released parameters -> those that training has."""
  p, A, C, unit = _units(params, scales_in, scales_out)
  p |= {
    'W_enc': _times(p['W_enc'], A / unit, 2),
    **_outputs(p, A / C, 1 / C, unit[:, None] / C),
  }
  shift = _shift(p) if pre_encoder_bias else 0.0
  b_enc = _times(p['b_enc'].astype(np.float64), 1 / unit, 1, np.float64)
  return p | {
    'b_enc': (b_enc + shift).astype(np.float32),
    'threshold': _times(p['threshold'], 1 / unit, 1),
  }


def fold_decoder_norm(params: Mapping[str, np.ndarray]) -> Params:
  """Gives each latent's decoder norm 1, over all that it writes together.

  The norms go to the encoder and the threshold: the reconstruction is
  unchanged, latent i is multiplied by the norm of its decoder. A latent whose
  decoder is zero writes nothing, whatever it does: it gets a zero encoder and
  threshold, so that it never fires, and a basis vector as its decoder, so that
  no cosine divides by zero.

  Raises:
    ValueError: W_dec is not finite, or there is a `k`: latents that are ranked
      against each other cannot be scaled one by one.
  """
  if 'k' in params:
    raise ValueError(
      'A TopK member has no decoder norms to fold: to scale its latents one by '
      'one would change which are the largest; train it with unit decoders.'
    )
  p = _float32(params)
  W_dec = p['W_dec']
  several = W_dec.ndim == 4
  axes = (-2, -1) if several else -1
  # The largest entry first, or the square of a tiny one would be zero.
  largest = np.abs(W_dec).max(axis=axes)
  if not np.isfinite(largest).all():
    raise ValueError('W_dec holds values that are not finite.')
  W_dec = W_dec / np.expand_dims(np.where(largest == 0, 1, largest), axes)
  for silent in np.argwhere(largest == 0):
    own = (*silent, silent[0]) if several else tuple(silent)
    W_dec[(*own, silent[-1] % W_dec.shape[-1])] = 1
  norm = np.sqrt(np.square(W_dec).sum(axes))
  W_dec /= np.expand_dims(norm, axes)
  norm *= largest  # zero where silent
  return p | {
    'W_dec': W_dec,
    'W_enc': p['W_enc'] * norm[..., None, :],
    'b_enc': p['b_enc'] * norm,
    'threshold': p['threshold'] * norm,
  }


def _float32(params: Mapping[str, np.ndarray]) -> Params:
  return {key: np.asarray(array, np.float32) for key, array in params.items()}


def _units(params, scales_in, scales_out):
  """params, A, C, and by how much each layer's latents grow; [L] each."""
  p = _float32(params)
  layers = len(p['W_enc']) if p['W_enc'].ndim == 3 else 1
  A, C = (
    np.asarray(scales, np.float64).reshape(-1)
    for scales in (scales_in, scales_out)
  )
  for scales in (A, C):
    if not (np.isfinite(scales).all() and (scales > 0).all()):
      raise ValueError(
        f'A scale is finite and above 0; found {scales.tolist()}.'
      )
    if len(scales) != layers:
      raise ValueError(
        f'{layers} scales are needed, one a layer; found {len(scales)}.'
      )
  if 'k' in p and layers > 1:
    return p, A, C, np.full_like(C, np.exp(np.log(C).mean()))
  return p, A, C, C


def _shift(p: Params) -> np.ndarray:
  """b_dec W_enc, in float64: [F], or [L, F]."""
  out = np.empty(p['b_enc'].shape)
  b_dec = p['b_dec'].astype(np.float64)[..., None, :]
  # In blocks: float64 of a whole W_enc would triple the memory.
  for at in range(0, out.shape[-1], _BLOCK):
    block = slice(at, at + _BLOCK)
    out[..., block] = (b_dec @ p['W_enc'][..., block])[..., 0, :]
  return out


def _times(array, factor_L, axes: int, dtype=np.float32) -> np.ndarray:
  """Each layer's last `axes` axes times its factor."""
  if (factor_L == 1).all():
    return array.astype(dtype, copy=False)
  if array.ndim == axes:
    return (array * dtype(factor_L[0])).astype(dtype, copy=False)
  factor = factor_L.astype(dtype).reshape(-1, *[1] * axes)
  return (array * factor).astype(dtype, copy=False)


def _outputs(p: Params, skip_L, bias_L, decoder_LM) -> Params:
  """What writes, scaled; decoder_LM: [L, L], or [1, 1] and then 1."""
  found = {'b_dec': _times(p['b_dec'], bias_L, 1)}
  if p['W_dec'].ndim == 4:
    factor = decoder_LM.astype(np.float32)[:, None, :, None]
    found['W_dec'] = p['W_dec'] * factor
  if 'W_skip' in p:
    found['W_skip'] = _times(p['W_skip'], skip_L, 2)
  return found
