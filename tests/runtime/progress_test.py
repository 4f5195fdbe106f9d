"""Progress: rates, time left, a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import io
import threading
import time

import pytest

from gemma_scope.runtime import progress as progress_lib


class Clock:
  """Time that a test moves."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress_lib.time, 'monotonic', clock)
  return clock


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0.04, '0.0 s'),
    (9.96, '10 s'),
    (59.7, '1 min 00 s'),
    (185, '3 min 05 s'),
    (7620, '2 h 07 min'),
    (3 * 86400 + 4 * 3600, '3 d 04 h'),
    (float('inf'), '?'),
  ],
)
def test_duration(seconds, text):
  assert progress_lib.duration(seconds) == text


def test_quantity():
  values = [0.123, 9.994, 12.34, 950, 12345, 999_600, 2e9]
  text = ['0.12', '9.99', '12.3', '950', '12.3k', '1.00M', '2.00G']
  assert [progress_lib.quantity(v) for v in values] == text


def test_a_line_has_rates_and_time_left(clock):
  out = io.StringIO()
  progress = progress_lib.Progress(1000, 64, first_step=100, stream=out)
  clock.now += 60  # compilation
  progress.update(101, {'loss': 1.0})
  for step in range(102, 501):
    clock.now += 0.1
    progress.update(step, lambda step=step: {'loss': 1 / step, 'dead': '1 %'})
  shown = out.getvalue().splitlines()
  assert len(shown) == 1 + 3  # at once, then every 10 s of 40
  # 10 steps a second now: the minute of compilation has left the window.
  assert progress.line(500, {'loss': 0.25, 'dead': '1 %'}) == (
    'train 500/1,000 50% | 10.0 steps/s 640 tokens/s | 50 s left'
    ' | loss 0.25 dead 1 %'
  )
  assert 'loss 1 ' not in shown[-1] and 'dead 1 %' in shown[-1]
  clock.now += 0.1
  progress.update(1000)
  assert 'done in' in out.getvalue().splitlines()[-1]


def test_values_are_made_only_when_they_are_shown(clock):
  asked = []
  progress = progress_lib.Progress(100, stream=io.StringIO())
  for step in range(1, 51):
    clock.now += 1
    progress.update(step, lambda step=step: asked.append(step) or {})
  assert asked == [1, 11, 21, 31, 41]


def test_a_terminal_has_one_bar(clock):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  with progress_lib.Progress(100, 5, stream=out) as progress:
    for step in range(1, 101):
      clock.now += 1
      progress.update(step, {'note': '[not markup]'})
  for words in (
    'train',
    '100/100',
    '1.00 steps/s 5.00 tokens/s | note [not markup]',
  ):
    assert words in out.getvalue()


@pytest.mark.parametrize('after_s', [0.0, 60.0])
def test_a_loop_is_shown_if_it_takes_long(after_s):
  out = io.StringIO()
  items = []
  for item in progress_lib.track(range(3), 'passes', after_s, out):
    items.append(item)
    time.sleep(0.05)
  assert items == [0, 1, 2]
  assert ('passes 3/3 100%' in out.getvalue()) is (after_s == 0)


def wait_for(holds, seconds=10.0):
  for _ in range(int(seconds / 0.05)):
    if holds():
      return
    time.sleep(0.05)
  pytest.fail('nothing happened')


def test_a_step_that_takes_long_is_not_silent(clock, monkeypatch):
  monkeypatch.setattr(progress_lib, '_LOOK_S', 0.02)
  out = io.StringIO()
  with progress_lib.Progress(
    8, stream=out, status=lambda: 'compiling'
  ) as progress:
    clock.now += 12
    wait_for(out.getvalue)
    assert out.getvalue() == 'train 0/8 0% | compiling, 12 s\n'
    progress.update(3)
    clock.now += 12
    wait_for(lambda: out.getvalue().count('\n') == 3)
    assert out.getvalue().endswith('train 3/8 38% | compiling, 12 s\n')
    for doing, shown in (('logit lens', 'logit lens, 24'), ('', 'working, 36')):
      progress.say(doing)
      lines = out.getvalue().count('\n')
      clock.now += 12
      wait_for(lambda lines=lines: out.getvalue().count('\n') > lines)
      assert out.getvalue().endswith(f'train 3/8 38% | {shown} s\n')
  clock.now += 60
  time.sleep(0.1)
  assert out.getvalue().count('\n') == 5  # closed: nothing more is said


def test_a_progress_that_is_dropped_ends_its_thread(monkeypatch):
  monkeypatch.setattr(progress_lib, '_LOOK_S', 0.02)
  before = set(threading.enumerate())
  progress = progress_lib.Progress(8, stream=io.StringIO())
  (thread,) = set(threading.enumerate()) - before
  del progress
  thread.join(10)
  assert not thread.is_alive()
