"""SAEs and a text -> an `Index` for each SAE.

First pass, for each batch of sequences:

  forward       one pass of the model, tapped at the sites of all SAEs
  encode        f = encode(x) for each SAE; only the K latents that fire on a
                token reach the host, K the most that any token has
  `Statistics`  counts, maxima, histograms, top examples, samples, co-firing

The second pass reads the sequences that hold an example again, for the
activations around it. The host never holds B x F numbers for an SAE, and
nothing depends on the order of the text or on how it is cut into batches.

Tokens whose activation has a norm above a bound of the SAE's card
(`activations.outliers`) are outliers: they are counted and listed apart, and
are left out of everything else.

Samples are drawn by a hash of (latent, sequence, position), R from each bin of
the histogram. The R smallest hashes of each tenth of (0, max] are then among
those kept, unless a bin straddles two tenths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gemma_scope
from gemma_scope import files, path_values, release, sites
from gemma_scope.activations import outliers
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.microscope.index import encode, logit_lens
from gemma_scope.microscope.index import store as store_lib
from gemma_scope.microscope.index.statistics import (
  Firings,
  Outliers,
  Statistics,
  memory,
)
from gemma_scope.microscope.index.store import Index
from gemma_scope.release import sae_folder
from gemma_scope.sae import released

WINDOW = 48  # tokens around an example
_FEATURE_BYTES = 1 << 14  # of a feature, in the index and its pages


class Text(NamedTuple):
  """The text that the SAEs are read on.

  Attributes:
    sequences_NT: int32, BOS first.
    keep_NT: bool, where a token counts.
    documents_NT: int32, the document of each token.
    about: plain JSON, the index's 'corpus'.
  """

  sequences_NT: np.ndarray
  keep_NT: np.ndarray
  documents_NT: np.ndarray
  about: dict[str, Any]


def spread(store, seq_len: int, count: int, keep, eos_id: int) -> Text:
  """Takes `count` sequences, evenly spread over a store's training text.

  Args:
    store: a `token_store.Tokens`.
    seq_len: tokens in a sequence.
    count: at most this many sequences.
    keep: tokens [N, T] -> where they count.
    eos_id: the token that ends a document.
  """
  rows = store.sequences(seq_len)
  chosen = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
  sequences_NT = np.stack([rows[i] for i in chosen])
  about = {
    'name': path_values.shortened(store.manifest['source']),
    'sha256': store.manifest['sha256']['train'],
    'split': 'train',
  }
  documents_NT = rows.documents(chosen, eos_id)
  return Text(sequences_NT, keep(sequences_NT), documents_NT, about)


def check_room(folder: pathlib.Path, saes: Sequence[Any]) -> None:
  """Refuses a disk without room for the first pass, the index and the pages."""
  latents = sum(sae.card['width'] for sae in saes)
  needed = memory(latents) + latents * _FEATURE_BYTES
  files.check_room(folder, needed, f'The index of {latents:,} features')


class State:
  """The statistics of the first pass on disk; ignored for any other pass.

  Attributes:
    key: hash of the text, the cards and the parameters.
  """

  def __init__(
    self,
    path: pathlib.Path,
    text: Text,
    saes: Sequence[release.Released],
    every: int = 8,
    outliers: bool = False,
  ):
    self._path, self._every, self._calls = path, every, 0
    digest = hashlib.sha256(text.sequences_NT.tobytes())
    version = f'{gemma_scope.__version__} {store_lib.VERSION} {outliers}'
    digest.update(version.encode())
    for sae in saes:
      card = json.dumps(sae.card, sort_keys=True, default=str)
      digest.update(card.encode())
      digest.update(sae_folder.digest(sae.load()).encode())
    self.key = digest.hexdigest()

  def load(self) -> tuple[int, list[dict[str, np.ndarray]]] | None:
    """(sequences done, arrays of each SAE), or None to begin at the start."""
    if not self._path.exists():
      return None
    try:
      with np.load(self._path, allow_pickle=False) as file:
        if str(file['key']) != self.key:
          return None
        states: list[dict[str, np.ndarray]] = []
        for name in file.files:
          number, _, field = name.partition('/')
          if field:
            while len(states) <= int(number):
              states.append({})
            states[int(number)][field] = file[name]
        return int(file['done']), states
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
      return None  # cut off while it was written

  def save(self, done: int, states, now: bool = False) -> None:
    """Saves every few calls, or now; completely or not at all."""
    self._calls += 1
    if self._calls % self._every and not now:
      return
    arrays = {
      f'{i}/{name}': array
      for i, state in enumerate(states())
      for name, array in state.items()
    }
    with files.whole_file(self._path) as file:
      np.savez(file, key=self.key, done=done, **arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class How:
  """How a pass over the text is run.

  Attributes:
    batch: sequences in each forward pass.
    mesh: the devices; None for one.
    progress: called with the sequences done and the total, of both passes.
    poll: called before each batch; may raise to stop.
    state: keeps the first pass on disk; None keeps nothing.
    outliers: True also counts the tokens that an SAE's outlier rule leaves out.
  """

  batch: int = 32
  mesh: Mesh | None = None
  progress: Callable[[int, int], None] = lambda done, total: None
  poll: Callable[[], None] = lambda: None
  state: State | None = None
  outliers: bool = False


def build(
  gemma: lm.Gemma,
  lm_params: lm.Params,
  saes: Sequence[release.Released],
  text: Text,
  how: How | None = None,
) -> Iterator[Index]:
  """Indexes every SAE in two passes over the text.

  Args:
    gemma, lm_params: the language model, sharded or not.
    saes: the SAEs; all their parameters are held in memory.
    text: the sequences.
    how: batch, devices and the rest.

  Yields:
    An `Index` for each SAE, in their order.
  """
  how = how or How()
  for sae in saes:
    sae.wiring.check_one_model(sae.name)
  saes = [sae.loaded() for sae in saes]
  reader = _Reader((gemma, lm_params), saes, text, how)
  finished = [counts.finish() for counts in _first_pass(reader, text, how)]
  windows = [
    _Windows(arrays, text.sequences_NT.shape[1]) for arrays in finished
  ]
  _second_pass(reader, windows, len(text.sequences_NT), how)
  for sae, bounds, arrays, sae_windows in zip(
    saes, reader.bounds, finished, windows, strict=True
  ):
    params, keep_NT = sae.load(), text.keep_NT.copy()
    keep_NT[arrays['outlier_sequence_O'], arrays['outlier_position_O']] = False
    meta = {
      'version': store_lib.VERSION,
      'card': dict(sae.card),
      'sae_sha256': sae_folder.digest(params),
      'model': gemma.config.name,
      'corpus': text.about,
      'tokens': int(keep_NT.sum()),
      'sequences': len(text.sequences_NT),
      'outliers': _outliers_meta(bounds, len(arrays['outlier_norm_O'])),
      'code': gemma_scope.__version__,
    }
    yield Index(
      meta=meta,
      sequences_NT=text.sequences_NT,
      keep_NT=keep_NT,
      document_NT=text.documents_NT,
      **arrays,
      **sae_windows.shares(arrays['max_F']),
      **logit_lens.geometry(params),
      **logit_lens.effects(lm_params, params, sae.card),
    )


def _outliers_meta(bounds: Mapping[sites.Site, float], count: int):
  if not bounds:
    return None
  return {
    'norm_bounds': {str(site): bound for site, bound in bounds.items()},
    'tokens': count,
  }


def _first_pass(reader: _Reader, text: Text, how: How) -> list[Statistics]:
  count = len(text.sequences_NT)
  statistics = [Statistics(width, count) for width in reader.widths]
  saved = how.state.load() if how.state else None
  start = 0
  if saved:
    start, states = saved
    for counts, arrays in zip(statistics, states, strict=True):
      counts.restore(arrays)
  arrays = lambda: [counts.arrays() for counts in statistics]
  for first in range(start, count, how.batch):
    try:
      how.poll()
    except Exception:
      if how.state and first > start:
        how.state.save(first, arrays, now=True)
      raise
    rows_B = np.arange(first, min(first + how.batch, count))
    for counts, (fires, left_out) in zip(
      statistics, reader(rows_B), strict=True
    ):
      counts.add(fires, text.documents_NT)
      counts.add_outliers(left_out)
    how.progress(rows_B[-1] + 1, 2 * count)
    if how.state:
      how.state.save(rows_B[-1] + 1, arrays)
  return statistics


def _second_pass(reader, windows: Sequence[_Windows], count: int, how: How):
  """Reads the sequences that hold an example again, for the windows."""
  needed = np.unique(np.concatenate([of_sae.sequences() for of_sae in windows]))
  for first in range(0, len(needed), how.batch):
    how.poll()
    rows_B = needed[first : first + how.batch]
    for sae_windows, (fires, _) in zip(windows, reader(rows_B), strict=True):
      sae_windows.add(fires)
    done = min(first + how.batch, len(needed))
    how.progress(count + round(count * done / len(needed)), 2 * count)


class _Reader:
  """Sequences -> each SAE's firings and outliers, from one forward pass."""

  def __init__(
    self,
    model: tuple[lm.Gemma, lm.Params],
    saes: Sequence[release.Released],
    text: Text,
    how: How,
  ):
    self._model, self._text, self._how = model, text, how
    self._wirings = [sae.wiring for sae in saes]
    self.bounds = [
      {} if how.outliers else outliers.norm_bounds(sae.card) for sae in saes
    ]
    self._sites = tuple(
      dict.fromkeys(
        site
        for wiring, bounds in zip(self._wirings, self.bounds, strict=True)
        for site in (*wiring.sites, *bounds)
      )
    )
    arrays = [sae.load() for sae in saes]
    self.widths = [params['b_enc'].size for params in arrays]
    self._encoders = list(
      map(encode.Encoder, released.on_demand(arrays, how.mesh), self.widths)
    )

  def __call__(self, chosen: np.ndarray) -> Iterator[tuple[Firings, Outliers]]:
    filled = np.resize(chosen, self._how.batch)  # one shape, one program
    tokens_BT = _on_data(self._text.sequences_NT[filled], self._how.mesh)
    taps = splice.taps(*self._model, tokens_BT, self._sites)
    keep_BT = self._text.keep_NT[filled].copy()
    keep_BT[len(chosen) :] = False
    for wiring, bounds, encoder in zip(
      self._wirings, self.bounds, self._encoders, strict=True
    ):
      norm_BT = encode.outlier_norms(
        tuple(taps[site] for site in bounds), tuple(bounds.values()), keep_BT
      )
      x = tuple(taps[site] for site in wiring.sites)
      yield encoder(x, keep_BT, norm_BT, filled)


def _on_data(tokens_BT, mesh: Mesh | None):
  if mesh is None:
    return tokens_BT
  place = NamedSharding(mesh, PartitionSpec('data', None))
  return jax.device_put(tokens_BT, place)


class _Windows:
  """Activations around the examples, filled by the second pass."""

  def __init__(self, arrays: Mapping[str, np.ndarray], length: int):
    width = min(WINDOW, length)
    examples = {  # latent, sequence, first position of the window
      'top': (
        arrays['top_sequence_FE'],
        arrays['top_position_FE'] - width // 2,
      ),
      'sample': (
        arrays['sample_sequence_FQR'],
        arrays['sample_position_FQR'] - width // 2,
      ),
    }
    self._shapes = {
      name: sequence.shape for name, (sequence, _) in examples.items()
    }
    self._width, self._latents = width, len(arrays['max_F'])
    latent = np.concatenate(
      [
        np.broadcast_to(
          np.arange(sequence.shape[0]).reshape(-1, *[1] * (sequence.ndim - 1)),
          sequence.shape,
        ).ravel()
        for sequence, _ in examples.values()
      ]
    )
    flat = [sequence.ravel() for sequence, _ in examples.values()]
    self._sequence = np.concatenate(flat)
    self._start = np.concatenate(
      [start.ravel() for _, start in examples.values()]
    )
    key = self._sequence.astype(np.int64) * self._latents + latent
    self._order = np.argsort(key, kind='stable')
    self.key = key[self._order]
    self._values = np.zeros((len(key), width), np.float32)

  def sequences(self) -> np.ndarray:
    """The sequences that hold an example."""
    sequences = np.unique(self._sequence)
    return sequences[sequences >= 0]

  def add(self, fires: Firings) -> None:
    """Fills the windows that these firings fall into."""
    key = fires.sequence.astype(np.int64) * self._latents + fires.latent
    low, high = (
      np.searchsorted(self.key, key, side) for side in ('left', 'right')
    )
    matches = high - low
    firing = np.repeat(np.arange(len(key)), matches)
    begins = np.cumsum(matches) - matches
    within = np.arange(len(firing)) - np.repeat(begins, matches)
    example = self._order[low[firing] + within]
    offset = fires.position[firing] - self._start[example]
    inside = (offset >= 0) & (offset < self._width)
    self._values[example[inside], offset[inside]] = fires.value[firing[inside]]

  def shares(self, max_F: np.ndarray) -> dict[str, np.ndarray]:
    """The windows as shares of max_F, by their names in an `Index`."""
    names = {'top': 'window_top_FEW', 'sample': 'window_sample_FQRW'}
    arrays, first = {}, 0
    for name, shape in self._shapes.items():
      count = int(np.prod(shape))
      values = self._values[first : first + count].reshape(len(max_F), -1)
      share = store_lib.shares(values, max_F[:, None])
      arrays[names[name]] = share.reshape(*shape, self._width)
      first += count
    return arrays
