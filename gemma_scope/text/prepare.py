"""Documents -> tokens, once -> sequences of fixed length, by index.

  sources.documents(source)       names and texts in a fixed order
    -> prepare(source, tokenizer, folder)   one flat token file per split
    -> token_store.Tokens(folder)   the store, opened and checked
    -> .sequences(T)[i]             BOS + T-1 tokens, int32 [T]
    -> shuffled(sequences, seed)[i] any i >= 0: a new order every epoch
    -> batch(rows, start, count)    int32 [count, T]

Every row is a pure function of (store, T, seed, i), so there is no iterator
state. grain and sentencepiece are imported only when rows are shuffled and text
is encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from gemma_scope import files
from gemma_scope.text import corpus, sources, splits, token_store, tokenizers
from gemma_scope.text import sequences as sequences_lib

_BATCH_CHARS = 1 << 21  # encoded at once: bounds memory, feeds the threads
_BATCH_SECONDS = 2.0  # so that a slow source shows progress too
_READERS = 16  # rows that are read at once


class Rows(Protocol):
  """Random access to int32 [T] rows."""

  def __getitem__(self, index: int, /) -> np.ndarray: ...


def shuffled(sequences: sequences_lib.Sequences, seed: int) -> Rows:
  """Rows in a random order, for any index i >= 0.

  Every epoch i // len has another permutation. It is grain's index shuffle, a
  pure function of (seed, len, i) without a table. Seeds are 0 .. 2**32 - 1.
  """
  import grain

  if not 0 <= seed < 1 << 32:
    raise ValueError(f'seed is {seed}; it must be in 0 .. 2**32 - 1.')
  # seed() hashes: shuffle(seed) would give seed 1 the epochs of seed 0, late.
  source = grain.MapDataset.source(sequences).seed(seed)
  return source.shuffle().repeat(None, reseed_each_epoch=True)


def batch(rows: Rows, start: int, count: int) -> np.ndarray:
  """int32 [count, T]: rows start .. start + count - 1.

  They lie far apart, on a disk or in a bucket: several are read at once, in
  daemon threads, so that a process that ends does not wait for the rest.
  """
  read: list[Any] = [None] * count
  left, errors = iter(range(count)), []

  def work():
    try:
      for i in left:
        read[i] = rows[start + i]
    except Exception as error:
      errors.append(error)

  threads = [
    threading.Thread(target=work, daemon=True)
    for _ in range(min(_READERS, count))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]
  return np.stack(read)


# Preparing a store.


@dataclasses.dataclass(frozen=True)
class Progress:
  """Progress of a preparation; `tokens` is None while it only compares."""

  documents: int
  tokens: int | None
  bytes: int
  seconds: float

  def __str__(self) -> str:
    rate = self.bytes / 1e6 / max(self.seconds, 1e-9)
    tokens = 'compared' if self.tokens is None else f'{self.tokens:,} tokens'
    return (
      f'{self.documents:,} documents, {self.bytes / 1e6:.1f} MB, {tokens}, '
      f'{rate:.2f} MB/s'
    )


def prepare(
  source: str,
  tokenizer: tokenizers.Tokenizer,
  folder: str | os.PathLike[str],
  *,
  column: str = '',
  progress: Callable[[Progress], None] = lambda _: None,
  limit_tokens: int | None = None,
) -> token_store.Tokens:
  """Tokenises a source into `folder`, unless that has been done.

  The folder (on a local or mounted disk) is written completely or not at all;
  an interrupted preparation starts again. If the folder has this preparation,
  it is opened and returned. (Its documents are read and hashed again, unless a
  revision guarantees that they are the same.)

  Args:
    source, column: see `sources.documents`.
    tokenizer: the language model's tokenizer.
    folder: the folder of the token store.
    progress: called every two seconds or more, and at the end.
    limit_tokens: stops after the document with which both splits together reach
      this number of tokens.

  Raises:
    ValueError: the source has no text, or the folder has another preparation
      (the message names the field that differs).
  """
  files.refuse_address(folder, 'The folder of a token store')
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
  if column:
    inputs['column'] = column
  sources.documents(source, column=column)  # refused before the hub is asked
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    return _same_preparation(folder, inputs, progress)
  revision = sources.revision(source)
  if revision is not None:
    inputs['revision'] = revision
  documents = sources.documents(source, column=column, revision=revision)
  if limit_tokens is not None:
    size = np.dtype(sequences_lib.dtype_of(tokenizer.vocab_size)).itemsize
    subject = f'A store of {limit_tokens:,} tokens'
    files.check_room(folder, limit_tokens * size, subject)
  try:
    with files.whole_folder(folder) as draft:
      counts = _write(draft, documents, tokenizer, limit_tokens, progress)
      if not counts['source_bytes']:
        raise ValueError(f'{source!r} holds no text: nothing was written.')
      token_store.write_manifest(draft, inputs | counts)
  except FileExistsError:
    # Another process was first: the same text, or a refusal.
    return _same_preparation(folder, inputs, progress)
  return token_store.Tokens(folder)


def _same_preparation(
  folder: pathlib.Path,
  inputs: dict[str, Any],
  progress: Callable[[Progress], None],
) -> token_store.Tokens:
  """Opens the folder if it holds the preparation of these inputs."""
  store = token_store.Tokens(folder)
  manifest = store.manifest
  for field in ('column', 'revision'):  # those that not every manifest has
    if field in manifest:
      inputs = {field: None} | inputs
  for field, wanted in inputs.items():
    if field != 'revision':
      _refuse_another(folder, field, manifest.get(field), wanted)
  source, column = inputs['source'], inputs.get('column') or ''
  revision = manifest.get('revision')
  if revision is not None:
    if 'commit' not in revision:  # a store keeps the commit it was made from
      newest = sources.revision(source)
      _refuse_another(folder, 'revision', revision, newest)
    return store
  documents = sources.documents(source, column=column)
  if inputs['limit_tokens'] is not None:  # only the first ones were read
    documents = itertools.islice(documents, store.documents_read)
  digest, ticks = hashlib.sha256(), _Ticks(progress)
  for number, document in enumerate(documents, 1):
    ticks.bytes += _hash_document(digest, document)
    ticks.maybe(number, None)
  if digest.hexdigest() != manifest['source_sha256']:
    raise ValueError(
      f'{folder} holds another preparation: source_sha256 differs, so the '
      f'text of {source!r} has changed since. {_ADVICE}'
    )
  return store


_ADVICE = 'Choose another folder, or delete that one.'


def _refuse_another(
  folder: pathlib.Path, field: str, stored: Any, wanted: Any
) -> None:
  """ValueError where two values differ; of two dicts, names what differs."""
  if stored == wanted:
    return
  if isinstance(stored, dict) and isinstance(wanted, dict):
    names = sorted(stored.keys() | wanted.keys())
    names = [name for name in names if stored.get(name) != wanted.get(name)]
    stored = {name: stored.get(name) for name in names}
    wanted = {name: wanted.get(name) for name in names}
  raise ValueError(
    f'{folder} holds another preparation: {field} is {stored!r} there and '
    f'{wanted!r} here. {_ADVICE}'
  )


class _Ticks:
  """Calls `progress` every _BATCH_SECONDS, and at the end."""

  def __init__(self, progress: Callable[[Progress], None]):
    self._progress = progress
    self._started = self._last = time.monotonic()
    self._documents = 0  # when it was last called
    self.bytes = 0

  def maybe(self, documents: int, tokens: int | None) -> None:
    if time.monotonic() - self._last >= _BATCH_SECONDS:
      self.now(documents, tokens)

  def now(self, documents: int, tokens: int | None) -> None:
    if documents == self._documents:
      return
    self._last, self._documents = time.monotonic(), documents
    seconds = self._last - self._started
    self._progress(Progress(documents, tokens, self.bytes, seconds))


def _write(
  folder: pathlib.Path,
  documents: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer,
  limit_tokens: int | None,
  progress: Callable[[Progress], None],
) -> dict[str, Any]:
  """Writes the token files; returns the manifest's part about them."""
  digest, ticks = hashlib.sha256(), _Ticks(progress)
  with contextlib.ExitStack() as stack:
    token_files = {
      split: stack.enter_context(open(folder / f'{split}.tokens', 'wb'))
      for split in corpus.SPLITS
    }
    dtype = sequences_lib.dtype_of(tokenizer.vocab_size)
    writer = splits.Writer(token_files, dtype, tokenizer.eos_id)
    for batch_documents in _batches(documents):
      encoded = tokenizer.encode_all(
        [document.text for document in batch_documents]
      )
      for document, ids in zip(batch_documents, encoded, strict=True):
        ticks.bytes += _hash_document(digest, document)
        writer.add(document.split, ids)
        if limit_tokens is not None and writer.tokens >= limit_tokens:
          break
      ticks.maybe(writer.documents, writer.tokens)
      if limit_tokens is not None and writer.tokens >= limit_tokens:
        break
    ticks.now(writer.documents, writer.tokens)
    counts = writer.finish()
  return {
    'source_sha256': digest.hexdigest(),
    'source_bytes': ticks.bytes,
    **counts,
  }


def _batches(
  documents: Iterable[corpus.Document],
) -> Iterator[list[corpus.Document]]:
  """Documents in batches of _BATCH_CHARS, sooner after _BATCH_SECONDS."""
  batched, size, began = [], 0, time.monotonic()
  for document in documents:
    batched.append(document)
    size += len(document.text)
    waited = time.monotonic() - began >= _BATCH_SECONDS
    if size >= _BATCH_CHARS or waited:
      yield batched
      batched, size, began = [], 0, time.monotonic()
  if batched:
    yield batched


def _hash_document(digest: Any, document: corpus.Document) -> int:
  """Hashes name and text, each with its length; returns the text's bytes."""
  name, body = document.name.encode(), document.text.encode()
  digest.update(len(name).to_bytes(8, 'little') + name)
  digest.update(len(body).to_bytes(8, 'little') + body)
  return len(body)


# A run's text.


def open_text(
  config: ConfigDict, workdir: pathlib.Path, report: Callable[[str], None]
) -> tuple[tokenizers.Tokenizer, token_store.Tokens]:
  """Opens the tokenizer and token store of a run; makes a store if necessary.

  A run keeps the store that it started with, even if the source changes.

  Raises:
    ValueError: the tokenizer does not belong to the model, or the store was
      made with another tokenizer.
  """
  # JAX: not for those who only prepare text.
  from gemma_scope.language_model import weights
  from gemma_scope.runtime import cluster, remote

  lm, text = config.lm, config.text
  tokenizer = tokenizers.Tokenizer(
    lm.tokenizer or weights.tokenizer(lm.name, lm.checkpoint)
  )
  check_tokenizer(tokenizer, lm.name, lm.checkpoint)
  folder = pathlib.Path(workdir / 'tokens')
  with cluster.first_goes_ahead():
    if not (text.store or folder.exists()):
      remote.fetch(folder)
    if text.store or (folder / token_store.MANIFEST).exists():
      store = token_store.Tokens(text.store or folder)
    else:
      report(f'tokenising {text.source}')
      store = prepare(
        text.source,
        tokenizer,
        folder,
        column=text.get('column', ''),
        progress=lambda state: report(str(state)),
      )
      if store.note:
        report(store.note)
    store.verify()
  if store.fingerprint['tokenizer_sha256'] != tokenizer.sha256:
    raise ValueError(
      f'The token store {str(store.folder)!r} was made with another tokenizer '
      f'than {tokenizer.path!r}; prepare it again or set lm.tokenizer.'
    )
  return tokenizer, store


def check_tokenizer(
  tokenizer: tokenizers.Tokenizer, name: str, checkpoint: str
) -> None:
  """Refuses a tokenizer that does not belong to a language model.

  The sizes of the vocabularies and the ids of padding and BOS are compared.
  """
  from gemma_scope.language_model import weights

  rows = weights.read_config(name, checkpoint).vocab_size
  bos = weights.special_ids(name, checkpoint).get('bos')
  check_vocabulary(tokenizer, name, rows, bos)


def check_vocabulary(
  tokenizer: tokenizers.Tokenizer, name: str, rows: int, bos: int | None = None
) -> None:
  """Like `check_tokenizer`, for a model with known facts.

  Args:
    rows: rows of the model's embedding; may be a few more than there are
      pieces, for padding.
    bos: the id of BOS that the model was trained with, or None.
  """
  from gemma_scope.language_model import generate

  pieces = tokenizer.vocab_size
  advice = (
    'set lm.tokenizer (--tokenizer) to the SentencePiece model that belongs to '
    'the language model.'
  )
  if not 0.99 * rows <= pieces <= rows:
    raise ValueError(
      f'{tokenizer.path} has {pieces:,} pieces and the vocabulary of {name} '
      f'has {rows:,}: {advice}'
    )
  for role, tokenizer_id, model_id in (
    ('pad', tokenizer.pad_id, generate.PAD),
    ('bos', tokenizer.bos_id, bos),
  ):
    if model_id is not None and tokenizer_id != model_id:
      raise ValueError(
        f'{tokenizer.path} has <{role}> at id {tokenizer_id}, {name} at '
        f'{model_id}: {advice}'
      )
