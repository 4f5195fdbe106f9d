"""The edits of a causal card: contexts of every feature, and their controls.

  ablate  at examples of the feature, one from each document, evenly spaced over
          the index's list of the largest activations
  add     at tokens where the feature is silent; the tokens are drawn once and
          shared by all features

A feature has the same controls in all contexts: the decoders of other features
that fire (shuffled) and random directions, all with its own decoder's norm.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from gemma_scope import sae as sae_lib
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits.intervene import Subject
from gemma_scope.microscope.index.store import Index

EDITS = ('ablate', 'add')


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured.

  Attributes:
    contexts: for each edit, of each feature.
    scored: tokens that are scored, from the edited one on.
    controls: of each kind, at least 2.
    likeliest: tokens of the KL that is compared with controls.
    lists: other features' lists of tokens, as controls of z.
    pool: tokens that additions are drawn from.
    sample: measures so many features, drawn at random; 0 measures all.
    seed: of all draws.
  """

  contexts: int = 4
  scored: int = 3
  controls: int = 3
  likeliest: int = 2048
  lists: int = 20
  pool: int = 64
  sample: int = 0
  seed: int = 0

  def __post_init__(self):
    if self.contexts < 2 or self.controls < 2 or self.scored < 1:
      raise ValueError(
        'A causal card needs at least 2 contexts, 2 controls and 1 scored '
        f'token; found {self.contexts}, {self.controls} and {self.scored}.'
      )


class Edit(NamedTuple):
  """One edit: the context `slot` of a feature."""

  feature: int
  kind: int  # index into EDITS
  slot: int
  position: int
  amount: float  # of the decoder that is added


def check(subject: Subject) -> None:
  """Raises ValueError unless cards can be made of the SAE."""
  if subject.place.several:
    raise ValueError(
      'Causal cards are made of SAEs and transcoders of one layer; found '
      f'{subject.place}.'
    )


class Plan:
  """All edits, by sequence of the index.

  Args:
    subject: the SAE in its model.
    index: its index.
    settings: what is measured.

  Attributes:
    alive: the features that fire, ascending.
    tested: those of them that are measured; all give controls.
    by_sequence: sequence -> its edits.
  """

  def __init__(self, subject: Subject, index: Index, settings: Settings):
    check(subject)
    self.settings, self.index = settings, index
    self._W_dec = np.asarray(subject.params['W_dec'], np.float32)
    norm_F = np.linalg.norm(self._W_dec, axis=1)
    self.alive = np.flatnonzero((index.fired_F > 0) & (norm_F > 0))
    self._norm_F = norm_F
    self.by_sequence: dict[int, list[Edit]] = {}
    if len(self.alive) <= max(settings.controls, settings.lists):
      raise ValueError(
        f'The controls need more than {max(settings.controls, settings.lists)} '
        f'features that fire; the SAE has {len(self.alive)}.'
      )
    self.tested = self._drawn()
    self._ablations()
    self._additions(subject)
    for edits in self.by_sequence.values():
      edits.sort(key=lambda edit: (edit.position, edit.feature))

  @property
  def count(self) -> int:
    """Number of edits, without their controls."""
    return sum(map(len, self.by_sequence.values()))

  def _drawn(self) -> np.ndarray:
    count = self.settings.sample or len(self.alive)
    rng = np.random.default_rng((self.settings.seed, 4))
    chosen = rng.permutation(self.alive)[:count]
    return np.sort(chosen)

  def _add(self, sequence: int, edit: Edit) -> None:
    self.by_sequence.setdefault(sequence, []).append(edit)

  def _ablations(self) -> None:
    index, contexts = self.index, self.settings.contexts
    for i in self.tested.tolist():
      filled_E = np.flatnonzero(index.top_sequence_FE[i] >= 0)
      spaced = np.unique(np.linspace(0, len(filled_E) - 1, contexts).round())
      for slot, e in enumerate(filled_E[spaced.astype(int)].tolist()):
        position = int(index.top_position_FE[i, e])
        edit = Edit(i, 0, slot, position, -float(index.top_FE[i, e]))
        self._add(int(index.top_sequence_FE[i, e]), edit)

  def _additions(self, subject: Subject) -> None:
    rng = np.random.default_rng((self.settings.seed, 1))
    length = self.index.keep_NT.shape[1]
    room_T = np.arange(length) <= max(length - self.settings.scored, 0)
    sequence, position = np.nonzero(self.index.keep_NT & room_T)
    order = rng.permutation(len(sequence))
    _, first = np.unique(sequence[order], return_index=True)
    drawn_P = order[np.sort(first)][: self.settings.pool]  # one a sequence
    silent_PF = np.stack(
      [
        _silent(subject, self.index.sequences_NT[n], t)
        for n, t in zip(sequence[drawn_P], position[drawn_P], strict=True)
      ]
    )
    for i in self.tested.tolist():
      free = rng.permutation(np.flatnonzero(silent_PF[:, i]))
      for slot, p in enumerate(free[: self.settings.contexts].tolist()):
        amount = float(self.index.mean_F[i])
        edit = Edit(i, 1, slot, int(position[drawn_P[p]]), amount)
        self._add(int(sequence[drawn_P[p]]), edit)

  def directions(self, feature: int) -> np.ndarray:
    """The feature's decoder and its controls, of one norm [1 + 2 M, D]."""
    count = self.settings.controls
    rng = np.random.default_rng((self.settings.seed, 2, feature))
    other_features = self.alive[self.alive != feature]
    writers = self._W_dec[rng.choice(other_features, count, replace=False)]
    random = rng.normal(size=(count, self._W_dec.shape[1]))
    vectors = np.concatenate([self._W_dec[feature][None], writers, random])
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors * (self._norm_F[feature] / norm)).astype(np.float32)

  def lists(self, feature: int) -> np.ndarray | None:
    """Token lists [1 + lists, 2, L]: raised and lowered; its own first."""
    if self.index.positive_FL is None:
      return None
    rng = np.random.default_rng((self.settings.seed, 3, feature))
    other_features = self.alive[self.alive != feature]
    listed = rng.choice(other_features, self.settings.lists, replace=False)
    listed = np.concatenate([[feature], listed])
    pair = self.index.positive_FL[listed], self.index.negative_FL[listed]
    return np.stack(pair, 1)


def _silent(subject: Subject, tokens_T: np.ndarray, position: int):
  site = subject.place.sites[0]
  taps = splice.taps(subject.gemma, subject.lm_params, tokens_T[None], (site,))
  x_1D = np.asarray(taps[site])[0, position][None]
  return np.asarray(_encoded(subject.params, x_1D))[0] == 0


@jax.jit
def _encoded(params, x_1D):
  with jax.default_matmul_precision('highest'):
    return sae_lib.encode(params, x_1D)
