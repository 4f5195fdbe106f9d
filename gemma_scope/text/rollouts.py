"""Gemma's turns, and a token store of its own replies to prompts.

  <start_of_turn>user\\n{prompt}<end_of_turn>\\n
  <start_of_turn>model\\n{answer}<end_of_turn>\\n

  encode(tokenizer, prompt)   ids up to the opened model's turn
  prepare_rollouts(...)       the model answers each -> a token store whose row
                              i is conversation i, padded (token_store.py)

The turn markers are single ids that only this module places: a marker typed
inside a text is encoded as the letters it is made of.

Answers are sampled in parts of `batch` conversations, each a file of its own;
answer i is a function of (model, prompt, seed, i), so that a killed
preparation goes on with the first part it lacks and ends with the same store.
"""

from __future__ import annotations

import contextlib
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
from gemma_scope.text import corpus, sequences, token_store, tokenizers
from gemma_scope.text import prompts as prompts_lib

_PARTS = 'parts'  # folder of what is done, until the store is whole
_INPUTS = 'inputs.json'


# Turns.


def encode(tokenizer: tokenizers.Tokenizer, *texts: str) -> np.ndarray:
  """int32 ids, without BOS, of turns: user, model, user, ...

  After a user's last turn the model's is opened, for it to be continued. White
  space around a text is dropped, as in Gemma's own template.
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
  """The ids of '<start_of_turn>model\\n', for `tokenizers.Special.reply`."""
  opening = tokenizer.start_of_turn, *tokenizer.encode('model\n')
  return tuple(int(token) for token in opening)


# Rollouts.


def prepare_rollouts(
  gemma: lm.Gemma,
  params: lm.Params,
  tokenizer: tokenizers.Tokenizer,
  prompts: Sequence[str],
  folder: str | os.PathLike[str],
  *,
  seq_len: int,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  seed: int = 0,
  batch: int = 32,
  heldout: float = 0.05,
  facts: Mapping[str, Any] | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
  poll: Callable[[], None] = lambda: None,
) -> token_store.Tokens:
  """Lets the model answer every prompt; a store of the conversations.

  Row i of `.sequences(seq_len, split)` is BOS, the user's turn, the model's
  turn, padding. Prompts that do not leave `max_new_tokens` of the row are left
  out and counted. Called again it goes on where it was stopped, or opens what
  is whole.

  Args:
    gemma, params, tokenizer: the instruction-tuned model.
    prompts: one for each conversation.
    folder: of the store.
    seq_len: tokens of a row, BOS included; the store has no other.
    max_new_tokens, temperature, top_k, seed: of the answers.
    batch: conversations sampled at once; with devices, their multiple.
    heldout: share of the prompts for the split 'eval', by their hash.
    facts: what else identifies the answers (the model's name, a checksum of
      its parameters): JSON, written to the manifest, the same on every call.
    progress: called with (parts done, parts in all), first with what was found.
    poll: called before each batch; may raise to stop.

  Raises:
    ValueError: the folder holds something else (which field differs), or the
      model, tokenizer and sizes do not fit.
  """
  folder = pathlib.Path(folder)
  prompts = [corpus.valid(prompt) for prompt in prompts]
  generate.check_settings(max_new_tokens, temperature, top_k, seed)
  _check_fit(gemma, tokenizer, batch, heldout)
  room = seq_len - 1 - len(tokenizer.encode('\n')) - max_new_tokens
  kept, openings = _openings(tokenizer, prompts, room, seq_len, max_new_tokens)
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
      **(facts or {}),
      'max_new_tokens': max_new_tokens,
      'temperature': float(temperature),
      'top_k': top_k,
      'seed': seed,
      'batch': batch,
      'heldout': float(heldout),
      'prompts': len(prompts),
      'too_long': len(prompts) - len(kept),
    },
  }
  inputs = json.loads(json.dumps(inputs))
  if (folder / token_store.MANIFEST).exists():
    store = token_store.Tokens(folder)
    _same(folder, store.manifest, inputs)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return store
  splits = _splits([prompts[i] for i in kept], heldout)
  _begin(folder, inputs)
  total = -(-len(kept) // batch)
  dtype = sequences.dtype_of(tokenizer.vocab_size)
  shape = np.dtype((dtype, seq_len - 1))
  sizes = [min(batch, len(kept) - part * batch) for part in range(total)]
  lacking = [
    part
    for part in range(total)
    if _read_part(_part(folder, part), sizes[part] * shape.itemsize) is None
  ]
  progress(total - len(lacking), total)
  banned = range(tokenizer.vocab_size, gemma.config.vocab_size)
  for done, part in enumerate(lacking, total - len(lacking) + 1):
    members = slice(part * batch, part * batch + sizes[part])
    replies = generate.generate(
      gemma,
      params,
      [np.append(tokenizer.bos_id, ids) for ids in openings[members]],
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_k=top_k,
      seed=seed,
      streams=kept[members],
      stop=(tokenizer.end_of_turn, tokenizer.eos_id),
      forbid=(tokenizer.bos_id, *banned),
      batch=batch,
      prompt_len=room + 1,
      poll=poll,
    )
    rows = _rows(tokenizer, openings[members], replies, seq_len)
    _write_part(_part(folder, part), rows.astype(dtype).tobytes())
    progress(done, total)
  counts = _assemble(folder, splits, sizes, shape, tokenizer)
  token_store.write_manifest(folder, inputs | {'dtype': dtype} | counts)
  shutil.rmtree(folder / _PARTS)
  return token_store.Tokens(folder)


def _check_fit(gemma, tokenizer, batch, heldout) -> None:
  if tokenizer.pad_id != generate.PAD:
    raise ValueError(
      f'{tokenizer.path} has padding {tokenizer.pad_id}, and Gemma reads '
      f'{generate.PAD} as padding; use the tokenizer that belongs to the model.'
    )
  if tokenizer.vocab_size > gemma.config.vocab_size:
    raise ValueError(
      f'{tokenizer.path} has {tokenizer.vocab_size} pieces and '
      f'{gemma.config.name} knows {gemma.config.vocab_size}; use the '
      'tokenizer that belongs to the model.'
    )
  if batch < 1 or not 0 <= heldout < 1:
    raise ValueError(
      f'batch={batch}, heldout={heldout}: the batch must be positive, the '
      'share in 0 .. 1.'
    )


def _openings(tokenizer, prompts, room, seq_len, max_new_tokens):
  """Indices of the prompts that fit, and their ids up to the reply."""
  every = [encode(tokenizer, prompt) for prompt in prompts]
  kept = [i for i, ids in enumerate(every) if len(ids) <= room]
  if not kept:
    raise ValueError(
      f'None of the {len(prompts)} prompts leaves room for '
      f'max_new_tokens={max_new_tokens} in seq_len={seq_len}: the shortest '
      f'needs {min(map(len, every), default=0)} tokens and has {room}.'
    )
  return kept, [every[i] for i in kept]


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
  """int32 [B, seq_len - 1]: opening, reply, its newline, padding."""
  rows_BT = np.full((len(openings), seq_len - 1), generate.PAD, np.int32)
  for row_T, opening, reply in zip(rows_BT, openings, replies, strict=True):
    ended = reply[-1:] == tokenizer.end_of_turn
    newline = tokenizer.encode('\n') if ended.any() else reply[:0]
    ids = np.concatenate([opening, reply, newline])
    row_T[: len(ids)] = ids
  return rows_BT


def _begin(folder: pathlib.Path, inputs: dict[str, Any]) -> None:
  """Makes the folder of parts, or finds there the same inputs."""
  path = folder / _PARTS / _INPUTS
  if path.exists():
    _same(folder, json.loads(path.read_text()), inputs)
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


def _same(folder, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  found, wanted = _flat(found), _flat(wanted)
  fields = wanted.keys() | {k for k in found if k.startswith('rollouts.')}
  for field in sorted(fields):
    if found.get(field) != wanted.get(field):
      raise ValueError(
        f'{folder} holds another preparation: {field} is '
        f'{found.get(field)!r} there and {wanted.get(field)!r} here. Choose '
        'another folder, or delete that one.'
      )


def _flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
  settings = inputs.get('rollouts', {})
  flat = {key: value for key, value in inputs.items() if key != 'rollouts'}
  return flat | {f'rollouts.{key}': v for key, v in settings.items()}


# Parts: the tokens, then their SHA-256.


def _part(folder: pathlib.Path, part: int) -> pathlib.Path:
  return folder / _PARTS / f'{part:08}.tokens'


def _write_part(path: pathlib.Path, data: bytes) -> None:
  files.write_bytes(path, data + hashlib.sha256(data).digest())


def _read_part(path: pathlib.Path, size: int) -> bytes | None:
  """The part's tokens; None where it is missing or damaged."""
  if not path.is_file() or path.stat().st_size != size + 32:
    return None
  data = path.read_bytes()
  whole = hashlib.sha256(data[:size]).digest() == data[size:]
  return data[:size] if whole else None


def _assemble(folder, splits, sizes, shape, tokenizer) -> dict[str, Any]:
  """Parts -> the two token files; the manifest's part about them."""
  hashes = {split: hashlib.sha256() for split in corpus.SPLITS}
  padding = (tokenizer.pad_id,)
  answers = tokenizers.Special(padding, reply_opening(tokenizer))
  stops = tokenizer.end_of_turn, tokenizer.eos_id
  reply_tokens = ended = 0
  paths = {s: folder / f'{s}.tokens' for s in corpus.SPLITS}
  with contextlib.ExitStack() as stack:
    token_files = {
      split: stack.enter_context(files.whole_file(path))
      for split, path in paths.items()
    }
    for part, size in enumerate(sizes):
      data = _read_part(_part(folder, part), size * shape.itemsize)
      if data is None:
        raise ValueError(
          f'{_part(folder, part)} is damaged; prepare again, which makes it '
          'anew.'
        )
      rows_BT = np.frombuffer(data, shape)
      answer_BT = answers.keep(rows_BT)
      reply_tokens += int((answer_BT & (rows_BT != tokenizer.eos_id)).sum())
      ended += int((answer_BT & np.isin(rows_BT, stops)).any(-1).sum())
      first = sum(sizes[:part])
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
