"""Damaged SAEs and language models of other tools: a sentence, no traceback.

These formats have no checksum, so that a flipped bit of a value is read as
another value; what can be seen is seen, and is told in a sentence.
"""

from __future__ import annotations

import functools
import pathlib
import random
import shutil
from collections.abc import Iterator

import numpy as np

from gemma_scope.language_model import weights
from gemma_scope.release.formats import published
from tests.faults import damage
from tests.faults.registry import Trial, attempt, fault
from tests.helpers import random_models

TESTS = pathlib.Path(__file__).parents[1]
SAES = sorted(
  path.parent for path in TESTS.glob('release/format_fixtures/**/expected.npz')
)
MODELS = sorted(
  path.parent
  for path in TESTS.glob('language_model/gemma_fixtures/*/config.json')
  if random_models.HAS_GEMMA4 or not path.parent.name.startswith('gemma4')
)


@functools.cache
def _right(folder: pathlib.Path, kind: str):
  return _load(folder, kind)


def _load(folder: pathlib.Path, kind: str):
  if kind == 'sae':
    params, card = published.load(str(folder))
    return {k: v for k, v in card.items() if k != 'name'}, params
  import jax

  gemma, params = weights.load('small', str(folder))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  values = {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}
  return str(gemma.config), values


def _damaged(folder: pathlib.Path, dice: random.Random) -> str:
  """One bit or one end of a file that is read."""
  found = sorted(
    path for path in folder.iterdir() if path.name != 'expected.npz'
  )
  path = dice.choice(found)
  data = bytearray(path.read_bytes())
  kind = dice.choice(('flip', 'flip', 'flip', 'cut', 'missing'))
  if kind == 'flip':
    # In what decides: the config, the header.
    end = len(data) if dice.random() < 0.3 else min(len(data), 600)
    data[dice.randrange(end)] ^= 1 << dice.randrange(8)
  elif kind == 'cut':
    data = data[: dice.choice((0, len(data) // 2, len(data) - 1))]
  path.write_bytes(data)
  if kind == 'missing':
    path.unlink()
  return f'{path.name}: {kind}'


def _inject(kind: str, folders, folder: pathlib.Path, times: int):
  dice = random.Random(kind)
  for number in range(times):
    source = folders[number % len(folders)]
    copy = folder / source.name
    shutil.copytree(source, copy)
    where = _damaged(copy, dice)
    right = _right(source, kind)
    trial = attempt(
      lambda copy=copy: _load(copy, kind),
      lambda found, right=right: damage._same(right, found),
      where,
    )
    if trial.outcome == 'wrong':
      trial = Trial('survived', f'{where}, as another value')
    if trial.outcome == 'broken':
      trial = Trial('broken', where, f'{source.name}: {trial.detail}')
    yield trial
    shutil.rmtree(copy)


@fault(
  'foreign-sae',
  'damaged SAEs of SAELens, sparsify, dictionary_learning: no traceback',
  full=2000,
  quick=60,
)
def foreign_sae(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  yield from _inject('sae', SAES, folder, times)


@fault(
  'foreign-model',
  'damaged language models of Hugging Face: no traceback',
  full=300,
  quick=12,
)
def foreign_model(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  yield from _inject('model', MODELS, folder, times)
