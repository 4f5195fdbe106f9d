"""Commands in processes of their own.

They are forked from a server that has imported JAX, Gemma and the package:
starting an interpreter for each takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import time
from collections.abc import Sequence

import gemma_scope

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]


def fork(log: pathlib.Path, environment, run, *arguments):
  """A started process that calls `run` and writes all output to `log`."""
  server = multiprocessing.get_context('forkserver')
  server.set_forkserver_preload(['tests.helpers.preloaded'])
  process = server.Process(
    target=_redirected,
    args=(log, environment, run, *arguments),
    daemon=True,  # it ends with the tests
  )
  process.start()
  return process


def one_device() -> dict[str, str]:
  """The environment of a process that has one CPU device."""
  flags = os.environ['XLA_FLAGS']
  return {'XLA_FLAGS': flags.replace('device_count=8', 'device_count=1')}


def script(path: str, *flags: str) -> None:
  """Runs one of launch/'s scripts, as from a shell in the repository."""
  sys.argv = [str(ROOT / path), *flags]
  os.chdir(ROOT)
  runpy.run_path(sys.argv[0], run_name='__main__')


class Script:
  """One of launch/'s scripts in a process of its own, on one device.

  Args:
    log: a file for all that it prints.
    path, *flags: the script and its flags.
    **environment: variables that are set for it.
  """

  def __init__(
    self, log: pathlib.Path, path: str, *flags: str, **environment: str
  ):
    self._log = log
    self._process = start(log, script, path, *flags, **environment)

  def is_alive(self) -> bool:
    return self._process.is_alive()

  def output(self) -> str:
    return self._log.read_text() if self._log.exists() else ''

  def send(self, number: signal.Signals) -> None:
    os.kill(self._process.pid, number)

  def wait_for(self, holds, timeout: float = 240) -> None:
    """Waits until `holds()`; the process must live that long."""
    deadline = time.monotonic() + timeout
    while not holds():
      assert self._process.is_alive(), self.output()
      assert time.monotonic() < deadline, f'too slow: {self.output()}'
      time.sleep(0.01)

  def end(self, timeout: float = 300) -> tuple[int, str]:
    """Exit code (negative after a signal) and output of a process that ends."""
    self._process.join(timeout)
    assert self._process.exitcode is not None, f'too slow: {self.output()}'
    return self._process.exitcode, self.output()


def _redirected(log, environment, run, *arguments):
  os.environ.update(environment)
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.stdout = sys.stderr = open(file, 'w', buffering=1)
  run(*arguments)


def command(words: Sequence[str]) -> None:
  """A command of gemma-scope, such as ['train', '--config=tiny', ...]."""
  import launch

  sys.argv = ['gemma-scope', *words]
  os.chdir(ROOT)
  launch.main(words)


def start(log: pathlib.Path, run, *arguments, **environment: str):
  """`fork`, on one device."""
  return fork(log, one_device() | environment, run, *arguments)
