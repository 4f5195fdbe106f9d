"""Chunks stay where the devices that hold their parts have room."""

from __future__ import annotations

import jax
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunk_memory


@pytest.mark.parametrize(
  'sae, data, over',
  [
    (1, 1, ('data',)),
    (1, 2, ('data',)),
    (1, 8, ('data',)),
    (2, 2, ('data', 'sae')),
    (8, 1, ('data', 'sae')),
    (3, 2, ('data',)),  # no place of 'sae' has a whole number of rows
  ],
)
def test_devices_hold_their_parts_of_the_rows(sae, data, over):
  devices = jax.devices()[: 6 if sae == 3 else 8]
  mesh = mesh_lib.make({'sae': sae, 'data': data, 'latent': -1}, devices)
  assert chunk_memory.axes(mesh.shape, 8) == over
  widths, held = (24, 25), 0
  of_device, of_host = chunk_memory.sizes(mesh, 32.0, widths, 8)
  for width in widths:
    axis = chunk_memory.columns(mesh.shape, width)
    x = jax.device_put(
      jax.numpy.zeros((8, width), 'float32'),
      mesh_lib.sharding(mesh, over, axis),
    )
    held += x.addressable_shards[0].data.nbytes
  assert of_device == held
  assert of_host == 32 * sum(widths)  # one process has every part


@pytest.mark.parametrize(
  'memory, ahead, device, expected',
  [
    ('auto', 'auto', 800, (True, True)),  # two are a quarter of it
    ('auto', 'auto', 799, (True, False)),
    ('auto', 'off', 400, (True, False)),
    ('auto', 'on', 799, (False, True)),
    ('auto', 'auto', 399, (False, False)),  # and the host has no room for two
    ('device', 'off', 1, (True, False)),
    ('host', 'off', 9999, (False, False)),
  ],
)
def test_what_is_held_where(memory, ahead, device, expected):
  rooms = float(device), 799.0
  assert chunk_memory.held(memory, ahead, (100.0, 100.0), rooms) == expected
