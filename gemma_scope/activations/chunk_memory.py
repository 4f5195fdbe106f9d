"""Decides whether chunks of rows stay on devices or hosts, and how many.

Rows are split over the mesh's axis 'data' alone: devices that differ in the
other axes hold the same rows, and each of them needs the memory.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def held(
  memory: str,
  ahead: str,
  sizes: tuple[float, float],
  rooms: tuple[float, float],
) -> tuple[bool, bool]:
  """Whether chunks stay on the devices, and whether two are held at once.

  Args:
    memory, ahead: see `chunks.Chunks`.
    sizes: bytes of one chunk on a device, and on a host.
    rooms: bytes of memory of a device, and of a host.
  """
  chunks = 2 if ahead == 'on' else 1
  on_device = memory == 'device' or (
    memory == 'auto' and chunks * sizes[0] <= rooms[0] / 4
  )
  size, room = (sizes[0], rooms[0]) if on_device else (sizes[1], rooms[1])
  fits = 2 * size <= room / 4
  return on_device, ahead == 'on' or (ahead == 'auto' and fits)


def sizes(mesh: Mesh, chunk_bytes: float) -> tuple[float, float]:
  """Bytes of a chunk on each device and on each host."""
  data_indices: dict[int, set[int]] = {}  # of the axis 'data', by process
  for (_, data, _), device in np.ndenumerate(mesh.devices):
    data_indices.setdefault(device.process_index, set()).add(data)
  device_bytes = chunk_bytes / mesh.shape['data']
  return device_bytes, device_bytes * max(map(len, data_indices.values()))


def memory() -> tuple[float, float]:
  """Bytes of memory of a device and of a host, the same in every process.

  Infinity for a CPU device, which has no memory of its own.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  host_bytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  memory_bytes = np.asarray([stats.get('bytes_limit', np.inf), host_bytes])
  if jax.process_count() > 1:  # all processes must decide alike
    memory_bytes = multihost_utils.process_allgather(memory_bytes).min(0)
  return tuple(map(float, memory_bytes))
