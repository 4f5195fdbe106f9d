"""Gemma's chat turns, and token stores of its replies to prompts.

  <start_of_turn>user\\n{prompt}<end_of_turn>\\n
  <start_of_turn>model\\n{answer}<end_of_turn>\\n

In Gemma 4 the markers are <|turn> and <turn|>; the tokenizer says which.

  encode(tokenizer, prompt)   ids up to the beginning of the model's turn
  prepare_rollouts(...)       the model answers each prompt -> a token store
                              whose row i is conversation i, padded

The turn markers are single ids. A marker in a user's text is encoded as its
letters instead (`Tokenizer.encode_literally`).

Answers are sampled in parts of `batch` conversations, each written to a file.
Answer i is a function of (model, prompt, seed, i), so a preparation that was
killed continues with the first missing part and ends with the same store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import generate
from gemma_scope.text import corpus, prepare, sequences, token_store, tokenizers
from gemma_scope.text import prompts as prompts_lib

_PARTS = 'parts'  # folder of what is done, until the store is whole
_INPUTS = 'inputs.json'


# Turns.


def encode(tokenizer: tokenizers.Tokenizer, *texts: str) -> np.ndarray:
  """Turns of user, model, user, ... as int32 ids without BOS.

  If the last turn is the user's, the opening of the model's turn follows. White
  space around a text is dropped, as in Gemma's template.
  """
  start, end = tokenizer.start_of_turn, tokenizer.end_of_turn
  user, model, newline = tokenizer.encode_all(['user\n', 'model\n', '\n'])
  ids = []
  for i, text in enumerate(texts):
    role = model if i % 2 else user
    ids += [
      [start],
      role,
      tokenizer.encode_literally(text.strip()),
      [end],
      newline,
    ]
  if len(texts) % 2:
    ids += [[start], model]
  return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)


def reply_opening(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
  """The ids that open a model's turn, for `tokenizers.Special.reply`."""
  opening = tokenizer.start_of_turn, *tokenizer.encode('model\n')
  return tuple(int(token) for token in opening)


# Rollouts.


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """An instruction-tuned language model.

  Attributes:
    gemma, params: the model, on one device or sharded.
    tokenizer: the model's tokenizer.
    facts: further facts that determine answers (name, checksum of parameters),
      as JSON for the manifest; the same on every call.
  """

  gemma: lm.Gemma
  params: lm.Params
  tokenizer: tokenizers.Tokenizer
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How answers are sampled and stored.

  Attributes:
    seq_len: tokens of a row, BOS included; the store has only this length.
    max_new_tokens: maximum number of tokens of an answer.
    temperature, top_k, seed: see `generate.Sampling`.
    batch: conversations sampled at once; a multiple of the devices.
    heldout: share of the prompts that belong to 'eval', by their hash.
  """

  seq_len: int
  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  seed: int = 0
  batch: int = 32
  heldout: float = 0.05

  def check(self) -> None:
    """Raises ValueError if a value is impossible."""
    self.sampling()
    if self.batch < 1 or not 0 <= self.heldout < 1:
      raise ValueError(
        f'batch={self.batch}, heldout={self.heldout}: the batch must be '
        'positive and the held-out share in 0 .. 1.'
      )

  def sampling(self, **fields) -> generate.Sampling:
    """How answers are drawn; `fields` are those that depend on the prompts."""
    return generate.Sampling(
      self.max_new_tokens, self.temperature, self.top_k, self.seed, **fields
    )

  def room(self, tokenizer: tokenizers.Tokenizer) -> int:
    """Tokens left in a row for the prompt and the opening of the reply."""
    newline = len(tokenizer.encode('\n'))
    return self.seq_len - 1 - newline - self.max_new_tokens


def prepare_rollouts(
  model: Model,
  prompts: Sequence[str],
  folder: str | os.PathLike[str],
  settings: Settings,
  progress: Callable[[int, int], None] = lambda done, total: None,
  poll: Callable[[], None] = lambda: None,
) -> token_store.Tokens:
  """Samples an answer to every prompt; returns a store of the conversations.

  Row i of `.sequences(seq_len, split)` is BOS, the user's turn, the model's
  turn and padding. Prompts that leave fewer than `max_new_tokens` tokens are
  left out and counted. A second call continues a stopped preparation, or opens
  the finished store.

  Args:
    model: the language model.
    prompts: one for each conversation.
    folder: the folder of the store.
    settings: how answers are sampled and stored.
    progress: called with (parts done, all parts); the first call has the parts
      of an earlier run.
    poll: called before each batch; may raise to stop.

  Raises:
    ValueError: the folder holds another preparation (the message names the
      field that differs), or model, tokenizer and sizes do not fit.
  """
  folder, tokenizer = pathlib.Path(folder), model.tokenizer
  prompts = [corpus.valid(prompt) for prompt in prompts]
  settings.check()
  config = model.gemma.config
  prepare.check_vocabulary(tokenizer, config.name, config.vocab_size)
  fitting, openings = _openings(tokenizer, prompts, settings)
  inputs = _inputs(model, prompts, len(prompts) - len(fitting), settings)
  if (folder / token_store.MANIFEST).exists():
    store = token_store.Tokens(folder)
    _same(folder, store.manifest, inputs)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return store
  splits = _splits([prompts[i] for i in fitting], settings.heldout)
  dtype = sequences.dtype_of(tokenizer.vocab_size)
  shape = np.dtype((dtype, settings.seq_len - 1))
  # The parts, and the files that they are joined to.
  needed = 2 * len(splits) * shape.itemsize
  files.check_room(folder, needed, f'A store of {len(splits):,} conversations')
  _begin(folder, inputs)
  starts = range(0, len(fitting), settings.batch)
  sizes = [min(settings.batch, len(fitting) - start) for start in starts]
  missing = [
    number
    for number, size in enumerate(sizes)
    if _read_part(_part(folder, number), size * shape.itemsize) is None
  ]
  progress(len(sizes) - len(missing), len(sizes))
  for done, number in enumerate(missing, len(sizes) - len(missing) + 1):
    members = slice(starts[number], starts[number] + sizes[number])
    rows = _answer(model, openings[members], fitting[members], settings, poll)
    _write_part(_part(folder, number), rows.astype(dtype).tobytes())
    progress(done, len(sizes))
  counts = _assemble(folder, splits, sizes, shape, tokenizer)
  token_store.write_manifest(folder, inputs | {'dtype': dtype} | counts)
  shutil.rmtree(folder / _PARTS)
  return token_store.Tokens(folder)


def _inputs(
  model: Model, prompts: Sequence[str], too_long: int, settings: Settings
) -> dict[str, Any]:
  """The manifest's part that two preparations of one store share, as JSON."""
  tokenizer, sampled = model.tokenizer, dataclasses.asdict(settings)
  seq_len = sampled.pop('seq_len')
  sampled['temperature'] = float(settings.temperature)
  sampled['heldout'] = float(settings.heldout)
  inputs = {
    'format': token_store.FORMAT,
    'source': 'rollouts',
    'source_sha256': _hash_of(prompts),
    'tokenizer_sha256': tokenizer.sha256,
    'vocab_size': tokenizer.vocab_size,
    'bos_id': tokenizer.bos_id,
    'eos_id': tokenizer.eos_id,
    'pad_id': tokenizer.pad_id,
    'python': None,
    'limit_tokens': None,
    'chat': True,
    'seq_len': seq_len,
    'reply': list(reply_opening(tokenizer)),
    'rollouts': {
      **model.facts,
      **sampled,
      'prompts': len(prompts),
      'too_long': too_long,
    },
  }
  return json.loads(json.dumps(inputs))


def _answer(
  model: Model,
  openings: Sequence[np.ndarray],
  streams: Sequence[int],
  settings: Settings,
  poll: Callable[[], None],
) -> np.ndarray:
  """int32 [B, seq_len - 1]: the conversations of one part."""
  tokenizer = model.tokenizer
  absent = range(tokenizer.vocab_size, model.gemma.config.vocab_size)
  replies = generate.generate(
    model.gemma,
    model.params,
    [np.append(tokenizer.bos_id, ids) for ids in openings],
    settings.sampling(
      streams=streams,
      stop=(tokenizer.end_of_turn, tokenizer.eos_id),
      forbid=(tokenizer.bos_id, *absent),
    ),
    passes=generate.Passes(settings.batch, settings.room(tokenizer) + 1, poll),
  )
  return _rows(tokenizer, openings, replies, settings.seq_len)


def _openings(tokenizer, prompts: Sequence[str], settings: Settings):
  """Indices of the prompts that fit, and their ids up to the reply."""
  room = settings.room(tokenizer)
  encoded = [encode(tokenizer, prompt) for prompt in prompts]
  fitting = [i for i, ids in enumerate(encoded) if len(ids) <= room]
  if not fitting:
    raise ValueError(
      f'None of the {len(prompts)} prompts leaves room for '
      f'max_new_tokens={settings.max_new_tokens} in '
      f'seq_len={settings.seq_len}: the shortest needs '
      f'{min(map(len, encoded), default=0)} tokens and has {room}.'
    )
  return fitting, [encoded[i] for i in fitting]


def _splits(prompts: Sequence[str], heldout: float) -> list[str]:
  splits = [
    'eval' if prompts_lib.held_out(prompt, heldout) else 'train'
    for prompt in prompts
  ]
  if 'train' not in splits or (heldout and 'eval' not in splits):
    raise ValueError(
      f'heldout={heldout} splits these {len(splits)} prompts into '
      f'{splits.count("train")} to train on and {splits.count("eval")} held '
      'out; use more prompts, another share, or 0.'
    )
  return splits


def _hash_of(prompts: Sequence[str]) -> str:
  digest = hashlib.sha256()
  for prompt in prompts:
    data = prompt.encode()
    digest.update(len(data).to_bytes(8, 'little') + data)
  return digest.hexdigest()


def _rows(tokenizer, openings, replies, seq_len: int) -> np.ndarray:
  """int32 [B, seq_len - 1]: opening, reply, newline and padding."""
  rows_BT = np.full((len(openings), seq_len - 1), generate.PAD, np.int32)
  for row_T, opening, reply in zip(rows_BT, openings, replies, strict=True):
    ended = reply[-1:] == tokenizer.end_of_turn
    newline = tokenizer.encode('\n') if ended.any() else reply[:0]
    ids = np.concatenate([opening, reply, newline])
    row_T[: len(ids)] = ids
  return rows_BT


def _begin(folder: pathlib.Path, inputs: dict[str, Any]) -> None:
  """Makes the folder of parts, or finds the same inputs in it."""
  path = folder / _PARTS / _INPUTS
  if path.exists():
    _same(folder, files.read_json(path), inputs)
    return
  # A lease of this run (run.lease, run.lock) may lie there.
  if folder.is_dir() and any(
    not p.name.startswith('run.') and p.name != _PARTS for p in folder.iterdir()
  ):
    raise ValueError(
      f'{folder} is not empty and holds no rollouts; choose another folder.'
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, inputs, indent=2)


def _same(folder, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  stored, wanted = _flat(stored), _flat(wanted)
  fields = wanted.keys() | {
    key for key in stored if key.startswith('rollouts.')
  }
  for field in sorted(fields):
    if stored.get(field) != wanted.get(field):
      raise ValueError(
        f'{folder} holds another preparation: {field} is {stored.get(field)!r} '
        f'there and {wanted.get(field)!r} here. Choose another folder, or '
        'delete that one.'
      )


def _flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
  settings = inputs.get('rollouts', {})
  flat = {key: value for key, value in inputs.items() if key != 'rollouts'}
  return flat | {f'rollouts.{key}': value for key, value in settings.items()}


# Parts: the tokens, then their SHA-256.


def _part(folder: pathlib.Path, number: int) -> pathlib.Path:
  return folder / _PARTS / f'{number:08}.tokens'


def _write_part(path: pathlib.Path, data: bytes) -> None:
  files.write_bytes(path, data + hashlib.sha256(data).digest())


def _read_part(path: pathlib.Path, size: int) -> bytes | None:
  """The part's tokens; None where it is missing or damaged."""
  if not path.is_file() or path.stat().st_size != size + 32:
    return None
  data = path.read_bytes()
  intact = hashlib.sha256(data[:size]).digest() == data[size:]
  return data[:size] if intact else None


def _assemble(folder, splits, sizes, shape, tokenizer) -> dict[str, Any]:
  """Joins the parts to the two token files; returns facts for the manifest."""
  hashes = {split: hashlib.sha256() for split in corpus.SPLITS}
  padding = (tokenizer.pad_id,)
  answers = tokenizers.Special(padding, reply_opening(tokenizer))
  stops = tokenizer.end_of_turn, tokenizer.eos_id
  reply_tokens = ended = 0
  paths = {split: folder / f'{split}.tokens' for split in corpus.SPLITS}
  with contextlib.ExitStack() as stack:
    token_files = {
      split: stack.enter_context(files.whole_file(path))
      for split, path in paths.items()
    }
    for number, size in enumerate(sizes):
      data = _read_part(_part(folder, number), size * shape.itemsize)
      if data is None:
        raise ValueError(
          f'{_part(folder, number)} is damaged; run the same command again, '
          'which samples this part anew.'
        )
      rows_BT = np.frombuffer(data, shape)
      answer_BT = answers.keep(rows_BT)
      reply_tokens += int((answer_BT & (rows_BT != tokenizer.eos_id)).sum())
      ended += int((answer_BT & np.isin(rows_BT, stops)).any(-1).sum())
      first = sum(sizes[:number])
      for split, row_T in zip(
        splits[first : first + size], rows_BT, strict=True
      ):
        token_files[split].write(row_T.tobytes())
        hashes[split].update(row_T.tobytes())
  counts = {split: splits.count(split) for split in corpus.SPLITS}
  width = shape.shape[0]
  return {
    'tokens': {split: n * width for split, n in counts.items()},
    'documents': counts,
    'sha256': {split: hashes[split].hexdigest() for split in corpus.SPLITS},
    'replies': {'tokens': reply_tokens, 'ended': ended},
  }
