"""The live view's questions about a text, answered from their plain JSON.

  read    its tokens, each one's latents, what is missed, what comes next
  change  latents changed: loss, KL, logits at each position, with controls
  dose    a dose-response curve      steer  a continuation, and the default one
  why     what a logit is due to     graph  the same over several layers

SAEs are loaded when they are first asked about; the last few are kept. What a
question lacks, or has too much of, is said in a ValueError.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gemma_scope.language_model import gemma as lm
from gemma_scope.microscope.circuits import (
  attribution,
  effects,
  intervene,
  readout,
)
from gemma_scope.microscope.circuits import attribution_graph as graph_lib
from gemma_scope.microscope.circuits.intervene import Change, Subject
from gemma_scope.microscope.index.store import Index
from gemma_scope.release import sae_folder
from gemma_scope.text import tokenizers

MOST_TOKENS = 4096  # of a text
_MOST_CHANGES = 32
_SHOWN = 64  # latents a token
_NEXT = 5  # likeliest tokens, at each
_KEPT = 4  # SAEs on the devices


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
  """An SAE of the view; in the order of the pages.

  Attributes:
    path: its name there.
    card: its card.
    load: its parameters and index, if that is theirs.
    index: what it fires on.
  """

  path: str
  card: Mapping[str, Any]
  load: Callable[[], tuple[sae_folder.Params, Index]]
  index: Index


class Questions:
  """Answers by name, each a function of a question alone."""

  def __init__(
    self,
    gemma: lm.Gemma,
    lm_params: lm.Params,
    tokenizer: tokenizers.Tokenizer,
    shown: Sequence[Shown],
    mesh: Mesh | None = None,
  ):
    self._gemma, self._lm_params, self._mesh = gemma, lm_params, mesh
    self._tokenizer, self._shown = tokenizer, list(shown)
    self._subjects: collections.OrderedDict[int, Subject] = (
      collections.OrderedDict()
    )
    self._special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    self.answers = {
      'read': self.read, 'change': self.change, 'dose': self.dose,
      'steer': self.steer, 'why': self.why, 'graph': self.graph,
    }  # fmt: skip

  # What a question holds.

  def _subject(self, asked: Mapping, key: str = 'member') -> Subject:
    return self._loaded(_integer(asked, key, 0, len(self._shown) - 1))

  def _loaded(self, i: int) -> Subject:
    if i not in self._subjects:
      one = self._shown[i]
      self._subjects[i] = intervene.subject(
        self._gemma, self._lm_params, one.load()[0], one.card,
        one.index.max_F, self._special, self._mesh,
      )  # fmt: skip
      while len(self._subjects) > _KEPT:
        self._subjects.popitem(last=False)
    self._subjects.move_to_end(i)
    return self._subjects[i]

  def _tokens(self, asked: Mapping) -> list[int]:
    text = asked.get('text')
    if not isinstance(text, str):
      raise ValueError('A question has a "text".')
    ids = readout.with_bos(self._tokenizer, text)
    if not 1 < len(ids) <= MOST_TOKENS:
      raise ValueError(
        f'The text has {len(ids) - 1:,} tokens; give 1 to {MOST_TOKENS - 1:,}.'
      )
    return ids

  def _changes(self, asked: Mapping) -> list[Change]:
    given = asked.get('changes')
    if not isinstance(given, list) or len(given) > _MOST_CHANGES:
      raise ValueError(f'"changes" is a list of at most {_MOST_CHANGES}.')
    return [_change(one) for one in given]

  def _logit(self, asked: Mapping, ids: Sequence[int]) -> readout.Logit:
    """Two tokens: as given, else the two likeliest ones at the end."""
    given = asked.get('logit')
    if given is None:
      return readout.likeliest(self._gemma, self._lm_params, ids)
    if not isinstance(given, list) or len(given) != 2:
      raise ValueError('"logit" is a pair of tokens; the second may be null.')
    first, second = (None if one is None else self._token(one) for one in given)
    if first is None:
      raise ValueError('The first token of "logit" is missing.')
    return first, second

  def _token(self, given) -> int:
    size = self._gemma.config.vocab_size
    if type(given) is int:
      if not 0 <= given < size:
        raise ValueError(f'There is no token {given}; the model has {size:,}.')
      return given
    if not isinstance(given, str) or not given:
      raise ValueError('A token is its text, or its number.')
    return readout.one_token(self._tokenizer, given)

  def _pieces(self, logit: readout.Logit) -> list[str]:
    return readout.logit_pieces(self._tokenizer, logit)

  # Answers.

  def read(self, asked: Mapping) -> dict[str, Any]:
    """A text's tokens, their latents, what is missed, what comes next."""
    subject, ids = self._subject(asked), self._tokens(asked)
    found = effects.read(subject, ids, _SHOWN)
    after = effects.predict(self._gemma, self._lm_params, ids, _NEXT)
    latents = [
      [[int(i), _short(v)] for i, v in zip(i_K, v_K, strict=True) if v > 0]
      for i_K, v_K in zip(found.feature_TK, found.value_TK, strict=True)
    ]
    counts_T = found.counts_T
    return {
      'ids': ids,
      'pieces': self._tokenizer.pieces(ids),
      'counts': counts_T.tolist(),
      'latents': [
        row if counts else []
        for row, counts in zip(latents, counts_T, strict=True)
      ],
      'l0': found.l0_T.tolist(),
      'unexplained': list(map(_short, found.unexplained_T)),
      'loss': [None, *map(_short, after.loss_T)],
      'next': [
        [[piece, _short(p)] for piece, p in zip(pieces, p_K, strict=True)]
        for pieces, p_K in zip(
          map(self._tokenizer.pieces, after.token_TK.tolist()),
          after.probability_TK,
          strict=True,
        )
      ],
    }

  def change(self, asked: Mapping) -> dict[str, Any]:
    """What changes do at each position, beside as long vectors of others."""
    subject, ids = self._subject(asked), self._tokens(asked)
    logit, changes = self._logit(asked, ids), self._changes(asked)
    given = intervene.rows(subject, [changes])
    rows = intervene.with_controls(subject, given, 8)
    found = effects.effects(subject, effects.padded([ids]), rows, logit=logit)
    length = len(ids)
    loss_BT = (found.loss_BT - found.clean_loss_BT)[:, : length - 1]
    logit_BT = (found.logit_BT - found.clean_logit_BT)[:, :length]
    said = effects.summary(found)
    return {
      'pieces': self._tokenizer.pieces(ids),
      'logit': self._pieces(logit),
      'kl': list(map(_short, found.kl_BT[0, :length])),
      'delta_loss': [None, *map(_short, loss_BT[0])],
      'delta_logit': list(map(_short, logit_BT[0])),
      'control': {
        'kl': list(map(_short, found.kl_BT[1:, :length].mean(0))),
        'delta_loss': [None, *map(_short, loss_BT[1:].mean(0))],
        'delta_logit': list(map(_short, np.abs(logit_BT[1:]).max(0))),
      },
      'mean': said[0],
      'control_mean': {
        key: float(np.mean([abs(one[key]) for one in said[1:]]))
        for key in said[0]
      },
    }

  def dose(self, asked: Mapping) -> dict[str, Any]:
    """A dose-response curve of one change."""
    subject, ids = self._subject(asked), self._tokens(asked)
    (change,) = self._changes({'changes': [asked.get('change')]})
    logit = self._logit(asked, ids)
    strengths = (1.0,)
    if change.kind in ('add', 'clamp'):
      strengths = (-2, -1, -0.5, 0, 0.5, 1, 2, 4)
    return {
      'logit': self._pieces(logit),
      'curve': effects.dose_response(
        subject, ids, change, strengths=strengths, logit=logit
      ),
    }

  def steer(self, asked: Mapping) -> dict[str, Any]:
    """The continuation by default and with changes, from the same seed."""
    subject, ids = self._subject(asked), self._tokens(asked)
    found = effects.steer(
      subject, ids, self._changes(asked),
      max_new_tokens=_integer(asked, 'tokens', 1, 256, 48),
      temperature=_number(asked, 'temperature', 0.0, 5.0, 0.5),
      seed=_integer(asked, 'seed', 0, 2**32 - 1, 0),
      stop=[self._tokenizer.eos_id], forbid=[self._tokenizer.bos_id],
    )  # fmt: skip
    for one in found.values():
      one['pieces'] = self._tokenizer.pieces(one['ids'])
      one['text'] = self._tokenizer.decode(one['ids'])
    return found

  def why(self, asked: Mapping) -> dict[str, Any]:
    """Latents behind a logit difference, predictions beside exact effects."""
    subject, ids = self._subject(asked), self._tokens(asked)
    logit = self._logit(asked, ids)
    found = attribution.attribute(subject, ids, logit)
    for line in found['features']:
      line['by_token'] = list(map(_short, line['by_token']))
    return found | {
      'pieces': self._tokenizer.pieces(ids),
      'logit': self._pieces(logit),
    }

  def graph(self, asked: Mapping) -> dict[str, Any]:
    """The graph over transcoders of several layers, or a CLT."""
    first = _integer(asked, 'member', 0, len(self._shown) - 1)
    chosen = readout.together(
      [(one.card, one.index) for one in self._shown], first
    )
    subjects = [self._loaded(i) for i in chosen]
    ids = self._tokens(asked)
    logit = self._logit(asked, ids)
    found = graph_lib.plain(graph_lib.trace(subjects, ids, logit))
    return found | {
      'members': chosen,
      'pieces': self._tokenizer.pieces(ids),
      'logit': self._pieces(logit),
    }


# Shared with the commands.


def _short(value) -> float | None:
  return float(f'{value:.4g}') if np.isfinite(value) else None


def _integer(asked, key, least, most, default=None) -> int:
  value = asked.get(key, default)
  if type(value) is not int or not least <= value <= most:
    raise ValueError(f'"{key}" is a whole number from {least:,} to {most:,}.')
  return value


def _number(asked, key, least, most, default=None) -> float:
  value = asked.get(key, default)
  if type(value) not in (int, float) or not least <= value <= most:
    raise ValueError(f'"{key}" is a number from {least:g} to {most:g}.')
  return float(value)


def _change(given) -> Change:
  if not isinstance(given, dict) or not isinstance(given.get('kind'), str):
    raise ValueError('A change has "feature", "kind" and "strength".')
  return Change(
    _integer(given, 'feature', 0, 2**31 - 1),
    given['kind'],
    _number(given, 'strength', -1e4, 1e4, 1.0),
  )
