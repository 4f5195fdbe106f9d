"""An index -> the files that Neuronpedia imports in bulk, gzipped JSON lines.

  release.jsonl.gz model.jsonl.gz sourceset.jsonl.gz source.jsonl.gz
  features/batch-N.jsonl.gz       one line a latent
  activations/batch-N.jsonl.gz    one line an example
  explanations/batch-0.jsonl.gz   one line a label, where there are labels

A line is a row of a table of Neuronpedia's database, with every column that has
no default there: SourceRelease, Model, SourceSet, Source, Neuron, Activation,
Explanation (schema.prisma of hijohnnylin/neuronpedia, apps/webapp). Labels
name no explanation type and no model, since both must be rows of that database
already; where a label comes from is in its notes.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.microscope.index.store import Index
from gemma_scope.runtime import progress

_BATCH = 1024
_KINDS = {
  'resid_post': 'res',
  'mlp_out': 'mlp',
  'attn_out': 'att',
  'mlp_in': 'transcoder',
  'mlp_in_ungained': 'transcoder',
}


@dataclasses.dataclass(frozen=True)
class Naming:
  """How an export is named.

  Attributes:
    model: Neuronpedia's name of the model, such as 'gemma-2-2b'.
    release: name of the set of SAEs: a-z, 0-9 and dashes.
    creator: who made the SAEs.
    layers, neurons: of the model: layers, and neurons in the MLP of a layer.
    date: when the rows were made, as YYYY-MM-DD.
    user: id of the database's user that owns the rows; by default that of a
      local Neuronpedia.
  """

  model: str
  release: str
  creator: str = ''
  layers: int = 0
  neurons: int = 0
  date: str = '1970-01-01'
  user: str = 'clkht01d40000jv08hvalcvly'

  @property
  def own(self) -> dict[str, str]:
    """Columns of every row that belongs to a user."""
    return {'creatorId': self.user, 'createdAt': f'{self.date}T00:00:00.000Z'}

  def __post_init__(self):
    if not re.fullmatch(r'[a-z0-9][a-z0-9-]{0,63}', self.release):
      raise ValueError(
        'The name of a release (--title) may only have a-z, 0-9 and dashes; '
        f'found {self.release!r}.'
      )


def source_id(index: Index, release: str) -> str:
  """The id of an SAE: '12-gemmascope-res-16k-jumprelu-l0-33' at layer 12.

  L0 is that on the index's text.
  """
  card = index.meta['card']
  wiring = sites.wiring_of(card)
  kind = _KINDS.get(wiring.kind, wiring.kind).replace('_', '-')
  width = sites.width_name(card['width'])
  architecture = str(card.get('architecture', 'sae')).replace('_', '-')
  l0 = round(float(index.density_F.sum()))
  return (
    f'{wiring.sites[0].layer}-{release}-{kind}-{width}-{architecture}-l0-{l0}'
  )


def check_ids(ids: Mapping[str, str]) -> None:
  """ValueError where two SAEs (name -> id) would have the same id."""
  owners: dict[str, str] = {}
  for name, source in ids.items():
    if source in owners:
      raise ValueError(
        f'{owners[source]} and {name} would both be {source!r} on Neuronpedia; '
        'export them apart, with --release and another --title.'
      )
    owners[source] = name


def write(
  folder: str | os.PathLike[str],
  index: Index,
  pieces: Callable[[Sequence[int]], list[str]],
  naming: Naming,
  labels: Mapping[int, Mapping[str, Any]] | None = None,
) -> int:
  """Writes one source, completely or not at all; replaces an older export.

  Args:
    folder: to write.
    index: of the SAE.
    pieces: token ids -> their text.
    naming: model, release and creator.
    labels: latent -> {'text', 'by'}.

  Returns:
    How many latents were written: those that fired.
  """
  with files.whole_folder(folder, replace=True) as draft:
    return _write(draft, index, pieces, naming, labels or {})


def _write(folder: pathlib.Path, index, pieces, naming: Naming, labels) -> int:
  source = source_id(index, naming.release)
  common = {'modelId': naming.model, 'layer': source}
  _write_about(folder, index, naming, source)
  if labels:
    (folder / 'explanations').mkdir()
    _lines(
      folder / 'explanations/batch-0.jsonl.gz',
      (
        common
        | {
          'id': _id(source, j, 'label'),
          'index': str(j),
          'authorId': naming.user,
          'description': label['text'],
          'typeName': None,
          'explanationModelName': None,
          'notes': f'gemma_scope, by {label["by"]}',
        }
        for j, label in sorted(labels.items())
      ),
    )
  common |= naming.own
  neuron = common | {'sourceSetName': source.partition('-')[2]}
  fired = np.flatnonzero(index.fired_F)
  for name in ('features', 'activations'):
    (folder / name).mkdir()
  starts = range(0, len(fired), _BATCH)
  for batch, start in enumerate(progress.track(starts, f'export {source}')):
    latents = fired[start : start + _BATCH]
    _lines(
      folder / f'features/batch-{batch}.jsonl.gz',
      (neuron | _feature(index, j, pieces) for j in latents),
    )
    _lines(
      folder / f'activations/batch-{batch}.jsonl.gz',
      (
        common | {'id': _id(source, j, e)} | example
        for j in latents
        for e, example in enumerate(_examples(index, j, pieces))
      ),
    )
  return len(fired)


def _write_about(folder, index: Index, naming: Naming, source: str) -> None:
  """The release, the model, the set and the source."""
  card, corpus = index.meta['card'], index.meta['corpus']
  source_set = source.partition('-')[2]
  own, creator = naming.own, {'creatorName': naming.creator}
  public = {'visibility': 'PUBLIC'}
  about = f'{card["type"]} of {sites.wiring_of(card)}'
  rows = {
    'release': {
      'name': naming.release,
      'description': naming.release,
      'descriptionShort': naming.release,
      'urls': [],
      'creatorNameShort': naming.creator,
      **creator,
      **own,
      **public,
    },
    'model': {
      'id': naming.model,
      'displayName': naming.model,
      'displayNameShort': naming.model,
      'instruct': naming.model.endswith('-it'),
      'layers': naming.layers,
      'neuronsPerLayer': naming.neurons,
      'owner': 'Google',
      'updatedAt': own['createdAt'],
      **own,
      **public,
    },
    'sourceset': {
      'modelId': naming.model,
      'name': source_set,
      'description': about,
      'releaseName': naming.release,
      'urls': [],
      **creator,
      'type': card['type'],
      **own,
      **public,
    },
    'source': {
      'id': source,
      'modelId': naming.model,
      'setName': source_set,
      'hasDashboards': True,
      **own,
      **public,
      'dataset': corpus.get('name', ''),
      'num_prompts': index.meta['sequences'],
      'num_tokens_in_prompt': int(index.sequences_NT.shape[1]),
    },
  }
  for name, row in rows.items():
    _lines(folder / f'{name}.jsonl.gz', [row])


def _id(*parts) -> str:
  """An id of the form that the database makes, always the same for a row."""
  digest = hashlib.sha256('/'.join(map(str, parts)).encode()).hexdigest()
  return 'c' + digest[:24]


def _feature(index: Index, j: int, pieces) -> dict[str, Any]:
  filled_bins = np.flatnonzero(index.histogram_FH[j])
  low, high = (
    (filled_bins[0], filled_bins[-1] + 1) if len(filled_bins) else (0, 0)
  )
  middles = np.sqrt(index.edges_H[:-1] * index.edges_H[1:])
  with_it = index.cofiring_FC[j] >= 0
  row = {
    'index': str(j),
    'maxActApprox': round(float(index.max_F[j]), 4),
    'frac_nonzero': float(index.density_F[j]),
    'freq_hist_data_bar_values': _rounded(middles[low:high]),
    'freq_hist_data_bar_heights': index.histogram_FH[j, low:high].tolist(),
    'topkCosSimIndices': index.neighbour_FC[j].tolist(),
    'topkCosSimValues': _rounded(index.neighbour_value_FC[j]),
    'correlated_features_indices': index.cofiring_FC[j][with_it].tolist(),
    'correlated_features_l1': _rounded(index.cofiring_value_FC[j][with_it]),
    'hasVector': False,
  }
  if index.positive_FL is not None:
    row |= {
      'pos_str': pieces(index.positive_FL[j]),
      'pos_values': _rounded(index.positive_value_FL[j]),
      'neg_str': pieces(index.negative_FL[j]),
      'neg_values': _rounded(index.negative_value_FL[j]),
    }
  return row


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
      'dataIndex': str(index.top_sequence_FE[j, e]),
      'tokens': pieces(sequence[inside]),
      'values': _rounded(values),
      'maxValue': round(float(values[best]), 4),
      'maxValueTokenIndex': best,
      'minValue': round(float(values.min()), 4),
    }


def _rounded(values) -> list[float]:
  return [round(float(value), 4) for value in values]


def _lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  with gzip.GzipFile(path, 'wb', mtime=0) as file:
    for row in rows:
      file.write(json.dumps(row, allow_nan=False).encode() + b'\n')
