"""A mesh that is chosen fits, is the cheapest that does, and says why."""

from __future__ import annotations

import math

import jax
import pytest

from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope.training import auto_mesh, setup, stack


# Chunks on the host, whatever its memory: they take none of the devices.
def auto(argument: str = '', **fields):
  config = tiny.get_config(argument or None)
  config_lib.override(config, 'mesh', 'auto')
  config.activations.memory = 'host'
  config.update_from_flattened_dict(fields)
  return config


def test_the_cheapest_way_that_fits_is_chosen():
  # Three SAEs, so narrow that copies of them cost less than sums of many rows.
  three = 'layers=0;sites=resid_post;widths=1k;sparsity=4,8,16'
  config = auto(three, **{'train.batch': 1024, 'activations.lm_batch': 8})
  model = setup.dimensions(config)
  chosen, ways = auto_mesh.choose(config, model, 8, 2**40)
  assert chosen == min(ways, key=lambda way: (way.cost, way.bytes))
  assert len({way.sizes for way in ways}) == len(ways) > 3
  assert all(math.prod(way.sizes) == 8 for way in ways)
  # With less memory than that needs, another one.
  less, _ = auto_mesh.choose(config, model, 8, chosen.bytes)
  assert less.bytes < 0.9 * chosen.bytes and less.cost >= chosen.cost
  line = auto_mesh.reason(less, ways, 8, chosen.bytes)
  assert 'would be faster and needs' in line and 'of 8 devices' in line


def test_axes_that_are_given_stay():
  config = auto(**{'mesh.latent': 2})
  model = setup.dimensions(config)
  _, ways = auto_mesh.choose(config, model, 8, 2**40)
  assert {way.sizes[2] for way in ways} == {2}
  config = tiny.get_config()
  assert dict(auto_mesh.make(config).shape) == {
    'sae': 1,
    'data': 8,
    'latent': 1,
  }


def test_what_fits_nowhere_is_split_into_runs_that_fit():
  config = auto('layers=0,1')
  model = setup.dimensions(config)
  _, ways = auto_mesh.choose(config, model, 8, 2**40)
  hbm = 0.95 * min(way.bytes for way in ways) / 0.9
  with pytest.raises(config_lib.ConfigError) as error:
    auto_mesh.choose(config, model, 8, hbm)
  assert 'train them in 2 runs, with layers=0, layers=1' in str(error.value)
  with pytest.raises(config_lib.ConfigError, match='take more devices'):
    auto_mesh.choose(config, model, 8, 1.0)
  # SAEs over layers cannot be split by layers.
  config = auto('layers=0,1;type=crosscoder;widths=64,128;sparsity=4,8')
  ways = auto_mesh.choose(config, model, 8, 2**40)[1]
  hbm = 0.99 * min(way.bytes for way in ways) / 0.9
  assert auto_mesh.split(config, model, 8, hbm) == ['widths=64', 'widths=128']


def test_devices_that_nothing_divides_are_refused():
  config = auto(**{'train.batch': 64})
  with pytest.raises(config_lib.ConfigError, match='No mesh of 7 devices'):
    auto_mesh.choose(config, setup.dimensions(config), 7, 2**40)


def test_the_state_is_what_the_devices_hold():
  """Bytes by arithmetic are those of the arrays that training makes."""
  config = auto('layers=0,1;sparsity=4,8', **{'activations.store': 'a'})
  config.activations.store = ''
  mesh = auto_mesh.make(config)
  model = setup.dimensions(config)
  stacks, _ = setup.make_stacks(config, model)
  states = stack.init_all(stacks, jax.random.key(0), mesh)
  first = jax.devices()[0]
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(states)
    for shard in leaf.addressable_shards
    if shard.device == first
  )
  sizes = mesh.devices.shape
  ways = auto_mesh.choose(config, model, mesh.size, 2**40)[1]
  (way,) = (w for w in ways if w.sizes == sizes)
  assert 0.9 * held < way.bytes
