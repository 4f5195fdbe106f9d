"""Several processes of one run on this machine."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import time
import types
from collections.abc import Callable, Mapping, Sequence

from tests.helpers import processes


class Cluster:
  """So many processes of one cluster, on a free port of this machine.

  A process is killed when the block ends.

  Args:
    folder: for a log of each process.
    count: how many processes.
    run, *arguments: what each calls.
    silence_s: after so many seconds a silent process is named.
    environment: further variables that are set for each.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    count: int,
    run: Callable[..., None],
    *arguments,
    silence_s: float = 5,
    environment: Mapping[str, str] = types.MappingProxyType({}),
  ):
    with socket.socket() as probe:
      probe.bind(('localhost', 0))
      port = probe.getsockname()[1]
    environment = {
      **processes.one_device(),
      **environment,
      'COORDINATOR_ADDRESS': f'localhost:{port}',
      'NUM_PROCESSES': str(count),
      'GEMMA_SCOPE_PEER_SECONDS': str(silence_s),
      'GEMMA_SCOPE_JOIN_SECONDS': '60',
    }
    self.logs = [folder / f'{port}.{i}.log' for i in range(count)]
    self.processes = [
      processes.fork(log, environment | {'PROCESS_ID': str(i)}, run, *arguments)
      for i, log in enumerate(self.logs)
    ]

  def __enter__(self) -> Cluster:
    return self

  def __exit__(self, *error):
    for process in self.processes:
      process.kill()
      process.join()

  def send(self, number: signal.Signals, to: int) -> None:
    os.kill(self.processes[to].pid, number)

  def wait_for(self, holds: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
      assert all(process.is_alive() for process in self.processes), (
        self.outputs()
      )
      assert time.monotonic() < deadline, 'too slow'
      time.sleep(0.02)

  def outputs(self) -> list[str]:
    return [log.read_text() if log.exists() else '' for log in self.logs]

  def codes(self, indices: Sequence[int], timeout: float = 120) -> list[int]:
    """Exit codes; negative after a signal, None of who has not ended."""
    for i in indices:
      self.processes[i].join(timeout)
    return [self.processes[i].exitcode for i in indices]

  def name(self, index: int) -> str:
    pid = self.processes[index].pid
    return f'Process {index} (host {socket.gethostname()}, pid {pid})'
