"""Progress: a line on a terminal or in a log, with rate and time left."""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_Item = TypeVar('_Item')


def duration(seconds: float) -> str:
  """Seconds for a reader: '4.2 s', '3 min 05 s', '2 h 07 min', '3 d 04 h'."""
  if not math.isfinite(seconds):
    return '?'
  if seconds < 59.5:
    return f'{seconds:.1f} s' if seconds < 9.95 else f'{seconds:.0f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  hours, minutes = divmod(minutes, 60)
  if hours < 48:
    return f'{hours} h {minutes:02d} min'
  return f'{hours // 24} d {hours % 24:02d} h'


def quantity(value: float) -> str:
  """Three digits and a unit: 950 -> '950', 12345 -> '12.3k', 2e9 -> '2.00G'."""
  for unit in ('', 'k', 'M', 'G', 'T', 'P'):
    if abs(value) < 999.5 or unit == 'P':
      break
    value /= 1000
  digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
  return f'{value:.{digits}f}{unit}'


class Progress:
  """One line on how a loop of known length goes.

    train 1,200/6,000 20 % | 14.2 steps/s 29.1k tokens/s | 5 min 38 s left
      | 41 % of peak | loss 0.31 l0 48.2 fvu 0.22 dead 1.3 %

  On a terminal the line is renewed in place (rich, when installed);
  elsewhere one is printed every `every_s` seconds and for the last step.
  Rates are of the last `window_s` seconds, so that a pause is forgotten.

  Args:
    total: steps of the whole loop.
    tokens_per_step: rows or tokens of one step; 0 shows no such rate.
    flops_per_step: with `peak` (FLOP/s, `matmul_peak` times the devices)
      gives the share of peak; 0 shows none.
    first_step: where a resumed loop begins.
    label: what is going on; unit: what tokens_per_step counts.
  """

  def __init__(
    self,
    total: int,
    tokens_per_step: float = 0,
    flops_per_step: float = 0,
    *,
    peak: float = 0,
    first_step: int = 0,
    label: str = 'train',
    unit: str = 'tokens',
    every_s: float = 10.0,
    window_s: float = 30.0,
    stream: Any = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total, self._label, self._unit = total, label, unit
    self._tokens = tokens_per_step
    self._share = flops_per_step / peak if peak else 0
    self._every_s, self._window_s, self._clock = every_s, window_s, clock
    self._stream = sys.stderr if stream is None else stream
    self._began = clock()
    self._marks = collections.deque([(self._began, first_step)])
    self._shown: float | None = None
    self._live = self._terminal()

  def _terminal(self) -> Any:
    if not getattr(self._stream, 'isatty', lambda: False)():
      return None
    try:
      from rich import console, live
    except ImportError:
      return None
    # No refresh thread: a line changes only when there is news.
    shown = live.Live(
      console=console.Console(file=self._stream, highlight=False),
      auto_refresh=False,
    )
    shown.start()
    return shown

  def update(
    self,
    step: int,
    metrics: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
  ):
    """`step` steps are done; shows the line when it is due.

    Values are numbers or words; a function that makes them is called only
    when a line is shown.
    """
    now = self._clock()
    self._marks.append((now, step))
    # One mark older than the window stays: rates span at least the window.
    while len(self._marks) > 2 and self._marks[1][0] <= now - self._window_s:
      self._marks.popleft()
    every_s = min(self._every_s, 0.5) if self._live else self._every_s
    due = self._shown is None or now - self._shown >= every_s
    if due or step >= self._total:
      self._shown = now
      self._show(self.line(step, metrics() if callable(metrics) else metrics))

  def line(self, step: int, metrics: Mapping[str, Any] | None) -> str:
    """The line for `step`, from the marks so far."""
    (then, first), (now, last) = self._marks[0], self._marks[-1]
    rate = (last - first) / (now - then) if now > then else 0.0
    share = step / self._total if self._total else 1.0
    parts = [f'{self._label} {step:,}/{self._total:,} {share:.0%}']
    if rate:
      rates = f'{quantity(rate)} steps/s'
      if self._tokens:
        rates += f' {quantity(rate * self._tokens)} {self._unit}/s'
      parts.append(rates)
    if step < self._total:
      left = (self._total - step) / rate if rate else math.inf
      parts.append(f'{duration(left)} left')
    else:
      parts.append(f'done in {duration(now - self._began)}')
    if rate and self._share:
      parts.append(f'{rate * self._share:.0%} of peak')
    words = [
      f'{k} {v if isinstance(v, str) else format(float(v), ".4g")}'
      for k, v in (metrics or {}).items()
    ]
    return ' | '.join(parts + [' '.join(words)] * bool(words))

  def _show(self, line: str):
    if self._live is None:
      print(line, file=self._stream, flush=True)
    else:
      from rich import text

      shown = text.Text(line, no_wrap=True, overflow='ellipsis')
      self._live.update(shown, refresh=True)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Says that something else goes on (compile, evaluation), and how long.

    Its time is taken out of the rates.
    """
    began = self._clock()
    self._note(f'{name} ...')
    try:
      yield
    finally:
      away = self._clock() - began
      self._marks = collections.deque((t + away, s) for t, s in self._marks)
      self._note(f'{name}: {duration(away)}')

  def _note(self, line: str):
    if self._live is None:
      print(line, file=self._stream, flush=True)
    else:
      self._live.console.print(line, markup=False)

  def close(self):
    """Leaves the terminal as it was; the last line stays."""
    if self._live is not None:
      self._live.stop()
      self._live = None

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *unused):
    self.close()


def matmul_peak() -> float:
  """FLOP/s of a large float32 matmul on one device, measured here.

  The best of a few runs of one square `a @ b` under jax's default matmul
  precision, the one that training uses; below 0.5 s after one compilation.
  "Share of peak" is model FLOPs / time / (this times the devices): how far a
  step is from being one big matmul, not from a data sheet's number.
  """
  import jax
  import jax.numpy as jnp

  side = 1024 if jax.default_backend() == 'cpu' else 8192
  a = jnp.ones((side, side), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  multiply(a, a).block_until_ready()
  best, began = math.inf, time.perf_counter()
  for _ in range(8):
    start = time.perf_counter()
    multiply(a, a).block_until_ready()
    stop = time.perf_counter()
    best = min(best, stop - start)
    if stop - began > 0.3:
      break
  return 2 * side**3 / best


def track(
  items: Sequence[_Item],
  label: str,
  after_s: float = 5.0,
  every_s: float = 5.0,
  stream: Any = None,
) -> Iterator[_Item]:
  """Yields the items of a loop, and shows progress if it takes long.

  Nothing is shown before `after_s` seconds. A timer shows the first line, so
  that a slow first item (one that compiles) is not silent either.
  """
  count, done, ended = len(items), 0, False
  shown: list[Progress] = []

  def begin():
    if not ended:
      shown.append(
        Progress(
          count, label=label, first_step=done, every_s=every_s, stream=stream
        )
      )
      shown[0].update(done)

  timer = threading.Timer(after_s, begin)
  timer.daemon = True
  timer.start()
  try:
    for item in items:
      yield item
      done += 1
      if shown:
        shown[0].update(done)
  finally:
    ended = True
    timer.cancel()
    if shown:
      shown[0].close()
