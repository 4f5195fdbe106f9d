"""Indexes -> a folder of static pages that opens from a disk, with no server.

  index.html assets/          one page, its style, three scripts
  data/collection.js          what the SAEs are and how they were measured
  data/vocabulary.js          the pieces of the tokens that occur
  data/m3/list.js             what is searched of SAE 3: few numbers a feature
  data/m3/c7.js               features 7 * 64 .. : examples, histogram, logits
  data/m3/to5.js              its features' nearest decoders in SAE 5

Each data file calls scope(key, text) with gzipped JSON in base64: a page from a
disk may load scripts and fetch nothing. An example's values are float16 shares
of the feature's largest, in base64. Text reaches the page as text alone; a
content security policy forbids all else. Equal indexes give equal bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.evaluation import estimates
from gemma_scope.microscope.index.store import Index

ASSETS = pathlib.Path(__file__).parent / 'assets'
FILES = ('index.html', 'scope.css', 'tokens.js', 'scope.js', 'live.js')
CHUNK = 64  # features a file
_TOP, _SILENT, _OPEN = 16, 4, 2  # examples shown; tenths that are unfolded
_PAIRS = 8  # SAEs that one is compared with
_MATCHES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
  """One SAE of the pages.

  Attributes:
    path: its name there.
    index: what it fires on.
    metrics: as a release has them, or None.
    decoder_FD: for comparisons, or None.
    labels: feature -> {'text', 'by', 'score', 'control'}.
  """

  path: str
  index: Index
  metrics: Mapping[str, Any] | None = None
  decoder_FD: np.ndarray | None = None
  labels: Mapping[int, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )


def write(
  folder: str | os.PathLike[str],
  entries: Sequence[Entry],
  pieces: Callable[[Iterable[int]], list[str]],
  title: str = 'Sparse autoencoders',
) -> None:
  """Writes the pages, whole or not at all; older pages there are replaced.

  Args:
    folder: of the pages.
    entries: at least one; all of one text.
    pieces: token ids -> their text.
    title: of the first page.

  Raises:
    ValueError: the folder is there and holds something else.
  """
  target = pathlib.Path(folder)
  if target.exists() and not (target / 'data' / 'collection.js').exists():
    raise ValueError(f'{target} is there and holds no pages; name another.')
  with files.whole_folder(target, replace=True) as draft:
    _write(draft, entries, pieces, title)


def _write(
  folder: pathlib.Path,
  entries: Sequence[Entry],
  pieces: Callable[[Iterable[int]], list[str]],
  title: str,
) -> None:
  (folder / 'assets').mkdir()
  for name in FILES:
    place = folder if name == 'index.html' else folder / 'assets'
    shutil.copyfile(ASSETS / name, place / name)
  near = _comparable(entries)
  used: set[int] = set()
  described = []
  for i, entry in enumerate(entries):
    data = folder / 'data' / f'm{i}'
    data.mkdir(parents=True)
    _put(data / 'list.js', f'm{i}/list', _listed(entry, used))
    latents = len(entry.index.max_F)
    for k in range(math.ceil(latents / CHUNK)):
      part = range(k * CHUNK, min((k + 1) * CHUNK, latents))
      found = [_feature(entry, j, used) for j in part]
      _put(data / f'c{k}.js', f'm{i}/c{k}', found)
    for other in near[i]:
      found = _matched(entry, entries[other])
      _put(data / f'to{other}.js', f'm{i}/to{other}', found)
    described.append(_described(entry, i, near[i]))
  meta = entries[0].index.meta
  collection = {
    'title': title,
    'members': described,
    'chunk': CHUNK,
    'edges': _short(entries[0].index.edges_H),
    **{key: meta[key] for key in ('model', 'corpus', 'tokens', 'sequences')},
    'code': meta['code'],
  }
  _put(folder / 'data' / 'collection.js', 'collection', collection)
  ids = sorted(used)
  vocabulary = dict(zip(map(str, ids), pieces(ids), strict=True))
  _put(folder / 'data' / 'vocabulary.js', 'vocabulary', vocabulary)


def _put(path: pathlib.Path, key: str, value: Any) -> None:
  text = json.dumps(value, separators=(',', ':'), allow_nan=False)
  packed = base64.b64encode(gzip.compress(text.encode(), 4, mtime=0)).decode()
  path.write_text(f"scope('{key}','{packed}')\n")


def _halves(values: np.ndarray) -> str:
  """Numbers as float16 in base64: two bytes each, and no time to write them."""
  return base64.b64encode(values.astype('<f2').tobytes()).decode()


def _short(values) -> list[float | None]:
  """Four digits of each; None where there is no number."""
  return [
    float(f'{v:.4g}') if math.isfinite(v) else None
    for v in np.asarray(values, float).ravel().tolist()
  ]


def _one(value) -> float | None:
  return float(f'{value:.4g}') if math.isfinite(value) else None


def _described(entry: Entry, i: int, near: Sequence[int]) -> dict[str, Any]:
  index, card = entry.index, entry.index.meta['card']
  place, density_F = sites.wiring_of(card), entry.index.density_F
  metrics = entry.metrics or {}
  keys = ('l0', 'fvu', 'delta_loss')
  number = lambda m: {'value': m['value']} if isinstance(m, Mapping) else None
  control = metrics.get('control') or {}
  return {
    'id': i,
    'name': entry.path,
    'place': str(place),
    'kind': place.folder,
    'layer': place.sites[0].layer,
    'width': len(index.max_F),
    'widthName': sites.width_name(card['width']),
    'architecture': str(card.get('architecture', '')),
    'meanL0': _one(density_F.sum()),
    'dead': int((index.fired_F == 0).sum()),
    'dense': int((density_F > 0.1).sum()),
    'near': list(near),
    'metrics': {k: number(metrics.get(k)) for k in keys}
    | {'control': {k: number(control.get(k)) for k in keys}},
  }


def _listed(entry: Entry, used: set[int]) -> dict[str, Any]:
  """What the search knows of each feature."""
  index = entry.index
  latents = range(len(index.max_F))
  fires_on = [words(index, j) for j in latents]
  logits = index.positive_FL
  logits = [[]] * len(latents) if logits is None else logits[:, :5].tolist()
  for ids in (*fires_on, *logits):
    used.update(ids)
  return {
    'density': _short(index.density_F),
    'max': _short(index.max_F),
    'word': fires_on,
    'logit': logits,
    'label': [
      str(entry.labels[j]['text']) if j in entry.labels else '' for j in latents
    ],
  }


def words(index: Index, j: int) -> list[int]:
  """The tokens at its largest values, the most frequent first; at most five."""
  there = index.top_sequence_FE[j] >= 0
  ids = index.sequences_NT[
    index.top_sequence_FE[j][there], index.top_position_FE[j][there]
  ]
  found, count = np.unique(ids, return_counts=True)
  return found[np.lexsort((found, -count))][:5].tolist()


def _feature(entry: Entry, j: int, used: set[int]) -> dict[str, Any]:
  index = entry.index
  fired, tokens = int(index.fired_F[j]), max(index.meta['tokens'], 1)
  _, low, high = estimates.wilson_interval(fired, tokens)

  def example(sequence, position, window, start):
    """A window of a sequence; `position` None where it is silent."""
    row = index.sequences_NT[sequence]
    first, last = max(start, 0), min(start + len(window), len(row))
    ids = row[first:last].tolist()
    used.update(ids)
    peak = None if position is None else position - first
    values = _halves(window[first - start : last - start])
    return {'ids': ids, 'values': values, 'peak': peak}

  def examples(sequences, positions, windows):
    half = windows.shape[-1] // 2
    return [
      example(s, p, window, p - half)
      for s, p, window in zip(
        sequences.tolist(), positions.tolist(), windows, strict=True
      )
      if s >= 0
    ]

  silence_W = np.zeros(index.window_top_FEW.shape[-1], np.float16)
  pairs = lambda ids, values: [
    [int(k), v] for k, v in zip(ids, _short(values), strict=True) if k >= 0
  ]
  record = {
    'fired': fired,
    'density': _one(fired / tokens),
    'low': _one(low),
    'high': _one(high),
    'max': _one(index.max_F[j]),
    'mean': _one(index.mean_F[j]),
    'threshold': _one(index.threshold_F[j]),
    'encoder': _one(index.encoder_norm_F[j]),
    'decoder': _one(index.decoder_norm_F[j]),
    'cosine': _one(index.cosine_F[j]),
    'histogram': index.histogram_FH[j].tolist(),
    'top': examples(
      index.top_sequence_FE[j][:_TOP],
      index.top_position_FE[j][:_TOP],
      index.window_top_FEW[j][:_TOP],
    ),
    'near': pairs(index.neighbour_FC[j], index.neighbour_value_FC[j]),
    'with': pairs(index.cofiring_FC[j], index.cofiring_value_FC[j]),
    'silent': [
      example(s, None, silence_W, 0)
      for s in index.silent_FM[j][:_SILENT].tolist()
      if s >= 0
    ],
    'tenths': [],
    'label': entry.labels.get(j),
  }
  tenths = index.sample_FQR.shape[1]
  for q in reversed(range(tenths)):
    found = examples(
      index.sample_sequence_FQR[j, q],
      index.sample_position_FQR[j, q],
      index.window_sample_FQRW[j, q],
    )
    if found:
      most = float(index.max_F[j])
      ends = {
        'from': _one(most * q / tenths),
        'to': _one(most * (q + 1) / tenths),
      }
      shut = len(record['tenths']) >= _OPEN
      record['tenths'].append({**ends, 'open': not shut, 'examples': found})
  if index.positive_FL is not None:
    for name in ('positive', 'negative'):
      ids = getattr(index, f'{name}_FL')[j]
      used.update(ids.tolist())
      record[name] = pairs(ids, getattr(index, f'{name}_value_FL')[j])
  return record


def _comparable(entries: Sequence[Entry]) -> list[list[int]]:
  """For each, others that write to the same place; at most `_PAIRS`, mutual."""
  found: list[list[int]] = [[] for _ in entries]
  for i, one in enumerate(entries):
    for j in range(i + 1, len(entries)):
      other = entries[j]
      if one.decoder_FD is None or other.decoder_FD is None:
        continue
      same = (
        one.index.meta['card']['targets'] == other.index.meta['card']['targets']
      )
      if same and max(len(found[i]), len(found[j])) < _PAIRS:
        found[i].append(j)
        found[j].append(i)
  return found


def _matched(one: Entry, other: Entry) -> dict[str, Any]:
  """Nearest decoders of one SAE's features among another's."""
  unit = lambda W: (
    W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-30)
  )
  a_FD, b_FD = unit(one.decoder_FD), unit(other.decoder_FD)
  match, cosine = [], []
  for start in range(0, len(a_FD), 1024):
    product = a_FD[start : start + 1024] @ b_FD.T
    best = np.argsort(-product, 1, kind='stable')[:, :_MATCHES]
    match += best.tolist()
    cosine += [_short(row) for row in np.take_along_axis(product, best, 1)]
  return {'match': match, 'cosine': cosine}
