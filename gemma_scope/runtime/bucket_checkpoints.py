"""Checkpoints in a bucket: the bytes of every leaf, and last a commit.

  <step>/<leaf>/<region>.<part>   raw bytes in C order, 64 MiB at most
  <step>/commit.json              written last: shapes, dtypes, regions, the
                                  CRC32 of every 16 MiB, the caller's dict

A region is the block of an array that one process holds (`checksums`). Every
process writes its own and reads what its devices need, whatever the number of
processes was when the step was saved; every byte is compared with its CRC32 on
the way in. `save` copies to the memory of the host and returns; threads upload,
all processes wait for one another at the coordinator, and the first one writes
the commit. A step without a commit does not exist; to delete one, its commit is
deleted first.

Orbax does this on disks and, with gcsfs, in gs://; it takes s3:// for a path of
the disk, and commits a step by a rename there, which a bucket does not have.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gemma_scope.runtime import checkpoints, checksums, cluster
from gemma_scope.runtime.objects import PART, BucketError, Objects

_log = logging.getLogger(__name__)

_COMMIT, _DAMAGED = 'commit.json', 'damaged.json'
_TRIES = 3  # for bytes that do not have their checksum
_numbers = itertools.count()


class BucketCheckpoints(checkpoints.Checkpoints):
  """As `checkpoints.Checkpoints`, in a bucket.

  Args:
    store: below which the steps are.
    keep: how many of the newest steps stay.
  """

  def __init__(self, store: Objects, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f'checkpoint.keep is at least 1; found {keep}.')
    self._store, self._folder = store, store.address
    self._keep, self._cleaned = keep, False
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._saving: concurrent.futures.Future | None = None
    self._step = -1  # the one that is being saved

  def close(self):
    """Waits for the save in flight; raises its error."""
    try:
      self.wait()
    finally:
      self._pool.shutdown()

  def steps(self) -> list[int]:
    """The committed steps in the bucket, oldest first."""
    split_names = (name.split('/') for name in self._names())
    return sorted(
      int(name_parts[0])
      for name_parts in split_names
      if len(name_parts) == 2
      and name_parts[1] == _COMMIT
      and name_parts[0].isdecimal()
    )

  def _names(self) -> list[str]:
    try:
      return self._store.names()
    except BucketError as error:
      raise checkpoints.CheckpointError(str(error)) from error

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """See `checkpoints.Checkpoints.save`."""
    self.wait()
    leaves, _ = checksums.named(state)
    self._prepare()
    # The first process decides for all.
    if checksums.from_all(step in self.steps())[0]:
      _log.info('Step %d is already saved in %s.', step, self._folder)
      return
    copies = {name: dict(_blocks(leaf)) for name, leaf in leaves.items()}
    sealed = self._sealed(step, leaves, checksums.of_regions(copies), meta)
    self._step = step
    barrier = f'gemma_scope/save/{next(_numbers)}'
    self._saving = self._pool.submit(
      self._upload, step, copies, json.dumps(sealed).encode(), barrier
    )

  def _upload(self, step: int, copies, sealed: bytes, barrier: str) -> None:
    self._store.write_all(
      (_name(step, leaf, region, part), data)
      for leaf, blocks in copies.items()
      for region, block in blocks.items()
      for part, data in enumerate(_cut(block))
    )
    cluster.wait_for_all(barrier)
    if jax.process_index() == 0:
      self._store.write(f'{step}/{_COMMIT}', sealed)
      for old_step in self.steps()[: -self._keep]:
        self._delete(old_step)

  def _delete(self, step: int) -> None:
    # The commit first: a step half deleted must not look like a step.
    self._store.delete(f'{step}/{_COMMIT}')
    self._store.delete_below(f'{step}/')

  def wait(self) -> None:
    """Waits until the save in flight is committed; raises its error."""
    if self._saving is None:
      return
    saving, self._saving = self._saving, None
    try:
      saving.result()
    except Exception as error:
      raise checkpoints.CheckpointError(
        f'Step {self._step} could not be saved in {self._folder}: '
        f'{str(error) or type(error).__name__} Earlier steps are intact.'
      ) from error

  def _prepare(self):
    """Removes steps that a killed run left without a commit."""
    if self._cleaned:
      return
    if jax.process_index() == 0:
      names_by_step: dict[str, set[str]] = {}
      for name in self._names():
        step, _, object_name = name.partition('/')
        names_by_step.setdefault(step, set()).add(object_name)
      for step, object_names in names_by_step.items():
        if step.isdecimal() and not object_names & {_COMMIT, _DAMAGED}:
          _log.info('Removing step %s, left by a run that was killed.', step)
          self._store.delete_below(f'{step}/')
    checksums.from_all(None)  # a barrier
    self._cleaned = True

  # Of `restore`, which is the base class's.

  def _exists(self, step: int) -> bool:
    return step in self.steps()

  def _set_aside(self, step: int):
    if jax.process_index() == 0:
      commit = self._store.read(f'{step}/{_COMMIT}')
      self._store.write(f'{step}/{_DAMAGED}', commit or b'{}')
      self._store.delete(f'{step}/{_COMMIT}')
    checksums.from_all(None)

  def _body(self, step: int) -> dict[str, Any]:
    for attempt in range(_TRIES):
      try:
        return self._checked_body(step)
      except checkpoints._Damaged:
        if attempt == _TRIES - 1:
          raise

  def _checked_body(self, step: int) -> dict[str, Any]:
    try:
      body = checksums.unseal(json.loads(self._store.read(f'{step}/{_COMMIT}')))
    except BucketError:
      raise
    except Exception as error:
      raise checkpoints._Damaged(
        f'its {_COMMIT} cannot be read ({type(error).__name__}: {error})'
      ) from error
    return self._of_this_version(step, body)

  def _leaves(self, step: int, body: Mapping, wanted: Mapping) -> dict:
    targets = checksums.targets(wanted)
    return {
      name: self._leaf(step, name, body['leaves'][name]['crc32'], target)
      for name, target in targets.items()
    }

  def _leaf(self, step: int, name: str, sums: Mapping, target) -> jax.Array:
    """An array: the blocks of this process's devices, from saved regions."""
    regions_read: dict[str, np.ndarray] = {}  # regions, read and checked

    def block(index):
      bounds = _bounds(index, target.shape)
      array = np.empty([stop - start for start, stop in bounds], target.dtype)
      filled = 0
      for region in sums:
        saved = _parsed(region)
        overlap = [
          (max(a, c), min(b, d))
          for (a, b), (c, d) in zip(saved, bounds, strict=True)
        ]
        if any(start >= stop for start, stop in overlap):
          continue
        if region not in regions_read:
          regions_read[region] = self._region(
            step, name, region, sums[region], target.dtype
          )
        slices_in = lambda block_bounds, both=overlap: tuple(
          slice(a - c, b - c)
          for (a, b), (c, _) in zip(both, block_bounds, strict=True)
        )
        array[slices_in(bounds)] = regions_read[region][slices_in(saved)]
        filled += math.prod(b - a for a, b in overlap)
      if filled != array.size:
        raise checkpoints._Damaged(f'{name} has holes')
      return array

    return jax.make_array_from_callback(target.shape, target.sharding, block)

  def _region(self, step, name, region, sums, dtype) -> np.ndarray:
    """A region's bytes, once every block of them has its CRC32."""
    shape = [stop - start for start, stop in _parsed(region)]
    size = math.prod(shape) * dtype.itemsize
    count = -(-size // PART)
    names = [_name(step, name, region, part) for part in range(count)]
    for _ in range(_TRIES):
      data = b''.join(part or b'' for part in self._store.read_all(names))
      if len(data) == size and checksums.of_bytes(data) == sums:
        return np.frombuffer(data, dtype).reshape(shape)
    raise checkpoints._Damaged(
      f'the bytes of {name} are not those saved ({len(data):,} of {size:,})'
    )


def _blocks(leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
  """This process's regions of an array, copied to the host's memory."""
  if getattr(leaf, 'is_fully_addressable', True):
    index = (slice(None),) * len(leaf.shape)
    yield checksums.region(index, leaf.shape), _copied(leaf)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield checksums.region(shard.index, leaf.shape), _copied(shard.data)


def _copied(x: Any) -> np.ndarray:
  # On a CPU np.asarray is a view of the device's memory, which is donated.
  return np.array(x, order='C')


def _cut(block: np.ndarray) -> Iterator[bytes]:
  data = memoryview(block.reshape(-1).view(np.uint8))
  for start in range(0, len(data), PART):
    yield bytes(data[start : start + PART])


def _name(step: int, leaf: str, region: str, part: int) -> str:
  spelled = region.replace(':', '-').replace(',', '_') or 'scalar'
  return f'{step}/{leaf}/{spelled}.{part:05d}'


def _parsed(region: str) -> list[tuple[int, int]]:
  bounds = (bound.split(':') for bound in region.split(',') if bound)
  return [(int(start), int(stop)) for start, stop in bounds]


def _bounds(index, shape) -> list[tuple[int, int]]:
  return [
    index_slice.indices(size)[:2]
    for index_slice, size in zip(index, shape, strict=True)
  ]
