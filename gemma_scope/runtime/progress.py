"""Progress of a loop: a bar in a terminal, lines in a log; rates, time left.

Progress  a loop that reports its steps
track     a loop over items; shown only if it takes long
"""

from __future__ import annotations

import collections
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_Item = TypeVar('_Item')
_WINDOW_S = 30.0  # seconds over which rates are averaged
_LINE_S, _BAR_S = 10.0, 0.5  # seconds between lines, between updates of a bar
_LOOK_S = 1.0  # seconds between looks at whether a step takes long


def duration(seconds: float) -> str:
  """Seconds for a reader: '4.2 s', '3 min 05 s', '2 h 07 min', '3 d 04 h'."""
  if not math.isfinite(seconds):
    return '?'
  if seconds < 59.5:
    return f'{seconds:.1f} s' if seconds < 9.95 else f'{seconds:.0f} s'
  minutes, remaining_seconds = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {remaining_seconds:02d} s'
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
  """Shows the progress of a loop of known length: rates, time left, metrics.

  In a terminal it is a bar drawn by `rich`. Elsewhere a line is printed every
  ten seconds and for the last step:

    train 1,200/6,000 20% | 14.2 steps/s 29.1k tokens/s | 5 min 38 s left
      | loss 0.31 L0 48.2 FVU 0.22 dead 1.3%

  Rates are averages over the last 30 seconds, so that pauses do not distort
  them for long. If a step takes longer than ten seconds (a program compiles,
  activations are computed), a thread shows that it is running and why it waits.

  Args:
    total: number of steps of the whole loop.
    tokens_per_step: rows or tokens of a step; 0 shows no rate of tokens.
    label: the name of the loop.
    first_step: the step at which a resumed loop begins.
    stream: the output; stderr by default.
    status: returns what a step is waiting for, or ''.
  """

  def __init__(
    self,
    total: int,
    tokens_per_step: float = 0,
    *,
    label: str = 'train',
    first_step: int = 0,
    stream: Any = None,
    status: Callable[[], str] = lambda: '',
  ):
    self._total, self._label = total, label
    self._tokens, self._status = tokens_per_step, status
    self._stream = sys.stderr if stream is None else stream
    self._began = time.monotonic()
    self._marks = collections.deque([(self._began, first_step)])
    self._shown, self._said = -math.inf, self._began
    self._bar = self._task = None
    if getattr(self._stream, 'isatty', lambda: False)():
      self._bar, self._task = self._open_bar(first_step)
    self._closed = threading.Event()
    threading.Thread(
      target=_keep_alive, args=(weakref.ref(self), self._closed), daemon=True
    ).start()

  def _open_bar(self, first_step: int):
    from rich import console, progress, text  # only where it shows

    class Bar(progress.Progress):
      """A bar, and below it a line of rates and metrics."""

      def get_renderables(self):
        yield from super().get_renderables()
        for task in self.tasks:
          yield text.Text(
            task.fields['about'], no_wrap=True, overflow='ellipsis'
          )

    bar = Bar(
      progress.TextColumn('{task.description}'),
      progress.BarColumn(bar_width=20),
      progress.MofNCompleteColumn(),
      progress.TimeRemainingColumn(),
      console=console.Console(file=self._stream),
      auto_refresh=False,  # no thread: it changes only when there is news
    )
    bar.start()
    task = bar.add_task(
      self._label, total=self._total, completed=first_step, about=''
    )
    return bar, task

  def update(
    self,
    step: int,
    metrics: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
  ) -> None:
    """Records that `step` steps are done, and shows it if an update is due.

    Values are numbers or words. A function that returns them is called only if
    they are shown.
    """
    now = time.monotonic()
    self._marks.append((now, step))
    # One mark older than the window stays: rates span at least the window.
    while len(self._marks) > 2 and self._marks[1][0] <= now - _WINDOW_S:
      self._marks.popleft()
    every_s = _LINE_S if self._bar is None else _BAR_S
    if now - self._shown < every_s and step < self._total:
      return
    self._shown = self._said = now
    values = metrics() if callable(metrics) else metrics
    if self._bar is None:
      print(self.line(step, values), file=self._stream, flush=True)
    else:
      about = ' | '.join((*self._rates(), *_words(values)))
      self._bar.update(self._task, completed=step, about=about, refresh=True)

  def say(self, doing: str) -> None:
    """Sets what is shown while a step takes long; '' for the default."""
    self._status = lambda: doing

  def line(self, step: int, metrics: Mapping[str, Any] | None) -> str:
    """The line for `step`, from the marks so far."""
    share = step / self._total if self._total else 1.0
    remaining = 'done in ' + duration(self._marks[-1][0] - self._began)
    if step < self._total:
      rate = self._rate()
      remaining = duration((self._total - step) / rate if rate else math.inf)
      remaining += ' left'
    fields = [f'{self._label} {step:,}/{self._total:,} {share:.0%}']
    return ' | '.join([*fields, *self._rates(), remaining, *_words(metrics)])

  def _rate(self) -> float:
    """Steps a second."""
    (first_time, first), (last_time, last) = self._marks[0], self._marks[-1]
    return (
      (last - first) / (last_time - first_time)
      if last_time > first_time
      else 0.0
    )

  def _rates(self) -> list[str]:
    rate = self._rate()
    if not rate:
      return []
    rates = f'{quantity(rate)} steps/s'
    if self._tokens:
      rates += f' {quantity(rate * self._tokens)} tokens/s'
    return [rates]

  def _say_alive(self) -> None:
    """Shows that the loop is running if nothing was shown for a while."""
    now = time.monotonic()
    if now - self._said < _LINE_S - 1:
      return
    self._said = now
    last_time, step = self._marks[-1]
    doing = f'{self._status() or "working"}, {duration(now - last_time)}'
    if self._bar is not None:
      self._bar.update(self._task, about=doing, refresh=True)
      return
    share = step / self._total if self._total else 1.0
    print(
      f'{self._label} {step:,}/{self._total:,} {share:.0%} | {doing}',
      file=self._stream,
      flush=True,
    )

  def close(self) -> None:
    """Ends the bar; the last state stays visible."""
    self._closed.set()
    if self._bar is not None:
      self._bar.stop()

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *unused):
    self.close()


def _words(metrics: Mapping[str, Any] | None) -> list[str]:
  """The metrics as one part of a line, or none."""
  words = [
    f'{name} {value if isinstance(value, str) else format(float(value), ".4g")}'
    for name, value in (metrics or {}).items()
  ]
  return [' '.join(words)] if words else []


def _keep_alive(shown: weakref.ref[Progress], closed: threading.Event) -> None:
  """Lets a Progress say that it is alive, until it is closed or gone."""
  while not closed.wait(_LOOK_S):
    if (progress := shown()) is None:
      return
    progress._say_alive()
    del progress


def track(
  items: Sequence[_Item],
  label: str,
  after_s: float = 5.0,
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
      shown.append(Progress(count, label=label, first_step=done, stream=stream))
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
