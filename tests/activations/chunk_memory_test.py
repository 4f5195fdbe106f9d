"""Chunks stay where every device that has a copy of them has room."""

from __future__ import annotations

import jax
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunk_memory


@pytest.mark.parametrize('data', [1, 2, 8])
def test_devices_that_do_not_split_rows_hold_them_all(data):
  mesh = mesh_lib.make({'sae': 1, 'data': data, 'latent': -1})
  of_device, of_host = chunk_memory.sizes(mesh, 800.0)
  x = jax.device_put(
    jax.numpy.zeros((8, 25), 'float32'),
    mesh_lib.sharding(mesh, 'data', None),
  )
  assert of_device == x.addressable_shards[0].data.nbytes
  assert of_host == 800  # one process has every part


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
