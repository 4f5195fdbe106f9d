"""Checksums for the leaves of a tree, by name.

  tree -> {'params.W_enc': array, ...} -> {'params.W_enc': {region: [crc32]}}

A region, such as '0:4,8:16', is the block of the whole array that one process
holds. Its bytes in C order are cut into blocks with a CRC32 each, so that
threads can share the work (2 GB/s per core; zlib releases the GIL). An array
that one process holds whole is one region, so that it can be checked under any
other sharding.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)

_BLOCK = 1 << 24  # bytes under one CRC: small enough to keep threads busy


def named(tree: Any) -> tuple[dict[str, Any], Any]:
  """The leaves by dotted path, and the tree's structure.

  Orbax is given the flat dict, so that what is on disk does not depend on how
  it spells tuples, empty optax states and dataclasses.
  """
  pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {}
  for path, leaf in pairs:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name in leaves:
      raise ValueError(f'Two leaves of the state are named {name!r}.')
    dtype = getattr(leaf, 'dtype', None)
    if (
      dtype is None
      or jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
      or jax.dtypes.canonicalize_dtype(dtype) != dtype
    ):
      raise ValueError(
        f'The leaf {name} of the state is a {dtype or type(leaf).__name__},'
        ' and a checkpoint holds arrays of the dtypes that jax can hold;'
        ' wrap numbers in jnp.asarray and keys in jax.random.key_data.'
      )
    leaves[name] = leaf
  return leaves, structure


def num_bytes(leaf: Any) -> int:
  """Bytes of the whole array, over all processes."""
  return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize


def spelling(leaf: Any) -> dict[str, Any]:
  """Shape and dtype, in JSON."""
  return {'shape': list(leaf.shape), 'dtype': leaf.dtype.name}


def described(
  leaves: Mapping[str, Any], sums: Mapping[str, Mapping[str, list[int]]]
) -> dict[str, dict[str, Any]]:
  """Shape, dtype and sums of every leaf, in JSON; the same on all processes.

  Args:
    sums: {leaf: {region: sums}} of the regions that this process has.
  """
  sums_of_processes = from_all(sums)
  return {
    name: spelling(leaf)
    | {
      'crc32': {
        region_name: crcs
        for process_sums in sums_of_processes
        for region_name, crcs in process_sums[name].items()
      }
    }
    for name, leaf in leaves.items()
  }


def targets(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Where to put the leaves; one without a sharding, on the first device."""
  first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return {
    name: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=getattr(leaf, 'sharding', None) or first_device,
    )
    for name, leaf in leaves.items()
  }


def differences(
  saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
  """How the names, shapes and dtypes of two sets of leaves differ."""
  problems = [f'{name} is missing' for name in wanted if name not in saved]
  problems += [
    f'{name} is not expected' for name in saved if name not in wanted
  ]
  for name in wanted.keys() & saved.keys():
    for key, expected in spelling(wanted[name]).items():
      if saved[name][key] != expected:
        problems.append(
          f'{name} has {key} {saved[name][key]}, expected {expected}'
        )
  return sorted(problems)


def seal(body: Any) -> dict[str, Any]:
  """A JSON value with the CRC32 of its own text; keys become strings."""
  body = json.loads(json.dumps(body))
  text = json.dumps(body, sort_keys=True)
  return {'crc32': zlib.crc32(text.encode()), 'body': body}


def unseal(sealed: Mapping[str, Any]) -> Any:
  """The value of `seal`; ValueError if its checksum does not match."""
  text = json.dumps(sealed['body'], sort_keys=True)
  if zlib.crc32(text.encode()) != sealed['crc32']:
    raise ValueError('it does not have its own checksum')
  return sealed['body']


def region(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  """A block of an array as '0:4,8:16'; '' for a scalar."""
  bounds = [
    index_slice.indices(length)
    for index_slice, length in zip(index, shape, strict=True)
  ]
  return ','.join(f'{start}:{stop}' for start, stop, _ in bounds)


def _sums(array: np.ndarray, pool: concurrent.futures.Executor) -> list[int]:
  """CRC32 of each block of an array's bytes in C order (zlib frees the GIL)."""
  data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  starts = range(0, len(data), _BLOCK)
  return list(pool.map(lambda i: zlib.crc32(data[i : i + _BLOCK]), starts))


def _pool() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def of(leaves: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
  """{leaf: {region: sums}}: the whole array, or this process's own shards."""
  sums = {}
  with _pool() as pool:
    for name, leaf in leaves.items():
      if getattr(leaf, 'is_fully_addressable', True):
        everything = region((slice(None),) * len(leaf.shape), leaf.shape)
        sums[name] = {everything: _sums(np.asarray(leaf), pool)}
      else:
        sums[name] = {
          region(shard.index, leaf.shape): _sums(np.asarray(shard.data), pool)
          for shard in leaf.addressable_shards
          if shard.replica_id == 0
        }
  return sums


def of_bytes(data: bytes) -> list[int]:
  """The sums of bytes in C order."""
  with _pool() as pool:
    return _sums(np.frombuffer(data, np.uint8), pool)


def of_regions(
  copies: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, list[int]]]:
  """{leaf: {region: sums}} of {leaf: {region: array}}."""
  with _pool() as pool:
    return {
      name: {place: _sums(block, pool) for place, block in blocks.items()}
      for name, blocks in copies.items()
    }


def wrong(
  leaves: Mapping[str, jax.Array],
  expected: Mapping[str, Mapping[str, list[int]]],
) -> list[str]:
  """Names of the leaves whose bytes are not those that were saved.

  A region that this process does not hold whole is another's to check; a
  leaf of which it holds none (saved by several processes under another
  sharding) is not checked, and that is logged.
  """
  changed, unchecked = [], []
  with _pool() as pool:
    for name, leaf in leaves.items():
      if leaf.is_fully_addressable:
        array = np.asarray(leaf)

        def block_of(place, array=array):
          bounds = (bound.split(':') for bound in place.split(',') if bound)
          return array[
            tuple(slice(int(start), int(stop)) for start, stop in bounds)
          ]
      else:
        shards = {
          region(shard.index, leaf.shape): shard.data
          for shard in leaf.addressable_shards
        }

        def block_of(place, shards=shards):
          data = shards.get(place)
          return None if data is None else np.asarray(data)

      blocks = [
        (block_of(place), sums) for place, sums in expected[name].items()
      ]
      blocks = [(data, sums) for data, sums in blocks if data is not None]
      if not blocks:
        unchecked.append(name)
      elif any(_sums(data, pool) != sums for data, sums in blocks):
        changed.append(name)
  if unchecked:
    _log.info(
      'The sharding changed; the checksums of %d leaves were not compared'
      ' by process %d.',
      len(unchecked),
      jax.process_index(),
    )
  return changed


def from_all(value: Any) -> list[Any]:
  """This small JSON value of every process, in their order."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray([data.size]))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(bytes(row[: int(size)]))
    for row, size in zip(rows, sizes.reshape(-1), strict=True)
  ]
