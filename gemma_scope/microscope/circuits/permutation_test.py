"""What a search for causes finds where there are none: decoders shuffled.

  pi      a permutation of a layer's latents that fire on the index's text
  shuffle latent i keeps its values and its length, and writes along W_dec[pi i]
          a_Ti = f_Ti |W_dec[i]| / |W_dec[pi i]| W_dec[pi i] . dm/dy_T

The same search, the largest of |a|, and the exact effect of each latent found;
of each shuffle the largest effect is kept. If which latent writes where meant
nothing, the true arrangement would be one draw among these: in at most p of
such cases is its largest effect among the share p of the largest. Source: the
permutation test of a maximum (Westfall and Young 1993, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_scope.microscope.circuits import effects, intervene
from gemma_scope.microscope.circuits.intervene import Rows, Subject


def largest(
  subject: Subject,
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
  f_TF: np.ndarray,
  slopes: Sequence[np.ndarray],
  *,
  top: int,
  shuffles: int,
  seed: int = 0,
  by_token: bool = False,
) -> np.ndarray:
  """The largest exact effect of each shuffle, [shuffles], absolute.

  Args:
    subject, tokens_T: as in `attribute`; the logit is after the last token.
    logit: tokens (a, b).
    f_TF: the text's latents.
    slopes: dm/df [T, F] by each way to predict.
    top: latents, or latents at a token, measured by each way.
    shuffles: how many.
    seed: of the shuffles.
    by_token: a latent is searched, and taken out, at one token.
  """
  layer_F, norm_F = intervene.decoders(subject)
  alive_F = ((subject.max_F > 0) | (f_TF > 0).any(0)) & (norm_F > 0)
  active = np.flatnonzero((f_TF > 0).any(0) & alive_F)
  f_TA, chosen = f_TF[:, active], []
  for c in range(shuffles):
    rng, writer_F = np.random.default_rng((seed, c)), np.arange(len(norm_F))
    for layer in np.unique(layer_F):
      pool = np.flatnonzero(alive_F & (layer_F == layer))
      writer_F[pool] = rng.permutation(pool)
    writer_A = writer_F[active]
    gain_A = intervene.gains(norm_F, active, writer_A)
    picked = set()
    for slope_TF in slopes:
      a_TA = f_TA * slope_TF[:, writer_A] * gain_A
      if not by_token:
        a_TA = a_TA.sum(0, keepdims=True)
      order = np.argsort(-np.abs(a_TA), axis=None, kind='stable')[:top]
      picked |= set(zip(*np.unravel_index(order, a_TA.shape), strict=True))
    chosen += [
      (c, t, active[a], writer_A[a], gain_A[a]) for t, a in sorted(picked)
    ]
  if not chosen:
    return np.zeros(0)
  draw_B, at_B, feature_B, writer_B, gain_B = map(
    np.array, zip(*chosen, strict=True)
  )
  column = lambda a, kind: a.astype(kind)[:, None]
  rows = Rows(
    column(feature_B, np.int32),
    np.full((len(chosen), 1), intervene.KINDS.index('ablate'), np.int32),
    np.zeros((len(chosen), 1), np.float32),
    column(writer_B, np.int32),
    column(gain_B, np.float32),
  )
  tokens_1T = effects.padded([tokens_T])
  where_BT = np.ones((len(chosen), tokens_1T.shape[1]), bool)
  if by_token:
    where_BT = at_B[:, None] == np.arange(tokens_1T.shape[1])
  found = effects.effects(
    subject, tokens_1T, rows, logit=logit, where_BT=where_BT
  )
  change_B = (found.clean_logit_BT - found.logit_BT)[:, len(tokens_T) - 1]
  most_C = np.zeros(shuffles)
  np.maximum.at(most_C, draw_B, np.abs(change_B))
  return most_C


def p_value(effect: float, most_C: np.ndarray) -> float:
  """Share of shuffles, this arrangement among them, that have as much."""
  return float((1 + np.sum(most_C >= abs(effect))) / (1 + len(most_C)))
