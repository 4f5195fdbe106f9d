"""Labelled text -> the rows that a probe reads: activations and latents.

  prompts (JSONL) -> tokens -> x at the SAE's sites -> pooled: a row a prompt
  sequences, where a token counts -> x there: a row a token

Beside an SAE's latents there are those of a random one with as many latents on
(`controls`), the same as the evaluation's. With several sites x and f are those
of all layers, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from gemma_scope import release, sae, sites
from gemma_scope.evaluation import controls
from gemma_scope.evaluation.saebench import probe
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.release import sae_folder
from gemma_scope.text import json_lines, tokenizers

_ROWS = 1024  # encoded at once
POOLINGS: dict[str, Callable] = {
  'last': lambda a_TD: a_TD[-1],
  'mean': lambda a_TD: a_TD.mean(0),
  'max': lambda a_TD: a_TD.max(0),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """Labelled texts.

  Attributes:
    texts: of each prompt.
    label_N: bool.
    test_N: bool, held out.
    group_N: int; prompts of one group go the same way.
  """

  texts: list[str]
  label_N: np.ndarray
  test_N: np.ndarray
  group_N: np.ndarray


def read_prompts(path: str | os.PathLike[str], seed: int = 0) -> Prompts:
  """Prompts of a JSONL file: {"text", "label", "split"?, "group"?} a line.

  A label is true or false (or 1 or 0), a split "train" or "test"; without
  splits a third of the groups is held out. Without a group a prompt is its own,
  but the same text twice is one group.

  Raises:
    ValueError: a line is not of that form.
  """
  texts, labels, splits, groups = [], [], [], []
  for number, one in json_lines.records(path):
    good = isinstance(one, dict) and isinstance(one.get('text'), str)
    good = good and one.get('label') in (0, 1)
    if not good or one.get('split', 'test') not in ('train', 'test'):
      raise ValueError(
        f'{path}, line {number} is not a labelled prompt: expected a JSON '
        'object with "text", "label" (true or false) and at most "split" '
        '("train" or "test") and "group".'
      )
    texts.append(one['text'])
    labels.append(bool(one['label']))
    splits.append(one.get('split'))
    groups.append(json.dumps(one.get('group', one['text'])))
  if not texts:
    raise ValueError(f'{path} holds no prompts.')
  _, group_N = np.unique(groups, return_inverse=True)
  if len(set(splits) & {None}) and set(splits) != {None}:
    raise ValueError(f'{path} gives a split to some prompts and not to others.')
  test_N = np.array([split == 'test' for split in splits])
  if splits[0] is None:
    test_N = probe.split(group_N, seed=seed)
  return Prompts(texts, np.array(labels), test_N, group_N)


def activations(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_NT: np.ndarray,
  wiring: sites.Wiring,
  batch: int = 16,
) -> dict:
  """x [N, T, D], float32 in host memory, at the sites that an SAE names."""
  at = tuple(sorted({*wiring.sites, *wiring.targets}))
  parts = []
  for start in range(0, len(tokens_NT), batch):
    part = tokens_NT[start : start + batch]
    real = len(part)
    filled = np.resize(part, (batch, part.shape[1]))
    taps = jax.device_get(splice.taps(gemma, params, filled, at))
    parts.append({s: np.asarray(x[:real], np.float32) for s, x in taps.items()})
  return {site: np.concatenate([p[site] for p in parts]) for site in at}


@functools.cache
def _encode():
  return jax.jit(sae.encode)


def _chunks(params: sae_folder.Params, x_BD: np.ndarray):
  """Latents [n, F] of `_ROWS` rows at a time, all layers side by side."""
  with jax.default_matmul_precision('highest'):
    for start in range(0, len(x_BD), _ROWS):
      part = x_BD[start : start + _ROWS]
      filled = np.resize(part, (_ROWS, *part.shape[1:]))
      f = np.asarray(_encode()(dict(params), filled))[: len(part)]
      yield f.reshape(len(part), -1)


def latents(params: sae_folder.Params, x_BD: np.ndarray) -> np.ndarray:
  """f [B, F] of rows [B, D] ([B, L, D] with several layers), all latents."""
  return np.concatenate(list(_chunks(params, x_BD)))


def pooled_latents(
  params: sae_folder.Params,
  x_BD: np.ndarray,
  prompt_B: np.ndarray,
  pooling: str,
) -> np.ndarray:
  """Latents pooled over the rows of each prompt, [N, F].

  Only a few prompts' latents are in memory at once.

  Args:
    prompt_B: the prompt of each row, rising, every prompt at least once.
  """
  first_N = np.flatnonzero(np.diff(prompt_B, prepend=-1))
  ends_N = np.append(first_N[1:], len(prompt_B))
  if pooling == 'last':
    return latents(params, x_BD[ends_N - 1])
  rows, start = [], 0
  while start < len(first_N):
    fits = np.searchsorted(ends_N, first_N[start] + _ROWS, 'right')
    stop = max(int(fits), start + 1)
    f_BF = latents(params, x_BD[first_N[start] : ends_N[stop - 1]])
    for first, end in zip(first_N[start:stop], ends_N[start:stop], strict=True):
      offset = first_N[start]
      rows.append(POOLINGS[pooling](f_BF[first - offset : end - offset]))
    start = stop
  return np.stack(rows)


def read_at(x_by_site: Mapping, wiring: sites.Wiring, where) -> np.ndarray:
  """The rows `where` ([N, T] bool or an index) that an SAE reads."""
  if not wiring.several:
    return x_by_site[wiring.sites[0]][where]
  return np.stack([x_by_site[site][where] for site in wiring.sites], -2)


def control(
  x_by_site: Mapping,
  keep_NT: np.ndarray,
  wiring: sites.Wiring,
  params: sae_folder.Params,
  seed: int = 0,
) -> sae_folder.Params:
  """A random SAE of this wiring and width, with the same L0 on these rows."""
  width = params['b_enc'].size
  rows = {site: x[keep_NT] for site, x in x_by_site.items()}
  x_BD = read_at(x_by_site, wiring, keep_NT)
  l0 = controls.mean_l0(dict(params), x_BD)
  shape = controls.Shape(wiring, width, seed)
  (made,) = controls.fit(shape, [l0], rows, kinds=('random',))
  return {name: np.asarray(array) for name, array in made['random']().items()}


class Pair(NamedTuple):
  """An SAE and the random one beside it."""

  wiring: sites.Wiring
  params: sae_folder.Params
  control: sae_folder.Params


def of_tokens(
  x_by_site: Mapping,
  pair: Pair,
  where_NT: np.ndarray,
  test_N: np.ndarray,
  group_NT: np.ndarray,
) -> probe.Rows:
  """A row for each token of `where_NT`, in the order of the text."""
  x_BD = read_at(x_by_site, pair.wiring, where_NT)
  test_NT = np.broadcast_to(test_N[:, None], where_NT.shape)
  return probe.Rows(
    x_BD.reshape(len(x_BD), -1),
    latents(pair.params, x_BD),
    latents(pair.control, x_BD),
    test_NT[where_NT],
    group_NT[where_NT],
  )


def of_prompts(
  model: tuple[lm.Gemma, lm.Params],
  sae_given: release.Released,
  prompts: Prompts,
  tokenizer: tokenizers.Tokenizer,
  pooling: str = 'last',
  batch: int = 16,
) -> probe.Rows:
  """A row for each prompt: its tokens' activations and latents, pooled.

  Args:
    pooling: 'last' (token), 'mean' or 'max' over the tokens, BOS left out.

  Raises:
    ValueError: an unknown pooling; a prompt without tokens.
  """
  if pooling not in POOLINGS:
    raise ValueError(
      f'pooling is {pooling!r}; it is one of {", ".join(POOLINGS)}.'
    )
  ids = tokenizer.encode_all(prompts.texts)
  empty = [i for i, row in enumerate(ids) if not len(row)]
  if empty:
    raise ValueError(f'Prompt {empty[0]} has no tokens.')
  length = -(-(1 + max(map(len, ids))) // 16) * 16
  tokens_NT = np.full((len(ids), length), tokenizer.pad_id, np.int32)
  keep_NT = np.zeros(tokens_NT.shape, bool)
  for i, row in enumerate(ids):
    tokens_NT[i, : 1 + len(row)] = [tokenizer.bos_id, *row]
    keep_NT[i, 1 : 1 + len(row)] = True
  params, wiring = sae_given.load(), sae_given.wiring
  x_by_site = activations(*model, tokens_NT, wiring, batch)
  twin = control(x_by_site, keep_NT, wiring, params)
  x_BD = read_at(x_by_site, wiring, keep_NT)
  of_row = np.repeat(np.arange(len(ids)), keep_NT.sum(1))
  x_pooled = [POOLINGS[pooling](x_BD[of_row == i]) for i in range(len(ids))]
  return probe.Rows(
    np.stack(x_pooled).reshape(len(ids), -1),
    pooled_latents(params, x_BD, of_row, pooling),
    pooled_latents(twin, x_BD, of_row, pooling),
    prompts.test_N,
    prompts.group_N,
  )
