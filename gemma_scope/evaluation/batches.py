"""Held-out text in batches of equal size, with masks and document numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SAMPLE_TOKENS, _SAMPLE_SEQUENCES = 2**14, 32  # at least, to fit controls


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """Held-out text to evaluate on.

  Attributes:
    sequences_NT: int32, each starting with BOS.
    keep: which tokens count: int32 [N, T] -> bool [N, T], never BOS
      (`tokenizers.Special.keep`).
    batch: sequences a forward pass; need not divide N.
    documents_NT: the number of each token's document: the clusters of the
      intervals. None: each sequence is one.
    fit_NT: sequences on which controls are fitted; None fits them on
      `sequences_NT`, which flatters the controls.
    loss_every: losses and KL are measured at every n-th position, with a
      different offset in each batch. Logits of a large vocabulary cost more
      than the layers of a small model.
  """

  sequences_NT: np.ndarray
  keep: Callable[[np.ndarray], np.ndarray]
  batch: int
  documents_NT: np.ndarray | None = None
  fit_NT: np.ndarray | None = None
  loss_every: int = 1


@dataclasses.dataclass(frozen=True)
class Watch:
  """Callbacks of a long evaluation.

  Attributes:
    progress: called often, as progress(sequences done, N); a fraction is done
      between two batches.
    poll: called often; may raise to stop.
    says: called with a description of each phase before the batches.
  """

  progress: Callable[[float, int], None] = lambda done, total: None
  poll: Callable[[], None] = lambda: None
  says: Callable[[str], None] = lambda phase: None


class Batch(NamedTuple):
  """One batch; padding rows do not count in any metric."""

  tokens_BT: jax.Array
  keep_BT: jax.Array
  cluster_BT: np.ndarray  # on the host, 0 .. clusters - 1
  rows: int  # sequences without padding rows


class Batches:
  """The batches of a text, on the devices.

  Attributes:
    size, length: sequences, and tokens of each.
    clusters, clustered_by: number of clusters, and what they are: 'documents'
      or 'sequences'.
  """

  def __init__(self, text: Text, mesh: Mesh | None):
    self._tokens_NT = _sequences(text.sequences_NT)
    self.size, self.length = self._tokens_NT.shape
    self._keep_NT = _kept(text, self._tokens_NT)
    _check_batch(text.batch, _data(mesh))
    self._batch, self._sharding = text.batch, None
    self._loss_every = text.loss_every
    if mesh is not None:
      self._sharding = NamedSharding(mesh, PartitionSpec('data', None))
    documents_NT = text.documents_NT
    self.clustered_by = 'sequences' if documents_NT is None else 'documents'
    if documents_NT is None:
      documents_NT = np.arange(self.size)[:, None]
    documents_NT = np.broadcast_to(documents_NT, self._tokens_NT.shape)
    # Numbered from 0 over the tokens that count; others belong nowhere.
    numbers = np.unique(documents_NT[self._keep_NT])
    self.clusters = len(numbers)
    cluster_NT = np.searchsorted(numbers, documents_NT)
    self._cluster_NT = np.minimum(cluster_NT, self.clusters - 1)

  def __len__(self) -> int:
    return -(-self.size // self._batch)

  def __iter__(self) -> Iterator[Batch]:
    return self._of(np.arange(self.size))

  def loss_positions(self, number: int) -> np.ndarray:
    """Positions where a batch's losses are computed; equally many per batch."""
    stride = min(self._loss_every, self.length - 1)
    count = (self.length - 1) // stride
    return number % stride + stride * np.arange(count)

  def sample(self) -> Iterator[Batch]:
    """A sample, spread evenly over the sequences with a token that counts."""
    (index_n,) = np.nonzero(self._keep_NT.any(1))
    count = min(fit_sequences(self.length), len(index_n))
    rows = np.linspace(0, len(index_n) - 1, count).round().astype(int)
    return self._of(index_n[rows])

  def _of(self, index_n: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(index_n), self._batch):
      index_B = index_n[start : start + self._batch]
      real_B = np.arange(self._batch) < len(index_B)
      filled_B = np.resize(index_B, self._batch)
      keep_BT = self._keep_NT[filled_B] & real_B[:, None]
      placed = self._tokens_NT[filled_B], keep_BT
      placed = jax.device_put(placed, self._sharding)
      yield Batch(*placed, self._cluster_NT[filled_B], len(index_B))


def fit_sequences(length: int) -> int:
  """How many sequences of this length controls are fitted on."""
  return max(_SAMPLE_SEQUENCES, -(-_SAMPLE_TOKENS // length))


def _check_batch(batch: int, data: int) -> None:
  if batch < 1 or batch % data:
    raise ValueError(
      f'A batch of {batch} sequences must be at least one and divisible by '
      f"the mesh's data axis ({data})."
    )


def _data(mesh: Mesh | None) -> int:
  return 1 if mesh is None else mesh.shape.get('data', 1)


def _sequences(sequences) -> np.ndarray:
  tokens_NT = np.asarray(sequences, np.int32)
  shape = tokens_NT.shape
  if len(shape) != 2 or shape[0] < 1 or shape[1] < 3:
    raise ValueError(
      'Evaluation sequences must have shape [N, T], with N at least 1 and T at '
      f'least 3; found {list(shape)}.'
    )
  return tokens_NT


def _kept(text: Text, tokens_NT: np.ndarray) -> np.ndarray:
  keep_NT = np.asarray(text.keep(tokens_NT))
  if keep_NT.shape != tokens_NT.shape or keep_NT.dtype != bool:
    raise ValueError(
      f'`keep` gave {keep_NT.dtype} {list(keep_NT.shape)}; expected bool '
      f'{list(tokens_NT.shape)}.'
    )
  misplaced = np.flatnonzero(keep_NT[:, 0])
  if misplaced.size:
    raise ValueError(
      'Sequences start with BOS, which does not count; sequence '
      f'{misplaced[0]} starts with token {tokens_NT[misplaced[0], 0]}, which '
      'does.'
    )
  if not (keep_NT[:, 1:] & keep_NT[:, :-1]).any():
    raise ValueError('No token counts: all tokens of the text are special.')
  return keep_NT
