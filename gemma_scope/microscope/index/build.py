"""Members of a collection -> an `Index` each, in one pass over a text.

For each batch of sequences

  forward pass with every member's sites tapped, once for all of them
  each member   f = encode(x), and of it what fires alone: K pairs (latent,
                value) a token, K the most that any token has
  `Statistics`  counts, maxima, histograms, largest values, samples, co-firing

then a second look, once for all, at the sequences that hold an example, for its
window. What a
member needs on the host never has B x F numbers, and none of it depends on how
the text was cut into batches or ordered (but for the windows' float16).

A sample is drawn by priority, a hash of (latent, sequence, position), kept R to
a bin of the histogram: the R smallest priorities of each tenth of (0, max] are
then among those kept, unless a bin straddles two tenths.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gemma_scope
from gemma_scope import files, sae, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.microscope.index import logit_lens
from gemma_scope.microscope.index import store as store_lib
from gemma_scope.microscope.index.statistics import Firings, Statistics
from gemma_scope.microscope.index.store import Index
from gemma_scope.release import sae_folder
from gemma_scope.sae import released, sparse

Row = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]
WINDOW = 48  # tokens around an example


class Text(NamedTuple):
  """What the members are read on.

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
  """`count` sequences of a token store's training text, evenly spread over it.

  Args:
    store: a `token_store.Tokens`.
    seq_len: tokens a sequence.
    count: at most so many.
    keep: tokens [N, T] -> where they count.
    eos_id: what ends a document.
  """
  rows = store.sequences(seq_len)
  at = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
  sequences_NT = np.stack([rows[i] for i in at])
  about = {
    'name': store.manifest['source'],
    'sha256': store.manifest['sha256']['train'],
    'split': 'train',
  }
  documents_NT = rows.documents(at, eos_id)
  return Text(sequences_NT, keep(sequences_NT), documents_NT, about)


def name_of(path: str) -> str:
  """A folder's name below an output folder, from an SAE's path anywhere."""
  parts = [p for p in path.replace('\\', '/').split('/') if p not in ('', '..')]
  return '/'.join(re.sub(r'[^\w.+=-]', '_', part) for part in parts[-4:])


class State:
  """The first pass's statistics on disk; unused where the pass is another.

  Attributes:
    key: of the text and of the members, parameters and all.
  """

  def __init__(
    self, path: pathlib.Path, text: Text, members: Sequence[Row], every: int = 8
  ):
    self._path, self._every, self._calls = path, every, 0
    digest = hashlib.sha256(text.sequences_NT.tobytes())
    digest.update(f'{gemma_scope.__version__} {store_lib.VERSION}'.encode())
    for params, card in members:
      digest.update(json.dumps(card, sort_keys=True, default=str).encode())
      digest.update(sae_folder.digest(params).encode())
    self.key = digest.hexdigest()

  def load(self) -> tuple[int, list[dict[str, np.ndarray]]] | None:
    """(sequences done, arrays of each member), or None: from the start."""
    if not self._path.exists():
      return None
    try:
      with np.load(self._path, allow_pickle=False) as file:
        if str(file['key']) != self.key:
          return None
        found: list[dict[str, np.ndarray]] = []
        for name in file.files:
          number, _, field = name.partition('/')
          if field:
            while len(found) <= int(number):
              found.append({})
            found[int(number)][field] = file[name]
        return int(file['done']), found
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
      return None  # cut off while it was written

  def save(self, done: int, states, now: bool = False) -> None:
    """Every few calls, or now; whole or not at all."""
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


def build(
  gemma: lm.Gemma,
  lm_params: lm.Params,
  members: Sequence[Row],
  text: Text,
  *,
  batch: int = 32,
  mesh: Mesh | None = None,
  progress: Callable[[int, int], None] = lambda done, of: None,
  poll: Callable[[], None] = lambda: None,
  state: State | None = None,
) -> Iterator[Index]:
  """Indexes every member.

  Args:
    gemma, lm_params: the language model, sharded or not.
    members: (parameters, card) in released form.
    text: the sequences.
    batch: sequences a forward pass.
    mesh: the devices; None for one.
    progress: called as progress(sequences done, of both passes).
    poll: called before each batch; may raise to stop.
    state: keeps the first pass on disk; None keeps nothing.

  Yields:
    An `Index` a member, in their order.
  """
  several = [sites.wiring_of(card) for _, card in members]
  reads = tuple(dict.fromkeys(s for place in several for s in place.sites))
  on_device = [released.put(params, mesh) for params, _ in members]
  count = len(text.sequences_NT)
  statistics = [Statistics(p['b_enc'].size, count) for p, _ in members]
  kept = state.load() if state else None
  start = 0
  if kept:
    start, found = kept
    for one, arrays in zip(statistics, found, strict=True):
      one.restore(arrays)
  total = 2 * count
  encoders = [_Encoder(params) for params in on_device]

  def firings(at: np.ndarray):
    """Each member's `Firings` on some sequences, from one pass of the model."""
    filled = np.resize(at, batch)  # one shape, one program
    tokens_BT = _on_data(text.sequences_NT[filled], mesh)
    taps = splice.taps(gemma, lm_params, tokens_BT, reads)
    keep_BT = text.keep_NT[filled].copy()
    keep_BT[len(at) :] = False
    for place, encode in zip(several, encoders, strict=True):
      yield encode(tuple(taps[s] for s in place.sites), keep_BT, filled)

  arrays = lambda: [one.arrays() for one in statistics]
  for first in range(start, count, batch):
    try:
      poll()
    except Exception:
      if state and first > start:
        state.save(first, arrays, now=True)
      raise
    at = np.arange(first, min(first + batch, count))
    for one, fires in zip(statistics, firings(at), strict=True):
      one.add(fires, text.documents_NT)
    progress(at[-1] + 1, total)
    if state:
      state.save(at[-1] + 1, arrays)
  finished = [one.finish() for one in statistics]
  windows = [_Windows(found, text.sequences_NT.shape[1]) for found in finished]
  wanted = np.unique(np.concatenate([one.sequences() for one in windows]))
  for first in range(0, len(wanted), batch):
    poll()
    at = wanted[first : first + batch]
    for one, fires in zip(windows, firings(at), strict=True):
      one.add(fires)
    done = min(first + batch, len(wanted))
    progress(count + round(count * done / len(wanted)), total)
  for (params, card), found, around in zip(
    members, finished, windows, strict=True
  ):
    yield Index(
      meta={
        'version': store_lib.VERSION,
        'card': dict(card),
        'sae_sha256': sae_folder.digest(params),
        'model': gemma.config.name,
        'corpus': text.about,
        'tokens': int(text.keep_NT.sum()),
        'sequences': count,
        'code': gemma_scope.__version__,
      },
      sequences_NT=text.sequences_NT,
      keep_NT=text.keep_NT,
      **found,
      **around.arrays,
      **logit_lens.geometry(params),
      **logit_lens.effects(lm_params, params, card),
    )


def _on_data(tokens_BT, mesh: Mesh | None):
  if mesh is None:
    return tokens_BT
  place = NamedSharding(mesh, PartitionSpec('data', None))
  return jax.device_put(tokens_BT, place)


class _Encoder:
  """One member's firings on a batch; room for K a token, more when needed."""

  def __init__(self, params):
    self._params, self._room = params, 64
    self._width = params['b_enc'].size

  def __call__(self, x, keep_BT, sequences_B) -> Firings:
    while True:
      room = min(self._room, self._width)
      i_BK, f_BK, found_B = map(
        np.asarray, _encode(self._params, x, keep_BT, room)
      )
      if found_B.max() <= room:
        break
      self._room = 1 << int(found_B.max() - 1).bit_length()
    token, slot = np.nonzero(np.arange(room) < found_B[:, None])
    row, position = np.divmod(token, keep_BT.shape[1])
    return Firings(
      latent=i_BK[token, slot].astype(np.int64),
      value=f_BK[token, slot],
      sequence=sequences_B[row].astype(np.int32),
      position=position.astype(np.int32),
    )


@functools.partial(jax.jit, static_argnames='room')
def _encode(params, x, keep_BT, room: int):
  """The latents that fire on each token: index and value [B T, K], count."""
  x = released.stacked(x, params['W_enc'].ndim == 3)
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
  rows = keep_BT.size
  f_RF = f.reshape(rows, -1)
  i_RK, found_R = sparse.select((f_RF > 0) & keep_BT.reshape(-1, 1), room)
  return i_RK, jax.numpy.take_along_axis(f_RF, i_RK, 1), found_R


class _Windows:
  """Latents' values around their examples, from a second look."""

  def __init__(self, found: Mapping[str, np.ndarray], length: int):
    width = min(WINDOW, length)
    at = {  # examples: latent, sequence, first position of the window
      'top': (found['top_sequence_FE'], found['top_position_FE'] - width // 2),
      'sample': (
        found['sample_sequence_FQR'],
        found['sample_position_FQR'] - width // 2,
      ),
    }
    self._shapes = {name: sequence.shape for name, (sequence, _) in at.items()}
    self._width, self._latents = width, len(found['max_F'])
    latent = np.concatenate(
      [
        np.broadcast_to(
          np.arange(s.shape[0]).reshape(-1, *[1] * (s.ndim - 1)), s.shape
        ).ravel()
        for s, _ in at.values()
      ]
    )
    self._sequence = np.concatenate([s.ravel() for s, _ in at.values()])
    self._start = np.concatenate([start.ravel() for _, start in at.values()])
    key = self._sequence.astype(np.int64) * self._latents + latent
    self._order = np.argsort(key, kind='stable')
    self.key = key[self._order]
    self._values = np.zeros((len(key), width), np.float16)

  def sequences(self) -> np.ndarray:
    """Those that hold an example."""
    found = np.unique(self._sequence)
    return found[found >= 0]

  def add(self, fires: Firings) -> None:
    """Fills the windows that these firings fall into."""
    key = fires.sequence.astype(np.int64) * self._latents + fires.latent
    low, high = (
      np.searchsorted(self.key, key, side) for side in ('left', 'right')
    )
    many = high - low
    firing = np.repeat(np.arange(len(key)), many)
    within = np.arange(len(firing)) - np.repeat(np.cumsum(many) - many, many)
    example = self._order[low[firing] + within]
    offset = fires.position[firing] - self._start[example]
    inside = (offset >= 0) & (offset < self._width)
    self._values[example[inside], offset[inside]] = fires.value[firing[inside]]

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The windows, by their names in an `Index`."""
    names = {
      'top': 'window_top_FEW',
      'sample': 'window_sample_FQRW',
    }
    found, first = {}, 0
    for name, shape in self._shapes.items():
      count = int(np.prod(shape))
      part = self._values[first : first + count]
      found[names[name]] = part.reshape(*shape, self._width)
      first += count
    return found
