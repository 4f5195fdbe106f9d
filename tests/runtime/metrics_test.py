"""Intervals, and the metrics of a run by step."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from gemma_scope.evaluation import estimates
from gemma_scope.runtime import metrics


def lines(folder):
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


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


def test_a_full_disk_names_the_file_and_hides_no_other_error(tmp_path):
  class Full:
    """A file on a full disk."""

    def write(self, text):
      raise OSError(28, 'No space left on device')

    close = flush = lambda self: self.write('')

  writer = metrics.Writer(tmp_path)
  writer._file = Full()
  with pytest.raises(OSError, match=r"left on device: '.*metrics\.jsonl'"):
    writer.write_scalars(1, {'loss': 1.0})
  with pytest.raises(KeyError, match='the first'), writer:
    raise KeyError('the first')
