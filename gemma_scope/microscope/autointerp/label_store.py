"""The labels of an SAE on disk, as pages and reports show them.

A file of JSON lines for each SAE, a row of `labels.explain` each, with the hash
of the SAE: rows of another SAE of the same name are not read.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_scope.microscope.autointerp import labels

Rows = dict[int, dict[str, Any]]


def read(path: pathlib.Path, sae_sha256: str) -> Rows:
  """Feature -> its row; {} where there is no file."""
  if not path.exists():
    return {}
  rows = map(json.loads, path.read_text(encoding='utf-8').splitlines())
  return {r['feature']: r for r in rows if r['sae_sha256'] == sae_sha256}


def add(
  path: pathlib.Path, sae_sha256: str, rows: Sequence[dict[str, Any]]
) -> None:
  """Adds rows of `labels.explain`, or replaces those of the same features."""
  path.parent.mkdir(parents=True, exist_ok=True)
  owner = {'sae_sha256': sae_sha256}
  merged = read(path, sae_sha256) | {
    row['feature']: row | owner for row in rows
  }
  labels.write(path, [merged[feature] for feature in sorted(merged)])


def shown(rows: Rows) -> dict[int, dict[str, Any]]:
  """Labelled feature -> its label and scores, for the pages."""
  value = lambda score: None if score is None else score['value']
  return {
    feature: {
      'text': row['label'],
      'by': row['by'],
      'score': value(row['detection']),
      'control': value(row['shuffled']),
      'low': row['low_score'],
    }
    for feature, row in rows.items()
    if row['label'] is not None
  }


def clearest(rows: dict[str, Sequence[dict[str, Any]]]) -> Iterator[str]:
  """Lines on the features of the clearest labels; none where there is none."""
  chosen = _clearest(rows)
  if chosen:
    yield (
      'Features with the clearest labels; in brackets the balanced accuracy on '
      "held-out text, and with another feature's label:"
    )
  for name, row in chosen:
    own, control = (row[key]['value'] for key in ('detection', 'shuffled'))
    yield f'  {name} {row["feature"]} ({own:.0%}, {control:.0%}) {row["label"]}'


def _clearest(
  rows: dict[str, Sequence[dict[str, Any]]], most: int = 8
) -> list[tuple[str, dict[str, Any]]]:
  """Features whose label is most clearly better than another feature's.

  Args:
    rows: what `explain` returned, by the name of the SAE.
    most: how many; an SAE has at most two of them.

  Returns:
    (name of the SAE, row), the clearest first: by the lower end of the
    detection score's interval less the score with another feature's label.
  """
  lead = lambda row: row['detection']['low'] - row['shuffled']['value']
  clear = []
  for name, sae_rows in rows.items():
    scored = [r for r in sae_rows if r.get('shuffled') and not r['low_score']]
    clear += [(name, row) for row in sorted(scored, key=lead)[-2:]]
  clear.sort(key=lambda entry: -lead(entry[1]))
  return clear[:most]
