"""One process at a time writes to a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from gemma_scope import files
from gemma_scope.runtime import cluster, progress

_log = logging.getLogger(__name__)


class LeaseError(RuntimeError):
  """The folder belongs to another live run, or was lost to one."""


def _process_start(pid: int) -> str | None:
  """When a process started, as its kernel writes it; None when it is dead.

  A pid alone identifies no process, for the kernel reuses it. A zombie (killed,
  not yet reaped by its parent) counts as dead.
  """
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    if os.path.exists('/proc/self/stat'):
      return None
  except OSError:
    return 'unknown'
  else:
    fields = stat.rpartition(')')[2].split()
    return None if fields[0] in 'ZX' else fields[19]
  return 'unknown' if files.is_alive(pid) else None  # no /proc: macOS


def _boot() -> str:
  """Identifies this boot of this machine; host names may be shared."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return 'unknown'


def this_process() -> dict[str, Any]:
  """What identifies this process, for a lease."""
  return {
    'host': socket.gethostname(),
    'boot': _boot(),
    'pid': os.getpid(),
    'start': _process_start(os.getpid()),
  }


def is_of_this_boot(holder: Mapping[str, Any]) -> bool:
  """Whether a lease's holder would be a process of this machine."""
  return (
    holder.get('host') == socket.gethostname()
    and holder.get('boot') == _boot()
    and isinstance(holder.get('pid'), int)
  )


def is_running(holder: Mapping[str, Any]) -> bool:
  """Whether a holder on this machine still runs."""
  start = _process_start(holder['pid'])
  return start is not None and start == holder.get('start')


class Heartbeat:
  """A lease that a thread keeps alive while this process holds it.

  Subclasses write a heartbeat (`_beat`) and compare the holder (`_is_ours`).

  Args:
    where: the folder, as messages name it.
    beat_s: seconds between heartbeats.

  Attributes:
    lost: whether another run was seen to hold the folder.
  """

  def __init__(self, folder_shown: str, beat_s: float):
    self._where, self._beat_s = folder_shown, beat_s
    self._token = uuid.uuid4().hex
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None
    self.lost = False

  def check(self):
    """Raises LeaseError when another run took the folder (call per save).

    It can happen only to a process that did not run for a while: a laptop that
    slept, a machine that was paused.
    """
    if self._thread is not None and not self.lost:
      self.lost = not self._is_ours()
    if self.lost:
      raise LeaseError(
        f'Another run took over {self._where} while this one was not'
        ' running; this one must stop without writing there.'
      )

  def _beat(self) -> bool:
    """Writes a heartbeat; False if another run holds the folder."""
    raise NotImplementedError

  def _is_ours(self) -> bool:
    raise NotImplementedError

  def _warn_of_taking_over(self, holder: Mapping[str, Any]) -> None:
    _log.warning(
      'Taking over %s from process %s on host %s, which is gone.',
      self._where,
      holder.get('pid'),
      holder.get('host'),
    )

  def _start_beating(self) -> None:
    self.lost = False
    self._stop.clear()
    self._thread = threading.Thread(
      target=self._beat_until_stopped, name='lease-heartbeat', daemon=True
    )
    self._thread.start()

  def _stop_beating(self) -> bool:
    """Ends the thread; False if this process has none."""
    if self._thread is None:
      return False
    self._stop.set()
    self._thread.join()
    self._thread = None
    return True

  def _beat_until_stopped(self) -> None:
    while not self._stop.wait(self._beat_s):
      try:
        if not self._beat():
          self.lost = True
          return
      except OSError as error:  # a network file system may stumble
        _log.warning('No heartbeat could be written: %s', error)


class Lease(Heartbeat):
  """Exclusive ownership of a folder while a `with` block lasts.

  `run.lease` names the holder. `run.lock` is locked (flock) only while the
  lease is read or written, so that of two processes that take over a stale
  lease the second sees the first. A holder on this boot of this host is dead
  when its process is gone, or its pid belongs to a younger process; a holder
  elsewhere is dead when its heartbeat is older than `stale_s`. Ages compare two
  times that the folder's own file system stamped: the clocks of two hosts need
  not agree. In a cluster the first process holds the lease for all.

  Raises:
    LeaseError: another live run holds the folder.
  """

  def __init__(self, folder, *, beat_s: float = 30.0, stale_s: float = 300.0):
    super().__init__(str(folder), beat_s)
    self._folder, self._stale_s = pathlib.Path(folder), stale_s
    self._path = self._folder / 'run.lease'

  def __enter__(self) -> Lease:
    if not cluster.first():
      return self
    self._folder.mkdir(parents=True, exist_ok=True)
    with self._mutex() as now:
      holder = self._read()
      if holder is not None:
        beat_age_s = now - self._path.stat().st_mtime
        held_s = now - holder.get('taken', now)
        if not self._stale(holder, beat_age_s):
          raise LeaseError(
            f'{self._folder} is in use by process {holder.get("pid")} on'
            f' host {holder.get("host")}, which took it'
            f' {progress.duration(max(0.0, held_s))} ago (last heartbeat'
            f' {progress.duration(max(0.0, beat_age_s))} ago); stop that run or'
            ' choose another folder.'
          )
        self._warn_of_taking_over(holder)
      holder = {**this_process(), 'taken': now, 'token': self._token}
      files.write_json(self._path, holder)
    self._start_beating()
    return self

  def __exit__(self, *unused):
    if not self._stop_beating():
      return
    try:
      with self._mutex():
        if self._is_ours():
          self._path.unlink()
    except OSError as error:  # the next run finds that this process is gone
      _log.warning(
        'The lease of %s could not be given back: %s.', self._folder, error
      )

  @contextlib.contextmanager
  def _mutex(self):
    """Yields the file system's time, with no other process in the block."""
    handle = os.open(self._folder / 'run.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX)
      except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
          raise
        _log.warning(
          'The file system of %s has no locks (%s); a second run that starts'
          ' at the same moment would not be seen.',
          self._folder,
          error,
        )
      os.utime(handle)
      yield os.fstat(handle).st_mtime
    finally:
      os.close(handle)  # and with it the flock

  def _read(self) -> dict[str, Any] | None:
    try:
      holder = json.loads(self._path.read_text())
      return holder if isinstance(holder, dict) else {}
    except FileNotFoundError:
      return None
    except ValueError:  # damaged: only its heartbeat can speak for it
      return {}

  def _stale(self, holder: Mapping[str, Any], beat_age_s: float) -> bool:
    if is_of_this_boot(holder):
      return not is_running(holder)
    return beat_age_s > self._stale_s

  def _is_ours(self) -> bool:
    return (self._read() or {}).get('token') == self._token

  def _beat(self) -> bool:
    if is_ours := self._is_ours():
      os.utime(self._path)
    return is_ours
