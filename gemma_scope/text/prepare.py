"""Documents -> tokens, once -> sequences of fixed length, by index.

  sources.documents(source)       names and texts in a fixed order
    -> prepare(source, tokenizer, folder)   one flat token file per split
    -> token_store.Tokens(folder)   the store, opened and checked
    -> .sequences(T)[i]             BOS + T-1 tokens, int32 [T]
    -> shuffled(sequences, seed)[i] any i >= 0: a new order every epoch
    -> batch(rows, start, count)    int32 [count, T]

Every row is a pure function of (store, T, seed, i): no iterator whose state
could be lost. This module is the face of the three above it; it imports grain
and sentencepiece only where a row is shuffled or a text encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from gemma_scope import files
from gemma_scope.text import corpus, sources, token_store, tokenizers
from gemma_scope.text import sequences as sequences_lib

_BATCH_CHARS = 1 << 21  # encoded at once: bounds memory, feeds the threads
_BATCH_SECONDS = 2.0  # so that a slow source shows progress too


class Rows(Protocol):
  """Random access to int32 [T] rows."""

  def __getitem__(self, index: int, /) -> np.ndarray: ...


def shuffled(sequences: sequences_lib.Sequences, seed: int) -> Rows:
  """`[i]` for any i >= 0: i // len is the epoch, each its own permutation.

  The order is grain's index shuffle: a pure function of (seed, len, i) that
  holds no table of indices. Seeds are 0 .. 2**32 - 1.
  """
  import grain

  if not 0 <= seed < 1 << 32:
    raise ValueError(f'seed is {seed}; it must be in 0 .. 2**32 - 1.')
  # seed() hashes: shuffle(seed) would give seed 1 the epochs of seed 0, late.
  source = grain.MapDataset.source(sequences).seed(seed)
  return source.shuffle().repeat(None, reseed_each_epoch=True)


def batch(rows: Rows, start: int, count: int) -> np.ndarray:
  """int32 [count, T]: rows start .. start + count - 1."""
  return np.stack([rows[i] for i in range(start, start + count)])


# Preparing a store.


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a preparation has done so far."""

  documents: int
  tokens: int
  bytes: int
  seconds: float

  def __str__(self) -> str:
    rate = self.bytes / 1e6 / max(self.seconds, 1e-9)
    return (
      f'{self.documents:,} documents, {self.bytes / 1e6:.1f} MB, '
      f'{self.tokens:,} tokens, {rate:.2f} MB/s'
    )


def prepare(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  folder: str | os.PathLike[str],
  *,
  progress: Callable[[Progress], None] | None = None,
  limit_tokens: int | None = None,
) -> token_store.Tokens:
  """Tokenises a source once into `folder`, or finds that this was done.

  Stops at the end of the first document with which both splits together hold
  `limit_tokens`. The folder (on a local or mounted disk) appears complete or
  not at all; an interrupted preparation starts again. If the folder holds
  this preparation (the documents are read and hashed again, not tokenised) it
  is opened and returned; if it holds another, ValueError names the field that
  differs.
  """
  folder = pathlib.Path(folder)
  if limit_tokens is not None and limit_tokens < 1:
    raise ValueError(f'limit_tokens is {limit_tokens}; it must be positive.')
  inputs = {
    'format': token_store.FORMAT,
    'source': source,
    'python': platform.python_version() if source == 'python' else None,
    'tokenizer_sha256': tokenizer.sha256,
    'vocab_size': tokenizer.vocab_size,
    'bos_id': tokenizer.bos_id,
    'eos_id': tokenizer.eos_id,
    'pad_id': tokenizer.pad_id,
    'limit_tokens': limit_tokens,
  }
  revision = sources.revision(source)
  if revision is not None:
    inputs['revision'] = revision
  found = sources.documents(source)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    return _same_preparation(folder, inputs, found)
  try:
    with files.whole_folder(folder) as draft:
      written = _write(
        draft, found, tokenizer, limit_tokens, progress or (lambda _: None)
      )
      token_store.write_manifest(draft, inputs | written)
  except FileExistsError:
    # Another process was first: the same text, or a refusal.
    return _same_preparation(folder, inputs, sources.documents(source))
  return token_store.Tokens(folder)


def _same_preparation(
  folder: pathlib.Path,
  inputs: dict[str, Any],
  found: Iterable[corpus.Document],
) -> token_store.Tokens:
  """Opens the folder if it holds the preparation of these inputs."""
  store = token_store.Tokens(folder)
  advice = 'Choose another folder, or delete that one.'
  for field, wanted in inputs.items():
    there = store.manifest.get(field)
    if isinstance(wanted, dict) and isinstance(there, dict):
      names = sorted(wanted.keys() | there.keys())
      names = [n for n in names if wanted.get(n) != there.get(n)]
      wanted = {n: wanted.get(n) for n in names}
      there = {n: there.get(n) for n in names}
    if there != wanted:
      raise ValueError(
        f'{folder} holds another preparation: {field} is {there!r} there and '
        f'{wanted!r} here. {advice}'
      )
  if inputs['limit_tokens'] is not None:  # only the first ones were read
    found = itertools.islice(found, sum(store.manifest['documents'].values()))
  read = hashlib.sha256()
  for document in found:
    _hash_document(read, document)
  if read.hexdigest() != store.manifest['source_sha256']:
    raise ValueError(
      f'{folder} holds another preparation: source_sha256 differs, so the '
      f'text of {inputs["source"]!r} has changed since. {advice}'
    )
  return store


def _write(
  folder: pathlib.Path,
  found: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer,
  limit_tokens: int | None,
  progress: Callable[[Progress], None],
) -> dict[str, Any]:
  """Writes the token files; returns the manifest's part about them."""
  dtype = sequences_lib.dtype_of(tokenizer.vocab_size)
  started = time.monotonic()
  read = hashlib.sha256()
  hashes = {split: hashlib.sha256() for split in corpus.SPLITS}
  tokens = dict.fromkeys(corpus.SPLITS, 0)
  counts = dict.fromkeys(corpus.SPLITS, 0)
  text_bytes, full = 0, False
  with contextlib.ExitStack() as stack:
    token_files = {
      split: stack.enter_context(open(folder / f'{split}.tokens', 'wb'))
      for split in corpus.SPLITS
    }
    for several in _batches(found):
      encoded = tokenizer.encode_all([d.text for d in several])
      for document, ids in zip(several, encoded, strict=True):
        text_bytes += _hash_document(read, document)
        data = np.append(ids, tokenizer.eos_id).astype(dtype).tobytes()
        split = document.split
        token_files[split].write(data)
        hashes[split].update(data)
        tokens[split] += len(ids) + 1
        counts[split] += 1
        full = limit_tokens is not None and sum(tokens.values()) >= limit_tokens
        if full:
          break
      seconds = time.monotonic() - started
      totals = sum(counts.values()), sum(tokens.values())
      progress(Progress(*totals, text_bytes, seconds))
      if full:
        break
  return {
    'source_sha256': read.hexdigest(),
    'source_bytes': text_bytes,
    'dtype': dtype,
    'tokens': tokens,
    'documents': counts,
    'sha256': {s: hashes[s].hexdigest() for s in corpus.SPLITS},
  }


def _batches(
  found: Iterable[corpus.Document],
) -> Iterator[list[corpus.Document]]:
  """Batches of _BATCH_CHARS, or what came within _BATCH_SECONDS."""
  several, size, began = [], 0, time.monotonic()
  for document in found:
    several.append(document)
    size += len(document.text)
    late = time.monotonic() - began >= _BATCH_SECONDS
    if size >= _BATCH_CHARS or late:
      yield several
      several, size, began = [], 0, time.monotonic()
  if several:
    yield several


def _hash_document(digest: Any, document: corpus.Document) -> int:
  """Adds name and text, each after its length; returns the text's bytes."""
  name, body = document.name.encode(), document.text.encode()
  digest.update(len(name).to_bytes(8, 'little') + name)
  digest.update(len(body).to_bytes(8, 'little') + body)
  return len(body)


def open_text(
  config: ConfigDict, workdir: pathlib.Path, report: Callable[[str], None]
) -> tuple[tokenizers.Tokenizer, token_store.Tokens]:
  """The tokenizer and the token store; makes the store where none is named.

  A run keeps the store it began with, whatever became of its source.
  """
  # JAX: not for those who only prepare text.
  from gemma_scope.language_model import weights
  from gemma_scope.runtime import cluster

  tokenizer = tokenizers.Tokenizer(
    config.lm.tokenizer
    or weights.tokenizer(config.lm.name, config.lm.checkpoint)
  )
  folder = pathlib.Path(config.text.store or workdir / 'tokens')
  with cluster.first_goes_ahead():
    if config.text.store or (folder / 'manifest.json').exists():
      store = token_store.Tokens(folder)
      store.verify()
    else:
      report(f'tokenising {config.text.source}')
      store = prepare(config.text.source, tokenizer, folder)
  if store.fingerprint['tokenizer_sha256'] != tokenizer.sha256:
    raise ValueError(
      f'The token store {str(folder)!r} was made with another tokenizer than '
      f'{tokenizer.path!r}; prepare it again or set lm.tokenizer.'
    )
  return tokenizer, store
