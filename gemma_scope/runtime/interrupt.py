"""SIGTERM, Ctrl-C or a cloud's notice end all processes after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from gemma_scope.runtime import preemption


class Interrupted(Exception):
  """Raised when a signal or the cloud's notice asks the run to end."""


class Interrupt:
  """Turns SIGTERM, Ctrl-C and notices into a flag that every phase polls.

    with Interrupt() as interrupt:
      for batch in harvest: interrupt.check()
      for step in ...:
        if interrupt.at_step(step): save; break

  In a lone process, handlers in the main thread set the flag; a second Ctrl-C
  raises KeyboardInterrupt at once. Python runs a handler between two bytecodes:
  during a long compilation the flag is set when that call returns.

  In a cluster (joined before this is entered), SIGTERM belongs to JAX's
  preemption service, which stops all processes at the same step. Ctrl-C and
  the notice that a machine will be taken away (`preemption`) are turned into
  SIGTERM. The flag appears at the call on which all processes agree, so each
  process must make the same calls of `check` and `at_step`. With `alone`, a
  process of a cluster is treated as a lone one.
  """

  def __init__(self, alone: bool = False):
    self._alone = alone
    self._flag = threading.Event()
    self._old: dict[int, Any] = {}
    self._cluster = False
    self._calls = 0
    self._pressed = False
    self._watch: preemption.Watch | None = None

  def __enter__(self) -> Interrupt:
    if threading.current_thread() is not threading.main_thread():
      raise RuntimeError(
        'Interrupt installs signal handlers, which is possible in the main '
        'thread only; enter it there and pass it on.'
      )
    self._cluster = jax.distributed.is_initialized() and not self._alone
    own_signals = (
      (signal.SIGINT,)
      if self._cluster
      else (
        signal.SIGINT,
        signal.SIGTERM,
      )
    )
    self._old = {s: signal.signal(s, self._handle) for s in own_signals}
    if ask := preemption.server():
      self._watch = preemption.Watch(ask, self._leave)
    return self

  def __exit__(self, *unused):
    if self._watch is not None:
      self._watch.stop()
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
    self._end(
      f'{signal.Signals(number).name}: ending at the next whole step (Ctrl-C '
      'again: at once, unsaved)'
    )

  def _leave(self, notice: str) -> None:
    """The cloud will take this machine away; called in a thread."""
    self._end(
      f'The cloud will take this machine away ({notice}): ending at the next '
      'whole step'
    )

  def _end(self, sentence: str) -> None:
    # os.write: print may be interrupted in the middle of its own lock.
    with contextlib.suppress(OSError):
      os.write(2, f'\n{sentence}\n'.encode())
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
      raise Interrupted(
        'The run was asked to end (SIGTERM, Ctrl-C or a notice of the cloud).'
      )

  def at_step(self, step: int) -> bool:
    """Whether all processes should stop at `step`."""
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
