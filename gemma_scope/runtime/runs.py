"""One run, one folder: the lease, the interrupt, the refusal of changes.

  Lease      only one live process owns a run's folder. A file holds host,
             pid, start time and a heartbeat (its modification time); a dead
             holder's lease is taken over.
  Interrupt  SIGTERM and Ctrl-C become a flag that every phase polls, so that
             the run ends at a whole step, saved.
  refuse_changes  a resumed run must have the config and the data it began
             with; what differs is named.

Nothing here knows of training; a run holds `with Lease(folder), Interrupt()
as interrupt:` around all its phases.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import signal
import socket
import threading
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from gemma_scope import files
from gemma_scope.runtime import cluster, metrics

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------- lease


class LeaseError(RuntimeError):
  """The folder belongs to another live run, or was lost to one."""


def _process_start(pid: int) -> str | None:
  """When a process started, as its kernel spells it; None when it is dead.

  A pid alone is not a name: the kernel gives it out again. A zombie (killed,
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
  try:  # no /proc: macOS
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except OSError:
    pass
  return 'unknown'


def _boot() -> str:
  """Names this boot of this kernel; two machines may share a host name."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return 'unknown'


class Lease:
  """Exclusive ownership of a folder while the `with` block lasts.

  `run.lease` says who holds it; `run.lock` is held (flock) only for the
  moments in which the lease is read and written, so that of two takers of one
  stale lease the second sees the first's. A holder is dead when it is on this
  boot of this host and its process is gone (or its pid belongs to a younger
  process), or is elsewhere and its heartbeat is older than `stale_s`. Ages
  are differences of two times stamped by the folder's own file system, so two
  hosts' clocks need not agree. In a cluster the first process holds the lease
  for all.

  Raises LeaseError, one sentence, when another live run holds the folder.
  """

  def __init__(self, folder, *, beat_s: float = 30.0, stale_s: float = 300.0):
    self._folder = pathlib.Path(folder)
    self._path = self._folder / 'run.lease'
    self._beat_s, self._stale_s = beat_s, stale_s
    self._token = uuid.uuid4().hex
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None
    self.lost = False

  def __enter__(self) -> Lease:
    if not cluster.first():
      return self
    self._folder.mkdir(parents=True, exist_ok=True)
    with self._mutex() as now:
      holder = self._read()
      if holder is not None:
        beat = now - self._path.stat().st_mtime
        held = now - holder.get('taken', now)
        if not self._stale(holder, beat):
          raise LeaseError(
            f'{self._folder} is in use by process {holder.get("pid")} on'
            f' host {holder.get("host")}, which took it'
            f' {metrics.duration(max(0.0, held))} ago (last heartbeat'
            f' {metrics.duration(max(0.0, beat))} ago); stop that run or choose'
            ' another folder.'
          )
        _log.warning(
          'Taking over %s from process %s on host %s, which is gone.',
          self._folder,
          holder.get('pid'),
          holder.get('host'),
        )
      self._write(now)
    self._stop.clear()
    self._thread = threading.Thread(
      target=self._beat, name='lease-heartbeat', daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *unused):
    if self._thread is None:
      return
    self._stop.set()
    self._thread.join()
    self._thread = None
    with self._mutex():
      holder = self._read()
      if holder and holder.get('token') == self._token:
        self._path.unlink()

  def check(self):
    """Raises LeaseError when another run took the folder (call per save).

    It can happen only to a process that did not run for `stale_s`: a laptop
    that slept, a machine that was paused.
    """
    if self._thread is not None and not self.lost:
      holder = self._read()
      self.lost = not holder or holder.get('token') != self._token
    if self.lost:
      raise LeaseError(
        f'Another run took over {self._folder} while this one was not'
        ' running; this one must stop without writing there.'
      )

  @contextlib.contextmanager
  def _mutex(self):
    """Yields the file system's time while no other taker is in here."""
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

  def _write(self, now: float):
    holder = {
      'host': socket.gethostname(),
      'boot': _boot(),
      'pid': os.getpid(),
      'start': _process_start(os.getpid()),
      'taken': now,
      'token': self._token,
    }
    files.write_json(self._path, holder)
    self.lost = False

  def _stale(self, holder: Mapping[str, Any], beat_age_s: float) -> bool:
    pid = holder.get('pid')
    here = (
      holder.get('host') == socket.gethostname()
      and holder.get('boot') == _boot()
      and isinstance(pid, int)
    )
    if here:
      start = _process_start(pid)
      return start is None or start != holder.get('start')
    return beat_age_s > self._stale_s

  def _beat(self):
    while not self._stop.wait(self._beat_s):
      try:
        holder = self._read()
        if not holder or holder.get('token') != self._token:
          self.lost = True
          return
        os.utime(self._path)
      except OSError as error:  # a network file system may stumble
        _log.warning('No heartbeat could be written: %s.', error)


# --------------------------------------------------------------- interrupt


class Interrupted(Exception):
  """SIGTERM or Ctrl-C asked the run to end."""


class Interrupt:
  """The one owner of SIGTERM and SIGINT; a flag that every phase polls.

    with Interrupt() as interrupt:
      for batch in harvest: interrupt.check()     # or: if interrupt.requested
      for step in ...:
        if interrupt.at_step(step): save; break

  One process: handlers in the main thread set the flag; a second Ctrl-C
  raises KeyboardInterrupt at once. Python runs a handler between bytecodes,
  so inside one long compilation the flag is set when that call returns.

  In a cluster (joined before entering): of two handlers of SIGTERM the one
  installed last wins silently, and jax's preemption service must be the one,
  for it makes all processes stop at the same place. SIGTERM is then left to
  jax, Ctrl-C is turned into SIGTERM, and the flag appears at the call on which
  all agree: every process must make the same calls of `check` and `at_step`.
  """

  def __init__(self):
    self._flag = threading.Event()
    self._old: dict[int, Any] = {}
    self._cluster = False
    self._calls = 0
    self._pressed = False

  def __enter__(self) -> Interrupt:
    if threading.current_thread() is not threading.main_thread():
      raise RuntimeError(
        'Interrupt installs signal handlers, which only the main thread may'
        ' do; enter it there and pass it on.'
      )
    self._cluster = jax.distributed.is_initialized()
    mine = (
      (signal.SIGINT,)
      if self._cluster
      else (
        signal.SIGINT,
        signal.SIGTERM,
      )
    )
    self._old = {s: signal.signal(s, self._handle) for s in mine}
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      # None: a handler that was not Python's cannot be put back by Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._old = {}

  def _handle(self, number, frame):
    del frame
    if number == signal.SIGINT:
      if self._pressed:
        raise KeyboardInterrupt
      self._pressed = True
    # os.write: print may be interrupted in the middle of its own lock.
    with contextlib.suppress(OSError):
      os.write(
        2,
        f'\n{signal.Signals(number).name}: ending at the next whole step'
        ' (Ctrl-C again: at once, unsaved)\n'.encode(),
      )
    if self._cluster:
      os.kill(os.getpid(), signal.SIGTERM)  # jax tells the other processes
    else:
      self._flag.set()

  @property
  def requested(self) -> bool:
    """True once the run should end."""
    return self._flag.is_set()

  def check(self):
    """Raises Interrupted once the run should end."""
    if self._agreed():
      raise Interrupted('The run was asked to end (SIGTERM or Ctrl-C).')

  def at_step(self, step: int) -> bool:
    """True when this process, and every other one, is to stop at `step`."""
    del step  # calls are counted: a harvest polls between two steps
    return self._agreed()

  def _agreed(self) -> bool:
    self._calls += 1
    if (
      self._cluster
      and not self.requested
      and multihost_utils.reached_preemption_sync_point(self._calls)
    ):
      self._flag.set()
    return self.requested


# ----------------------------------------------------------------- changes


class ChangedError(ValueError):
  """A resumed run differs from the run that made its folder."""


_ABSENT = object()


def _show(value: Any) -> str:
  if value is _ABSENT:
    return 'absent'
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'


def _plain(value: Any) -> Any:
  """As JSON gives it back, for a saved dict is compared with a live one."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


def _spell(value: Any) -> str:
  return json.dumps(value, sort_keys=True, default=repr)


def _walk(old: Any, new: Any, name: str):
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old | new):
      yield from _walk(
        old.get(key, _ABSENT),
        new.get(key, _ABSENT),
        f'{name}.{key}' if name else key,
      )
  # By spelling: True is not 1, and nan is nan.
  elif _spell(old) != _spell(new):
    yield name, old, new


def fingerprint_difference(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  ignore: Collection[str] = (),
) -> list[str]:
  """The fields that differ, as 'train.batch: was 64, is 128'.

  Nested dicts are compared field by field, everything else as a whole; tuples
  and lists are one, as in JSON. A name in `ignore` covers what is below it.
  """
  skip = tuple(ignore)
  return [
    f'{name}: was {_show(was)}, is {_show(now)}'
    for name, was, now in _walk(_plain(old), _plain(new), '')
    if not any(name == s or name.startswith(s + '.') for s in skip)
  ]


def refuse_changes(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  ignore: Collection[str] = (),
  what: str = 'config',
):
  """Raises ChangedError, one sentence naming every field that differs."""
  found = fingerprint_difference(old, new, ignore)
  if found:
    raise ChangedError(
      f'This run was started with another {what} ({"; ".join(found)}); set'
      ' it back, or choose another folder for a new run.'
    )
