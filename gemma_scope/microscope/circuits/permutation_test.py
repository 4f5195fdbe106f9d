"""Permutation test: the attribution search repeated with shuffled decoders.

  pi       a permutation of the latents of a layer that fire on the indexed text
  shuffle  latent i keeps its values and its norm but writes along W_dec[pi i]:
           a_Ti = f_Ti |W_dec[i]| / |W_dec[pi i]| W_dec[pi i] . dm/dy_T

In each shuffle, the search selects the latents with the largest |a| and
measures their exact effects; the largest effect is kept. Under the null
hypothesis that decoders are exchangeable among latents, the true assignment is
one more shuffle: with probability at most p, its largest effect is among the
top fraction p. Source: max-statistic permutation test (Westfall and Young 1993,
section 2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sites
from gemma_scope.microscope.circuits import effects, intervene
from gemma_scope.microscope.circuits.intervene import Rows, Subject


class Reading(NamedTuple):
  """A number read from the model: x[site, last token] . vector.

  Attributes:
    site: where it is read.
    vector_D: a direction there, such as a probe's or a feature's encoder.
  """

  site: sites.Site
  vector_D: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
  """The logit to attribute, and the text and SAE.

  Attributes:
    subject: the SAE in its model.
    tokens_T: ids, BOS first; the logit is read after the last.
    logit: tokens (a, b) of the logit difference; if b is None, logit a alone.
    reading: read instead of the logit.
  """

  subject: Subject
  tokens_T: tuple[int, ...]
  logit: tuple[int, int | None]
  reading: Reading | None = None

  @functools.cached_property
  def counts_1T(self) -> np.ndarray:
    """The tokens at which latents are changed, padding included."""
    tokens_1T = effects.padded([self.tokens_T])
    return intervene.counted(self.subject, tokens_1T)[0]


@dataclasses.dataclass(frozen=True)
class Shuffles:
  """Settings of the permutation test.

  Attributes:
    top: latents to measure in each shuffle, for each prediction.
    count: number of shuffles.
    seed: random seed of the shuffles.
    by_token: whether to search for, and ablate, latents at single tokens.
  """

  top: int
  count: int
  seed: int = 0
  by_token: bool = False


def exact(
  query: Query, rows: Rows, where_BT: np.ndarray | None = None
) -> np.ndarray:
  """How much the logit (or the reading) falls with each row of changes, [B]."""
  counts_1T = query.counts_1T
  if where_BT is None:
    where_BT = counts_1T
  else:
    where_BT = where_BT & counts_1T[:, : where_BT.shape[1]]
  if query.reading is not None:
    return _read_change(query, rows, where_BT)
  measured = effects.effects(
    query.subject,
    effects.padded([query.tokens_T]),
    rows,
    logit=query.logit,
    where_BT=where_BT,
  )
  last = len(query.tokens_T) - 1
  return (measured.clean_logit_BT - measured.logit_BT)[:, last]


def _read_change(query: Query, rows: Rows, where_BT: np.ndarray) -> np.ndarray:
  """How much the reading falls with each row of changes."""
  subject, reading = query.subject, query.reading
  tokens_1T = effects.padded([query.tokens_T])
  missing = tokens_1T.shape[1] - where_BT.shape[1]
  wide_BT = np.pad(where_BT, ((0, 0), (0, missing)))
  wide_BT = np.broadcast_to(wide_BT, (len(rows.feature_BK), wide_BT.shape[1]))
  static = subject.gemma, subject.place, reading.site, rows.projects
  params, end = (subject.lm_params, subject.params), len(query.tokens_T) - 1
  none_1T = np.zeros_like(wide_BT[:1])  # no token is changed
  readings = []
  for b in range(-1, len(wide_BT)):
    row_slice = slice(max(b, 0), max(b, 0) + 1)
    where_1T = none_1T if b < 0 else wide_BT[row_slice]
    row = Rows(*(array[row_slice] for array in rows))
    readings.append(
      _read(static, params, tokens_1T, row, where_1T, (end, reading.vector_D))
    )
  clean, *edited = map(float, readings)
  return clean - np.array(edited)


@functools.partial(jax.jit, static_argnums=0)
def _read(static, params, tokens_1T, row, where_1T, end):
  gemma, place, site, projects = static
  lm_params, sae_params = params
  position, vector_D = end
  edits = intervene.edits(place, sae_params, row, where_1T, projects)
  taps = gemma.forward(
    lm_params, tokens_1T, taps=(site,), edits=edits, logits=False
  ).taps
  return taps[site][0, position].astype(jnp.float32) @ vector_D


def largest(
  query: Query,
  f_TF: np.ndarray,
  slopes: Sequence[np.ndarray],
  control: Shuffles,
) -> np.ndarray:
  """The largest absolute exact effect in each shuffle, [count].

  Args:
    query: the logit to attribute.
    f_TF: latent values on the text.
    slopes: dm/df [T, F] for each prediction.
    control: settings of the test.
  """
  subject, shuffles = query.subject, control.count
  layer_F, norm_F = intervene.decoders(subject)
  alive_F = ((subject.max_F > 0) | (f_TF > 0).any(0)) & (norm_F > 0)
  active = np.flatnonzero((f_TF > 0).any(0) & alive_F)
  f_TA, chosen = f_TF[:, active], []
  for c in range(shuffles):
    rng, writer_F = (
      np.random.default_rng((control.seed, c)),
      np.arange(len(norm_F)),
    )
    for layer in np.unique(layer_F):
      pool = np.flatnonzero(alive_F & (layer_F == layer))
      writer_F[pool] = rng.permutation(pool)
    writer_A = writer_F[active]
    gain_A = intervene.gains(norm_F, active, writer_A)
    selected = set()
    for slope_TF in slopes:
      a_TA = f_TA * slope_TF[:, writer_A] * gain_A
      if not control.by_token:
        a_TA = a_TA.sum(0, keepdims=True)
      order = np.argsort(-np.abs(a_TA), axis=None, kind='stable')[: control.top]
      selected |= set(zip(*np.unravel_index(order, a_TA.shape), strict=True))
    chosen += [
      (c, t, active[a], writer_A[a], gain_A[a]) for t, a in sorted(selected)
    ]
  if not chosen:
    return np.zeros(0)
  draw_B, at_B, feature_B, writer_B, gain_B = map(
    np.array, zip(*chosen, strict=True)
  )
  column = lambda array, kind: array.astype(kind)[:, None]
  rows = Rows(
    column(feature_B, np.int32),
    np.full((len(chosen), 1), intervene.KINDS.index('ablate'), np.int32),
    np.zeros((len(chosen), 1), np.float32),
    column(writer_B, np.int32),
    column(gain_B, np.float32),
  )
  where_BT = None
  if control.by_token:
    where_BT = at_B[:, None] == np.arange(len(query.tokens_T))
  change_B = exact(query, rows, where_BT)
  most_C = np.zeros(shuffles)
  np.maximum.at(most_C, draw_B, np.abs(change_B))
  return most_C


def p_value(effect: float, most_C: np.ndarray) -> float:
  """Permutation p-value: fraction of shuffles with an effect as large.

  The true assignment counts as one of the shuffles.
  """
  return float((1 + np.sum(most_C >= abs(effect))) / (1 + len(most_C)))
