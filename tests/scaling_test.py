"""A prediction is kept before what it predicts is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_scope import files, scaling
from tests.helpers import releases, runs

ONE_SITE = {
  'collection.layers': (0,),
  'collection.sites': ('resid_post',),
  'collection.sparsity': (2.0, 4.0),
}


def plan(folder, widths=(8, 16, 32), predicted=(64,), steps=(10, 20)):
  config = runs.small(folder, **ONE_SITE)
  return scaling.Plan(config, widths, steps, predicted)


@pytest.fixture
def trained(monkeypatch):
  """The configs of all runs; each releases random SAEs at once."""
  configs = []

  def run(config, folder, report):
    configs.append(config)
    tokens = config.train.steps * config.train.batch
    saes = [
      (
        releases.params_of(int(width + k), width=width),
        releases.card('resid_post/0', target=k, width=width, tokens=tokens)
        | {'name': f'{width} {k:g}'},
      )
      for width in config.collection.widths
      for k in config.collection.sparsity
    ]
    return releases.save(folder / 'release', saes) or True

  rows_KBD = np.random.default_rng(0).standard_normal((4, 32, releases.D))
  monkeypatch.setattr(scaling.pipeline, 'run', run)
  monkeypatch.setattr(scaling, 'held_out', lambda *_: rows_KBD)
  return configs


def test_predicts_then_trains_then_compares(tmp_path, trained):
  lines, workdir = [], tmp_path / 'scaling'

  def report(line):
    if 'sha256' in line:  # the prediction is there, and no wide SAE yet
      assert {w for c in trained for w in c.collection.widths} == {8, 16, 32}
      assert not (workdir / 'large').exists()
    lines.append(line)

  assert scaling.run(plan(tmp_path), workdir, report)
  assert sum('sha256' in line for line in lines) == 1
  path = workdir / 'prediction.json'
  kept = (workdir / 'prediction.json.sha256').read_text().split()
  assert kept == [files.sha256(path), 'prediction.json']
  predictions = json.loads(path.read_text())['predictions']
  asked = {(p['width'], p['l0'], p['tokens']) for p in predictions}
  assert asked == {(64, k, 64 * n) for k in (2.0, 4.0) for n in (10, 20)}
  results = json.loads((workdir / 'large.json').read_text())['saes']
  assert {(r['width'], r['target'], r['tokens']) for r in results} == asked
  assert lines[-1].count('\n| 64 |') == 4

  # A schedule is a share of its run, and no text is evaluated on.
  by_steps = {config.train.steps: config for config in trained}
  assert {n: c.train.decay for n, c in by_steps.items()} == {10: 2, 20: 5}
  assert not any(config.evaluation.sequences for config in trained)

  # Nothing is trained twice, and what was written is held to.
  count = len(trained)
  assert scaling.run(plan(tmp_path), workdir, lines.append)
  assert len(trained) == count
  with pytest.raises(ValueError, match='choose another workdir'):
    scaling.run(plan(tmp_path, predicted=(128,)), workdir, lines.append)
  path.write_text(path.read_text().replace('0.', '0.1', 1))
  with pytest.raises(ValueError, match='was changed'):
    scaling.run(plan(tmp_path), workdir, lines.append)


def test_errors_are_those_of_the_released_saes():
  random = np.random.default_rng(0)
  W_DF = random.standard_normal((6, 10)).astype(np.float32)
  params = {
    'W_enc': W_DF,
    'b_enc': np.zeros(10, np.float32),
    'threshold': np.full(10, 0.5, np.float32),
    'W_dec': W_DF.T / 10,
    'b_dec': np.ones(6, np.float32),
  }
  rows_KBD = random.standard_normal((3, 4, 6)).astype(np.float32)
  x_RD = rows_KBD.reshape(12, 6)
  z_RF = x_RD @ W_DF
  f_RF = np.where(z_RF > 0.5, z_RF, 0)
  error = np.square(x_RD - f_RF @ W_DF.T / 10 - 1).sum()
  figures = scaling.on_rows(params, rows_KBD)
  variance = np.square(x_RD - x_RD.mean(0)).sum()
  assert figures['fvu'] == pytest.approx(error / variance, rel=1e-5)
  assert figures['l0'] == pytest.approx((f_RF > 0).sum() / 12)
  assert figures['never_fired'] == np.mean((f_RF == 0).all(0))


def test_a_plan_that_predicts_nothing_is_refused(tmp_path):
  with pytest.raises(ValueError, match='three widths'):
    plan(tmp_path, widths=(8, 16))
  with pytest.raises(ValueError, match='are both'):
    plan(tmp_path, predicted=(16,))
  with pytest.raises(ValueError, match='one site'):
    config = runs.small(tmp_path)
    scaling.Plan(config, (8, 16, 32), (10, 20), (64,))
  workdir = tmp_path / 'early'
  (workdir / 'large').mkdir(parents=True)
  with pytest.raises(ValueError, match='before its prediction'):
    scaling.run(plan(tmp_path), workdir)
