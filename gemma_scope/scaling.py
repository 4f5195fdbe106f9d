"""Predicts the errors of wide SAEs from narrow ones, before training them.

  measure   runs of all widths at once, one for each number of steps: a run's
            schedule ends with it, so that its last step is comparable
  predict   the law of `evaluation.scaling_law` -> prediction.json, and its
            sha256 beside it
  compare   the wide SAEs, trained only now, beside prediction and baselines

The workdir holds small/ and large/ with a run for each number of steps, their
errors in measured.json and results.json, and the prediction. Errors are FVU on
rows that no run reads: the first chunk after those of the longest.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import files, pipeline, release, sae, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.activations import outliers
from gemma_scope.evaluation import scaling_law
from gemma_scope.training import setup

_BATCHES = 128  # of held-out rows, at most

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is trained, and what is predicted.

  Attributes:
    config: of the runs; collection.widths and train.steps are set for each. Its
      train.warm_up, decay, sparsity_warm_up and l0_steps are shares of its
      train.steps, and shrink with it.
    widths, steps: of the SAEs that the law is fitted to.
    predicted: widths whose error is predicted, at each number of steps.
  """

  config: ConfigDict
  widths: tuple[int, ...]
  steps: tuple[int, ...]
  predicted: tuple[int, ...]

  def __post_init__(self):
    if len(set(self.widths)) < 3 or len(set(self.steps)) < 2:
      raise ValueError(
        'A prediction needs SAEs of at least three widths and two numbers of '
        f'steps; found {list(self.widths)} and {list(self.steps)}.'
      )
    if set(self.widths) & set(self.predicted):
      raise ValueError(
        'A width is either measured or predicted; '
        f'{sorted(set(self.widths) & set(self.predicted))} are both.'
      )
    if self.config.collection.type != 'sae':
      raise ValueError('Scaling laws are fitted to SAEs: set type=sae.')
    if len(names := list(map(str, specs.site_list(self.config)))) != 1:
      raise ValueError(
        'A scaling law is fitted at one site, and the config has '
        f'{", ".join(names)}.'
      )

  def run_config(self, widths: Sequence[int], steps: int) -> ConfigDict:
    """The config of one run: without evaluation on text."""
    config = copy.deepcopy(self.config)
    share = steps / config.train.steps
    config.collection.widths = tuple(widths)
    config.evaluation.sequences = 0
    for name in ('warm_up', 'decay', 'sparsity_warm_up', 'l0_steps'):
      config.train[name] = round(share * config.train[name])
    config.train.steps = steps
    config_lib.check(config)
    return config


def run(plan: Plan, workdir: pathlib.Path, report: Report = print) -> bool:
  """Measures, predicts, trains what was predicted; True when all is done."""
  workdir.mkdir(parents=True, exist_ok=True)
  prediction = workdir / 'prediction.json'
  if not prediction.exists() and (workdir / 'large').exists():
    raise ValueError(
      f'{workdir / "large"} exists before its prediction; a prediction is made '
      'before what it predicts is trained. Delete the folder.'
    )
  measured = _measured(plan, workdir, 'small', plan.widths, report)
  if measured is None:
    return False
  if not prediction.exists():
    _predict(plan, measured, prediction)
  stored = _stored_prediction(plan, prediction)
  report(f'prediction {prediction}, sha256 {files.sha256(prediction)}')
  results = _measured(plan, workdir, 'large', plan.predicted, report)
  if results is None:
    return False
  report(table(stored['predictions'], results))
  return True


def _measured(
  plan: Plan,
  workdir: pathlib.Path,
  name: str,
  widths: Sequence[int],
  report: Report,
) -> list[dict[str, Any]] | None:
  """Errors of the SAEs of these widths, trained if need be; None if stopped."""
  path = workdir / f'{name}.json'
  if path.exists():
    return json.loads(path.read_text())['saes']
  folders = [workdir / name / f'steps_{steps}' for steps in plan.steps]
  for steps, folder in zip(plan.steps, folders, strict=True):
    if (folder / 'release').exists():
      continue
    report(f'training {len(widths)} widths for {steps:,} steps')
    config = plan.run_config(widths, steps)
    if not pipeline.run(config, folder, report):
      return None
  saes = [
    sae for folder in folders for sae in release.load_all(folder / 'release')
  ]
  rows_KBD = held_out(plan, folders[-1], saes[0].card, report)
  measured = []
  for released in saes:
    card = released.card
    figures = on_rows(released.load(), rows_KBD)
    measured.append(
      {
        'width': card['width'],
        'target': card['sparsity']['value'],
        'seed': card['seed'],
        'tokens': card['tokens'],
        **figures,
      }
    )
    report(
      'width {width:,}, {tokens:,} tokens: FVU {fvu:.4f}, L0 {l0:.1f}'.format(
        **measured[-1]
      )
    )
  files.write_json(path, {'saes': measured}, indent=1)
  return measured


def held_out(
  plan: Plan, workdir: pathlib.Path, card, report: Report = print
) -> np.ndarray:
  """Rows [K, B, D] of the first chunk that no run reads, without outliers."""
  config = plan.run_config(plan.widths, max(plan.steps))
  mesh = mesh_lib.make(config.mesh)
  source, _ = setup.make_source(config, workdir, mesh, report)
  chunks = chunks_lib.Chunks(
    source, config.seed, mesh, max_norm=config.activations.max_norm
  )
  chunks.norm_bounds = outliers.norm_bounds(card)
  index = -(-config.train.steps // chunks.layout.batches)
  stored = getattr(source, 'chunks', None)
  if stored is not None and index >= stored:
    raise ValueError(
      f'The activation store has {stored} chunks, and the longest run reads '
      f'{index}: none is left to measure errors on. Train fewer steps, or '
      'harvest more.'
    )
  (rows_KBD,) = chunks.load(index).rows.values()
  if isinstance(rows_KBD, chunks_lib.OnHost):
    rows_KBD = rows_KBD.up()
  return np.asarray(rows_KBD[:_BATCHES], np.float32)


@jax.jit
def _sums(params, x_BD):
  f_BF = sae.encode(params, x_BD)
  error_BD = x_BD - sae.decode(params, f_BF)
  return (error_BD**2).sum(), (f_BF > 0).sum(0)


def on_rows(params, rows_KBD: np.ndarray) -> dict[str, float]:
  """FVU, mean L0, and the share of latents that never fire on raw rows."""
  error, fired_F = 0.0, np.zeros(params['b_enc'].size, np.int64)
  for x_BD in rows_KBD:
    batch_error, batch_fired_F = jax.device_get(_sums(params, x_BD))
    error, fired_F = error + float(batch_error), fired_F + batch_fired_F
  rows_RD = rows_KBD.reshape(-1, rows_KBD.shape[-1])
  variance = np.square(rows_RD - rows_RD.mean(0)).sum(dtype=np.float64)
  return {
    'fvu': error / float(variance),
    'l0': float(fired_F.sum()) / len(rows_RD),
    'never_fired': float((fired_F == 0).mean()),
  }


def _predict(plan: Plan, measured, path: pathlib.Path) -> None:
  """Fits the law and writes the prediction, and its sha256 beside it."""
  points = [
    scaling_law.Point(m['width'], m['l0'], m['tokens'], m['fvu'])
    for m in measured
  ]
  batch = plan.config.train.batch
  points_wanted = [
    scaling_law.Point(width, float(target), steps * batch)
    for width in plan.predicted
    for target in plan.config.collection.sparsity
    for steps in plan.steps
  ]
  predictions = scaling_law.forecast(points, points_wanted, plan.config.seed)
  law = scaling_law.fit(points, plan.config.seed)
  files.write_json(
    path,
    {
      'site': str(specs.site_list(plan.config)[0]),
      'widths': list(plan.widths),
      'steps': list(plan.steps),
      'predicted': list(plan.predicted),
      'law': law.describe(),
      'predictions': predictions,
    },
    indent=1,
  )
  files.write_text(
    path.with_suffix('.json.sha256'), f'{files.sha256(path)}  {path.name}\n'
  )


def _stored_prediction(plan: Plan, path: pathlib.Path) -> dict[str, Any]:
  """The prediction that was written, unchanged and of this plan."""
  recorded = path.with_suffix('.json.sha256').read_text().split()[0]
  if files.sha256(path) != recorded:
    raise ValueError(
      f'{path} was changed after it was written: its sha256 is no longer '
      f'{recorded}.'
    )
  stored = json.loads(path.read_text())
  for name in ('widths', 'steps', 'predicted'):
    if stored[name] != list(getattr(plan, name)):
      raise ValueError(
        f'{path} was made with {name} {stored[name]}, and this command has '
        f'{list(getattr(plan, name))}; choose another workdir.'
      )
  return stored


def table(predictions, results) -> str:
  """Prediction beside result, a line for each SAE, and the mean errors."""
  lines = [
    '| width | target L0 | tokens | predicted | 95 % interval | result | L0 '
    '| last width | log-linear |',
    '|---:|---:|---:|---:|---:|---:|---:|---:|---:|',
  ]
  errors = {'fvu': [], 'last_width': [], 'log_linear': []}
  inside = 0
  for r in sorted(results, key=lambda r: (r['width'], r['target'])):
    p = next(
      p
      for p in predictions
      if (p['width'], p['l0'], p['tokens'])
      == (r['width'], r['target'], r['tokens'])
    )
    inside += p['low'] <= r['fvu'] <= p['high']
    for name, values in errors.items():
      if p[name]:
        values.append(abs(np.log(p[name] / r['fvu'])))
    guesses = ' | '.join(
      f'{p[name]:.4f}' if p[name] else '-'
      for name in ('last_width', 'log_linear')
    )
    lines.append(
      f'| {r["width"]:,} | {r["target"]:g} | {r["tokens"]:,} | {p["fvu"]:.4f} '
      f'| {p["low"]:.4f} to {p["high"]:.4f} | {r["fvu"]:.4f} | {r["l0"]:.1f} '
      f'| {guesses} |'
    )
  means = {
    name: f'{np.mean(values):.1%}' for name, values in errors.items() if values
  }
  lines += [
    '',
    f'{inside} of {len(results)} results are inside the interval. Mean '
    f'absolute error: law {means["fvu"]}, '
    f'last width {means.get("last_width", "-")}, '
    f'log-linear {means.get("log_linear", "-")}.',
  ]
  return '\n'.join(lines)
