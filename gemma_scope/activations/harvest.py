"""Sequences -> rows of activations per site, in the order of the text.

  chunk c   the sequences [c n, (c + 1) n) of the shuffled text
  passes    each forward pass reads all sites of some of these sequences
  counts    which rows count: not BOS, EOS, padding, or a chat's user turns

`ModelSource` runs the language model; `store.StoreSource` reads rows from disk.
Both give the same rows and therefore the same batches (`chunks`). `Pair` runs
two models on the same tokens. A thread reads tokens or files one chunk ahead,
because that takes time on the host (`Ahead`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunk_memory
from gemma_scope.language_model import gemma as lm


@dataclasses.dataclass(frozen=True)
class Layout:
  """The sizes of chunks and batches, fixed for a whole run.

  Attributes:
    seq_len: T, tokens in a sequence, BOS included.
    sequences: n, sequences in a chunk.
    batch: B, rows in a training step.
    lm_batch: sequences in a forward pass; divides `sequences`.
    dtype: the dtype that rows are kept in, 'float32' or 'bfloat16'.
    share: the approximate share of rows that count; below 1 for chats, where
      only the model's replies count.
  """

  seq_len: int
  sequences: int
  batch: int
  lm_batch: int
  dtype: str
  share: float = 1.0

  @classmethod
  def of(
    cls, *, chunk_rows, seq_len, batch, lm_batch, dtype, share=1.0
  ) -> Layout:
    """The layout whose chunks hold at least `chunk_rows` rows that count."""
    per_pass = lm_batch * (seq_len - 1) * share
    passes = math.ceil(max(chunk_rows, batch) / per_pass)
    return cls(seq_len, passes * lm_batch, batch, lm_batch, dtype, share)

  @property
  def rows(self) -> int:
    """Rows in a chunk, without BOS and before other rows are left out."""
    return self.sequences * (self.seq_len - 1)

  @property
  def batches(self) -> int:
    """Batches in a chunk; each is a training step."""
    return int(self.rows * self.share) // self.batch


Poll = Callable[[], None]
Part = Mapping[sites.Site, Any]  # rows [..., D] of some sites


def never() -> None:
  """A poll that never interrupts."""


class Raw(Protocol):
  """A source of rows, in the order of the text.

  Attributes:
    layout: the sizes of chunks and batches.
    widths: D of each site.
    parts: the number of parts that `passes` yields for a chunk.
  """

  layout: Layout
  widths: dict[sites.Site, int]
  parts: int

  def passes(self, chunk: int, poll: Poll = never) -> Iterator[Part]:
    """The parts of a chunk; a site's parts together are its rows [R, D]."""

  def counts(self, chunk: int) -> np.ndarray:
    """Which of a chunk's rows count, bool [R]."""


class Ahead:
  """Calls `read(chunk, part)` one chunk ahead, in a thread."""

  def __init__(self, read: Callable[[int, int], Any], parts: int):
    self._read, self._parts = read, parts
    self._futures: dict[int, list[Future]] = {}  # by chunk

  def __call__(self, chunk: int, poll: Poll = never) -> Iterator[Any]:
    """Each part of `chunk`, with a poll before it."""
    self._start(chunk)
    for future in self._futures[chunk]:
      poll()
      yield future.result()
    self._start(chunk + 1)
    kept_chunks = chunk, chunk + 1
    self._futures = {
      i: futures for i, futures in self._futures.items() if i in kept_chunks
    }

  def _start(self, chunk: int) -> None:
    if chunk in self._futures:
      return
    self._futures[chunk] = futures = [Future() for _ in range(self._parts)]

    def work():
      for part, future in enumerate(futures):
        try:
          future.set_result(self._read(chunk, part))
        except Exception as error:
          future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()


class Text(NamedTuple):
  """What the language model reads.

  Attributes:
    sequences: `sequences(start, count)` -> int32 [count, T], for any start;
      called in a thread.
    keep: tokens [N, T] -> bool [N, T]: which rows count.
  """

  sequences: Callable[[int, int], np.ndarray]
  keep: Callable[[np.ndarray], np.ndarray]


class ModelSource:
  """Rows from forward passes of the language model.

  Args:
    gemma, params: the model.
    at: the sites to read, all in one pass.
    text: the tokens to read.
    layout: the sizes of chunks and batches.
    mesh: its 'data' axis splits the sequences, and its 'sae' axis too where
      they are enough: otherwise the SAEs' places would run the same pass.
  """

  def __init__(
    self,
    gemma: lm.Gemma,
    params: lm.Params,
    read_sites: Sequence[sites.Site],
    text: Text,
    layout: Layout,
    mesh: Mesh,
  ):
    self.layout = layout
    self.sites = tuple(read_sites)
    self.widths = {site: site.width(gemma.config) for site in self.sites}
    self.parts = layout.sequences // layout.lm_batch
    self.gemma, self.params = gemma, params
    self.text = text
    over = chunk_memory.axes(mesh.shape, layout.lm_batch)
    self.tokens_place = mesh_lib.sharding(mesh, over, None)
    if mesh.shape['sae'] > 1:
      # The same model, its residual stream where these sequences are.
      gemma = lm.Gemma(gemma.config, mesh_lib.sharding(mesh, over, None, None))
    count = layout.sequences
    self._tokens = Ahead(
      lambda chunk, _: text.sequences(chunk * count, count), 1
    )

    places = {
      site: mesh_lib.sharding(
        mesh, over, None, chunk_memory.columns(mesh.shape, width)
      )
      for site, width in self.widths.items()
    }

    @functools.partial(jax.jit, out_shardings=places)
    def harvest(params, tokens_BT):
      taps = gemma.forward(
        params, tokens_BT, taps=self.sites, logits=False
      ).taps
      # The rows of BOS are dropped here, where that costs nothing.
      return {
        site: taps[site][:, 1:].astype(layout.dtype) for site in self.sites
      }

    self.harvest = harvest  # (params, tokens [B, T]) -> {site: [B, T - 1, D]}

  def passes(self, chunk: int, poll: Poll = never) -> Iterator[Part]:
    """See `Raw`: each part is a forward pass, after a poll."""
    (tokens_NT,) = self._tokens(chunk)
    for tokens_BT in np.split(tokens_NT, self.parts):
      poll()
      tokens_BT = mesh_lib.put(tokens_BT, self.tokens_place)
      yield self.harvest(self.params, tokens_BT)

  def counts(self, chunk: int) -> np.ndarray:
    """See `Raw`."""
    (tokens_NT,) = self._tokens(chunk)
    return self.text.keep(tokens_NT)[:, 1:].reshape(-1)


class Pair:
  """Rows of two models on the same tokens.

  Args:
    first, second: sources of the same text and layout; the sites of the second
      become those `of_second`. Which rows count depends on the tokens alone.
  """

  def __init__(self, first: ModelSource, second: ModelSource):
    self.layout, self.parts = first.layout, first.parts
    self.widths = first.widths | {
      site.of_second(): width for site, width in second.widths.items()
    }
    self.text, self._models = first.text, (first, second)

  def passes(self, chunk: int, poll: Poll = never) -> Iterator[Part]:
    """See `Raw`: each part is a forward pass of both models."""
    passes_of_both = [model.passes(chunk, poll) for model in self._models]
    for first, second in zip(*passes_of_both, strict=True):
      yield {**first, **{site.of_second(): x for site, x in second.items()}}

  def counts(self, chunk: int) -> np.ndarray:
    """See `Raw`."""
    return self._models[0].counts(chunk)


def rows(
  source: Raw, chunk: int, poll: Poll = never
) -> tuple[dict[sites.Site, list[Any]], np.ndarray]:
  """All parts of a chunk by site, and which of its rows count."""
  parts = {site: [] for site in source.widths}
  for part in source.passes(chunk, poll):
    for site, x in part.items():
      parts[site].append(x)
  return parts, source.counts(chunk)


def one_late(parts: Iterator[Part], fetch: Callable[[Any], Any]):
  """Fetches each part to the host while the devices compute the next."""
  previous = None
  for part in parts:
    for x in part.values():
      if isinstance(x, jax.Array):
        x.copy_to_host_async()
    if previous is not None:
      yield {name: fetch(x) for name, x in previous.items()}
    previous = part
  if previous is not None:
    yield {name: fetch(x) for name, x in previous.items()}
