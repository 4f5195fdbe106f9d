"""Labels of latents, by rule or by a language model, and their scores.

  examples   a latent's windows: half to make the label, half to score it
  label      written by a language model (`llm`), or a rule (no model needed)
  detection  given a window, does the label predict that the latent fires in it?
  fuzzing    given a window with marked tokens, does the latent fire on these?
  score      balanced accuracy on held-out windows with a 95 % interval
  shuffled   detection with another latent's label on the same windows

Rules are checked exactly, without a model. Each row says whether its label is a
rule.

The interval is Newcombe's for the mean of two proportions, built from the
Wilson interval of each (Statistics in Medicine 17, 1998). Detection and fuzzing
are defined as in delphi (Paulo et al., arXiv 2410.13928). A label whose
interval includes 0.5 or the shuffled score is marked `low_score`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.evaluation import estimates
from gemma_scope.microscope.autointerp import examples, llm
from gemma_scope.microscope.index import store as index_lib
from gemma_scope.text import tokenizers

_AT_ONCE = 5  # windows per question
DASH = '-'
_SHOWN = 12  # windows shown to the model that writes a label
_MISTAKES = 2  # of each kind, kept for a label
_WIDE = 100  # characters of a mistake in a table


# Scores.


def balanced_accuracy(yes: Sequence[bool], no: Sequence[bool]):
  """Balanced accuracy of yes/no answers.

  Args:
    yes: answers to the windows where yes is right.
    no: answers to the windows where no is right.

  Returns:
    {'value', 'low', 'high', 'firing', 'silent'}, the last two being the numbers
    of windows; None if either kind has no windows.
  """
  if not len(yes) or not len(no):
    return None
  (p, p_low, p_high), (q, q_low, q_high) = (
    estimates.wilson_interval(np.sum(yes), len(yes)),
    estimates.wilson_interval(len(no) - np.sum(no), len(no)),
  )
  value = (p + q) / 2
  return {
    'value': float(value),
    'low': float(value - np.hypot(p - p_low, q - q_low) / 2),
    'high': float(value + np.hypot(p_high - p, q_high - q) / 2),
    'firing': len(yes),
    'silent': len(no),
  }


def detection_by_rule(label: examples.Rule, windows: examples.Examples):
  """Detection of a rule: does it predict a token in each window?

  Returns:
    The score, and the answers: truth -> [(window, answer)].
  """
  answers = {
    True: [
      (example, bool(label.at(example).any()))
      for example in windows.heldout_firing
    ],
    False: [
      (example, bool(label.at(example).any()))
      for example in windows.heldout_silent
    ],
  }
  score = balanced_accuracy(
    *([answer for _, answer in answers[truth]] for truth in (True, False))
  )
  return score, answers


def mistakes(
  answers: dict[bool, list[tuple[examples.Example, bool]]], pieces
) -> dict[str, list[str]]:
  """Held-out windows on which a label is most wrong, as text.

  Returns:
    'missed', where the latent fires most strongly and the label says no, with
    its tokens marked; and 'false', where it is silent and the label says yes.
  """
  missed = [example for example, answer in answers[True] if not answer]
  missed.sort(key=lambda example: -max(example.values))
  false = [example for example, answer in answers[False] if answer]
  return {
    'missed': [
      _shown(example, pieces, np.flatnonzero(example.fires))
      for example in missed[:_MISTAKES]
    ],
    'false': [_shown(example, pieces) for example in false[:_MISTAKES]],
  }


def fuzzing_by_rule(
  label: examples.Rule, windows: examples.Examples, seed: int = 0
):
  """Fuzzing score of a rule: does it predict half of the marked tokens?"""
  marked_right, marked_wrong = _marked(windows.heldout_firing, seed)

  def says(example, marks):
    return bool(label.at(example)[list(marks)].mean() >= 0.5)

  return balanced_accuracy(
    [says(*window) for window in marked_right],
    [says(*window) for window in marked_wrong],
  )


def _marked(firing: Sequence[examples.Example], seed: int):
  """Windows marked where the latent fires, and at as many other tokens."""
  rng, marked_right, marked_wrong = np.random.default_rng(seed), [], []
  for example in firing:
    firing_W = np.flatnonzero(example.fires)
    silent_W = np.flatnonzero(~np.asarray(example.fires))
    if len(firing_W) and len(silent_W):
      marked_right.append((example, firing_W))
      marked_wrong.append(
        (example, np.sort(rng.permutation(silent_W)[: len(firing_W)]))
      )
  return marked_right, marked_wrong


# A language model's labels.


def _shown(example: examples.Example, pieces, marks: Iterable[int] = ()) -> str:
  marks, words = set(map(int, marks)), []
  for t, piece in enumerate(pieces(example.ids)):
    piece = tokenizers.readable(piece)
    words.append(f'<<{piece}>>' if t in marks else piece)
  return ''.join(words)


def question(
  windows: examples.Examples, pieces, promoted: Sequence[str] = ()
) -> str:
  """The prompt that asks a language model for a label."""
  shown = [
    f'{i}. {_shown(example, pieces, np.flatnonzero(example.fires))!r}'
    for i, example in enumerate(windows.firing[:_SHOWN], 1)
  ]
  words = ''
  if promoted:
    words = f'\nWhere it fires, these tokens become likelier: {list(promoted)}'
  return (
    'A feature of a language model fires on the tokens between << and >> in '
    'these texts, and nowhere else in them.\n\n'
    + '\n'.join(shown)
    + words
    + '\n\nWhat do the marked tokens have in common that the others do not? '
    'Answer with one short phrase, no more than fifteen words.'
  )


def ask_which(
  model: llm.Model, label: str, texts: Sequence[str], marked: bool
) -> list[bool] | None:
  """A model's yes or no for each text; None if the answer has no such list."""
  if marked:
    task = (
      'In each text some tokens stand between << and >>. Say for each text '
      'whether the marked tokens are those that the label describes.'
    )
  else:
    task = 'Say for each text whether it contains what the label describes.'
  listed = '\n'.join(f'{i}. {text!r}' for i, text in enumerate(texts, 1))
  answer = model(
    f'A feature of a language model has the label: {label}\n\n{task}\n\n'
    f'{listed}\n\nAnswer with a JSON list of {len(texts)} numbers, 1 for yes '
    'and 0 for no, and nothing else.'
  )
  for bracketed in re.findall(r'\[[\s01,]*\]', answer):
    try:
      numbers = json.loads(bracketed)
    except ValueError:
      continue
    if len(numbers) == len(texts):
      return [number == 1 for number in numbers]
  return None


def _score_by_model(
  model, label, windows: examples.Examples, pieces, marked, seed
):
  """Detection or fuzzing score; each question mixes windows of both kinds.

  Returns:
    The score, and the answers: truth -> [(window, answer)].
  """
  if marked:
    positives, negatives = _marked(windows.heldout_firing, seed)
  else:
    positives = [(example, ()) for example in windows.heldout_firing]
    negatives = [(example, ()) for example in windows.heldout_silent]
  cases = [(window, True) for window in positives] + [
    (window, False) for window in negatives
  ]
  order = np.random.default_rng(seed).permutation(len(cases))
  answers = {True: [], False: []}
  unanswered = 0
  for start in range(0, len(order), _AT_ONCE):
    batch = [cases[i] for i in order[start : start + _AT_ONCE]]
    texts = [_shown(example, pieces, marks) for (example, marks), _ in batch]
    replies = ask_which(model, label, texts, marked)
    if replies is None:
      unanswered += len(batch)
      continue
    for ((example, _), truth), reply in zip(batch, replies, strict=True):
      answers[truth].append((example, reply))
  by_truth = {
    truth: [answer for _, answer in pairs] for truth, pairs in answers.items()
  }
  score = balanced_accuracy(by_truth[True], by_truth[False])
  return score and {**score, 'unanswered': unanswered}, answers


# Labels with their scores.


def explain(
  index: index_lib.Index,
  features: Sequence[int],
  pieces: Callable[[Iterable[int]], list[str]],
  model: llm.Model | None = None,
  seed: int = 0,
) -> list[dict[str, Any]]:
  """Labels latents and scores each label, next to another latent's label.

  Args:
    index: the index of one SAE.
    features: the latents to label, numbered as in the index.
    pieces: maps token ids to strings (`Tokenizer.pieces`).
    model: the language model that labels and scores; None to use rules.
    seed: for the order of the windows and the choice of marked tokens.

  Returns:
    For each latent {'feature', 'label', 'by', 'kind' ('rule' or 'model'),
    'question', 'promoted', 'detection', 'fuzzing', 'shuffled', 'low_score',
    'mistakes'}, ready for JSON. If a latent fires on too few sequences, label
    is None and 'why' gives the reason. A rule also has 'offset' and 'ids'.
  """
  labelled = []
  for feature in features:
    windows = examples.of(index, feature)
    row = {'feature': int(feature), 'label': None, 'promoted': []}
    if index.positive_FL is not None:
      ids = index.positive_FL[feature]
      row['promoted'] = [
        tokenizers.readable(piece) for piece in pieces(ids[ids >= 0])
      ]
    if not windows.firing or not windows.heldout_firing:
      row['why'] = 'The feature fires on too few sequences to be scored.'
      labelled.append((row, None, windows))
      continue
    if model is None:
      label = examples.rule(windows)
      row |= {
        'label': label.text(pieces),
        'by': 'rule',
        'kind': 'rule',
        'question': None,
        'offset': label.offset,
        'ids': list(label.ids),
      }
    else:
      prompt = question(windows, pieces, row['promoted'])
      label = ' '.join(model(prompt).split())
      row |= {
        'label': label,
        'by': model.name,
        'kind': 'model',
        'question': prompt,
      }
    labelled.append((row, label, windows))
  labelled_rows = [
    i for i, (_, label, _) in enumerate(labelled) if label is not None
  ]
  for n, i in enumerate(labelled_rows):
    row, label, windows = labelled[i]
    # The control is the next latent's label, so that none keeps its own.
    other_label = labelled[labelled_rows[(n + 1) % len(labelled_rows)]][1]
    if model is None:
      row['detection'], answers = detection_by_rule(label, windows)
      row['fuzzing'] = fuzzing_by_rule(label, windows, seed)
      shuffled, _ = detection_by_rule(other_label, windows)
    else:
      scored = lambda label_text, marked, scored_windows=windows: (
        _score_by_model(model, label_text, scored_windows, pieces, marked, seed)
      )
      row['detection'], answers = scored(label, False)
      row['fuzzing'], _ = scored(label, True)
      shuffled, _ = scored(other_label, False)
    row['mistakes'] = mistakes(answers, pieces)
    row['shuffled'] = shuffled if len(labelled_rows) > 1 else None
    row['low_score'] = _low(row['detection'], row['shuffled'])
  return [row for row, _, _ in labelled]


def _low(score, shuffled) -> bool:
  """Whether a label fails to beat chance or the shuffled label."""
  if score is None or score['low'] <= 0.5:
    return True
  return shuffled is not None and score['low'] <= shuffled['value']


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Mean scores over the labelled latents, and counts; for JSON."""
  means = {'features': len(rows)}
  for name in ('detection', 'fuzzing', 'shuffled'):
    values = [r[name]['value'] for r in rows if r.get(name)]
    means[name] = float(np.mean(values)) if values else None
  means['labelled'] = sum(r['label'] is not None for r in rows)
  means['low_score'] = sum(r.get('low_score', False) for r in rows)
  return means


def table(rows: Sequence[dict[str, Any]], most: int = 40) -> str:
  """Labels and scores as a text table, the best first, with the means.

  Below each label stand its worst mistakes: where the latent fires (<<>>) and
  the label says no, and where the label says yes and the latent is silent.

  A '?' marks a label that does not clearly beat both chance and another
  feature's label.
  """
  value = lambda row, name: (row.get(name) or {}).get('value')
  share = lambda score: f'{DASH:>6}' if score is None else f'{score:>6.0%}'
  labelled = [row for row in rows if row['label'] is not None]
  order = sorted(labelled, key=lambda row: -(value(row, 'detection') or 0))
  lines = [f'{"feature":>8} {"score":>6} {"fuzz":>6} {"other":>6}   label']
  for row in order[:most]:
    scores = (
      share(value(row, name)) for name in ('detection', 'fuzzing', 'shuffled')
    )
    mark = '?' if row.get('low_score') else ' '
    text = ' '.join(row['label'].split())
    lines.append(f'{row["feature"]:>8} {" ".join(scores)} {mark} {text[:70]}')
    for kind, name in (('missed', 'missed'), ('false', 'wrong on')):
      for window in row.get('mistakes', {}).get(kind, [])[:1]:
        lines.append(f'{"":33}{name} {_around(window)!r}')
  if len(order) > most:
    lines.append(f'... and {len(order) - most:,} more')
  totals = summary(rows)
  lines.append(
    f'{totals["labelled"]:,} of {totals["features"]:,} features labelled; mean '
    f"score {share(totals['detection']).strip()}, with another feature's label "
    f'{share(totals["shuffled"]).strip()}; {totals["low_score"]:,} labels (?) '
    'do '
    "not clearly beat chance and another feature's label."
  )
  return '\n'.join(lines)


def _around(window: str) -> str:
  """The part of a window around its first mark, or its start."""
  start = max(window.find('<<') - _WIDE // 2, 0)
  return window[start : start + _WIDE]


def write(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
  """Writes the rows as JSONL, one latent per line, never a partial file."""
  files.write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))
