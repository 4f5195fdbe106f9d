"""The flags of the microscope's commands, and what their text means."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from gemma_scope import sites
from gemma_scope.microscope.circuits import (
  attention_scores,
  card_results,
  intervene,
  permutation_test,
  readout,
)
from gemma_scope.microscope.session import Session


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of launch/microscope.py; each command reads some of them."""

  sae: str = ''
  sequences: int = 1024
  batch: int = 32
  labels: str = 'rule'
  outliers: bool = False
  port: int = 8642
  text: str = ''
  logit: str = ''
  change: tuple[str, ...] = ()
  tokens: int = 48
  temperature: float = 0.5
  seed: int = 0
  prompts: str = ''
  pooling: str = 'last'
  features: str = '200'
  endpoint: str = ''
  labeller: str = ''
  most_questions: int = 10_000
  model_id: str = ''
  title: str = 'gemma-scope'
  creator: str = ''
  json: bool = False
  head: str = ''
  target: str = ''
  supernodes: str = ''
  all: bool = False
  effects: bool = False
  contexts: int = 4
  scored: int = 3
  sample: int = 0
  alpha: float = card_results.ALPHA


def ids(session: Session, options: Options) -> list[int]:
  if not options.text:
    raise ValueError('--text is required: the prompt to explain.')
  return readout.with_bos(session.tokenizer, options.text)


def logit(session: Session, options: Options, ids) -> readout.Logit:
  """The tokens of --logit=a,b; by default the two likeliest next tokens."""
  if not options.logit:
    return readout.likeliest(*session.model, ids)
  words = options.logit.split(',')  # spaces belong to the tokens
  if len(words) > 2:
    raise ValueError(
      '--logit must be one token, or two tokens separated by a comma.'
    )
  tokens = [readout.one_token(session.tokenizer, word) for word in words]
  return readout.different(tokens[0], tokens[1] if len(tokens) > 1 else None)


def change(text: str) -> intervene.Change:
  feature, _, edit = text.partition(':')
  kind, _, strength = edit.partition(':')
  try:
    return intervene.Change(
      int(feature), kind or 'ablate', float(strength or 1)
    )
  except ValueError:
    raise ValueError(
      f'--change={text!r} must be LATENT:KIND:STRENGTH, such as 17:add:0.5.'
    ) from None


def head(text: str, length: int) -> attention_scores.Place:
  """The score that --head=LAYER.HEAD:QUERY:KEY names."""
  match = re.fullmatch(r'(\d+)\.(\d+):(\d+):(\d+)', text)
  if match is None or max(map(int, match.groups()[2:])) >= length:
    raise ValueError(
      f'--head={text!r} must be LAYER.HEAD:QUERY:KEY, such as 5.2:9:3, with '
      f'tokens counted from BOS, 0, to {length - 1}.'
    )
  return attention_scores.Place(*map(int, match.groups()))


def target(text: str, subjects, widths) -> permutation_test.Reading:
  """The reading of --target: SITE:FILE.npy, or feature:LAYER/FEATURE."""
  kind, _, argument = text.partition(':')
  if kind == 'feature':
    match = re.fullmatch(r'(\d+)/(\d+)', argument)
    reader = match and _reads(subjects, int(match[1]))
    if not reader or int(match[2]) >= reader[0].width // len(
      reader[0].place.sites
    ):
      raise ValueError(
        f'--target={text!r}: there is no such feature; write '
        'feature:LAYER/FEATURE, such as feature:2/17.'
      )
    subject, number = reader
    W_enc = subject.params['W_enc']
    W_enc = W_enc[number] if subject.place.several else W_enc
    vector_D = np.asarray(W_enc[:, int(match[2])])
    return permutation_test.Reading(subject.place.sites[number], vector_D)
  try:
    site = sites.parse(kind)
    vector_D = np.load(argument, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise ValueError(
      f'--target={text!r} must be SITE:FILE.npy, such as '
      f'resid_post/5:direction.npy, or feature:LAYER/FEATURE ({error}).'
    ) from None
  if vector_D.shape != (widths(site),):
    raise ValueError(
      f'{argument} must hold one vector of {widths(site)} numbers for {site}; '
      f'it holds an array of shape {list(vector_D.shape)}.'
    )
  return permutation_test.Reading(site, vector_D.astype(np.float32))


def _reads(subjects, layer: int):
  """The subject that reads a layer, and the number of that site."""
  for subject in subjects:
    for number, site in enumerate(subject.place.sites):
      if site.layer == layer:
        return subject, number
  return None


def features(text: str, index) -> list[int]:
  """Indices from 'all', '200' (the 200 most frequent) or '3,17' or '3,'."""
  alive = np.flatnonzero(index.fired_F)
  order = alive[np.argsort(-index.fired_F[alive], kind='stable')]
  if text == 'all':
    return sorted(map(int, alive))
  entries = [entry for entry in text.split(',') if entry.strip()]
  if not entries or not all(entry.strip().isdigit() for entry in entries):
    raise ValueError(
      '--features must be all, a number N (the N most frequent), or indices '
      f'separated by commas, such as 3,17; found {text!r}.'
    )
  numbers = list(map(int, entries))
  if len(numbers) == 1 and not text.endswith(','):
    return sorted(map(int, order[: numbers[0]]))
  unknown = [i for i in numbers if i >= len(index.max_F)]
  if unknown:
    raise ValueError(
      f'--features: there is no latent {unknown[0]}; the SAE has '
      f'{len(index.max_F):,}.'
    )
  return numbers
