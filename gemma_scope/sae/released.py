"""Parameters of released SAEs on the devices: placed, stacked, replicated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RESIDENT_BYTES = 2**32  # SAEs that together are smaller stay on the devices


def shardings(
  mesh: Mesh, params: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, NamedSharding]:
  """Shardings of an SAE: latents over the mesh axis that divides them."""
  width = params['b_enc'].shape[-1]
  split = 'latent' in mesh.shape and width % mesh.shape['latent'] == 0
  axes = {'W_enc': -1, 'b_enc': -1, 'threshold': -1}
  axes['W_dec'] = 1 if params['W_dec'].ndim == 4 else 0
  placed = {}
  for key, array in params.items():
    spec = [None] * array.ndim
    if split and key in axes:
      spec[axes[key]] = 'latent'
    placed[key] = NamedSharding(mesh, PartitionSpec(*spec))
  return placed


def put(
  params: Mapping[str, np.ndarray], mesh: Mesh | None
) -> dict[str, jax.Array]:
  """Puts an SAE on the devices, in the sharding above."""
  arrays = {key: np.asarray(a, np.float32) for key, a in params.items()}
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
