"""A token store: a folder of flat token files, and rows of it by index.

  train.tokens  eval.tokens   little-endian uint16 (vocabulary up to 65,536)
                              or int32, nothing else in the file
  manifest.json               what was tokenised and by what, counts, hashes

A stream is the tokens of its documents, each followed by EOS. Row i of length T
is BOS and then stream[i (T-1) : (i+1) (T-1)]; a remainder at the end is
dropped. Files are memory-mapped, so a store may be larger than the memory; of
those of a store in a bucket, the parts that are read are fetched
(`host_cache`). The manifest names no file (their names are fixed) and holds its
own hash.

Every row of a chat store (`rollouts`) is one conversation, padded. Its manifest
has `chat`, `seq_len`, the only row length it can be read at, and `reply`, the
ids that open the model's turn (`tokenizers.Special`).
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.text import corpus
from gemma_scope.text import sequences as sequences_lib

FORMAT = 1
MANIFEST = 'manifest.json'
_MANIFEST_BYTES = 1 << 16


class Tokens:
  """An open token store: its manifest and file sizes are checked."""

  def __init__(self, folder: str | os.PathLike[str]):
    self.folder = folder
    if files.scheme(folder):
      from gemma_scope.runtime import host_cache  # JAX

      above, _, name = os.fspath(folder).rstrip('/').rpartition('/')
      store = host_cache.Store(above)
      self.folder = f'{above}/{name}'
      listed = {f: about['bytes'] for f, about in store.listed(name).items()}
      bytes_of = lambda split: listed.get(f'{split}.tokens')
      path = store.path(name, MANIFEST)
    else:
      self.folder = pathlib.Path(folder)
      bytes_of = lambda split: _bytes(self.path(split))
      path = self.folder / MANIFEST
    self.manifest = _read_manifest(path)
    size = np.dtype(self.manifest['dtype']).itemsize
    for split in corpus.SPLITS:
      expected = self.manifest['tokens'][split] * size
      actual = bytes_of(split)
      if actual != expected:
        raise ValueError(
          f'{self.path(split)} should have {expected} bytes and '
          f'{"is missing" if actual is None else f"has {actual}"}; the store '
          'is damaged: delete the folder and prepare it again.'
        )

  def path(self, split: str) -> pathlib.Path | str:
    """The token file of 'train' or 'eval': its path, or its address."""
    if split not in corpus.SPLITS:
      raise ValueError(
        f'split is {split!r}; it is one of {", ".join(corpus.SPLITS)}.'
      )
    if files.scheme(self.folder):
      return f'{self.folder}/{split}.tokens'
    return self.folder / f'{split}.tokens'

  @property
  def fingerprint(self) -> dict[str, Any]:
    """The facts that identify the text, for checkpoints and cards."""
    keys = ('source', 'source_sha256', 'tokenizer_sha256', 'vocab_size')
    keys += ('limit_tokens', 'tokens', 'documents', 'sha256')
    if self.is_chat:
      keys += ('chat', 'seq_len', 'reply', 'rollouts')
    keys += tuple(key for key in ('column', 'held_out') if key in self.manifest)
    return {key: self.manifest[key] for key in keys}

  @property
  def documents_read(self) -> int:
    """The number of documents of the source that were read."""
    by_parts = self.manifest.get('held_out')
    counts = self.manifest['documents']
    return by_parts['documents'] if by_parts else sum(counts.values())

  @property
  def note(self) -> str:
    """How text was held out, where that is not by document; else ''."""
    by_parts = self.manifest.get('held_out')
    if not by_parts:
      return ''
    documents, pieces = by_parts['documents'], by_parts['parts']
    few = (
      'a single document' if documents == 1 else f'only {documents} documents'
    )
    held_out = (
      'its end' if pieces == 1 else f'the end of each of {pieces} parts'
    )
    return (
      f'The source has {few}, too few to hold some out: {held_out} is held out '
      f'instead ({self.manifest["tokens"]["eval"]:,} tokens, with gaps between '
      'them and the training text).'
    )

  @property
  def is_chat(self) -> bool:
    return self.manifest.get('chat', False)

  @property
  def reply(self) -> tuple[int, ...]:
    """The ids that open the model's turn; () unless this is a chat store."""
    return tuple(self.manifest['reply']) if self.is_chat else ()

  def verify(self) -> None:
    """Compares the hashes of the files; ValueError names a damaged one.

    A file is read once in a process, and again if its size or time changes.
    Parts of a bucket's files are compared when they are fetched.
    """
    if files.scheme(self.folder):
      return
    for split in corpus.SPLITS:
      state = self.path(split).stat()
      digest = _sha256(self.path(split), state.st_size, state.st_mtime_ns)
      if digest != self.manifest['sha256'][split]:
        raise ValueError(
          f'{self.path(split)} does not have the hash in its manifest; it is '
          'damaged: delete the folder and prepare it again.'
        )

  @property
  def share(self) -> float:
    """The share of tokens that SAEs see, about: in chats, the replies."""
    if not self.is_chat:
      return 1.0
    tokens = sum(self.manifest['tokens'].values())
    return self.manifest['replies']['tokens'] / max(tokens, 1)

  def sequences(
    self, seq_len: int, split: str = 'train'
  ) -> sequences_lib.Sequences:
    """Rows of `seq_len` tokens, BOS included.

    Raises:
      ValueError: there is not a single row, or a chat store has other rows.
    """
    if self.is_chat and seq_len != self.manifest['seq_len']:
      raise ValueError(
        f'{self.folder} holds conversations in rows of '
        f'{self.manifest["seq_len"]} tokens, not {seq_len}; set text.seq_len '
        'to that, or prepare it again.'
      )
    return sequences_lib.Sequences(
      str(self.path(split)),
      self.manifest['dtype'],
      self.manifest['bos_id'],
      seq_len,
      self.manifest['tokens'][split],
    )


def _bytes(path: pathlib.Path) -> int | None:
  return path.stat().st_size if path.is_file() else None


@functools.lru_cache(maxsize=16)
def _sha256(path: pathlib.Path, size: int, time_ns: int) -> str:
  """A file's hash, kept as long as `size` and `time_ns` stay the same."""
  return files.sha256(path)


# The manifest.


def write_manifest(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
  """Writes manifest.json, sealed with its own hash, in one step."""
  _check_manifest(manifest)
  sealed = manifest | {'manifest_sha256': files.json_sha256(manifest)}
  files.write_json(folder / MANIFEST, sealed, indent=2)


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(
      f'{path.parent} is no token store: it has no {MANIFEST}. Make one with '
      'launch/prepare_text.py, or launch/prepare_rollouts.py for chats.'
    )
  try:
    if path.stat().st_size > _MANIFEST_BYTES:
      raise ValueError('it is too large')
    manifest = files.read_json(path)
    _check_manifest(manifest)
    if manifest.pop('manifest_sha256', None) != files.json_sha256(manifest):
      raise ValueError('it does not have its own hash')
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise ValueError(
      f'{path} is not the manifest of a token store '
      f'({type(error).__name__}: {error}); it is damaged or of another '
      'version: delete the folder and prepare it again.'
    ) from error
  return manifest


def _check_manifest(manifest: Any) -> None:
  """Checks every field that this package relies on."""
  if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
    raise ValueError(f'its format is not {FORMAT}')
  vocab = _integer(manifest, 'vocab_size', 1, 1 << 31)
  if manifest['dtype'] != sequences_lib.dtype_of(vocab):
    raise ValueError(f'dtype is {manifest["dtype"]!r}')
  for key in ('bos_id', 'eos_id'):
    _integer(manifest, key, 0, vocab)
  _integer(manifest, 'pad_id', -1, vocab)  # -1: the tokenizer has none
  for split in corpus.SPLITS:
    _integer(manifest['tokens'], split, 0, 1 << 50)
    _integer(manifest['documents'], split, 0, 1 << 50)
    _hash(manifest['sha256'], split)
  for key in ('source_sha256', 'tokenizer_sha256'):
    _hash(manifest, key)
  for key in ('source', 'python', 'limit_tokens'):
    if not isinstance(manifest[key], (str, int, type(None))):
      raise ValueError(f'{key} is {manifest[key]!r}')
  if not isinstance(manifest.get('column', ''), str):
    raise ValueError(f'column is {manifest["column"]!r}')
  if not isinstance(manifest.get('revision', {}), dict):
    raise ValueError(f'revision is {manifest["revision"]!r}')
  if 'held_out' in manifest:
    for key in ('documents', 'parts'):
      _integer(manifest['held_out'], key, 1, 1 << 50)
  if manifest.get('chat', False) is not False:
    _check_chat(manifest)


def _check_chat(manifest: dict[str, Any]) -> None:
  width = _integer(manifest, 'seq_len', 2, 1 << 31) - 1
  reply = manifest['reply']
  complete = all(
    manifest['tokens'][split] % width == 0 for split in corpus.SPLITS
  )
  if manifest['chat'] is not True or not complete:
    raise ValueError('its rows are not whole conversations')
  if not isinstance(reply, list) or not reply:
    raise ValueError(f'reply is {reply!r}')
  for token in reply:
    _integer({'reply': token}, 'reply', 0, manifest['vocab_size'])
  if not isinstance(manifest['rollouts'], dict):
    raise ValueError(f'rollouts is {manifest["rollouts"]!r}')


def _integer(values: dict[str, Any], key: str, low: int, stop: int) -> int:
  value = values[key]
  if type(value) is not int or not low <= value < stop:
    raise ValueError(f'{key} is {value!r}')
  return value


def _hash(values: dict[str, Any], key: str) -> None:
  if not re.fullmatch('[0-9a-f]{64}', values[key]):
    raise ValueError(f'{key} is no SHA-256')
