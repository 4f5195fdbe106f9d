"""Statistics of each latent's activations, added up batch by batch.

Everything happens on the host and only touches the few latents that fire in a
batch: the firings are sorted and merged with what is kept of those latents.
`memory` gives the size of the state. Co-firing is counted over all latents: on
every token up to F = 4096, and on a hashed sample of tokens above, which bounds
the number of pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse as scipy_sparse

EXAMPLES, SAMPLES, SILENT, POOL, NEAR = 24, 4, 16, 64, 12
TENTHS = 10
# Four bins an octave are as fine as a page shows. The residual stream of
# Gemma 3 has values far beyond float16's 2^16.
EDGES_H = 2.0 ** np.linspace(-8, 28, 145)
_DENSE = 4096  # co-firing uses every token up to this many latents
_PAIRS = 1 << 22
_FIELDS = ('value', 'sequence', 'position', 'owner', 'rank')  # of a record


def memory(latents: int) -> int:
  """Bytes kept for an SAE, without co-firing: 251 MB at 16k, 16 GB at 1m."""
  bins = len(EDGES_H) - 1
  of_record = 4 + 4 + 4 + 4 + 8
  numbers = 8 * 3 + 4 + 8 * bins + POOL
  return latents * (numbers + of_record * (EXAMPLES + bins * SAMPLES))


class Firings(NamedTuple):
  """Activations above 0 on the tokens that count, each [P]."""

  latent: np.ndarray
  value: np.ndarray
  sequence: np.ndarray
  position: np.ndarray


class Outliers(NamedTuple):
  """Tokens that the outlier rule leaves out, each [O], and what fires there."""

  sequence: np.ndarray
  position: np.ndarray
  norm: np.ndarray
  fired_F: np.ndarray  # on how many of them each latent fires


def priority(latent, sequence, position) -> np.ndarray:
  """Hashes three numbers to uint64 with splitmix64."""
  with np.errstate(over='ignore'):
    z = (
      np.asarray(latent, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
      + np.asarray(sequence, np.uint64) * np.uint64(0xD1B54A32D192ED03)
      + np.asarray(position, np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Kept:
  """Keeps the `limit` records of lowest rank in each group, one per owner.

  A record is (value, sequence, position). The rank is the negated value, or a
  hash (`priority`).
  """

  def __init__(self, groups: int, limit: int):
    shape = groups, limit
    self.value = np.zeros(shape, np.float32)
    self.sequence = np.full(shape, -1, np.int32)
    self.position = np.zeros(shape, np.int32)
    self.owner = np.full(shape, -1, np.int32)
    self.rank = np.full(shape, np.inf)

  def add(self, group, rank, owner, value, sequence, position) -> None:
    """Merges records. Records with `owner` -1 never exclude one another."""
    candidates = rank < self.rank[group, -1]
    group, rank, owner, value, sequence, position = (
      column[candidates]
      for column in (group, rank, owner, value, sequence, position)
    )
    touched = np.unique(group)
    if not len(touched):
      return
    limit = self.rank.shape[1]
    filled = self.sequence[touched] >= 0
    groups = np.concatenate([np.repeat(touched, filled.sum(1)), group])
    columns = [
      np.concatenate([getattr(self, name)[touched][filled], added])
      for name, added in zip(
        _FIELDS, (value, sequence, position, owner, rank), strict=True
      )
    ]
    value, sequence, position, owner, rank = columns
    # An owner's best record first; then the best of each group.
    order = np.lexsort((position, sequence, rank, owner, groups))
    repeated = (np.diff(groups[order]) == 0) & (np.diff(owner[order]) == 0)
    duplicate = np.concatenate([[False], repeated & (owner[order][1:] >= 0)])
    order = order[~duplicate]
    order = order[
      np.lexsort((position[order], sequence[order], rank[order], groups[order]))
    ]
    groups = groups[order]
    first = np.searchsorted(groups, groups)
    rank_in_group = np.arange(len(groups)) - first
    fits = rank_in_group < limit
    order, groups, rank_in_group = (
      order[fits],
      groups[fits],
      rank_in_group[fits],
    )
    for name, values, fill_value in zip(
      _FIELDS,
      (value, sequence, position, owner, rank),
      (0, -1, 0, -1, np.inf),
      strict=True,
    ):
      array = getattr(self, name)
      array[touched] = fill_value
      array[groups, rank_in_group] = values[order]


class Statistics:
  """Statistics of one SAE on a text; batches may come in any order."""

  def __init__(self, latents: int, sequences: int):
    self._latents = latents
    self._pool = np.argsort(
      priority(0, np.arange(sequences), 1), kind='stable'
    )[:POOL]
    self._slot = np.full(sequences, -1)
    self._slot[self._pool] = np.arange(len(self._pool))
    bins = len(EDGES_H) - 1
    self.fired_F = np.zeros(latents, np.int64)
    self.sum_F = np.zeros(latents)
    self.max_F = np.zeros(latents, np.float32)
    self.histogram_FH = np.zeros((latents, bins), np.int64)
    self.heard_FP = np.zeros((latents, len(self._pool)), bool)
    self.top = Kept(latents, EXAMPLES)
    self.sample = Kept(latents * bins, SAMPLES)
    self.pairs = scipy_sparse.csr_matrix((latents, latents), dtype=np.int64)
    self.counted_F = np.zeros(latents, np.int64)  # where pairs were counted
    self.outlier_sequence_O = np.zeros(0, np.int32)
    self.outlier_position_O = np.zeros(0, np.int32)
    self.outlier_norm_O = np.zeros(0, np.float32)
    self.outlier_fired_F = np.zeros(latents, np.int64)

  def add(self, fires: Firings, documents_NT: np.ndarray) -> None:
    """Adds the firings of some sequences; each sequence is added once."""
    latent, value, sequence, position = fires
    F, bins = self.histogram_FH.shape
    self.fired_F += np.bincount(latent, minlength=F)
    self.sum_F += np.bincount(latent, weights=value, minlength=F)
    np.maximum.at(self.max_F, latent, value)
    inner = np.searchsorted(EDGES_H, value, 'right') - 1
    bin_ = np.clip(inner, 0, bins - 1)
    group = latent * bins + bin_
    self.histogram_FH += np.bincount(group, minlength=F * bins).reshape(F, bins)
    in_pool = self._slot[sequence] >= 0
    self.heard_FP[latent[in_pool], self._slot[sequence[in_pool]]] = True
    self.top.add(
      latent,
      -value.astype(float),
      documents_NT[sequence, position],
      value,
      sequence,
      position,
    )
    rank = priority(latent, sequence, position).astype(float)
    self.sample.add(
      group, rank, np.full(len(latent), -1, np.int32), value, sequence, position
    )
    self._add_pairs(fires)

  def add_outliers(self, outliers: Outliers) -> None:
    """Adds the outlier tokens of some sequences; each is added once."""
    for name in ('sequence', 'position', 'norm'):
      earlier = getattr(self, f'outlier_{name}_O')
      joined = np.concatenate([earlier, getattr(outliers, name)])
      setattr(self, f'outlier_{name}_O', joined)
    self.outlier_fired_F += outliers.fired_F

  def _add_pairs(self, fires: Firings) -> None:
    latent, _, sequence, position = fires
    share = min(1.0, _PAIRS / max(self._latents, 1) / 1024)
    if self._latents > _DENSE:
      chosen = priority(1, sequence, position) < np.uint64(share * (2**64 - 1))
      latent, sequence, position = (
        latent[chosen],
        sequence[chosen],
        position[chosen],
      )
    self.counted_F += np.bincount(latent, minlength=self._latents)
    token, row = np.unique(
      sequence.astype(np.int64) << 32 | position, return_inverse=True
    )
    fires_RF = scipy_sparse.csr_matrix(
      (np.ones(len(latent), np.int64), (row, latent)),
      (len(token), self._latents),
    )
    self.pairs = self.pairs + fires_RF.T @ fires_RF

  def finish(self) -> dict[str, np.ndarray]:
    """The arrays of an `Index` that come from firings."""
    order = np.lexsort((self.outlier_position_O, self.outlier_sequence_O))
    mean_F = self.sum_F / np.maximum(self.fired_F, 1)
    near, jaccard = self._cofiring()
    return {
      'fired_F': self.fired_F,
      'max_F': self.max_F,
      'mean_F': mean_F.astype(np.float32),
      'edges_H': EDGES_H.astype(np.float32),
      'histogram_FH': self.histogram_FH,
      'top_FE': self.top.value,
      'top_sequence_FE': self.top.sequence,
      'top_position_FE': self.top.position,
      **self._tenths(),
      'silent_FM': self._silent(),
      'cofiring_FC': near,
      'cofiring_value_FC': jaccard,
      'outlier_sequence_O': self.outlier_sequence_O[order],
      'outlier_position_O': self.outlier_position_O[order],
      'outlier_norm_O': self.outlier_norm_O[order],
      'outlier_fired_F': self.outlier_fired_F,
    }

  def _tenths(self) -> dict[str, np.ndarray]:
    """The R kept samples of smallest priority in each tenth of the range."""
    F, bins = self.histogram_FH.shape
    group, slot = np.nonzero(self.sample.sequence >= 0)
    value = self.sample.value[group, slot]
    latent = group // bins
    tenth = np.ceil(TENTHS * value / self.max_F[latent]).astype(int) - 1
    tenths = Kept(F * TENTHS, SAMPLES)
    tenths.add(
      latent * TENTHS + np.clip(tenth, 0, TENTHS - 1),
      self.sample.rank[group, slot],
      np.full(len(latent), -1, np.int32),
      value,
      self.sample.sequence[group, slot],
      self.sample.position[group, slot],
    )
    shape = F, TENTHS, SAMPLES
    return {
      'sample_FQR': tenths.value.reshape(shape),
      'sample_sequence_FQR': tenths.sequence.reshape(shape),
      'sample_position_FQR': tenths.position.reshape(shape),
    }

  def _silent(self) -> np.ndarray:
    silent_FP = ~self.heard_FP
    place_FP = np.cumsum(silent_FP, 1) - 1
    silent_FM = np.full((self._latents, SILENT), -1, np.int32)
    latent, slot = np.nonzero(silent_FP & (place_FP < SILENT))
    silent_FM[latent, place_FP[latent, slot]] = self._pool[slot]
    return silent_FM

  def _cofiring(self) -> tuple[np.ndarray, np.ndarray]:
    """For each latent the NEAR others of largest Jaccard index."""
    near = np.full((self._latents, NEAR), -1, np.int32)
    jaccard = np.zeros((self._latents, NEAR), np.float32)
    pairs = self.pairs.tocoo()
    distinct = pairs.row != pairs.col
    latent, neighbour, together = (
      column[distinct] for column in (pairs.row, pairs.col, pairs.data)
    )
    share = together / np.maximum(
      self.counted_F[latent] + self.counted_F[neighbour] - together, 1
    )
    order = np.lexsort((neighbour, -share, latent))
    latent, neighbour, share = latent[order], neighbour[order], share[order]
    place = np.arange(len(latent)) - np.searchsorted(latent, latent)
    best = place < NEAR
    near[latent[best], place[best]] = neighbour[best]
    jaccard[latent[best], place[best]] = share[best]
    return near, jaccard

  # The state between two runs, as plain arrays.

  _PLAIN = (
    'fired_F',
    'sum_F',
    'max_F',
    'histogram_FH',
    'heard_FP',
    'counted_F',
    'outlier_sequence_O',
    'outlier_position_O',
    'outlier_norm_O',
    'outlier_fired_F',
  )

  def arrays(self) -> dict[str, np.ndarray]:
    """Everything that `restore` needs."""
    arrays = {name: getattr(self, name) for name in self._PLAIN}
    for kind in ('top', 'sample'):
      for field in _FIELDS:
        arrays[f'{kind}_{field}'] = getattr(getattr(self, kind), field)
    pairs = self.pairs.tocoo()
    return arrays | {
      'pairs_row': pairs.row.astype(np.int32),
      'pairs_column': pairs.col.astype(np.int32),
      'pairs_count': pairs.data,
    }

  def restore(self, arrays) -> None:
    """Continues from a state that `arrays` returned."""
    for name in self._PLAIN:
      setattr(self, name, np.array(arrays[name]))
    for kind in ('top', 'sample'):
      for field in _FIELDS:
        value = np.array(arrays[f'{kind}_{field}'])
        setattr(getattr(self, kind), field, value)
    self.pairs = scipy_sparse.csr_matrix(
      (
        arrays['pairs_count'],
        (arrays['pairs_row'], arrays['pairs_column']),
      ),
      (self._latents, self._latents),
    )
