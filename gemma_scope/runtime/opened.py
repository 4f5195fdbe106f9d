"""The lease and the checkpoints of a run's folder, on a disk or in a bucket."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from gemma_scope.runtime import (
  bucket_checkpoints,
  bucket_lease,
  checkpoints,
  lease,
  remote,
)


def exclusive(
  folder: pathlib.Path, report: Callable[[str], None] = print
) -> lease.Lease | bucket_lease.BucketLease:
  """The lease of a folder, to enter."""
  store = remote.objects(folder)
  if store is None:
    return lease.Lease(folder)
  return bucket_lease.BucketLease(store, report=report)


def saves(folder: pathlib.Path, keep: int = 3) -> checkpoints.Checkpoints:
  """The checkpoints of a run, in its folder."""
  store = remote.objects(folder / 'checkpoints')
  if store is None:
    return checkpoints.Checkpoints(folder / 'checkpoints', keep=keep)
  return bucket_checkpoints.BucketCheckpoints(store, keep=keep)
