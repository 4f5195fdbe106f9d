"""Several processes as one job: start-up, watchdog, the first process.

  joined            a `with` block around a whole command: joins the cluster,
                    if there is one, and tells the others when this process
                    fails
  first             whether this process writes files and reports
  first_goes_ahead  the first process runs a block, then all others do

Start-up: every process connects to the coordinator, which is the first process.
If some are missing after GEMMA_SCOPE_JOIN_SECONDS (300), the processes that did
connect end, and their error names the coordinator's address.

Watchdog: every process writes a counter into the coordinator's key-value store.
A counter that does not change for GEMMA_SCOPE_PEER_SECONDS (60) belongs to a
process that was killed, stopped or cut off. Every other process then names it
and ends; otherwise it would wait in a collective forever. (JAX's own heartbeats
end the job too, but by SIGABRT with a C++ stack trace, without the host, and
mostly without the number of the process that failed.)

The exit code is 1, and the same command on all hosts continues from the last
checkpoint. A lone process has no watchdog and keeps its own signals.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its key-value store has no public name

_PREFIX = 'gemma_scope/beat/'
_WEEK_MS = 7 * 24 * 3600 * 1000
_names = itertools.count()


class ClusterError(RuntimeError):
  """The process cannot join the cluster."""


def first() -> bool:
  """Whether this process is the one that writes and reports."""
  # A lone process is first without a device being touched.
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def part() -> tuple[int, int]:
  """This process's index, and the number of processes."""
  if not jax.distributed.is_initialized():
    return 0, 1  # without a device being touched
  return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
  """The first process runs the block, then the others run it at once.

  Use it for files that one process writes and all read. Every process must
  enter the block. They wait at the coordinator, so that no device is busy.
  """
  if not first():
    _barrier()
  yield
  if first():
    _barrier()


def _barrier() -> None:
  """Waits for all processes; the watchdog ends the wait if one is lost."""
  if jax.distributed.is_initialized():
    client = distributed.global_state.client
    client.wait_at_barrier(f'gemma_scope/{next(_names)}', _WEEK_MS)


def wait_for_all(name: str) -> None:
  """Waits until all processes have called it with this name, in any thread."""
  if jax.distributed.is_initialized():
    distributed.global_state.client.wait_at_barrier(name, _WEEK_MS)


# ------------------------------------------------------------------- joining


def find() -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize; None for a lone process.

  By hand in COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID. Under SLURM, on
  GKE and on Cloud TPU slices JAX finds the arguments itself ({} here), and this
  function only decides whether there are several processes. JAX cannot do that:
  it raises in a process without a cluster and in a Kubernetes pod that is not
  part of a job, and it waits six minutes for a metadata server that is silent.

  Raises:
    ClusterError: only some of the variables are set.
  """
  names = 'COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'
  variables = [os.environ.get(name, '') for name in names]
  if any(variables):
    address, count, index = variables
    if not (address and count.isdigit() and index.isdigit()):
      raise ClusterError(
        f'Set all of {", ".join(names)}, such as host:8476, 4 and 0; found '
        + ', '.join(map(repr, variables))
        + '.'
      )
    if int(count) == 1:
      return None
    return {
      'coordinator_address': address,
      'num_processes': int(count),
      'process_id': int(index),
    }
  tasks = os.environ.get('SLURM_NTASKS', '1')
  slices = os.environ.get('MEGASCALE_NUM_SLICES', '1')
  several = (
    # salloc's shell has the first variable, and is no task.
    (int(tasks) > 1 and 'SLURM_PROCID' in os.environ)
    or int(slices) > 1
    or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
    or (_has_tpu() and ',' in _metadata('worker-network-endpoints'))
  )
  return {} if several else None


def _has_tpu() -> bool:
  """Whether this machine has TPU chips that a process may use."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms:
    return False
  return bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))


def _metadata(name: str) -> str:
  """An attribute of this machine in Google's cloud; '' elsewhere."""
  if os.environ.get('TPU_SKIP_MDS_QUERY'):
    return ''
  # By number: where there is no such network, no name is looked up either.
  host = os.environ.get('GCE_METADATA_IP', '169.254.169.254')
  request = urllib.request.Request(
    f'http://{host}/computeMetadata/v1/instance/attributes/{name}',
    headers={'Metadata-Flavor': 'Google'},
  )
  for _ in range(2):
    with contextlib.suppress(OSError, urllib.error.URLError):
      with urllib.request.urlopen(request, timeout=3) as answer:
        return answer.read().decode().strip()
  return ''


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Joins the cluster, if there is one, and leaves it at the end of the block.

  Enter the block before any device is used. If it raises, the error is printed
  (ValueError, RuntimeError and OSError without a traceback), the other
  processes are notified, and this one ends. A process without a cluster only
  runs the block.
  """
  arguments = find()
  if arguments is None:
    yield
    return
  limit_s = float(os.environ.get('GEMMA_SCOPE_PEER_SECONDS', '60'))
  _join(arguments, limit_s)
  watch = _Watch(limit_s)
  try:
    yield
    _barrier()  # the first one may still be writing
  except BaseException as error:
    _print_error(error)
    if _of_jax(error):  # most likely another process's end: say whose
      time.sleep(1.5 * limit_s)
    watch.leave(f'{type(error).__name__}: {error}')
  watch.stop()
  jax.distributed.shutdown()


def _join(arguments: dict[str, Any], limit_s: float) -> None:
  wait_s = float(os.environ.get('GEMMA_SCOPE_JOIN_SECONDS', '300'))
  state = distributed.global_state

  def give_up():
    _end(
      f'Process {state.process_id} of {state.num_processes} waited '
      f'{wait_s:g} s at the coordinator {state.coordinator_address}, and not '
      'all came: start the command on every host, and see that each reaches '
      'that address.'
    )

  # A timer of our own: JAX's ends the process with a stack of C++.
  timer = threading.Timer(wait_s, give_up)
  timer.daemon = True
  timer.start()
  jax.distributed.initialize(
    **arguments,
    initialization_timeout=int(2 * wait_s) + 60,
    heartbeat_timeout_seconds=int(3 * limit_s) + 10,
  )
  timer.cancel()


def _of_jax(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__
  return False


def _print_error(error: BaseException) -> None:
  if isinstance(error, (ValueError, RuntimeError, OSError)):
    _say(f'{type(error).__name__}: {error}')
  else:
    _say(''.join(traceback.format_exception(error)).rstrip())


def _say(sentence: str) -> None:
  sys.stdout.flush()
  # One write, without locks of Python: a thread may call this.
  os.write(2, f'{sentence}\n'.encode())


def _end(sentence: str) -> NoReturn:
  """Ends at once, because a normal exit would wait for the others."""
  _say(sentence)
  os._exit(1)


# ------------------------------------------------------------------ watching


class _Watch:
  """The watchdog of this process, in two threads.

  One talks to the coordinator and hangs if that hangs. The other compares the
  counters with the clock.
  """

  def __init__(self, limit_s: float):
    state = distributed.global_state
    self._address, self._index = state.coordinator_address, state.process_id
    self._client, self._limit_s = state.client, limit_s
    self._beat_s = limit_s / 8
    self._beats = itertools.count()
    self._stopped = threading.Event()
    self._writing = threading.Lock()
    now = time.monotonic()
    self._answered = now  # the coordinator, last
    self._others: dict[int, dict[str, Any]] = {
      i: {'since': now}
      for i in range(state.num_processes)
      if i != state.process_id
    }
    # JAX aborts this process as soon as the coordinator is gone. The handler
    # sleeps for six seconds (the signal's number is its argument), in which
    # `_judge` names the coordinator.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    for target in (self._exchange, self._judge):
      threading.Thread(target=target, daemon=True).start()

  def stop(self) -> None:
    """Stops watching; call it before leaving the cluster."""
    self._stopped.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._beat(state='done')

  def leave(self, sentence: str) -> NoReturn:
    """Tells the other processes why this one ends, and ends it."""
    self._tell(sentence)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

  def _tell(self, sentence: str) -> None:
    self._stopped.set()
    teller = threading.Thread(target=self._beat, args=('failed', sentence))
    teller.daemon = True  # the coordinator may not answer
    teller.start()
    teller.join(self._beat_s)
    if self._index == 0:  # the others read it here
      time.sleep(2 * self._beat_s)

  def _beat(self, state: str = 'alive', why: str = '') -> None:
    value = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'beat': next(self._beats),
      'state': state,
      'why': why[:500],
    }
    with self._writing:
      if state == 'alive' and self._stopped.is_set():
        return  # it would overwrite why this process failed
      self._client.key_value_set(
        f'{_PREFIX}{self._index}', json.dumps(value), allow_overwrite=True
      )

  def _exchange(self) -> None:
    while not self._stopped.is_set():
      try:
        self._beat()
        states = self._client.key_value_dir_get(_PREFIX)
      except jax.errors.JaxRuntimeError:
        pass  # the clock decides
      else:
        now = time.monotonic()
        self._answered = now
        for key, text in states:
          peer = self._others.get(int(key.rpartition('/')[2]))
          if peer is not None and peer.get('text') != text:
            peer.update(json.loads(text), text=text, since=now)
      self._stopped.wait(self._beat_s)

  def _coordinator_refuses(self) -> bool:
    host, _, port = self._address.rpartition(':')
    try:
      socket.create_connection((host, int(port)), timeout=2).close()
    except ConnectionRefusedError:
      return True
    except OSError:
      pass  # slow, or cut off: the clock decides
    return False

  def _judge(self) -> None:
    last_look = time.monotonic()
    while not self._stopped.wait(min(self._beat_s / 2, 2)):
      now = time.monotonic()
      if now - last_look > self._limit_s / 2:  # it was this process that slept
        self._answered = now
        for peer in self._others.values():
          peer['since'] = now
      last_look = now
      if self._index and self._coordinator_refuses():
        self._name(0, 'is gone, and the coordinator with it')
      if self._index and now - self._answered > self._limit_s:
        self._name(0, f'has not answered for {now - self._answered:.0f} s')
      if now - self._answered > 2 * self._beat_s:
        continue  # what is known of the others is old
      for number, peer in self._others.items():
        state, silent_s = peer.get('state'), now - peer['since']
        if state == 'failed':
          self._name(number, f'ended with {peer["why"]}')
        if state != 'done' and silent_s > self._limit_s:
          self._name(number, f'has not answered for {silent_s:.0f} s')

  def _name(self, number: int, event: str) -> None:
    if self._stopped.is_set():
      return
    peer = self._others[number]
    address = (
      f' (host {peer["host"]}, pid {peer["pid"]})' if peer.get('host') else ''
    )
    sentence = f'Process {number}{address} {event}'
    if number:  # the others hear the cause, and not this process's own silence
      self._tell(sentence)
    _end(
      f'{sentence}; process {self._index} ends too. The same command on every '
      'host continues from the last checkpoint.'
    )
