"""Decides whether chunks of rows stay on devices or hosts, and how many.

A chunk is split over the whole mesh where that is possible: its rows over
'data' and 'sae' (`axes`), the numbers of a row over 'latent' (`columns`). A
training step needs whole rows on every place of 'sae' and 'latent'; a batch is
gathered when it is taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def axes(shape: Mapping[str, int], count: int) -> tuple[str, ...]:
  """The axes that split `count` sequences of a pass, or rows of a batch.

  'data' first: what is gathered over 'sae' lies together, and nothing has to
  move between places of 'data'.

  Args:
    shape: of the mesh, by axis.
    count: 'data' divides it.
  """
  if shape['sae'] == 1 or count % (shape['data'] * shape['sae']):
    return ('data',)
  return 'data', 'sae'


def columns(shape: Mapping[str, int], width: int) -> str | None:
  """The axis that splits the numbers of a row of so many; None for no axis."""
  return None if shape['latent'] == 1 or width % shape['latent'] else 'latent'


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


def sizes(
  mesh: Mesh, column_bytes: float, widths: Iterable[int], batch: int
) -> tuple[float, float]:
  """Bytes of a chunk on each device and on each host.

  Args:
    mesh: the devices.
    column_bytes: of one number of every row.
    widths: of the rows of each site.
    batch: rows of a batch.
  """
  widths, of_device, of_host = tuple(widths), 0.0, 0.0
  for axis in ('latent', None):
    width = sum(w for w in widths if columns(mesh.shape, w) == axis)
    over = axes(mesh.shape, batch) + ((axis,) if axis else ())
    parts: dict[int, set[tuple[int, ...]]] = {}  # by process
    for place, device in np.ndenumerate(mesh.devices):
      named = dict(zip(mesh.axis_names, place, strict=True))
      part = tuple(named[name] for name in over)
      parts.setdefault(device.process_index, set()).add(part)
    size = column_bytes * width / math.prod(mesh.shape[n] for n in over)
    of_device += size
    of_host += size * max(map(len, parts.values()))
  return of_device, of_host


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
