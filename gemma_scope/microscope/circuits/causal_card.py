"""The causal card: the exact effect of every feature of an SAE, with controls.

  ablate  y' = y - f W_dec[i]           at examples of the feature, f its value
  add     y' = y + mean_F[i] W_dec[i]   at tokens where the feature is silent

Each edit is of one token; the model is run from the SAE's layer up, and S
tokens from the edited one on are scored (`packed_edits`):

  KL(before || after), change in loss    over the whole vocabulary
  KL among the K tokens likeliest before the edit     compared with controls
  change in logits at the edited token   the tokens that are promoted most, and
    z = (mean over the tokens that the logit lens says it raises - mean over
         those it lowers) / standard deviation over the vocabulary

Controls are edits of the same norm at the same token (`card_plan`). Controls of
z are other features' lists of tokens. `card_statistics` makes p-values of them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope.microscope.circuits import packed_edits
from gemma_scope.microscope.circuits.card_plan import (
  EDITS,
  Edit,
  Plan,
  Settings,
)
from gemma_scope.microscope.circuits.intervene import Subject

CONTROLS = ('shuffled', 'random')
PROMOTED = 10  # tokens kept in each context
_PASS = 192  # edits and controls in one pass
_SMALLEST = 24  # in the smallest pass
_HEADS = 8  # contexts whose logits are in memory at once


class Measured:
  """What was measured; nan in contexts that do not exist (yet).

  Args:
    width: F, features of the SAE.
    settings: what is measured.

  Attributes:
    arrays: by name, with axes E edits, F features, C contexts:
      kl, loss: over the whole vocabulary [E, F, C].
      among, shuffled, random: KL among the likeliest tokens, of the feature
        and its M controls [E, F, C] and [E, F, C, M].
      lens: z of its own list and of other features' [E, F, C, 1 + lists].
      promoted, promoted_value: tokens and changes of their logits
        [E, F, C, PROMOTED]; for ablations those whose logits fall most.
  """

  def __init__(self, width: int, settings: Settings):
    shape = len(EDITS), width, settings.contexts
    empty = lambda *axes: np.full((*shape, *axes), np.nan, np.float32)
    self.arrays = {
      'kl': empty(),
      'loss': empty(),
      'among': empty(),
      'shuffled': empty(settings.controls),
      'random': empty(settings.controls),
      'lens': empty(1 + settings.lists),
      'promoted': np.full((*shape, PROMOTED), -1, np.int32),
      'promoted_value': empty(PROMOTED),
    }

  def put(self, edit: Edit, values: Mapping[str, Any]) -> None:
    """Stores the effect of one edit."""
    for name, value in values.items():
      self.arrays[name][edit.kind, edit.feature, edit.slot] = value


def measure(
  subject: Subject, plan: Plan, measured: Measured, done: int = 0
) -> Iterator[int]:
  """Measures the edits, sequence after sequence, into `measured`.

  Args:
    subject, plan: the SAE, and its edits.
    measured: where the results go.
    done: number of sequences that were measured before.

  Yields:
    The number of sequences that are done, after each of them.
  """
  for number, sequence in enumerate(sorted(plan.by_sequence)):
    if number < done:
      continue
    below_TD = _below(subject, plan, sequence)
    for edits in _parts(plan, sequence):
      _measure_part(subject, plan, measured, sequence, edits, below_TD)
    yield number + 1


def _below(subject: Subject, plan: Plan, sequence: int) -> jax.Array:
  tokens_T = jnp.asarray(plan.index.sequences_NT[sequence])
  target = subject.place.targets[0]
  return packed_edits.below(subject.gemma, subject.lm_params, tokens_T, target)


def _parts(plan: Plan, sequence: int) -> list[list[Edit]]:
  """The edits of a sequence, as many at once as fit into a pass."""
  edits_per_pass = max(_PASS // (1 + 2 * plan.settings.controls), 1)
  edits = plan.by_sequence[sequence]
  return [
    edits[i : i + edits_per_pass] for i in range(0, len(edits), edits_per_pass)
  ]


def estimate(subject: Subject, plan: Plan) -> float:
  """Seconds that `measure` takes, from a full and a short pass."""
  scratch = Measured(subject.width, plan.settings)
  sequences = sorted(plan.by_sequence)
  fullest = max(sequences, key=lambda n: len(plan.by_sequence[n]))
  edits_of_pass = _parts(plan, fullest)[0]

  def seconds(edits: list[Edit]) -> float:
    for _ in range(2):  # the first one compiles
      began = time.perf_counter()
      below_TD = jax.block_until_ready(_below(subject, plan, fullest))
      _measure_part(subject, plan, scratch, fullest, edits, below_TD)
    return time.perf_counter() - began

  full_s, short_s = seconds(edits_of_pass), seconds(edits_of_pass[:1])
  slope = max(full_s - short_s, 0) / max(len(edits_of_pass) - 1, 1)
  sizes = [len(edits) for n in sequences for edits in _parts(plan, n)]
  return sum(short_s + slope * (size - 1) for size in sizes)


def _measure_part(subject, plan, measured, sequence, edits, below_TD) -> None:
  """Measures a few edits of one sequence, with their controls."""
  settings, gemma = plan.settings, subject.gemma
  tokens_T = plan.index.sequences_NT[sequence]
  change_EWD = np.stack(
    [edit.amount * plan.directions(edit.feature) for edit in edits]
  )
  position_E = np.array([edit.position for edit in edits], np.int32)
  ways = change_EWD.shape[1]
  rows = _SMALLEST  # few sizes, so that few programs are compiled
  while rows < len(edits) * ways:
    rows *= 2
  streams = packed_edits.run(
    gemma,
    subject.lm_params,
    subject.place.targets[0],
    below_TD,
    _filled(np.repeat(position_E, ways), rows),
    _filled(change_EWD.reshape(-1, change_EWD.shape[-1]), rows),
    settings.scored,
  )
  # On the host: a slice on the device is compiled for every number of edits.
  before_RSD, after_RSD = jax.device_get(streams)
  after_EWSD = after_RSD[: len(edits) * ways].reshape(
    len(edits), ways, *after_RSD.shape[1:]
  )
  _, first_U, own_E = np.unique(
    position_E, return_index=True, return_inverse=True
  )
  before_USD = before_RSD[first_U * ways]
  clean_USV = _clean(gemma, subject.lm_params, before_USD)
  wide = _whole_vocabulary(
    subject, plan, edits, tokens_T, (clean_USV, own_E, after_EWSD[:, 0])
  )
  count = min(settings.likeliest, gemma.config.vocab_size)
  chosen_USK = [_likeliest(clean_SV, count) for clean_SV in clean_USV]
  for e, edit in enumerate(edits):
    clean_SV, chosen_SK = clean_USV[own_E[e]], chosen_USK[own_E[e]]
    kl_WS = _among(
      gemma,
      subject.lm_params,
      after_EWSD[e],
      np.take_along_axis(clean_SV, chosen_SK, 1),
      chosen_SK,
    )
    inside_S = edit.position + np.arange(settings.scored) < len(tokens_T)
    kl_W = np.asarray(kl_WS)[:, inside_S].mean(1)
    controls = 1 + settings.controls
    among = {
      'among': kl_W[0],
      'shuffled': kl_W[1:controls],
      'random': kl_W[controls:],
    }
    measured.put(edit, {**wide[e], **among})


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
  """The array, padded with zeros to so many rows."""
  return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def _chunks(count: int) -> Iterator[np.ndarray]:
  """Indices below `count`, in chunks of one size; the last one repeats."""
  for start in range(0, count, _HEADS):
    yield np.minimum(np.arange(start, start + _HEADS), count - 1)


def _clean(gemma, lm_params, before_USD) -> np.ndarray:
  """Logits without edits, [U, S, V]."""
  batches = [
    np.asarray(_logits(gemma, lm_params, before_USD[chunk]))
    for chunk in _chunks(len(before_USD))
  ]
  return np.concatenate(batches)[: len(before_USD)]


@functools.partial(jax.jit, static_argnames='gemma')
def _logits(gemma, lm_params, x_USD):
  return gemma.unembed(lm_params, x_USD)


def _likeliest(clean_SV: np.ndarray, count: int) -> np.ndarray:
  """The `count` likeliest tokens at each position, in no order."""
  if count == clean_SV.shape[1]:
    return np.broadcast_to(np.arange(count), clean_SV.shape)
  return np.argpartition(-clean_SV, count - 1, 1)[:, :count]


def _whole_vocabulary(
  subject: Subject, plan: Plan, edits, tokens_T, streams
) -> list[dict[str, Any]]:
  """KL, loss, z and promoted tokens of each edit.

  Args:
    streams: clean logits [U, S, V], which of them belongs to each edit [E], and
      the edited residual stream [E, S, D].
  """
  clean_USV, own_E, after_ESD = streams
  scored = plan.settings.scored
  ahead_ES = np.array([edit.position for edit in edits])[:, None]
  ahead_ES = ahead_ES + np.arange(scored)
  next_ES = np.append(tokens_T, -1)[np.minimum(ahead_ES + 1, len(tokens_T))]
  inside_ES = ahead_ES < len(tokens_T)
  lists = [plan.lists(edit.feature) for edit in edits]
  lens = lists[0] is not None
  lists_EQ2L = np.stack(lists) if lens else np.zeros((len(edits), 1, 2, 1), int)
  falls_E = np.array([edit.amount < 0 for edit in edits])
  results = []
  for chunk in _chunks(len(edits)):
    measured = _wide(
      subject.gemma,
      subject.lm_params,
      clean_USV[own_E[chunk]],
      after_ESD[chunk],
      np.maximum(next_ES[chunk], 0),
      lists_EQ2L[chunk],
      np.where(falls_E[chunk], -1.0, 1.0),
    )
    kl_ES, loss_ES, z_EQ, token_EK, value_EK = map(np.asarray, measured)
    for k, e in enumerate(chunk[: len(edits) - chunk[0]]):
      losses = loss_ES[k][next_ES[e] >= 0]
      results.append(
        {
          'kl': kl_ES[k][inside_ES[e]].mean(),
          'loss': losses.mean() if len(losses) else np.nan,
          'lens': z_EQ[k] if lens else np.nan,
          'promoted': token_EK[k],
          'promoted_value': value_EK[k],
        }
      )
  return results


@functools.partial(jax.jit, static_argnames='gemma')
def _wide(gemma, lm_params, clean_ESV, after_ESD, next_ES, lists_EQ2L, sign_E):
  """KL, change in loss, z, and the tokens that change most, of each edit."""
  logits_ESV = gemma.unembed(lm_params, after_ESD)
  logp_ESV, logq_ESV = map(jax.nn.log_softmax, (clean_ESV, logits_ESV))
  next_logp = lambda logp: jnp.take_along_axis(logp, next_ES[..., None], -1)[
    ..., 0
  ]
  change_EV = (logits_ESV[:, 0] - clean_ESV[:, 0]) * sign_E[:, None]
  by_list_EQ2 = jax.vmap(lambda change_V, lists: change_V[lists].mean(-1))(
    change_EV, lists_EQ2L
  )
  spread_E1 = jnp.maximum(jnp.std(change_EV, -1, keepdims=True), 1e-12)
  z_EQ = (by_list_EQ2[..., 0] - by_list_EQ2[..., 1]) / spread_E1
  value_EK, token_EK = jax.lax.top_k(change_EV, PROMOTED)
  loss_ES = next_logp(logp_ESV) - next_logp(logq_ESV)
  return _kl(logp_ESV, logq_ESV), loss_ES, z_EQ, token_EK, value_EK


def _kl(logp, logq):
  """KL(p || q). All terms are positive: small divergences keep their digits."""
  ratio = logq - logp
  return jnp.sum(jnp.exp(logp) * (jnp.expm1(ratio) - ratio), -1)


@functools.partial(jax.jit, static_argnames='gemma')
def _among(gemma, lm_params, after_WSD, clean_SK, chosen_SK):
  """KL among the chosen tokens of each position, [W, S]."""
  logits_SWK = jax.vmap(
    lambda x_WD, tokens_K: gemma.unembed(lm_params, x_WD, tokens_K),
    in_axes=(1, 0),
  )(after_WSD, chosen_SK)
  logp_S1K = jax.nn.log_softmax(clean_SK)[:, None]
  return _kl(logp_S1K, jax.nn.log_softmax(logits_SWK)).T
