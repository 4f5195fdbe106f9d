"""Means, intervals, the writer and the progress line."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

from gemma_scope.evaluation import estimates
from gemma_scope.runtime import metrics
from gemma_scope.runtime import progress as progress_lib


class Clock:
  """Time that a test moves."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def lines(folder):
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_mean_is_numpys_weighted_average():
  rng = np.random.default_rng(0)
  x_nS, w_n = rng.standard_normal((20, 3)), rng.random(20)
  mean, first = metrics.Mean(), metrics.Mean()
  for x_S, w in zip(x_nS, w_n, strict=True):
    mean.add(x_S, w)
    first.add(x_S[0], w)
  np.testing.assert_allclose(mean.value, np.average(x_nS, 0, w_n))
  assert first.value == pytest.approx(np.average(x_nS[:, 0], 0, w_n))
  assert np.isnan(metrics.Mean().value)


@pytest.mark.parametrize('n', [8, 60])
def test_ratio_interval_covers_the_truth_95_times_in_100(n):
  # Clusters of unequal size that share an effect, as sequences do.
  rng = np.random.default_rng(1)
  trials, truth = 4000, 2.0
  size = rng.integers(20, 60, (n, trials)).astype(float)
  effect = truth + 0.5 * rng.standard_normal((n, trials))
  total = size * effect + np.sqrt(size) * rng.standard_normal((n, trials))
  value, low, high = estimates.ratio_interval(total, size)
  assert abs(value.mean() - truth) < 0.02
  covered = ((low <= truth) & (truth <= high)).mean()
  assert 0.93 < covered < 0.97


def test_ratio_interval_shapes_and_special_cases():
  a_nS = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]])
  b_n = np.array([1.0, 2.0, 2.0])
  whole = estimates.ratio_interval(a_nS, b_n)
  one = estimates.ratio_interval(a_nS[:, 1], b_n)
  assert all(type(x) is float for x in one)
  np.testing.assert_allclose([x[1] for x in whole], one)
  # A ratio that no cluster departs from is known exactly.
  exact = estimates.ratio_interval(3 * b_n, b_n)
  np.testing.assert_allclose(exact, (3, 3, 3))
  # A mean is the ratio to ones: the textbook's standard error.
  value, low, _ = estimates.ratio_interval(b_n, np.ones(3))
  t = 4.302652729696142  # Student, 2 degrees of freedom
  assert (value - low) / t == pytest.approx(b_n.std(ddof=1) / np.sqrt(3))
  assert estimates.ratio_interval([1.0], [2.0]) == (0.5, -np.inf, np.inf)
  with pytest.raises(ValueError, match='as many numerators'):
    estimates.ratio_interval([], [])


def test_writer_writes_a_line_a_step(tmp_path):
  with metrics.Writer(tmp_path / 'run') as writer:
    writer.write_scalars(1, {'loss': np.float32(0.5), 'bad': float('nan')})
    writer.write_scalars(2, {'loss': float('inf')})
  first, second = lines(tmp_path / 'run')
  assert first['step'] == 1 and first['loss'] == 0.5 and first['bad'] is None
  assert second['loss'] is None and second['time'] >= first['time'] > 1.6e9


def test_writer_drops_the_future_and_torn_lines_on_resume(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    for step in range(1, 7):
      writer.write_scalars(step, {'loss': step})
  path = tmp_path / 'metrics.jsonl'
  with path.open('a') as file:
    file.write('{"step": 7, "lo')  # killed here
  with metrics.Writer(tmp_path):
    pass
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
  before = path.stat().st_ino
  with metrics.Writer(tmp_path, resume_step=4) as writer:
    writer.write_scalars(5, {'loss': 50})
  assert [line['loss'] for line in lines(tmp_path)] == [1, 2, 3, 4, 50]
  assert path.stat().st_ino != before  # replaced whole, not edited
  # A line that is whole but for its newline would glue to the next.
  path.write_bytes(path.read_bytes().rstrip(b'\n'))
  with metrics.Writer(tmp_path, resume_step=9) as writer:
    writer.write_scalars(9, {})
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 9]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.jsonl']


def test_writer_names_what_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(RuntimeError, match=r'metrics.wandb.*pip install'):
    metrics.Writer(tmp_path, wandb={})
  with pytest.raises(RuntimeError, match=r'metrics.tensorboard.*pip install'):
    metrics.Writer(tmp_path, tensorboard=True)


def test_writer_feeds_wandb_and_tensorboard(tmp_path, monkeypatch):
  class Wandb:
    logged = []

    def init(self, **kwargs):
      self.kwargs = kwargs
      return self

    def log(self, values, step):
      self.logged.append((step, values))

    def finish(self):
      self.logged.append('finished')

  wandb = Wandb()
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  board = pytest.importorskip('tensorboardX') is not None
  with metrics.Writer(
    tmp_path, tensorboard=board, wandb={'project': 'p'}
  ) as writer:
    writer.write_scalars(3, {'a/loss': 1})
    writer.flush()
  assert wandb.kwargs['project'] == 'p'
  assert wandb.logged == [(3, {'a/loss': 1.0}), 'finished']
  events = list((tmp_path / 'tensorboard').iterdir())
  assert len(events) == 1 and events[0].stat().st_size > 0


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


def test_progress_line_rates_and_time_left():
  clock, out = Clock(), io.StringIO()
  progress = progress_lib.Progress(
    1000, 64, 1e6, peak=1e8, first_step=100, every_s=10, window_s=30,
    stream=out, clock=clock,
  )  # fmt: skip
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
    ' | 10% of peak | loss 0.25 dead 1 %'
  )
  assert 'loss 1 ' not in shown[-1] and 'dead 1 %' in shown[-1]
  clock.now += 0.1
  progress.update(1000)
  assert 'done in' in out.getvalue().splitlines()[-1]


def test_progress_asks_for_values_only_when_it_shows_them():
  clock, asked = Clock(), []
  progress = progress_lib.Progress(100, stream=io.StringIO(), clock=clock)
  for step in range(1, 51):
    clock.now += 1
    progress.update(step, lambda step=step: asked.append(step) or {})
  assert asked == [1, 11, 21, 31, 41]


def test_progress_phase_is_named_and_left_out_of_the_rates():
  clock, out = Clock(), io.StringIO()
  with progress_lib.Progress(100, stream=out, clock=clock) as progress:
    for step in range(1, 11):
      clock.now += 1
      progress.update(step)
    with progress.phase('evaluate'):
      clock.now += 3600
    clock.now += 1
    progress.update(11)
  assert 'evaluate ...\nevaluate: 1 h 00 min\n' in out.getvalue()
  assert '1.00 steps/s' in progress.line(11, {})


def test_progress_lives_on_one_line_of_a_terminal():
  pytest.importorskip('rich')

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out, clock = Terminal(), Clock()
  with progress_lib.Progress(100, stream=out, clock=clock) as progress:
    for step in range(1, 101):
      clock.now += 1
      progress.update(step, {'note': '[not markup]'})
    with progress.phase('evaluate'):
      pass
  text = out.getvalue()
  assert 'train 100/100 100%' in text and 'evaluate: 0.0 s' in text


def test_matmul_peak_is_a_rate():
  assert 1e8 < progress_lib.matmul_peak() < 1e17
