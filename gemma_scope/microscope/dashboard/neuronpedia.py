"""An index -> the files that Neuronpedia imports in bulk, gzipped JSON lines.

  release.jsonl.gz model.jsonl.gz sourceset.jsonl.gz source.jsonl.gz
  features/batch-N.jsonl.gz       one line a latent
  activations/batch-N.jsonl.gz    one line an example
  explanations/batch-0.jsonl.gz   one line a label, where there are labels

Fields are those of a feature's record there: fraction of tokens, largest value,
top and bottom logits, histogram, nearest decoders, and examples with their
tokens and values. Source: Neuronpedia's database schema and its export format.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.microscope.index.store import Index

_BATCH = 1024
_KINDS = {
  'resid_post': 'res', 'mlp_out': 'mlp', 'attn_out': 'att',
  'mlp_in': 'transcoder', 'mlp_in_ungained': 'transcoder',
}  # fmt: skip


def source_id(index: Index, name: str) -> str:
  """'12-gemmascope-res-16k' for layer 12, the set's name and 16k latents."""
  card = index.meta['card']
  place = sites.wiring_of(card)
  kind = _KINDS.get(place.kind, place.kind)
  width = sites.width_name(card['width'])
  return f'{place.sites[0].layer}-{name}-{kind}-{width}'


def write(
  folder: str | os.PathLike[str],
  index: Index,
  pieces: Callable[[Sequence[int]], list[str]],
  *,
  model: str,
  name: str,
  creator: str,
  labels: Mapping[int, Mapping[str, Any]] | None = None,
) -> int:
  """Writes one source.

  Args:
    folder: made here; a folder that exists is replaced.
    index: what to write.
    pieces: token ids -> their text.
    model: Neuronpedia's name of the model, such as 'gemma-2-2b'.
    name: of the release, letters, digits and dashes.
    creator: who made the SAE.
    labels: latent -> {'text', 'by'}.

  Returns:
    How many latents were written: those that fired.

  Raises:
    ValueError: a name that cannot be.
  """
  if not re.fullmatch(r'[a-z0-9][a-z0-9-]{0,63}', name):
    raise ValueError(
      f'A release is named by a-z, 0-9 and dashes; found {name!r}.'
    )
  # A second export takes the place of the first.
  with files.whole_folder(folder, replace=True) as draft:
    source = source_id(index, name)
    source_set = source.partition('-')[2]
    card, corpus = index.meta['card'], index.meta['corpus']
    _lines(draft / 'release.jsonl.gz', [{'name': name, 'creatorName': creator}])
    _lines(draft / 'model.jsonl.gz', [{'id': model}])
    _lines(
      draft / 'sourceset.jsonl.gz',
      [{'modelId': model, 'name': source_set, 'releaseName': name,
        'creatorName': creator, 'type': card['type']}],
    )  # fmt: skip
    _lines(
      draft / 'source.jsonl.gz',
      [{'id': source, 'modelId': model, 'setName': source_set,
        'dataset': corpus.get('name', ''),
        'num_prompts': index.meta['sequences'],
        'num_tokens_in_prompt': int(index.sequences_NT.shape[1])}],
    )  # fmt: skip
    if labels:
      (draft / 'explanations').mkdir()
      _lines(
        draft / 'explanations/batch-0.jsonl.gz',
        (
          {'modelId': model, 'layer': source, 'index': str(j),
           'description': label['text'], 'explanationModelName': label['by'],
           'typeName': 'gemma_scope'}
          for j, label in sorted(labels.items())
        ),
      )  # fmt: skip
    fired = np.flatnonzero(index.fired_F)
    for batch, start in enumerate(range(0, len(fired), _BATCH)):
      part = fired[start : start + _BATCH]
      common = {'modelId': model, 'layer': source}
      (draft / 'features').mkdir(exist_ok=True)
      (draft / 'activations').mkdir(exist_ok=True)
      _lines(
        draft / f'features/batch-{batch}.jsonl.gz',
        (common | _feature(index, j, pieces) for j in part),
      )
      _lines(
        draft / f'activations/batch-{batch}.jsonl.gz',
        (common | one for j in part for one in _examples(index, j, pieces)),
      )
    return len(fired)


def _feature(index: Index, j: int, pieces) -> dict[str, Any]:
  used = np.flatnonzero(index.histogram_FH[j])
  low, high = (used[0], used[-1] + 1) if len(used) else (0, 0)
  middles = np.sqrt(index.edges_H[:-1] * index.edges_H[1:])
  found = {
    'index': str(j),
    'maxActApprox': round(float(index.max_F[j]), 4),
    'frac_nonzero': float(index.density_F[j]),
    'freq_hist_data_bar_values': _rounded(middles[low:high]),
    'freq_hist_data_bar_heights': index.histogram_FH[j, low:high].tolist(),
    'topkCosSimIndices': index.neighbour_FC[j].tolist(),
    'topkCosSimValues': _rounded(index.neighbour_value_FC[j]),
    'correlated_features_indices': index.cofiring_FC[j].tolist(),
    'correlated_features_l1': _rounded(index.cofiring_value_FC[j]),
  }
  if index.positive_FL is not None:
    found |= {
      'pos_str': pieces(index.positive_FL[j]),
      'pos_values': _rounded(index.positive_value_FL[j]),
      'neg_str': pieces(index.negative_FL[j]),
      'neg_values': _rounded(index.negative_value_FL[j]),
    }
  return found


def _examples(index: Index, j: int, pieces) -> Iterator[dict[str, Any]]:
  windows_EW = index.windows('top', j)
  width = windows_EW.shape[1]
  for e in np.flatnonzero(index.top_sequence_FE[j] >= 0):
    sequence = index.sequences_NT[index.top_sequence_FE[j, e]]
    start = index.top_position_FE[j, e] - width // 2
    inside = np.arange(max(start, 0), min(start + width, len(sequence)))
    values = windows_EW[e, inside - start]
    best = int(np.argmax(values))
    yield {
      'index': str(j),
      'tokens': pieces(sequence[inside]),
      'values': _rounded(values),
      'maxValue': round(float(values[best]), 4),
      'maxValueTokenIndex': best,
      'minValue': round(float(values.min()), 4),
    }


def _rounded(values) -> list[float]:
  return [round(float(v), 4) for v in values]


def _lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  with gzip.GzipFile(path, 'wb', mtime=0) as file:
    for row in rows:
      file.write(json.dumps(row, allow_nan=False).encode() + b'\n')
