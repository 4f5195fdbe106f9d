"""Questions of the live view, as plain JSON, and their answers.

  read      the tokens of a text, their latents, the error, the next tokens
  change    effect of changed latents at each position, with controls
  dose      a dose-response curve
  steer     a continuation with changes, beside the default one
  why       attribution of a logit to latents
  graph     attribution through several layers
  ablate    exact effect of features of a graph, ablated together
  warm      compiles the programs of an SAE in the background
  complete  pieces of the vocabulary that begin with a text

SAEs are loaded at the first question about them and the last few are kept. A
question that lacks something, or has too much, raises a ValueError.
"""

from __future__ import annotations

import bisect
import collections
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import generate
from gemma_scope.microscope.circuits import (
  attribution,
  effects,
  graph_files,
  intervene,
  readout,
  supernodes,
)
from gemma_scope.microscope.circuits import attribution_graph as graph_lib
from gemma_scope.microscope.circuits.intervene import Change, Subject
from gemma_scope.microscope.dashboard import fields
from gemma_scope.microscope.index.store import Indexed
from gemma_scope.runtime import progress
from gemma_scope.text import tokenizers

MOST_TOKENS = 4096  # of a text
_MOST_CHANGES = 32
_SHOWN = 64  # latents a token
_NEXT = 5  # likeliest tokens, at each
_KEPT = 4  # SAEs on the devices
_COMPLETED, _LONGEST_PIECE = 12, 64
# JAX compiles and keeps programs for one question of a process at a time.
_ONE_AT_A_TIME = threading.Lock()
WARM_LENGTHS = (64, 32, 128)  # of texts, compiled at the start


class Questions:
  """Answers by name, each a function of a question alone.

  Args:
    model: the language model and its parameters.
    tokenizer: its tokenizer.
    saes: the SAEs, in the order of the pages.
    mesh: the devices; None for one.
  """

  def __init__(
    self,
    model: tuple[lm.Gemma, lm.Params],
    tokenizer: tokenizers.Tokenizer,
    saes: Sequence[Indexed],
    mesh: Mesh | None = None,
  ):
    self._model, self._mesh = model, mesh
    self._gemma, self._lm_params = model
    self._tokenizer, self._saes = tokenizer, list(saes)
    self._subjects: collections.OrderedDict[int, Subject] = (
      collections.OrderedDict()
    )
    self._special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    self.lock = _ONE_AT_A_TIME  # held while a question is answered
    self.warm_lengths = WARM_LENGTHS
    self._warming: dict[int, dict[str, Any]] = {}
    self._warmers: list[threading.Thread] = []
    self._closed = threading.Event()
    self.answers = {
      'read': self.read, 'change': self.change, 'dose': self.dose,
      'steer': self.steer, 'why': self.why, 'graph': self.graph,
      'ablate': self.ablate,
    }  # fmt: skip
    # Answered at once, also while another question is.
    self.instant = {'warm': self.warm, 'complete': self.complete}

  # What a question holds.

  def _subject(self, question: Mapping, key: str = 'member') -> Subject:
    return self._loaded(fields.integer(question, key, 0, len(self._saes) - 1))

  def _loaded(self, i: int) -> Subject:
    if i not in self._subjects:
      self._subjects[i] = intervene.subject(
        self._model,
        self._saes[i].checked,
        self._saes[i].index.max_F,
        self._special,
        self._mesh,
      )
      while len(self._subjects) > _KEPT:
        self._subjects.popitem(last=False)
    self._subjects.move_to_end(i)
    return self._subjects[i]

  def _tokens(self, question: Mapping) -> list[int]:
    if 'ids' in question:  # of `warm`; a question from outside has none
      return question['ids']
    text = question.get('text')
    if not isinstance(text, str):
      raise ValueError('A question must have a "text".')
    ids = readout.with_bos(self._tokenizer, text)
    if not 1 < len(ids) <= MOST_TOKENS:
      raise ValueError(
        f'The text has {len(ids) - 1:,} tokens; give 1 to {MOST_TOKENS - 1:,}.'
      )
    return ids

  def _changes(self, question: Mapping) -> list[Change]:
    listed = question.get('changes')
    if not isinstance(listed, list) or len(listed) > _MOST_CHANGES:
      raise ValueError(f'"changes" must be a list of at most {_MOST_CHANGES}.')
    return [fields.change(entry) for entry in listed]

  def _logit(self, question: Mapping, ids: Sequence[int]) -> readout.Logit:
    """Two tokens: as given, else the two likeliest ones at the end."""
    listed = question.get('logit')
    if listed is None:
      return readout.likeliest(self._gemma, self._lm_params, ids)
    if not isinstance(listed, list) or len(listed) != 2:
      raise ValueError(
        '"logit" must be a pair of tokens; the second may be null.'
      )
    first, second = (
      None if token is None else self._token(token) for token in listed
    )
    if first is None:
      raise ValueError('The first token of "logit" is missing.')
    return readout.different(first, second)

  def _token(self, token) -> int:
    size = self._gemma.config.vocab_size
    if type(token) is int:
      if not 0 <= token < size:
        raise ValueError(f'There is no token {token}; the model has {size:,}.')
      return token
    if not isinstance(token, str) or not token:
      raise ValueError('A token must be a text or a number.')
    return readout.one_token(self._tokenizer, token)

  def _pieces(self, logit: readout.Logit) -> list[str]:
    return readout.logit_pieces(self._tokenizer, logit)

  # Answered at once.

  def warm(self, question: Mapping) -> dict[str, Any]:
    """Compiles an SAE's programs in the background; returns the progress.

    Returns:
      `done` and `total` steps, and `what` is being compiled.
    """
    i = fields.integer(question, 'member', 0, len(self._saes) - 1)
    if i not in self._warming:
      self._warming[i] = {'done': 0, 'total': 1, 'what': 'the SAE'}
      warmer = threading.Thread(target=self._warm, args=(i,), daemon=True)
      self._warmers.append(warmer)
      warmer.start()
    return dict(self._warming[i])

  def close(self) -> None:
    """Stops the background threads after their current step."""
    self._closed.set()
    for warmer in self._warmers:
      warmer.join()

  def _warm(self, i: int) -> None:
    """Asks every question once about a text of each length."""
    state, index = self._warming[i], self._saes[i].index
    feature = int(np.argmax(index.max_F))
    kind = 'add' if index.max_F[feature] else 'ablate'
    change = {'feature': feature, 'kind': kind, 'strength': 1.0}
    question = {
      'member': i, 'logit': [0, 1], 'changes': [change], 'change': change
    }  # fmt: skip
    steps = [
      (name, length)
      for length in self.warm_lengths
      for name in ('read', 'change', 'steer', 'dose', 'why')
    ]
    state['total'] = len(steps)
    for name, length in progress.track(steps, 'warming up'):
      if self._closed.is_set():
        break
      state['what'] = f'{name} of up to {length} tokens'
      try:
        with self.lock:
          self.answers[name](question | {'ids': self._sample(length)})
      except ValueError:
        pass  # the question itself says what cannot be asked
      state['done'] += 1
    state['done'] = state['total']

  def _sample(self, length: int) -> list[int]:
    """The ids of a text that is filled up to `length`."""
    ids = self._saes[0].index.sequences_NT[0]
    ids = np.resize(ids[1:], length - 2)
    return [self._tokenizer.bos_id, *map(int, ids)]

  def complete(self, question: Mapping) -> dict[str, Any]:
    """Pieces of the vocabulary that begin with a text, the shortest first."""
    text = question.get('text')
    if not isinstance(text, str) or not text or len(text) > _LONGEST_PIECE:
      return {'pieces': []}
    start = text.replace(' ', '\u2581')
    first = bisect.bisect_left(self._vocabulary, start)
    last = bisect.bisect_right(self._vocabulary, start + '\U0010ffff')
    pieces = sorted(self._vocabulary[first:last], key=lambda p: (len(p), p))
    return {'pieces': pieces[:_COMPLETED]}

  @functools.cached_property
  def _vocabulary(self) -> list[str]:
    size = min(self._gemma.config.vocab_size, self._tokenizer.vocab_size)
    return sorted(self._tokenizer.pieces(range(size)))

  # Answers.

  def read(self, question: Mapping) -> dict[str, Any]:
    """A text's tokens, their latents, the error and the next tokens."""
    subject, ids = self._subject(question), self._tokens(question)
    reading = effects.read(subject, ids, _SHOWN)
    prediction = effects.predict(self._gemma, self._lm_params, ids, _NEXT)
    latents = [
      [
        [int(i), fields.short(v)]
        for i, v in zip(i_K, v_K, strict=True)
        if v > 0
      ]
      for i_K, v_K in zip(reading.feature_TK, reading.value_TK, strict=True)
    ]
    counts_T = reading.counts_T
    return {
      'ids': ids,
      'pieces': self._tokenizer.pieces(ids),
      'counts': counts_T.tolist(),
      'outliers': reading.outlier_T.tolist(),
      'latents': [
        row if counts else []
        for row, counts in zip(latents, counts_T, strict=True)
      ],
      'l0': reading.l0_T.tolist(),
      'unexplained': list(map(fields.short, reading.unexplained_T)),
      'loss': [None, *map(fields.short, prediction.loss_T)],
      'next': [
        [[piece, fields.short(p)] for piece, p in zip(pieces, p_K, strict=True)]
        for pieces, p_K in zip(
          map(self._tokenizer.pieces, prediction.token_TK.tolist()),
          prediction.probability_TK,
          strict=True,
        )
      ],
    }

  def change(self, question: Mapping) -> dict[str, Any]:
    """Effect of changes at each position, beside controls of equal norm.

    `control` has the largest absolute effect of the controls at each position.
    """
    subject, ids = self._subject(question), self._tokens(question)
    logit, changes = self._logit(question, ids), self._changes(question)
    edit_rows = intervene.rows(subject, [changes])
    rows = intervene.with_controls(subject, edit_rows, 8)
    measured = effects.effects(
      subject, effects.padded([ids]), rows, logit=logit
    )
    length = len(ids)
    loss_BT = (measured.loss_BT - measured.clean_loss_BT)[:, : length - 1]
    logit_BT = (measured.logit_BT - measured.clean_logit_BT)[:, :length]
    means = effects.summary(measured)
    return {
      'pieces': self._tokenizer.pieces(ids),
      'logit': self._pieces(logit),
      'kl': list(map(fields.short, measured.kl_BT[0, :length])),
      'delta_loss': [None, *map(fields.short, loss_BT[0])],
      'delta_logit': list(map(fields.short, logit_BT[0])),
      'control': {
        'kl': list(map(fields.short, measured.kl_BT[1:, :length].max(0))),
        'delta_loss': [None, *map(fields.short, np.abs(loss_BT[1:]).max(0))],
        'delta_logit': list(map(fields.short, np.abs(logit_BT[1:]).max(0))),
      },
      'mean': means[0],
      'control_mean': {
        key: float(np.mean([abs(mean[key]) for mean in means[1:]]))
        for key in means[0]
      },
    }

  def dose(self, question: Mapping) -> dict[str, Any]:
    """A dose-response curve of one change."""
    subject, ids = self._subject(question), self._tokens(question)
    (change,) = self._changes({'changes': [question.get('change')]})
    logit = self._logit(question, ids)
    strengths = (1.0,)
    if change.kind in ('add', 'clamp'):
      strengths = (-2, -1, -0.5, 0, 0.5, 1, 2, 4)
    return {
      'logit': self._pieces(logit),
      'curve': effects.dose_response(
        subject, ids, change, strengths=strengths, logit=logit
      ),
    }

  def steer(self, question: Mapping) -> dict[str, Any]:
    """The continuation by default and with changes, from the same seed."""
    subject, ids = self._subject(question), self._tokens(question)
    sampling = generate.Sampling(
      fields.integer(question, 'tokens', 1, 256, 48),
      temperature=fields.number(question, 'temperature', 0.0, 5.0, 0.5),
      seed=fields.integer(question, 'seed', 0, 2**32 - 1, 0),
      stop=[self._tokenizer.eos_id],
      forbid=[self._tokenizer.bos_id],
    )
    continuations = effects.steer(
      subject, ids, self._changes(question), sampling
    )
    for continuation in continuations.values():
      continuation['pieces'] = self._tokenizer.pieces(continuation['ids'])
      continuation['text'] = self._tokenizer.decode(continuation['ids'])
    return continuations

  def why(self, question: Mapping) -> dict[str, Any]:
    """Latents behind a logit difference, predictions beside exact effects."""
    subject, ids = self._subject(question), self._tokens(question)
    logit = self._logit(question, ids)
    attributed = attribution.attribute(subject, ids, logit)
    for line in attributed['features']:
      line['by_token'] = list(map(fields.short, line['by_token']))
    return attributed | {
      'pieces': self._tokenizer.pieces(ids),
      'logit': self._pieces(logit),
    }

  def graph(self, question: Mapping) -> dict[str, Any]:
    """The graph over transcoders of several layers, or a CLT.

    `neuronpedia` is the same as a file of circuit-tracer and Neuronpedia.
    """
    chosen, subjects = self._graphed(question)
    ids = self._tokens(question)
    logit = self._logit(question, ids)
    traced = graph_lib.trace(subjects, ids, logit)
    graph = graph_lib.plain(traced) | {
      'text': question.get('text', ''),
      'members': chosen,
      'saes': [self._saes[i].sae.name for i in chosen],
      'pieces': self._tokenizer.pieces(ids),
      'logit': self._pieces(logit),
    }
    config = self._gemma.config
    content = graph_files.plain(
      graph,
      graph_files.Prompt(graph['text'], ids, graph['pieces'], logit),
      graph_files.Model(
        config.name,
        config.num_layers,
        [subject.width // len(subject.place.sites) for subject in subjects],
      ),
      'graph',
    )
    return graph | {'neuronpedia': content}

  def ablate(self, question: Mapping) -> dict[str, Any]:
    """How much the logit falls without some features of a graph.

    `nodes` is a list of [index of the SAE in the graph, feature, token].
    """
    _, subjects = self._graphed(question)
    ids = self._tokens(question)
    nodes = fields.nodes(question, subjects, len(ids))
    return supernodes.exact(subjects, ids, self._logit(question, ids), nodes)

  def _graphed(self, question: Mapping) -> tuple[list[int], list[Subject]]:
    """The SAEs of a graph: their numbers, and in their model."""
    first = fields.integer(question, 'member', 0, len(self._saes) - 1)
    chosen = readout.together(self._saes, first)
    return chosen, [self._loaded(i) for i in chosen]
