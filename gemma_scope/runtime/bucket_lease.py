"""One process at a time writes to a run's folder in a bucket.

The object run.lease names the holder and counts its heartbeats. It is created
only where there is none, and replaced or deleted only in the generation that
was read, so that of two processes one is refused, wherever they run. No clock
of one host is compared with another's: a process that finds a lease watches it
by its own clock. If the count changes, the holder lives, and the process is
refused; if it does not change for `stale_s`, the holder is gone, and the lease
is taken over. A holder on this boot of this host is looked up instead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from gemma_scope.runtime import cluster, lease, objects, progress

_NAME = 'run.lease'


class BucketLease(lease.Heartbeat):
  """Exclusive ownership of a folder in a bucket while a `with` block lasts.

  In a cluster the first process holds it for all.

  Args:
    store: of the folder.
    beat_s: seconds between heartbeats.
    stale_s: seconds without one after which the holder is gone.
    report: told when this process waits to see whether a holder lives.

  Raises:
    LeaseError: another live run holds the folder.
  """

  def __init__(
    self,
    store: objects.Objects,
    *,
    beat_s: float = 15.0,
    stale_s: float = 180.0,
    report: Callable[[str], None] = print,
  ):
    super().__init__(store.address, beat_s)
    self._store, self._report = store, report
    self._stale_s = stale_s
    self._beats, self._generation = 0, objects.ABSENT
    self._turn = threading.Lock()  # between heartbeat and check

  def __enter__(self) -> BucketLease:
    if not cluster.first():
      return self
    holder, generation = self._read()
    if holder is not None:
      generation = self._watched(holder, generation)
      self._warn_of_taking_over(holder)
    self._generation = generation
    if not self._beat():
      holder, _ = self._read()
      raise lease.LeaseError(self._in_use(holder or {}, 'just now'))
    self._start_beating()
    return self

  def __exit__(self, *unused):
    if self._stop_beating() and not self.lost:
      self._store.replace(_NAME, None, self._generation)

  def _is_ours(self) -> bool:
    with self._turn:
      holder, _ = self._read()
    return (holder or {}).get('token') == self._token

  def _watched(self, holder: Mapping[str, Any], generation: bytes) -> bytes:
    """The generation of a lease whose holder is gone; raises if it lives."""
    if lease.is_of_this_boot(holder):
      if lease.is_running(holder):
        raise lease.LeaseError(self._in_use(holder, 'on this machine'))
      return generation
    since = time.monotonic()
    self._report(
      f'{self._store.address} has a lease of process {holder.get("pid")} on '
      f'host {holder.get("host")}: waiting for its heartbeat, at most '
      f'{progress.duration(self._stale_s)}'
    )
    while time.monotonic() - since < self._stale_s:
      time.sleep(min(self._beat_s, self._stale_s) / 5)
      holder, now = self._read()
      if holder is None:
        return now  # it has just ended
      if now != generation:
        seconds = progress.duration(time.monotonic() - since)
        raise lease.LeaseError(
          self._in_use(holder, f'seen alive within {seconds}')
        )
    return generation

  def _in_use(self, holder: Mapping[str, Any], when: str) -> str:
    return (
      f'{self._store.address} is in use by process {holder.get("pid")} on host'
      f' {holder.get("host")} ({when}); stop that run or choose another folder.'
    )

  def _read(self) -> tuple[dict[str, Any] | None, bytes]:
    data, generation = self._store.read_generation(_NAME)
    if data is None:
      return None, generation
    try:
      holder = json.loads(data)
    except ValueError:  # damaged: only its generation can speak for it
      holder = {}
    return holder if isinstance(holder, dict) else {}, generation

  def _beat(self) -> bool:
    """Writes the lease over the generation that is known."""
    self._beats += 1
    holder = {**lease.this_process(), 'token': self._token}
    holder['beat'] = self._beats
    data = json.dumps(holder, indent=1).encode()
    with self._turn:
      generation = self._store.replace(_NAME, data, self._generation)
      if not generation:  # another's, or ours by a request that was sent twice
        stored, generation = self._read()
        if (stored or {}).get('token') != self._token:
          return False
      self._generation = generation
    return True
