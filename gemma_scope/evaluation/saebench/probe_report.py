"""What the probes of a concept show, for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_scope.evaluation.saebench import probe


def report(result: Mapping[str, Any]) -> str:
  """`run`'s result as lines of text; the last says what it shows."""
  lines = [f'{"probe on":24}{"k":>4}  AUC, held out        balanced accuracy']
  for fitted in result['probes']:
    k = '' if fitted['k'] is None else fitted['k']
    cells = [_cell(fitted[name]) for name in ('auc', 'balanced_accuracy')]
    lines.append(f'{fitted["on"]:24}{k:>4}  ' + '  '.join(cells))
  return '\n'.join([*lines, conclusion(result)])


def conclusion(result: Mapping[str, Any]) -> str:
  """What `run` shows, in a sentence or two.

  Latents detect the concept where, at some k, their interval lies above that of
  the random SAE's k latents and above all shuffles. The best such k (by AUC) is
  compared with as many coordinates and components of the raw activation, and
  with the dense probes on all of it: an interval that lies above another beats
  it.
  """

  def above(fitted, controls):
    control_probes = [probe.best(result, on, fitted['k']) for on in controls]
    low = fitted['auc']['low']
    return low is not None and all(
      control is None or low > (control['auc']['high'] or 1)
      for control in control_probes
    )

  sparse = [fitted for fitted in result['probes'] if fitted['on'] == 'latents']
  detecting = [
    fitted
    for fitted in sparse
    if above(fitted, ('random_sae', 'shuffled_labels'))
  ]
  if not detecting:
    return (
      'No sparse probe on latents beats a random SAE and shuffled labels: the '
      'latents do not detect the concept.'
    )
  top = max(detecting, key=lambda fitted: fitted['auc']['value'])
  rivals = (
    ('as many coordinates of the activation', 'coordinates', top['k']),
    ('as many components of it', 'pca', top['k']),
    ('a dense probe of it', 'activations', None),
    ('the difference of means', 'difference_of_means', None),
  )
  outcomes: dict[str, list[str]] = {}
  for name, on, k in rivals:
    rival = probe.best(result, on, k)
    if rival is not None:
      outcome = _outcome(top['auc'], rival['auc'])
      outcomes.setdefault(outcome, []).append(
        f'{name} ({rival["auc"]["value"]:.3f})'
      )
  comparisons = [
    f'{outcome} {" and ".join(names)}' for outcome, names in outcomes.items()
  ]
  count = 'The latent' if top['k'] == 1 else f'The {top["k"]} latents'
  verb = 's' if top['k'] == 1 else ''
  return (
    f'{count} (AUC {top["auc"]["value"]:.3f}) detect{verb} the concept beyond '
    'a random SAE and shuffled labels. By the intervals: '
    f'{"; ".join(comparisons)}.'
  )


def _outcome(latents: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
  if latents['low'] is None or rival['low'] is None:
    return 'not told apart from'
  if latents['low'] > rival['high']:
    return 'better than'
  return (
    'worse than' if latents['high'] < rival['low'] else 'not told apart from'
  )


def _cell(figure: Mapping[str, float | None]) -> str:
  if figure['low'] is None:
    return f'{figure["value"]:.3f}{"":16}'
  return f'{figure["value"]:.3f} ({figure["low"]:.3f}, {figure["high"]:.3f})'
