"""Moves normalisation and decoder norms into an SAE's parameters.

Training sees normalised rows (class `Normalisation`): the input (x - m)/A and
the target (y - n)/C, where m and n are the centres and A and C the scales of
the sites that are read and written (in an SAE n = m, C = A, y = x):

  z = ((x - m)/A - b_dec) W_enc + b_enc        f = relu(z) 1[z > threshold]
  (y_hat - n)/C = f W_dec + b_dec + (x - m)/A W_skip

Encoders without a pre-encoder bias lack the `- b_dec`. A released SAE acts on
raw activations. Its latents are C times as large and W_dec stays as it was:

  W_enc' = C/A W_enc       b_enc' = C (b_enc - (m/A + b_dec) W_enc)
  W_skip' = C/A W_skip     b_dec' = C (b_dec - m/A W_skip) + n
  threshold' = C threshold
  =>  z' = x W_enc' + b_enc' = C z,  f' = C f,
      y_hat = f' W_dec + b_dec' + x W_skip'

(arXiv 2408.05147, appendix A; the centres are ours.) With several layers each
layer has its own m, n, A and C, the latents of layer l are C_l times as large,
and from layer l to m

  W_dec'[l, :, m] = C_m / C_l W_dec[l, :, m]

TopK (`k`) ranks the latents of all layers against each other, so that the
latents of all layers must grow by the same factor, the geometric mean of the C.

numpy only, float32 in and out; products with centres are taken in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Params = dict[str, np.ndarray]

_BLOCK = 1 << 12  # latents at a time in float64


class Normalisation(NamedTuple):
  """The normalisation of a site's rows; its arrays may be of NumPy or JAX.

  Attributes:
    scale: C, by which rows are divided.
    centre: m [D], which is subtracted first; None subtracts nothing.
    norm_bound: rows of a larger norm are outliers, which training leaves out;
      None keeps all. It plays no part in `apply` and `undo`.
  """

  scale: Any
  centre: Any = None
  norm_bound: Any = None

  def apply(self, x: Any) -> Any:
    """Normalises raw rows [..., D]."""
    return (x if self.centre is None else x - self.centre) / self.scale

  def undo(self, x: Any) -> Any:
    """The inverse of `apply`."""
    x = x * self.scale
    return x if self.centre is None else x + self.centre


def fold(
  params: Mapping[str, np.ndarray],
  read: Sequence[Normalisation],
  written: Sequence[Normalisation],
  *,
  pre_encoder_bias: bool,
) -> Params:
  """Moves the normalisation of the sites into a trained SAE's parameters.

  Args:
    params: W_enc [D, F], b_enc [F], W_dec [F, D_out], b_dec [D_out],
      threshold [F], optionally W_skip [D, D_out] and k []; with L layers each
      has a leading axis L, and W_dec is [L, F, L, D_out].
    read: of the sites read, one or L.
    written: of the sites written, as many.
    pre_encoder_bias: the trained encoder subtracts b_dec from its input (SAEs,
      crosscoders) or does not (transcoders, CLTs).

  Returns:
    float32 parameters that take raw x and return raw y_hat.

  Raises:
    ValueError: a scale is not finite and positive, a centre does not fit, or
      there are too many or too few of them.
  """
  p, A, C, unit = _units(params, read, written)
  m, n = _centres(p, 'W_enc', -2, read), _centres(p, 'b_dec', -1, written)
  shift = _shift(p, m, A, pre_encoder_bias)
  p |= {
    'b_enc': _times(p['b_enc'] - shift, unit, 1),
    'W_enc': _times(p['W_enc'], unit / A, 2),
    'threshold': _times(p['threshold'], unit, 1),
    **_outputs(p, C / A, C, C / unit[:, None]),
  }
  if m is not None or n is not None:
    b_dec = _plus(p['b_dec'], n, 1) - _skipped(p, m)
    p['b_dec'] = b_dec.astype(np.float32)
  return p


def unfold(
  params: Mapping[str, np.ndarray],
  read: Sequence[Normalisation],
  written: Sequence[Normalisation],
  *,
  pre_encoder_bias: bool,
) -> Params:
  """The inverse of `fold`: released parameters -> those that training has."""
  p, A, C, unit = _units(params, read, written)
  m, n = _centres(p, 'W_enc', -2, read), _centres(p, 'b_dec', -1, written)
  if m is not None or n is not None:
    p['b_dec'] = _plus(p['b_dec'], n, -1) + _skipped(p, m)
  p |= {
    'W_enc': _times(p['W_enc'], A / unit, 2),
    **_outputs(p, A / C, 1 / C, unit[:, None] / C),
  }
  shift = _shift(p, m, A, pre_encoder_bias)
  b_enc = _times(p['b_enc'].astype(np.float64), 1 / unit, 1, np.float64)
  return p | {
    'b_enc': (b_enc + shift).astype(np.float32),
    'threshold': _times(p['threshold'], 1 / unit, 1),
  }


def side_by_side(
  params: Mapping[str, np.ndarray], of_models: Sequence[Normalisation]
) -> tuple[Params, Normalisation]:
  """A crosscoder of two models, with one normalisation of its rows [x, x'].

  It was trained on (x - m) / C and (x' - m') / C'. With u, the geometric mean
  of C and C', and r, the vector that is C / u in the first half and C' / u in
  the second,

    ([x, x'] - [m, m']) / [C, C'] = ([x, x'] - [m, m']) / u / r

  so that W_enc / r, r W_dec and r b_dec are the same crosscoder on rows that
  are divided by u alone. Then `fold` applies.

  Args:
    params: W_enc [2 D, F], W_dec [F, 2 D], b_dec [2 D], ...
    of_models: the normalisation of each model's rows [B, D].

  Returns:
    The parameters, and the normalisation of rows [B, 2 D] that they are for.
  """
  p = _float32(params)
  width = p['b_dec'].shape[-1] // len(of_models)
  scales = np.asarray([n.scale for n in of_models], np.float64)
  u = float(np.exp(np.log(scales).mean()))
  r_D = np.repeat(scales / u, width).astype(np.float32)
  centre = None
  if any(n.centre is not None for n in of_models):
    zeros = np.zeros(width, np.float32)
    centre = np.concatenate(
      [zeros if n.centre is None else n.centre for n in of_models]
    )
  p |= {
    'W_enc': p['W_enc'] / r_D[:, None],
    'W_dec': p['W_dec'] * r_D,
    'b_dec': p['b_dec'] * r_D,
  }
  return p, Normalisation(u, centre)


def fold_decoder_norm(params: Mapping[str, np.ndarray]) -> Params:
  """Scales each latent's decoder to norm 1, over all layers together.

  The norms move to the encoder and the threshold. The reconstruction does not
  change, and latent i is multiplied by the norm of its decoder. A latent with a
  zero decoder gets a zero encoder and threshold, so that it never fires, and a
  basis vector as decoder, so that no cosine divides by zero.

  Raises:
    ValueError: W_dec is not finite, or there is a `k`: latents that are ranked
      against each other cannot be scaled one by one.
  """
  if 'k' in params:
    raise ValueError(
      'The decoder norms of a TopK SAE cannot be folded, because scaling '
      'latents changes which are the largest; train it with unit decoders.'
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


def _units(params, read, written):
  """params, A, C, and by how much each layer's latents grow; [L] each."""
  p = _float32(params)
  layers = len(p['W_enc']) if p['W_enc'].ndim == 3 else 1
  A, C = (
    np.asarray([site.scale for site in sites], np.float64)
    for sites in (read, written)
  )
  for scales in (A, C):
    if not (np.isfinite(scales).all() and (scales > 0).all()):
      raise ValueError(
        f'A scale must be finite and above 0; found {scales.tolist()}.'
      )
    if len(scales) != layers:
      raise ValueError(
        f'{layers} scales are needed, one a layer; found {len(scales)}.'
      )
  if 'k' in p and layers > 1:
    return p, A, C, np.full_like(C, np.exp(np.log(C).mean()))
  return p, A, C, C


def _centres(p: Params, name: str, axis: int, sites) -> np.ndarray | None:
  """Centres in float64, [D] or [L, D]; None where no site has one."""
  if all(site.centre is None for site in sites):
    return None
  width = p[name].shape[axis]
  centres = []
  for site in sites:
    centre = np.zeros(width) if site.centre is None else site.centre
    centre = np.asarray(centre, np.float64)
    if centre.shape != (width,) or not np.isfinite(centre).all():
      raise ValueError(
        f'A centre must have {width} finite values; found shape {centre.shape}.'
      )
    centres.append(centre)
  return np.stack(centres) if p['W_enc'].ndim == 3 else centres[0]


def _shift(p: Params, m, A, pre_encoder_bias: bool):
  """(m/A + b_dec) W_enc in float64, [F] or [L, F]; 0.0 without both terms."""
  shift = p['b_dec'].astype(np.float64) if pre_encoder_bias else None
  if m is not None:
    centre = m / (A[:, None] if m.ndim == 2 else A[0])
    shift = centre if shift is None else shift + centre
  if shift is None:
    return 0.0
  out = np.empty(p['b_enc'].shape)
  # In blocks: float64 of a whole W_enc would triple the memory.
  for start in range(0, out.shape[-1], _BLOCK):
    block = slice(start, start + _BLOCK)
    out[..., block] = (shift[..., None, :] @ p['W_enc'][..., block])[..., 0, :]
  return out


def _skipped(p: Params, m) -> np.ndarray | float:
  """m W_skip in float64, of released parameters: [D_out] or [L, D_out]."""
  if m is None or 'W_skip' not in p:
    return 0.0
  return (m[..., None, :] @ p['W_skip'])[..., 0, :]


def _plus(b_dec: np.ndarray, n, sign: int) -> np.ndarray:
  """b_dec plus or minus the centres written, in float64."""
  return b_dec.astype(np.float64) + (0.0 if n is None else sign * n)


def _times(array, factor_L, axes: int, dtype=np.float32) -> np.ndarray:
  """Each layer's last `axes` axes times its factor."""
  if (factor_L == 1).all():
    return array.astype(dtype, copy=False)
  if array.ndim == axes:
    return (array * dtype(factor_L[0])).astype(dtype, copy=False)
  factor = factor_L.astype(dtype).reshape(-1, *[1] * axes)
  return (array * factor).astype(dtype, copy=False)


def _outputs(p: Params, skip_L, bias_L, decoder_LM) -> Params:
  """b_dec, W_dec and W_skip, scaled; decoder_LM: [L, L], or [1, 1] of 1."""
  scaled = {'b_dec': _times(p['b_dec'], bias_L, 1)}
  if p['W_dec'].ndim == 4:
    factor = decoder_LM.astype(np.float32)[:, None, :, None]
    scaled['W_dec'] = p['W_dec'] * factor
  if 'W_skip' in p:
    scaled['W_skip'] = _times(p['W_skip'], skip_L, 2)
  return scaled
