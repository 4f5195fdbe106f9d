"""Steering tried on several prompts at several strengths, next to controls.

For each prompt and strength, the reply with the change is compared with the
unchanged model's reply from the same seed (strength 0):

  concept     mean activation of the changed latent on the reply, as a share of
              its largest value, when the unchanged model reads the reply alone
  perplexity  of the reply under the unchanged model: its fluency
  KL          of the changed model from the unchanged one, in nats a token

The control makes a change of the same norm along another latent's decoder. A
latent that steers its concept raises `concept` where the control does not.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma_scope import sae
from gemma_scope.language_model import generate, splice
from gemma_scope.microscope.circuits import effects, intervene
from gemma_scope.microscope.circuits.intervene import Change, Rows, Subject
from gemma_scope.sae import released

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
MEASURES = ('concept', 'perplexity', 'kl')


def sweep(
  subject: Subject,
  prompts: Sequence[Sequence[int]],
  change: Change,
  sampling: generate.Sampling,
  strengths: Sequence[float] = STRENGTHS,
) -> list[dict[str, Any]]:
  """Steers every prompt at every strength.

  Args:
    subject: the SAE in its model.
    prompts: token ids, BOS first.
    change: the change; its strength multiplies `strengths`.
    sampling: how replies are drawn; prompt i has noise stream i.
    strengths: in units of the latent's largest value.

  Returns:
    For each strength and prompt: {'strength', 'prompt' (its number), 'control'
    (whether another latent's decoder was written), 'ids' (the reply), and
    `MEASURES`, None for an empty reply}.
  """
  lines = []
  for strength in strengths:
    scaled = dataclasses.replace(change, strength=strength * change.strength)
    edit_rows = intervene.rows(subject, [[scaled]] * len(prompts))
    # One control latent for all prompts and strengths.
    control = intervene.control(
      subject, Rows(*(array[:1] for array in edit_rows))
    )
    control_rows = Rows(
      *(np.repeat(array, len(prompts), 0) for array in control)
    )
    for rows in (edit_rows, control_rows):
      measured = _measure(subject, prompts, rows, sampling, change.feature)
      for number, line in enumerate(measured):
        about = {'strength': strength, 'prompt': number}
        lines.append({**about, 'control': rows is control_rows, **line})
  return lines


def _measure(subject, prompts, rows: Rows, sampling, feature: int):
  """The replies to each prompt with these changes, and their measures."""
  streams = list(range(len(prompts)))
  longest = max(map(len, prompts))
  room = longest + sampling.max_new_tokens  # one shape for all strengths
  replies = generate.generate(
    subject.gemma,
    subject.lm_params,
    prompts,
    dataclasses.replace(sampling, streams=streams),
    edits=effects.edits_of(subject, rows),
    passes=generate.Passes(prompt_len=effects.padded_length(longest)),
  )
  texts = [
    [*prompt, *map(int, reply)]
    for prompt, reply in zip(prompts, replies, strict=True)
  ]
  cost = effects.effects(
    subject, effects.padded(texts, room), rows, np.array(streams)
  )
  bos = [prompt[0] for prompt in prompts]
  concept = _concept(subject, bos, replies, feature)
  for b, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
    reply_slice = slice(len(prompt) - 1, len(prompt) - 1 + len(reply))
    line = dict.fromkeys(MEASURES)
    if len(reply):
      line = {
        'concept': concept[b],
        'perplexity': float(np.exp(cost.clean_loss_BT[b, reply_slice].mean())),
        'kl': float(cost.kl_BT[b, reply_slice].mean()),
      }
    yield {'ids': list(map(int, reply)), **line}


def _concept(subject: Subject, bos, replies, feature: int) -> list[float]:
  """The latent's mean activation on each reply, read alone after BOS."""
  tokens_BT = effects.padded(
    [
      [first, *map(int, reply)]
      for first, reply in zip(bos, replies, strict=True)
    ]
  )
  counts_BT, _ = intervene.counted(subject, tokens_BT)
  place = subject.place
  taps = splice.taps(
    subject.gemma, subject.lm_params, tokens_BT, tuple(sorted(place.sites))
  )
  x = released.stacked([taps[site] for site in place.sites], place.several)
  f_BT = np.asarray(_one_latent(subject.params, x, feature))
  f_BT = f_BT.reshape(tokens_BT.shape) / max(subject.max_F[feature], 1e-30)
  total_B = np.where(counts_BT, f_BT, 0).sum(1)
  return (total_B / np.maximum(counts_BT.sum(1), 1)).tolist()


@jax.jit
def _one_latent(params, x, feature):
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
  return f.reshape(-1, params['b_enc'].size)[:, feature]


def summary(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Means over prompts: a row for each strength, with the control's."""
  rows = []
  for strength in dict.fromkeys(line['strength'] for line in lines):
    row = {'strength': strength}
    for control in (False, True):
      matching = [
        line
        for line in lines
        if (line['strength'], line['control']) == (strength, control)
      ]
      for name in MEASURES:
        values = [line[name] for line in matching if line[name] is not None]
        key = f'control_{name}' if control else name
        row[key] = float(np.mean(values)) if values else None
    rows.append(row)
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """`summary` as text: each measure with its control in brackets."""
  head = ''.join(f'  {name + " [control]":>24}' for name in MEASURES)
  shown = lambda value: '-' if value is None else f'{value:.3g}'
  lines = [f'{"strength":>8}{head}']
  for row in rows:
    cells = [
      f'{shown(row[name])} [{shown(row[f"control_{name}"])}]'
      for name in MEASURES
    ]
    strength = f'{row["strength"]:>8.2f}'
    lines.append(strength + ''.join(f'  {cell:>24}' for cell in cells))
  return '\n'.join(lines)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of equal keys as CSV with a header."""
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()
