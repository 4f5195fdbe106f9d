"""Indexes -> a folder of static pages that open from a disk without a server.

  index.html assets/          one page, its style and scripts
  data/collection.js          the SAEs, how they were measured, where to begin
  data/vocabulary.js          the pieces of the tokens that occur
  data/t5.js                  sequences 5 * 64 .. of the text
  data/m3/list.js             what the search needs about SAE 3
  data/m3/c7.js               features 7 * 64 .. : examples, histogram, logits
  data/m3/to5.js              its features' nearest decoders in SAE 5
  data/m3/outliers.js         tokens that its outlier rule left out

Each data file calls scope(key, text) with gzipped JSON in base64: a page opened
from a disk can load scripts but not fetch files. An example is a sequence and a
position; its activations are float16 shares of the feature's largest, in
base64. Text from corpora and models is inserted as text and never parsed as
HTML; a content security policy forbids all but the page's own scripts and
styles. Equal indexes give equal bytes. SAEs are written one after the other: at
most one index is in memory, and the decoders of those that are compared.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.evaluation import estimates
from gemma_scope.microscope.dashboard import records
from gemma_scope.microscope.dashboard.terms import TERMS
from gemma_scope.microscope.index import logit_lens
from gemma_scope.microscope.index.store import Index, Indexed
from gemma_scope.release import table

ASSETS = pathlib.Path(__file__).parent / 'assets'
CHUNK = 64  # features a file, and sequences a file
_PAIRS = 8  # SAEs that one is compared with
_MATCHES = 3
_OUTLIERS = 200  # shown in context
_BEGIN = 3  # features to start with


def write(
  folder: str | os.PathLike[str],
  saes: Iterable[Indexed],
  pieces: Callable[[Iterable[int]], list[str]],
  title: str = 'Sparse autoencoders',
  date: str = '',
  quantisation: str = '',
) -> None:
  """Writes the pages, completely or not at all; replaces older pages.

  Args:
    folder: of the pages.
    saes: at least one, all indexed on the same text; read one at a time.
    pieces: token ids -> their text.
    title: of the first page.
    date: when the indexes were built, as the pages show it.
    quantisation: of the model's weights, or ''.

  Raises:
    ValueError: the folder exists and holds something else.
  """
  target = pathlib.Path(folder)
  if target.exists() and not (target / 'data' / 'collection.js').exists():
    raise ValueError(f'{target} exists and is not a folder of pages.')
  with files.whole_folder(target, replace=True) as draft:
    about = {'title': title, 'date': date, 'quantisation': quantisation}
    _Writer(draft, pieces).write(saes, about)


class _Writer:
  """Writes SAEs one after the other, and then what they have in common."""

  def __init__(self, folder: pathlib.Path, pieces):
    self._folder, self._pieces = folder, pieces
    self._described: list[dict[str, Any]] = []
    self._decoders: list[tuple[list[str], np.ndarray]] = []
    self._begin: list[tuple[float, dict[str, Any]]] = []
    self._used: set[int] = set()

  def write(self, saes: Iterable[Indexed], about: Mapping[str, Any]) -> None:
    (self._folder / 'assets').mkdir()
    (self._folder / 'data').mkdir()
    for path in sorted(ASSETS.iterdir()):
      page = path.suffix == '.html'
      place = self._folder if page else self._folder / 'assets'
      shutil.copyfile(path, place / path.name)
    first_index = None
    for indexed in saes:
      first_index = first_index or indexed.index
      self._add(indexed)
    if first_index is None:
      raise ValueError('There are no SAEs to show.')
    sequences_NT = first_index.sequences_NT
    for start in range(0, len(sequences_NT), CHUNK):
      rows = sequences_NT[start : start + CHUNK].tolist()
      self._put(f't{start // CHUNK}', rows)
    self._used.update(np.unique(sequences_NT).tolist())
    ids = sorted(self._used)
    vocabulary = dict(zip(map(str, ids), self._pieces(ids), strict=True))
    self._put('vocabulary', vocabulary)
    beginnings = sorted(self._begin, key=lambda pair: -pair[0])[:_BEGIN]
    keys = ('model', 'corpus', 'sequences', 'code')
    collection = {
      **about,
      'members': self._described,
      'chunk': CHUNK,
      'edges': records.short(first_index.edges_H),
      'start': [start for _, start in beginnings],
      'terms': TERMS,
      **{key: first_index.meta[key] for key in keys},
    }
    self._put('collection', collection)

  def _put(self, key: str, value: Any) -> None:
    text = json.dumps(value, separators=(',', ':'), allow_nan=False)
    packed = gzip.compress(text.encode(), 3, mtime=0)
    path = self._folder / 'data' / f'{key}.js'
    path.write_text(f"scope('{key}','{base64.b64encode(packed).decode()}')\n")

  def _add(self, indexed: Indexed) -> None:
    i, index = len(self._described), indexed.index
    (self._folder / 'data' / f'm{i}').mkdir()
    self._put(f'm{i}/list', self._listed(indexed))
    latents = len(index.max_F)
    features = records.Features(indexed)
    for k in range(math.ceil(latents / CHUNK)):
      of_chunk = range(k * CHUNK, min((k + 1) * CHUNK, latents))
      self._put(f'm{i}/c{k}', [features(j) for j in of_chunk])
    if index.positive_FL is not None:
      self._used.update(np.unique(index.positive_FL).tolist())
      self._used.update(np.unique(index.negative_FL).tolist())
    for card in records.cards_of(indexed).values():
      edits = filter(None, (card['ablate'], card['add']))
      self._used.update(token for edit in edits for token, _ in edit['tokens'])
    if len(index.outlier_norm_O):
      self._put(f'm{i}/outliers', _outliers(index))
    self._described.append(_described(indexed, i))
    self._compare(i, indexed)
    self._begin += _beginnings(indexed, i)

  def _listed(self, indexed: Indexed) -> dict[str, Any]:
    """What the search needs about each feature."""
    index, labels = indexed.index, indexed.labels
    latents = range(len(index.max_F))
    logits = index.positive_FL
    label_field = lambda j, key: labels[j].get(key) if j in labels else None
    return {
      'density': records.short(index.density_F),
      'max': records.short(index.max_F),
      'word': words_of_all(index),
      'logit': [[]] * len(latents)
      if logits is None
      else logits[:, :5].tolist(),
      'label': [str(label_field(j, 'text') or '') for j in latents],
      'score': [label_field(j, 'score') for j in latents],
      **_listed_effects(indexed),
    }

  def _compare(self, i: int, indexed: Indexed) -> None:
    """Matches its decoders with those of earlier SAEs of the same targets."""
    targets = indexed.index.meta['card']['targets']
    decoder_FD = logit_lens.decoders(indexed.checked.load())
    norm_F1 = np.linalg.norm(decoder_FD, axis=1, keepdims=True)
    unit_FD = decoder_FD / np.maximum(norm_F1, 1e-30)
    for j, (other_targets, other_FD) in enumerate(self._decoders):
      matched_saes = [self._described[n]['near'] for n in (i, j)]
      if other_targets != targets or max(map(len, matched_saes)) >= _PAIRS:
        continue
      product_FG = unit_FD @ other_FD.T
      self._put(f'm{i}/to{j}', _matched(product_FG))
      self._put(f'm{j}/to{i}', _matched(product_FG.T))
      matched_saes[0].append(j)
      matched_saes[1].append(i)
    self._decoders.append((targets, unit_FD))


def _listed_effects(indexed: Indexed) -> dict[str, Any]:
  """Verdict and adjusted p-value of each feature, if they were measured."""
  if indexed.effects is None:
    return {}
  cards = records.cards_of(indexed)
  by_feature = [cards.get(j, {}) for j in range(len(indexed.index.max_F))]
  return {
    'verdict': [card.get('verdict') for card in by_feature],
    'q': [card.get('q') for card in by_feature],
    'kl': [
      ((card.get('ablate') or {}).get('kl') or [None])[0] for card in by_feature
    ],
  }


def _matched(product_FG: np.ndarray) -> dict[str, Any]:
  """The nearest decoders of each of F features among G others."""
  count = min(_MATCHES, product_FG.shape[1])
  best_FM = np.argpartition(-product_FG, count - 1, 1)[:, :count]
  cosine_FM = np.take_along_axis(product_FG, best_FM, 1)
  order_FM = np.lexsort((best_FM, -cosine_FM))
  cosine_FM = np.take_along_axis(cosine_FM, order_FM, 1)
  return {
    'match': np.take_along_axis(best_FM, order_FM, 1).tolist(),
    'cosine': np.round(cosine_FM.astype(float), 4).tolist(),
  }


def _described(indexed: Indexed, i: int) -> dict[str, Any]:
  index, card = indexed.index, indexed.index.meta['card']
  wiring, density_F = sites.wiring_of(card), indexed.index.density_F
  metrics = table.comparable(indexed.sae.metrics)
  control = metrics.get('control') or {}
  figures = lambda results: {
    key: _figure(results.get(key)) for key in ('l0', 'fvu', 'delta_loss')
  }
  return {
    'id': i,
    'name': indexed.sae.name,
    'place': str(wiring),
    'kind': wiring.folder,
    'layer': wiring.sites[0].layer,
    'width': len(index.max_F),
    'widthName': sites.width_name(card['width']),
    'architecture': str(card.get('architecture', '')),
    'meanL0': records.rounded(density_F.sum()),
    'tokens': index.meta['tokens'],
    'dead': int((index.fired_F == 0).sum()),
    'dense': int((density_F > estimates.DENSE).sum()),
    'labelled': len(indexed.labels),
    'outliers': len(index.outlier_norm_O),
    'near': [],
    'effects': (indexed.effects or {}).get('summary'),
    'metrics': figures(metrics) | {'control': figures(control)},
  }


def _figure(estimate: Any) -> dict[str, float | None] | None:
  if not isinstance(estimate, Mapping) or estimate.get('value') is None:
    return None
  return {key: estimate.get(key) for key in ('value', 'low', 'high')}


def _beginnings(indexed: Indexed, i: int) -> list[tuple[float, dict[str, Any]]]:
  """The feature whose label beats another's most: (score, where and why)."""
  density_F, gains = indexed.index.density_F, []
  for j, label in indexed.labels.items():
    score, control = label.get('score'), label.get('control')
    dense = density_F[j] > estimates.DENSE
    if None in (score, control) or label.get('low') or dense:
      continue
    gains.append((score - control, int(indexed.index.fired_F[j]), -j))
  chosen = []
  for gain, _, negated in sorted(gains, reverse=True)[:_BEGIN]:
    label = indexed.labels[-negated]
    why = (
      f'Its label is right on {label["score"]:.0%} of held-out examples, '
      f"another feature's label on {label['control']:.0%}."
    )
    # One of each SAE comes before a second one of any.
    rank = gain - len(chosen)
    beginning = {'member': i, 'feature': -negated, 'text': label['text']}
    chosen.append((rank, beginning | {'why': why}))
  return chosen


def _outliers(index: Index) -> dict[str, Any]:
  """Outliers counted by token id, and the largest ones in context."""
  order = np.argsort(-index.outlier_norm_O, kind='stable')[:_OUTLIERS]
  sequence_O, position_O = index.outlier_sequence_O, index.outlier_position_O
  ids, count = np.unique(
    index.sequences_NT[sequence_O, position_O], return_counts=True
  )
  tokens_shown = np.lexsort((ids, -count))[:_OUTLIERS]
  return {
    'bounds': index.meta['outliers']['norm_bounds'],
    'tokens': np.stack([ids, count], 1)[tokens_shown].tolist(),
    'shown': np.stack([sequence_O, position_O], 1)[order].tolist(),
    'norm': records.short(index.outlier_norm_O[order]),
  }


def words(index: Index, j: int) -> list[int]:
  """The tokens at its largest activations, most frequent first; at most 5."""
  filled_E = index.top_sequence_FE[j] >= 0
  ids = index.sequences_NT[
    index.top_sequence_FE[j][filled_E], index.top_position_FE[j][filled_E]
  ]
  tokens, count = np.unique(ids, return_counts=True)
  return tokens[np.lexsort((tokens, -count))][:5].tolist()


def words_of_all(index: Index) -> list[list[int]]:
  """`words` of every feature."""
  j, e = np.nonzero(index.top_sequence_FE >= 0)
  ids = index.sequences_NT[
    index.top_sequence_FE[j, e], index.top_position_FE[j, e]
  ]
  pairs, count = np.unique(np.stack([j, ids], 1), axis=0, return_counts=True)
  order = np.lexsort((pairs[:, 1], -count, pairs[:, 0]))
  j, ids = pairs[order].T
  place = np.arange(len(j)) - np.searchsorted(j, j)
  words: list[list[int]] = [[] for _ in index.max_F]
  for latent, token in zip(j[place < 5], ids[place < 5], strict=True):
    words[latent].append(int(token))
  return words
