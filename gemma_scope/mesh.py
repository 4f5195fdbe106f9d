"""The device mesh, and shardings on it.

One mesh with three axes serves the language model and the SAEs:
  'sae'     members of a stack: nothing to communicate
  'data'    rows of a batch, sequences of the language model (FSDP there)
  'latent'  latents of an SAE; heads, MLP units and vocabulary of the model
Sharding latents costs one sum of [B, D] a step, sharding data one of all
gradients (arXiv 2408.05147 section 3.3: narrow SAEs data-parallel, wide ones
latent-parallel).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ('sae', 'data', 'latent')


def shape(axes: Mapping[str, int], devices: int) -> tuple[int, ...]:
  """Sizes of `AXES`; one of them may be -1 for all remaining devices.

  An axis of 0 is chosen by `training.auto_mesh`; for what does not train, all
  devices that are left are the data axis.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = [axes[name] for name in AXES]
  if 0 in sizes:
    spare = AXES.index('data') if sizes[1] == 0 else sizes.index(0)
    spare_size = 1 if -1 in sizes else -1
    sizes = [
      (spare_size if i == spare else 1) if size == 0 else size
      for i, size in enumerate(sizes)
    ]
  fixed = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1 or fixed < 1 or devices % fixed:
    raise ValueError(
      f'mesh {dict(axes)} does not fit {devices} devices: its sizes must '
      'multiply to that, and at most one may be -1 (the rest).'
    )
  sizes = [devices // fixed if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != devices:
    raise ValueError(
      f'mesh {dict(axes)} uses {int(np.prod(sizes))} of {devices} devices; '
      'set one axis to -1 to use the rest.'
    )
  return tuple(sizes)


def make(axes: Mapping[str, int], devices=None) -> Mesh:
  """The mesh of the given sizes over all devices (or those given)."""
  devices = jax.devices() if devices is None else devices
  sizes = shape(axes, len(devices))
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Puts a host array that every process holds whole on the devices."""
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding)
  # `device_put` would first compare the arrays of all processes.
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
  """The sharding of an array whose dimensions are split over `axes`."""
  return NamedSharding(mesh, PartitionSpec(*axes))


def row_major(x: jax.Array) -> jax.Array:
  """x, which a compiled program keeps in the layout of its arguments.

  Without it the compiler may choose another layout for what a loop updates,
  and copy all of it before and after the loop. Before jax 0.11 the constraint
  itself gathers what is split over devices, so that there x is left alone.
  """
  if jax.__version_info__ < (0, 11):
    return x
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
