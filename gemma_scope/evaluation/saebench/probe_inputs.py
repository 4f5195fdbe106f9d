"""Labelled text -> rows for a probe: activations and latents.

  prompts (JSONL) -> tokens -> x at the SAE's sites -> pooled: one row a prompt
  sequences -> x at every token that counts: one row a token

The rows also have the latents of a random SAE with the same L0, the control
that evaluation uses (`controls`). For SAEs of several layers, x and f of all
layers are concatenated.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_scope import release, sae, sites
from gemma_scope.evaluation import controls
from gemma_scope.evaluation.saebench import probe
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.release import sae_folder
from gemma_scope.text import json_lines, tokenizers

_ROWS = 1024  # rows encoded at once
_CONTROL_VALUES = 2**26  # rows x latents that a control is fitted on
POOLINGS: dict[str, Callable] = {
  'last': lambda a_TD: a_TD[-1],
  'mean': lambda a_TD: a_TD.mean(0),
  'max': lambda a_TD: a_TD.max(0),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """Labelled texts.

  Attributes:
    texts: one for each prompt.
    label_N: bool.
    test_N: bool, which prompts are held out.
    group_N: int; prompts of the same group are in the same split.
  """

  texts: list[str]
  label_N: np.ndarray
  test_N: np.ndarray
  group_N: np.ndarray


def read_prompts(path: str | os.PathLike[str], seed: int = 0) -> Prompts:
  """Reads a JSONL file of {"text", "label", "split"?, "group"?}.

  A file whose name ends with .csv has columns of these names. A label is true
  or false (or 1 or 0), a split "train" or "test"; without splits a third of the
  groups is held out. Without a group a prompt is its own, but the same text
  twice is one group.

  Raises:
    ValueError: a line does not have this form.
  """
  texts, labels, splits, groups = [], [], [], []
  for number, record in _records(path):
    valid = isinstance(record, dict) and isinstance(record.get('text'), str)
    valid = valid and record.get('label') in (0, 1)
    if not valid or record.get('split', 'test') not in ('train', 'test'):
      raise ValueError(
        f'{path}, line {number} is not a labelled prompt: expected "text", '
        '"label" (true or false) and at most "split" ("train" or "test") and '
        '"group", in a JSON object or in the columns of a .csv file.'
      )
    texts.append(record['text'])
    labels.append(bool(record['label']))
    splits.append(record.get('split'))
    groups.append(json.dumps(record.get('group', record['text'])))
  if not texts:
    raise ValueError(f'{path} holds no prompts.')
  _, group_N = np.unique(groups, return_inverse=True)
  if len(set(splits) & {None}) and set(splits) != {None}:
    raise ValueError(f'{path} gives a split to some prompts and not to others.')
  test_N = np.array([split == 'test' for split in splits])
  if splits[0] is None:
    test_N = probe.split(group_N, seed=seed)
  return Prompts(texts, np.array(labels), test_N, group_N)


def read_texts(path: str | os.PathLike[str]) -> list[str]:
  """Texts of a file: .txt, one a line; .jsonl or .csv, the field "text".

  Raises:
    ValueError: a record has no text, or there are none.
  """
  if str(path).lower().endswith('.txt'):
    texts = [text for _, text in json_lines.lines(path) if text.strip()]
  else:
    texts = []
    for number, record in _records(path):
      if not isinstance(record, dict) or not isinstance(
        record.get('text'), str
      ):
        raise ValueError(f'{path}, line {number} has no "text".')
      texts.append(record['text'])
  if not texts:
    raise ValueError(f'{path} holds no prompts.')
  return texts


_CSV_LABELS = {'true': True, '1': True, 'false': False, '0': False}


def _records(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
  """Line number and fields of each prompt."""
  if not str(path).lower().endswith(('.csv', '.csv.gz')):
    yield from json_lines.records(path)
    return
  with json_lines.opened(path) as stream:
    rows = csv.DictReader(io.TextIOWrapper(stream, 'utf-8-sig', newline=''))
    try:
      for row in rows:
        if None in row:
          raise ValueError(
            f'{path}, line {rows.line_num} has more columns than its header '
            'line; put a text with commas between quotes.'
          )
        label = str(row.pop('label', '')).strip().lower()
        fields = {key: value for key, value in row.items() if value}
        yield rows.line_num, fields | {'label': _CSV_LABELS.get(label)}
    except (csv.Error, UnicodeDecodeError) as error:
      raise ValueError(
        f'{path}, line {rows.line_num + 1} is not CSV in UTF-8 ({error}).'
      ) from error


def activations(
  gemma: lm.Gemma,
  params: lm.Params,
  tokens_NT: np.ndarray,
  wiring: sites.Wiring,
  batch: int = 16,
) -> dict:
  """x [N, T, D] at every site of an SAE, float32 in host memory."""
  places = tuple(sorted({*wiring.sites, *wiring.targets}))
  batches = []
  for start in range(0, len(tokens_NT), batch):
    rows = tokens_NT[start : start + batch]
    count = len(rows)
    filled = np.resize(rows, (batch, rows.shape[1]))
    taps = jax.device_get(splice.taps(gemma, params, filled, places))
    batches.append(
      {site: np.asarray(x[:count], np.float32) for site, x in taps.items()}
    )
  return {
    site: np.concatenate([taps[site] for taps in batches]) for site in places
  }


@functools.cache
def _encode():
  return jax.jit(sae.encode)


def _chunks(params: sae_folder.Params, x_BD: np.ndarray):
  """Latents [n, F] of `_ROWS` rows at a time; layers are concatenated."""
  with jax.default_matmul_precision('highest'):
    for start in range(0, len(x_BD), _ROWS):
      rows_BD = x_BD[start : start + _ROWS]
      filled = np.resize(rows_BD, (_ROWS, *rows_BD.shape[1:]))
      f = np.asarray(_encode()(dict(params), filled))[: len(rows_BD)]
      yield f.reshape(len(rows_BD), -1)


def latents(params: sae_folder.Params, x_BD: np.ndarray) -> np.ndarray:
  """All latents f [B, F] of rows [B, D], or [B, L, D] with several layers."""
  return np.concatenate(list(_chunks(params, x_BD)))


def pooled_latents(
  params: sae_folder.Params,
  x_BD: np.ndarray,
  prompt_B: np.ndarray,
  pooling: str,
) -> np.ndarray:
  """Pools latents over the rows of each prompt, [N, F].

  Only the latents of a few prompts are in memory at once.

  Args:
    params: the SAE.
    x_BD: raw activations.
    prompt_B: the prompt of each row, in rising order; every prompt has a row.
    pooling: one of `POOLINGS`.
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
    for first_row, end in zip(
      first_N[start:stop], ends_N[start:stop], strict=True
    ):
      offset = first_N[start]
      rows.append(POOLINGS[pooling](f_BF[first_row - offset : end - offset]))
    start = stop
  return np.stack(rows)


def read_at(x_by_site: Mapping, wiring: sites.Wiring, selected) -> np.ndarray:
  """The SAE's input at `selected`, a mask [N, T] or an index."""
  if not wiring.several:
    return x_by_site[wiring.sites[0]][selected]
  return np.stack([x_by_site[site][selected] for site in wiring.sites], -2)


def control(
  x_by_site: Mapping,
  keep_NT: np.ndarray,
  wiring: sites.Wiring,
  params: sae_folder.Params,
  seed: int = 0,
) -> sae_folder.Params:
  """A random SAE with the same wiring, width and L0 on these rows.

  Of many rows, on evenly spread ones: memory does not grow with the text.
  """
  width = params['b_enc'].size
  kept = np.flatnonzero(keep_NT)
  limit = max(_ROWS, _CONTROL_VALUES // width)
  if len(kept) > limit:
    kept = kept[np.linspace(0, len(kept) - 1, limit).astype(int)]
  selected = np.unravel_index(kept, keep_NT.shape)
  rows = {site: x[selected] for site, x in x_by_site.items()}
  l0 = controls.mean_l0(dict(params), read_at(x_by_site, wiring, selected))
  shape = controls.Shape(wiring, width, seed)
  (fitted,) = controls.fit(shape, [l0], rows, kinds=('random',))
  return {name: np.asarray(array) for name, array in fitted['random']().items()}


class Pair(NamedTuple):
  """An SAE and its control, a random SAE."""

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
  """One row for each token of the mask `where_NT`, in the order of the text."""
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
  released: release.Released,
  prompts: Prompts,
  tokenizer: tokenizers.Tokenizer,
  pooling: str = 'last',
  batch: int = 16,
) -> probe.Rows:
  """One row for each prompt: activations and latents pooled over its tokens.

  Args:
    model: the language model and its parameters.
    released: the SAE.
    prompts: the labelled texts.
    tokenizer: the language model's tokenizer.
    pooling: 'last' (token), 'mean' or 'max' over the tokens without BOS.
    batch: prompts in a forward pass.

  Raises:
    ValueError: the pooling is unknown, or a prompt has no tokens.
  """
  if pooling not in POOLINGS:
    raise ValueError(
      f'pooling must be one of {", ".join(POOLINGS)}; found {pooling!r}.'
    )
  ids = tokenizer.encode_all(prompts.texts)
  empty_prompts = [i for i, row in enumerate(ids) if not len(row)]
  if empty_prompts:
    raise ValueError(f'Prompt {empty_prompts[0]} has no tokens.')
  length = -(-(1 + max(map(len, ids))) // 16) * 16
  tokens_NT = np.full((len(ids), length), tokenizer.pad_id, np.int32)
  keep_NT = np.zeros(tokens_NT.shape, bool)
  for i, row in enumerate(ids):
    tokens_NT[i, : 1 + len(row)] = [tokenizer.bos_id, *row]
    keep_NT[i, 1 : 1 + len(row)] = True
  params, wiring = released.load(), released.wiring
  x_by_site = activations(*model, tokens_NT, wiring, batch)
  random_sae = control(x_by_site, keep_NT, wiring, params)
  x_BD = read_at(x_by_site, wiring, keep_NT)
  prompt_B = np.repeat(np.arange(len(ids)), keep_NT.sum(1))
  x_pooled = [POOLINGS[pooling](x_BD[prompt_B == i]) for i in range(len(ids))]
  return probe.Rows(
    np.stack(x_pooled).reshape(len(ids), -1),
    pooled_latents(params, x_BD, prompt_B, pooling),
    pooled_latents(random_sae, x_BD, prompt_B, pooling),
    prompts.test_N,
    prompts.group_N,
  )
