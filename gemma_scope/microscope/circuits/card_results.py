"""Causal cards on disk: measured with progress, resumed, and summarised.

  <path>.npz    what was measured so far; a later call continues from it
  <path>.json   the cards and their summary, once all is measured

A card belongs to the SAE's parameters, the index and the settings; a file that
was written for others is measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.microscope.circuits import card_statistics as statistics
from gemma_scope.microscope.circuits import causal_card
from gemma_scope.microscope.circuits.card_plan import EDITS, Plan, Settings
from gemma_scope.microscope.circuits.intervene import Subject
from gemma_scope.microscope.index.store import Index
from gemma_scope.runtime import progress

ALPHA = 0.05
_SAVE_S = 30.0
_TOKENS = 6  # shown on a card
_DENSITIES = (0, 1e-4, 1e-3, 1e-2, 1e-1, 1)


@dataclasses.dataclass(frozen=True)
class Watch:
  """How a long measurement is followed.

  Attributes:
    poll: called after each sequence; may raise, and then all is saved.
    report: called with a line about the cost.
  """

  poll: Callable[[], None] = lambda: None
  report: Callable[[str], None] = print


def measure(
  subject: Subject,
  index: Index,
  path: pathlib.Path,
  settings: Settings,
  watch: Watch = Watch(),  # noqa: B008  frozen
) -> causal_card.Measured:
  """Measures all features, or continues; says first how long it takes.

  Args:
    subject, index: the SAE in its model, and its index.
    path: of the files, without an ending.
    settings: what is measured.
    watch: how it is followed.
  """
  plan = Plan(subject, index, settings)
  measured = causal_card.Measured(subject.width, settings)
  key, saved = _key(index, settings), _file(path, '.npz')
  done, total = _load(saved, key, measured), len(plan.by_sequence)
  if done < total:
    seconds = causal_card.estimate(subject, plan) * (total - done) / total
    watch.report(
      f'{len(plan.tested):,} features, {plan.count:,} edits, each beside '
      f'{2 * settings.controls} controls, on {total - done:,} sequences: about '
      f'{progress.duration(seconds)}'
    )
  last = time.monotonic()
  with progress.Progress(
    total, label='effects', first_step=done
  ) as progress_bar:
    try:
      for step in causal_card.measure(subject, plan, measured, done):
        done = step
        progress_bar.update(done, {})
        watch.poll()
        if time.monotonic() - last > _SAVE_S:
          _save(saved, key, measured, done)
          last = time.monotonic()
    finally:
      _save(saved, key, measured, done)
  return measured


def _file(path: pathlib.Path, ending: str) -> pathlib.Path:
  return path.parent / (path.name + ending)


def _key(index: Index, settings: Settings) -> str:
  """Changes with everything that the measurements depend on."""
  digest = hashlib.sha256(index.sequences_NT.tobytes())
  about = index.meta['sae_sha256'], dataclasses.asdict(settings)
  digest.update(json.dumps(about, sort_keys=True).encode())
  digest.update(index.top_FE.tobytes())
  return digest.hexdigest()


def _save(path, key: str, measured: causal_card.Measured, done: int) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole_file(path) as file:
    np.savez(file, key=key, done=done, **measured.arrays)


def _load(path, key: str, measured: causal_card.Measured) -> int:
  """Fills `measured` from the file; the number of sequences in it."""
  if not path.exists():
    return 0
  try:
    with np.load(path, allow_pickle=False) as file:
      if str(file['key']) != key:
        return 0
      arrays = {name: file[name] for name in measured.arrays}
      done = int(file['done'])
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return 0  # damaged: measured again
  measured.arrays.update(arrays)
  return done


def results(
  measured: causal_card.Measured, index: Index, alpha: float = ALPHA
) -> dict[str, Any]:
  """Cards and their summary, plain JSON: 'cards' by feature, and 'summary'."""
  arrays = measured.arrays
  controls = [arrays[name] for name in causal_card.CONTROLS]
  by_control = {
    kind: np.stack(list(map(statistics.edit_p, arrays['among'], arrays[kind])))
    for kind in causal_card.CONTROLS
  }
  p_EF = np.max(list(by_control.values()), 0)
  p_F = statistics.either_p(p_EF)
  q_F = statistics.adjusted(p_F)
  contexts_first = np.moveaxis(arrays['lens'], 0, 1)
  z_FQ = statistics.mean(
    contexts_first.reshape(len(p_F), -1, arrays['lens'].shape[-1]), 1
  )
  lens_p_F = statistics.pooled_p(z_FQ[:, 0], z_FQ[:, 1:])
  verdict_F, lens_q_F = statistics.verdicts(q_F, lens_p_F, alpha)
  edits = [_edit_cards(arrays, e, p_EF[e]) for e in range(len(EDITS))]
  cards = {}
  for i in np.flatnonzero(verdict_F >= 0).tolist():
    cards[i] = {
      'verdict': statistics.VERDICTS[verdict_F[i]],
      'p': _number(p_F[i]),
      'q': _number(q_F[i]),
      'lens_p': _number(lens_p_F[i]),
      'lens_q': _number(lens_q_F[i]),
      **{name: edits[e](i) for e, name in enumerate(EDITS)},
    }
  halves = {
    name: {
      kind: _number(statistics.halves_agree(arrays['among'][e], c[e]))
      for kind, c in zip(causal_card.CONTROLS, controls, strict=True)
    }
    for e, name in enumerate(EDITS)
  }
  beyond_controls = {
    kind: int((statistics.adjusted(statistics.either_p(p_EF)) <= alpha).sum())
    for kind, p_EF in by_control.items()
  }
  summary = {
    'alpha': alpha,
    'tested': len(cards),
    'verdicts': _counts(verdict_F),
    'beyond': beyond_controls,
    'by_density': _by_density(verdict_F, index.density_F),
    'halves_agree': halves,
  }
  return {'summary': summary, 'cards': cards}


def _counts(verdict_F: np.ndarray) -> dict[str, int]:
  return {
    name: int((verdict_F == v).sum())
    for v, name in enumerate(statistics.VERDICTS)
  }


def _by_density(verdict_F, density_F) -> list[dict[str, Any]]:
  rows = []
  for low, high in zip(_DENSITIES, _DENSITIES[1:], strict=False):
    inside_F = (density_F > low) & (density_F <= high) & (verdict_F >= 0)
    if inside_F.any():
      counts = _counts(np.where(inside_F, verdict_F, -1))
      rows.append({'above': low, 'up_to': high, 'verdicts': counts})
  return rows


def _edit_cards(arrays, e: int, p_F) -> Callable[[int], dict[str, Any] | None]:
  """A function that gives the card's part of one edit of a feature."""
  kl_F3 = statistics.interval(arrays['kl'][e])
  loss_F3 = statistics.interval(arrays['loss'][e])
  own_FC = statistics.logs(arrays['among'][e])
  times = {}
  for name in causal_card.CONTROLS:
    others_FC = statistics.mean(statistics.logs(arrays[name][e]))
    times[name] = np.exp(statistics.interval(own_FC - others_FC))
  z_F = statistics.mean(arrays['lens'][e, :, :, 0])
  count_F = np.isfinite(own_FC).sum(1)

  def card_of(i: int) -> dict[str, Any] | None:
    if not count_F[i]:
      return None
    return {
      'contexts': int(count_F[i]),
      'kl': _interval(kl_F3[i]),
      'loss': _interval(loss_F3[i]),
      **{
        f'times_{name}': _interval(values[i]) for name, values in times.items()
      },
      'p': _number(p_F[i]),
      'lens_z': _number(z_F[i]),
      'tokens': _tokens(arrays['promoted'][e, i]),
    }

  return card_of


def _tokens(promoted_CK: np.ndarray) -> list[list[int]]:
  """Tokens by the number of contexts in which they are among the first."""
  kept = promoted_CK[promoted_CK >= 0]
  token, first, count = np.unique(kept, return_index=True, return_counts=True)
  order = np.lexsort((first, -count))[:_TOKENS]
  return np.stack([token, count], 1)[order].tolist()


def _number(value) -> float | None:
  return float(f'{value:.4g}') if np.isfinite(value) else None


def _interval(values_3) -> list[float | None]:
  return [_number(value) for value in values_3]


def write(
  path: pathlib.Path, results: Mapping[str, Any], index: Index, settings
):
  """Writes the cards; returns the file's path."""
  path = _file(path, '.json')
  path.parent.mkdir(parents=True, exist_ok=True)
  about = {
    'sae_sha256': index.meta['sae_sha256'],
    'settings': dataclasses.asdict(settings),
  }
  files.write_json(path, {**about, **results})
  return path


def read(path: pathlib.Path, sae_sha256: str) -> dict[str, Any] | None:
  """The cards of these parameters, by feature, and the summary; or None."""
  path = _file(path, '.json')
  if not path.exists():
    return None
  stored = json.loads(path.read_text(encoding='utf-8'))
  if stored.get('sae_sha256') != sae_sha256:
    return None
  cards = {int(i): card for i, card in stored['cards'].items()}
  return {**stored, 'cards': cards}


def table(summary: Mapping[str, Any]) -> str:
  """The summary as text: verdicts, by density, agreement of the halves."""
  tested = max(summary['tested'], 1)
  lines = [
    f'{summary["tested"]:,} features tested, false discovery rate '
    f'{summary["alpha"]:g}'
  ]
  for name, count in summary['verdicts'].items():
    lines.append(f'  {name:32} {count:>7,}  {count / tested:>6.1%}')
  counts = ', '.join(
    f'{kind} {count:,}' for kind, count in summary['beyond'].items()
  )
  lines.append(f'beyond one kind of control alone: {counts}')
  lines.append('share with a measurable effect, by density:')
  for row in summary['by_density']:
    counts = row['verdicts']
    total = sum(counts.values())
    share = 1 - counts[statistics.VERDICTS[0]] / total
    span = f'{row["above"]:>7.2%} to {row["up_to"]:>7.2%}'
    lines.append(f'  {span} {total:>9,}  {share:>6.1%}')
  lines.append('agreement of two halves of the contexts (rank correlation):')
  for name, kinds in summary['halves_agree'].items():
    values = ', '.join(
      f'{kind} {"-" if value is None else format(value, ".2f")}'
      for kind, value in kinds.items()
    )
    lines.append(f'  {name}: beside {values}')
  return '\n'.join(lines)
