"""Flipped bits and cut files in everything that is kept on disk."""

from __future__ import annotations

import atexit
import functools
import logging
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gemma_scope import release, sites
from gemma_scope.activations import harvest
from gemma_scope.activations import store as activation_store
from gemma_scope.microscope.index import store as index_store
from gemma_scope.runtime import checkpoints
from gemma_scope.text import prepare, tokenizers
from gemma_scope.text import token_store as token_store_lib
from tests.faults.registry import Trial, attempt, fault
from tests.helpers import releases


class Kept(NamedTuple):
  """Something on disk.

  Attributes:
    make: writes it into an empty folder.
    use: reads all of it, as a command does.
    right: whether what was read is what was written.
  """

  make: Callable[[pathlib.Path], None]
  use: Callable[[pathlib.Path], Any]
  right: Callable[[Any], bool]


# A checkpoint: two steps, so that there is one to fall back to.


def _state(step: int) -> dict[str, Any]:
  draw = np.random.default_rng(step).standard_normal
  return {
    'W': jnp.asarray(draw((24, 64)), jnp.float32),
    'count': jnp.asarray(draw(64) * 100, jnp.int32),
  }


def _make_checkpoint(folder: pathlib.Path) -> None:
  with checkpoints.Checkpoints(folder) as saves:
    for step in (1, 2):
      saves.save(step, _state(step), {'step': step})


def _use_checkpoint(folder: pathlib.Path):
  log = logging.getLogger('gemma_scope')
  level = log.level
  log.setLevel(logging.ERROR)  # hundreds of warnings are expected
  try:
    with checkpoints.Checkpoints(folder) as saves:
      found = saves.restore(_state(0))
  finally:
    log.setLevel(level)
  if found.step < 2 and _right_checkpoint(found):
    raise ValueError('Step 2 was damaged; step 1, which is whole, was used.')
  return found


def _right_checkpoint(found) -> bool:
  """The newest step that is whole, bit for bit."""
  return found.meta == {'step': found.step} and all(
    np.array_equal(found.state[name], value)
    for name, value in _state(found.step).items()
  )


# A release of two SAEs, with metrics.


def _params(seed: int) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(seed).standard_normal
  D, F = releases.D, releases.F
  shapes = {'W_enc': (D, F), 'b_enc': F, 'W_dec': (F, D), 'b_dec': D}
  params = {k: draw(shape).astype(np.float32) for k, shape in shapes.items()}
  return params | {'threshold': np.abs(draw(F)).astype(np.float32)}


_SAES = [
  (_params(seed), releases.card(seed=seed, target=5.0 + seed), {'l0': 5.0})
  for seed in (0, 1)
]


def _make_release(folder: pathlib.Path) -> None:
  shutil.rmtree(folder)
  releases.save(folder, _SAES)


def _use_release(folder: pathlib.Path):
  return [
    (sae.load(), sae.card, sae.metrics) for sae in release.load_all(folder)
  ]


def _right_release(found) -> bool:
  wanted = sorted(_SAES, key=lambda sae: sae[1]['name'])
  found = sorted(found, key=lambda sae: sae[1]['name'])
  return len(found) == 2 and all(
    all(np.array_equal(params[k], v) for k, v in p.items())
    and card == c
    and metrics == m
    for (params, card, metrics), (p, c, m) in zip(found, wanted, strict=True)
  )


# A token store of a few documents.


@functools.cache
def _texts() -> pathlib.Path:
  """A folder of texts, written once; removed at the end of the process."""
  folder = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  for i in range(40):
    words = [f'word{(i * j) % 17} is {j}' for j in range(30)]
    (folder / f'{i}.txt').write_text(' '.join(words))
  return folder


def _make_tokens(folder: pathlib.Path) -> None:
  prepare.prepare(f'files:{_texts()}/*.txt', _tokenizer(), folder)


@functools.cache
def _tokenizer() -> tokenizers.Tokenizer:
  from gemma_scope.language_model import weights

  return tokenizers.Tokenizer(weights.tokenizer('tiny', ''))


def _use_tokens(folder: pathlib.Path):
  store = token_store_lib.Tokens(folder)
  store.verify()
  rows = [
    np.stack(list(store.sequences(9, split))) for split in ('train', 'eval')
  ]
  return store.fingerprint, store.manifest, rows


# A store of activations: two chunks of two sites.

_AT = (sites.Site(0, 'attn_out'), sites.Site(1, 'resid_post'))


class _Rows:
  """A source of made-up rows; see `harvest.Raw`."""

  layout = harvest.Layout(9, 4, 8, 2, 'float32')
  sites = _AT
  widths = dict.fromkeys(_AT, 8)
  parts = 2

  def passes(self, chunk, poll=harvest.never):
    for part in range(self.parts):
      poll()
      draw = np.random.default_rng((chunk, part)).standard_normal
      yield {site: draw((2, 8, 8)).astype(np.float32) for site in _AT}

  def counts(self, chunk):
    return np.arange(self.layout.rows) % 7 > 0


_FACTS = {'model': 'tiny', 'text': {'sha256': 'ab' * 32}}


def _make_store(folder: pathlib.Path) -> None:
  activation_store.write_store(folder, _Rows(), 2, _FACTS)


def _use_store(folder: pathlib.Path):
  source = activation_store.StoreSource(folder, _AT, 8)
  rows = [harvest.rows(source, chunk) for chunk in range(source.chunks)]
  return rows, source.layout, source.facts, source.widths


# An index of a random SAE.


@functools.cache
def _index() -> index_store.Index:
  draw = np.random.default_rng(0).random
  arrays = {
    name: (draw((4, 3)) * 100).astype(
      np.float16 if name.startswith('window') else np.float32
    )
    for name in index_store._FIELDS
  }
  card = releases.card()
  meta = {'version': index_store.VERSION, 'card': card, 'tokens': 4096}
  meta |= {'model': 'tiny', 'corpus': {'name': 'test', 'split': 'train'}}
  return index_store.Index(meta=meta, **arrays)


def _index_values(index: index_store.Index):
  names = index_store._FIELDS
  arrays = [getattr(index, name) for name in names]
  meta = {k: index.meta.get(k) for k in _index().meta}
  return [meta, *[(a.dtype, a.shape, a.tobytes()) for a in arrays]]


def _same(wanted: Any, found: Any) -> bool:
  """Whether two nested values are equal, arrays by their bytes."""
  if isinstance(wanted, np.ndarray):
    return (
      isinstance(found, np.ndarray)
      and (wanted.dtype, wanted.shape) == (found.dtype, found.shape)
      and wanted.tobytes() == np.ascontiguousarray(found).tobytes()
    )
  if isinstance(wanted, (list, tuple)):
    return len(wanted) == len(found) and all(map(_same, wanted, found))
  if isinstance(wanted, dict):
    return wanted.keys() == found.keys() and all(
      _same(value, found[key]) for key, value in wanted.items()
    )
  return wanted == found


def _compared(make, use) -> Kept:
  """Something whose right value is what was read before the damage."""
  first = []

  def made(folder):
    make(folder)
    first[:] = [use(folder)]

  return Kept(made, use, lambda found: _same(first[0], found))


KEPT: dict[str, Kept] = {
  'checkpoint': Kept(_make_checkpoint, _use_checkpoint, _right_checkpoint),
  'release': Kept(_make_release, _use_release, _right_release),
  'tokens': _compared(_make_tokens, _use_tokens),
  'activations': _compared(_make_store, _use_store),
  'index': _compared(
    lambda folder: index_store.write(folder / 'index', _index()),
    lambda folder: _index_values(index_store.read(folder / 'index')),
  ),
}


def _plain_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob('*') if p.is_file())


def damaged(
  kept: Kept, folder: pathlib.Path, damage: Callable[[pathlib.Path], str]
) -> Trial:
  """Makes a copy, damages it, and reads it."""
  copy = folder / 'copy'
  shutil.copytree(folder / 'whole', copy)
  where = damage(copy)
  trial = attempt(lambda: kept.use(copy), kept.right, where)
  shutil.rmtree(copy)
  return trial


def _flip(dice: random.Random) -> Callable[[pathlib.Path], str]:
  """Flips one bit: of any file alike half the time, else of any byte alike."""

  def damage(folder):
    found = [p for p in _plain_files(folder) if p.stat().st_size]
    sizes = [p.stat().st_size for p in found]
    weights = sizes if dice.random() < 0.5 else None
    (path,) = dice.choices(found, weights)
    data = bytearray(path.read_bytes())
    # Half of the flips in what is small and decides: the first bytes.
    end = len(data) if dice.random() < 0.5 else min(len(data), 512)
    data[dice.randrange(end)] ^= 1 << dice.randrange(8)
    path.write_bytes(data)
    return _name(path)

  return damage


def _name(path: pathlib.Path) -> str:
  """A file's name without what differs between two checkpoints."""
  return path.name if len(path.name) < 30 else path.parent.name


def _cuts(folder: pathlib.Path) -> Iterator[Callable[[pathlib.Path], str]]:
  """Each file: missing, empty, half, one byte short."""
  for path in _plain_files(folder):
    name, size = path.relative_to(folder), path.stat().st_size
    for cut in (None, 0, size // 2, size - 1):

      def damage(copy, name=name, cut=cut):
        file = copy / name
        if cut is None:
          file.unlink()
        else:
          file.write_bytes(file.read_bytes()[: max(cut, 0)])
        return _name(file)

      yield damage


def _register(what: str, kept: Kept) -> None:
  def flips(folder: pathlib.Path, times: int) -> Iterator[Trial]:
    (folder / 'whole').mkdir()
    kept.make(folder / 'whole')
    dice = random.Random(what)
    for _ in range(times):
      yield damaged(kept, folder, _flip(dice))

  def cuts(folder: pathlib.Path, times: int) -> Iterator[Trial]:
    (folder / 'whole').mkdir()
    kept.make(folder / 'whole')
    chosen = list(_cuts(folder / 'whole'))
    random.Random(what).shuffle(chosen)
    for damage in chosen[:times]:
      yield damaged(kept, folder, damage)

  few = what == 'checkpoint'
  fault(
    f'flip-{what}',
    f'one bit flipped in a {what}',
    full=500 if few else 2000,
    quick=12 if few else 100,
  )(flips)
  fault(
    f'cut-{what}',
    f'a file of a {what} missing, empty or cut short',
    full=1000,
    quick=8 if few else 40,
  )(cuts)


for _what, _kept in KEPT.items():
  _register(_what, _kept)
