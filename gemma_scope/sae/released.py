"""Released SAEs: encode and decode, and their parameters on the devices.

A released SAE is a mapping of arrays, named as in the files of Gemma Scope. It
acts on raw activations:

  encode  f = a ? relu(x W_enc + b_enc) : 0,  a = x W_enc + b_enc > threshold
  decode  y_hat = f W_dec + b_dec (+ x W_skip)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope.sae import activation_functions

RESIDENT_BYTES = 2**32  # SAEs that together are smaller stay on the devices

Params = Mapping[str, jax.Array | np.ndarray]


def encode(params: Params, x_BD: jax.Array) -> jax.Array:
  """Latents of raw activations.

  Args:
    params: W_enc [D, F], b_enc [F], threshold [F], and for TopK k []; with
      several layers each has a leading axis L.
    x_BD: [..., D]; with several layers [..., L, D].

  Returns:
    f [..., F], or [..., L, F].

  Raises:
    ValueError, TypeError: the parameters or the width belong to something else.
  """
  _check(params, 'W_enc', 'b_enc', 'threshold')
  W_enc = params['W_enc']
  x_BD = _of_shape('Activations', x_BD, W_enc.shape[:-1])
  terms = '...ld,ldf->...lf' if W_enc.ndim == 3 else '...d,df->...f'
  z_BF = jnp.einsum(terms, x_BD, W_enc) + params['b_enc']
  f_BF = jnp.where(z_BF > params['threshold'], jax.nn.relu(z_BF), 0)
  if 'k' not in params:
    return f_BF
  latent_axes = tuple(range(-params['b_enc'].ndim, 0))
  least = activation_functions.kth_largest(f_BF, params['k'], latent_axes)
  return jnp.where(f_BF >= least, f_BF, 0)


def decode(
  params: Params, f_BF: jax.Array, x_BD: jax.Array | None = None
) -> jax.Array:
  """Raw reconstruction of latents.

  Args:
    params: W_dec [F, D_out], b_dec [D_out]; with several layers W_dec
      [L, F, L, D_out], from layer to layer, and b_dec [L, D_out].
    f_BF: [..., F], or [..., L, F].
    x_BD: the raw input, needed where `params` has W_skip.

  Returns:
    y_hat [..., D_out], or [..., L, D_out].

  Raises:
    ValueError, TypeError: the parameters or the width belong to something else.
  """
  _check(params, 'W_dec', 'b_dec')
  W_dec = params['W_dec']
  several = W_dec.ndim == 4
  f_BF = _of_shape('Latents', f_BF, W_dec.shape[: 1 + several])
  terms = '...lf,lfmd->...md' if several else '...f,fd->...d'
  y_BD = jnp.einsum(terms, f_BF, W_dec) + params['b_dec']
  if 'W_skip' not in params:
    return y_BD
  if x_BD is None:
    raise ValueError(
      'These parameters have W_skip, which carries the input to the output: '
      'decode(params, f, x) needs the input x too.'
    )
  W_skip = params['W_skip']
  x_BD = _of_shape('Activations', x_BD, W_skip.shape[:-1])
  terms = '...ld,lde->...le' if several else '...d,de->...e'
  return y_BD + jnp.einsum(terms, x_BD, W_skip)


def _check(params: Params, *names: str) -> None:
  if not isinstance(params, Mapping):
    raise TypeError(
      'The parameters of an SAE are a mapping of arrays, such as '
      f'`release.load(path)[0]`; found a {type(params).__name__}.'
    )
  missing = [name for name in names if name not in params]
  if missing:
    raise ValueError(
      f'The parameters of an SAE have {", ".join(names)}; {missing[0]} is '
      f'missing among {", ".join(map(str, params)) or "none"}.'
    )


def _of_shape(name: str, values, axes_wanted: tuple[int, ...]) -> jax.Array:
  """The array, whose last axes must be `axes_wanted`."""
  array = values if hasattr(values, 'shape') else jnp.asarray(values)
  if tuple(array.shape[-len(axes_wanted) :]) != tuple(axes_wanted):
    axes = ', '.join(map(str, axes_wanted))
    raise ValueError(
      f'{name} of shape {list(array.shape)} do not fit this SAE, which takes '
      f'[..., {axes}].'
    )
  return array


def shardings(
  mesh: Mesh, params: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, NamedSharding]:
  """Shardings of an SAE: latents over the mesh axis that divides them."""
  width = params['b_enc'].shape[-1]
  split = 'latent' in mesh.shape and width % mesh.shape['latent'] == 0
  axes = {'W_enc': -1, 'b_enc': -1, 'threshold': -1}
  axes['W_dec'] = 1 if params['W_dec'].ndim == 4 else 0
  placements = {}
  for key, array in params.items():
    spec = [None] * array.ndim
    if split and key in axes:
      spec[axes[key]] = 'latent'
    placements[key] = NamedSharding(mesh, PartitionSpec(*spec))
  return placements


def put(
  params: Mapping[str, np.ndarray], mesh: Mesh | None
) -> dict[str, jax.Array]:
  """Puts an SAE on the devices, in the sharding above."""
  arrays = {key: np.asarray(array, np.float32) for key, array in params.items()}
  return jax.device_put(
    arrays, None if mesh is None else shardings(mesh, arrays)
  )


def on_demand(
  saes: Sequence[Mapping[str, np.ndarray]],
  mesh: Mesh | None,
  budget: int = RESIDENT_BYTES,
) -> list[Callable[[], dict[str, jax.Array]]]:
  """What puts each SAE on the devices when it is called.

  SAEs that together fit in `budget` bytes are put there once and stay; of more
  than that, none stays, and one is there at a time.
  """
  size = sum(array.nbytes for sae in saes for array in sae.values())
  calls = [functools.partial(put, sae, mesh) for sae in saes]
  return [functools.cache(call) if size <= budget else call for call in calls]


def stacked(parts: Sequence[jax.Array], several: bool) -> jax.Array:
  """Activations as float32: [B, t, D] of one site, or [B, t, L, D]."""
  parts = [part.astype(jnp.float32) for part in parts]
  return jnp.stack(parts, -2) if several else parts[0]


def beside(keep_BT: jax.Array, f: jax.Array) -> jax.Array:
  """keep_BT with axes of size 1, to broadcast with f [B, T, ...]."""
  return keep_BT.reshape(*keep_BT.shape, *[1] * (f.ndim - keep_BT.ndim))
