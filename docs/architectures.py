"""The tables and the picture of docs/architectures.md, from the runs' folders.

  .venv/bin/python docs/architectures.py runs/architectures

docs/architectures.sh makes the runs. Prints Markdown.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

from gemma_scope import release
from gemma_scope.release import frontier, table

RATES = '4e-3', '1.2e-2'
SCORES = 'mmcs', 'recovered_distinct', 'absorption', 'missed_alone'


def scores_of(run: pathlib.Path) -> dict[str, dict]:
  """Member's name -> metrics."""
  return json.loads((run / 'evaluation.json').read_text())['members']


def known(run: pathlib.Path, seeds: int) -> None:
  """One table: architectures, then the controls, means over seeds."""
  rows: dict[str, list[dict]] = {}
  for name, metrics in scores_of(run).items():
    architecture = name.partition('/width')[0].rpartition('/')[2]
    rows.setdefault(architecture, []).append(metrics)
    for kind, control in metrics['controls'].items():
      rows.setdefault(f'~{kind}', []).append(control)
  titles = {
    '~random': 'random SAE (control)',
    '~least_squares': 'random encoder, least squares (control)',
    '~pca': 'PCA (control)',
  }
  print(
    '| | L0 | FVU | dead | mean max cosine | recovered | absorbed '
    '| missed alone |\n|---|---:|---:|---:|---:|---:|---:|---:|'
  )
  # By FVU, controls last.
  order = sorted(rows, key=lambda a: ('~' in a, mean(rows[a], 'fvu')))
  for architecture in order:
    metrics = rows[architecture]
    several = seeds > 1 and '~' not in architecture
    cells = [f'{mean(metrics, "l0"):.2f}', spread(metrics, 'fvu', several)]
    cells.append(f'{mean(metrics, "dead"):.0%}')
    recoveries = [member['recovery'] for member in metrics]
    cells += [spread(recoveries, key, several) for key in SCORES]
    print(f'| {titles.get(architecture, architecture)} | {" | ".join(cells)} |')


def mean(members: list[dict], key: str) -> float:
  values = [member[key] for member in members if member[key] is not None]
  return float(np.mean(values)) if values else float('nan')


def spread(members: list[dict], key: str, several: bool) -> str:
  """Mean, and over several seeds their standard deviation."""
  values = [member[key] for member in members if member[key] is not None]
  if not values:
    return '-'
  deviation = f' ± {np.std(values, ddof=1):.3f}' if several else ''
  return f'{np.mean(values):.3f}{deviation}'


def ladder(out: pathlib.Path, picture: pathlib.Path) -> None:
  """Each architecture at its better rate: FVU and delta loss by target."""
  curves: dict[str, dict[str, list]] = {}
  for rate in RATES:
    folder = out / f'ladder_{rate}' / 'release'
    for member in release.load_all(folder):
      curve = curves.setdefault(member.card['architecture'], {})
      curve.setdefault(rate, []).append((member.card, member.metrics))

  def badness(rows) -> float:
    return float(
      np.mean([np.log(table.value(metrics['fvu'])) for _, metrics in rows])
    )

  best = {
    a: min(curve, key=lambda rate: badness(curve[rate]))
    for a, curve in curves.items()
  }
  order = sorted(best, key=lambda a: badness(curves[a][best[a]]))
  targets = [
    card['sparsity']['value'] for card, _ in curves[order[0]][best[order[0]]]
  ]
  for key in ('fvu', 'delta_loss'):
    head = ' | '.join(f'L0 {target:g}' for target in targets)
    print(f'\n| {key} | rate | {head} |\n|---|---:|{"---:|" * len(targets)}')
    for architecture in order:
      rows = sorted(
        curves[architecture][best[architecture]],
        key=lambda row: row[0]['sparsity']['value'],
      )
      cells = [f'{table.value(metrics[key]):.3f}' for _, metrics in rows]
      print(f'| {architecture} | {best[architecture]} | {" | ".join(cells)} |')
  worst = max(
    abs(table.value(metrics['l0']) / card['sparsity']['value'] - 1)
    for a in order
    for card, metrics in curves[a][best[a]]
  )
  print(f'\nLargest distance of a held-out L0 from its target: {worst:.1%}')
  frontier.frontier(picture, [row for a in order for row in curves[a][best[a]]])


def main(out: pathlib.Path) -> None:
  for name in ('sae', 'transcoder', 'crosscoder', 'clt'):
    print(f'\n### {name}\n')
    known(out / f'known_{name}', seeds=3 if name == 'sae' else 1)
  print('\n### ladder')
  folder = pathlib.Path(__file__).parent / 'architectures'
  folder.mkdir(exist_ok=True)
  ladder(out, folder / 'frontier.png')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
