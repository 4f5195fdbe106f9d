"""Sampling from Gemma: batched, with a KV cache, in one compiled program.

  prompts of several lengths -> padded on the left to P
  prefill   one pass over [B, P]; the last column is the end of every prompt
  loop      pick a token -> one pass over [B, 1] with the cache -> ...
            until every row has stopped or N tokens are sampled (lax.while_loop)

  pick      temperature 0: argmax;  else argmax(logits / temperature + Gumbel)

The n-th token of row b is drawn with fold_in(fold_in(key(seed), stream_b), n).
A reply is therefore a function of (seed, stream, prompt) and does not depend on
the other rows of its batch. With other shapes (P, B, devices) logits may differ
by rounding, about 1e-6.

Edits work as in `lm.Gemma.forward` and apply to all tokens, of the prompt and
of the reply. The program is compiled once for each set of edit functions and
shapes. Numbers bound with `jax.tree_util.Partial(fn, vector, strength)` are
arguments of the program, so that another strength compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers as numbers_lib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm

PAD = 0  # Gemma never attends to it, and it is never sampled
_ROUND = 16  # prompt lengths are rounded up to a multiple, for few programs

Edits = Mapping[sites.Site, lm.Edit]


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_new_tokens: N; at most so many are sampled for each prompt.
    temperature: 0 takes the likeliest token.
    top_k: samples among the k likeliest tokens; 0 among all.
    seed, streams: the noise. `streams` has an id in 0 .. 2**32 - 1 for each
      prompt, by default its index.
    stop: a reply ends with the first of these ids.
    forbid: ids that are never sampled. Padding never is.

  Raises:
    ValueError: a number is out of its range.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  seed: int = 0
  streams: Sequence[int] | None = None
  stop: Sequence[int] = ()
  forbid: Sequence[int] = ()

  def __post_init__(self):
    numbers = self.max_new_tokens, self.temperature, self.top_k, self.seed
    are_numbers = all(
      isinstance(number, numbers_lib.Real) for number in numbers
    )
    if not are_numbers or not (
      self.max_new_tokens > 0
      and self.temperature >= 0
      and self.top_k >= 0
      and 0 <= self.seed < 2**32
    ):
      raise ValueError(
        f'max_new_tokens={self.max_new_tokens!r}, temperature='
        f'{self.temperature!r}, top_k={self.top_k!r}, seed={self.seed!r}: the '
        'first must be positive, the others not negative, the seed below 2**32.'
      )
    for name in ('stop', 'forbid'):
      ids = np.asarray(getattr(self, name))
      if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
          f'{name} must be a list of token ids; found {getattr(self, name)!r}.'
        )


@dataclasses.dataclass(frozen=True)
class Passes:
  """How prompts are cut into passes.

  Attributes:
    batch: rows of a pass; the last one is filled up. All prompts by default.
    prompt_len: P, by default the longest prompt, rounded up.
    poll: called before each pass; may raise to stop.
    reply_len: room for a reply, by default `max_new_tokens`. The program is
      compiled for it, and serves any `max_new_tokens` that fits.
  """

  batch: int | None = None
  prompt_len: int | None = None
  poll: Callable[[], None] = lambda: None
  reply_len: int | None = None


def generate(
  gemma: lm.Gemma,
  params: lm.Params,
  prompts: Sequence[Sequence[int] | np.ndarray],
  sampling: Sampling,
  edits: Edits | Callable[[jax.Array], Edits] | None = None,
  passes: Passes | None = None,
) -> list[np.ndarray]:
  """Continues each prompt.

  Args:
    gemma, params: the model, on one device or sharded over a mesh (then its
      'data' axis must divide the batch).
    prompts: token ids, BOS included where it is wanted.
    sampling: how tokens are drawn.
    edits: {site: fn(x_BTD) -> x_BTD}, or a function that gives it for the
      tokens_BT that a pass reads, with which an edit can leave BOS alone.
    passes: how prompts are cut into passes.

  Returns:
    int32 [n] for each prompt, the stop token included; a row that does not
    end with one ran into `max_new_tokens`.

  Raises:
    ValueError: a prompt is empty, too long or not of this vocabulary.
  """
  passes = passes or Passes()
  streams = sampling.streams
  streams = range(len(prompts)) if streams is None else streams
  if len(streams) != len(prompts):
    raise ValueError(
      f'{len(prompts)} prompts and {len(streams)} streams: give one for each.'
    )
  if not len(prompts):
    return []
  rows = _rows(prompts)
  longest = max(map(len, rows))
  width = passes.prompt_len or -(-longest // _ROUND) * _ROUND
  _check(rows, width, gemma.config.vocab_size)
  batch = passes.batch or len(rows)
  room = max(passes.reply_len or 0, sampling.max_new_tokens)
  limits = room, min(sampling.top_k, gemma.config.vocab_size)
  replies = []
  for start in range(0, len(rows), batch):
    passes.poll()
    members = range(start, min(start + batch, len(rows)))
    filled = [*members, *[members[-1]] * (batch - len(members))]
    tokens_BP = np.full((batch, width), PAD, np.int32)
    for b, i in enumerate(filled):
      tokens_BP[b, width - len(rows[i]) :] = rows[i]
    draw = _Draw(
      np.asarray([streams[i] for i in filled], np.uint32),
      np.uint32(sampling.seed),
      np.float32(sampling.temperature),
      np.asarray(sampling.stop, np.int32).reshape(-1),
      np.append(np.int32(PAD), np.asarray(sampling.forbid, np.int32)),
      np.int32(sampling.max_new_tokens),
    )
    replies_BN = _sample(gemma, limits, params, _bound(edits), tokens_BP, draw)
    for row_N in np.asarray(replies_BN)[: len(members)]:
      replies.append(row_N[: np.count_nonzero(row_N != PAD)])
  return replies


def _rows(prompts) -> list[np.ndarray]:
  """Each prompt as int32; ValueError where one is no list of token ids."""
  rows = []
  for i, prompt in enumerate(prompts):
    row = np.asarray(prompt)
    integral = np.issubdtype(row.dtype, np.integer) or not row.size
    if isinstance(prompt, str) or row.ndim != 1 or not integral:
      raise ValueError(
        f'Prompt {i} must be a list of token ids, such as [2, 651]; found '
        f'{prompt!r:.60}.'
      )
    rows.append(row.astype(np.int32))
  return rows


def _check(rows: list[np.ndarray], width: int, vocab_size: int) -> None:
  for i, row in enumerate(rows):
    if not 1 <= len(row) <= width:
      raise ValueError(
        f'Prompt {i} has {len(row)} tokens; it must have 1 to {width}.'
      )
    if row.min() <= PAD or row.max() >= vocab_size:
      raise ValueError(
        f'Prompt {i} holds ids from {row.min()} to {row.max()}; the model '
        f'knows {PAD + 1} to {vocab_size - 1} (and {PAD}, padding).'
      )


def _bound(edits) -> Partial:
  """tokens_BT -> edits, as a pytree: functions static, bound arrays not."""
  if callable(edits):
    return edits if isinstance(edits, Partial) else Partial(edits)
  edit_functions = {
    site: fn if isinstance(fn, Partial) else Partial(fn)
    for site, fn in (edits or {}).items()
  }
  return Partial(_everywhere, edit_functions)


def _everywhere(edits, tokens_BT):
  del tokens_BT
  return edits


class _Draw(NamedTuple):
  """`Sampling` as the program's arguments."""

  streams_B: jax.Array
  seed: jax.Array
  temperature: jax.Array
  stop_K: jax.Array
  forbid_K: jax.Array
  most: jax.Array  # tokens of a reply


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(gemma, limits, params, edits, tokens_BP, draw: _Draw):
  """The whole generation -> int32 [B, room], padding after a row's stop."""
  room, top_k = limits
  batch, width = tokens_BP.shape
  slots_C = jnp.arange(width + room - 1)  # the last token is not read again
  first_B1 = jnp.sum(tokens_BP == PAD, -1, keepdims=True)  # a prompt's slot
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(draw.seed), draw.streams_B
  )

  def extend(cache, tokens_BT, start):
    slots_T = start + jnp.arange(tokens_BT.shape[1])
    mask_BTC = (slots_C[None, None, :] <= slots_T[None, :, None]) & (
      slots_C[None, None, :] >= first_B1[:, :, None]
    )
    positions_BT = jnp.maximum(slots_T[None, :] - first_B1, 0)
    return gemma.extend(
      params,
      cache,
      tokens_BT,
      positions_BT=positions_BT,
      mask_BTC=mask_BTC,
      edits=edits(tokens_BT),
    )

  def pick(logits_BV, n, stopped_B):
    logits_BV = logits_BV.at[:, draw.forbid_K].set(-jnp.inf)
    if top_k:
      least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
      logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    drawn_B = jax.vmap(jax.random.categorical)(
      jax.vmap(jax.random.fold_in, (0, None))(keys_B, n),
      logits_BV / jnp.maximum(draw.temperature, 1e-6),
    )
    likeliest_B = jnp.argmax(logits_BV, -1)
    token_B = jnp.where(draw.temperature > 0, drawn_B, likeliest_B)
    token_B = jnp.where(stopped_B, PAD, token_B).astype(jnp.int32)
    stops_B = jnp.any(token_B[:, None] == draw.stop_K[None, :], -1)
    return token_B, stopped_B | stops_B

  def unfinished(state):
    n, _, _, _, stopped_B = state
    return (n < draw.most) & ~jnp.all(stopped_B)

  def step(state):
    n, cache, token_B, replies_BN, stopped_B = state
    logits_BV, cache = extend(cache, token_B[:, None], width + n - 1)
    token_B, stopped_B = pick(logits_BV, n, stopped_B)
    return n + 1, cache, token_B, replies_BN.at[:, n].set(token_B), stopped_B

  with jax.named_scope('prefill'):
    cache = gemma.empty_cache(batch, len(slots_C))
    logits_BV, cache = extend(cache, tokens_BP, 0)
  token_B, stopped_B = pick(logits_BV, 0, jnp.zeros(batch, bool))
  replies_BN = jnp.full((batch, room), PAD, jnp.int32).at[:, 0].set(token_B)
  with jax.named_scope('decode'):
    state = (1, cache, token_B, replies_BN, stopped_B)
    return jax.lax.while_loop(unfinished, step, state)[3]
