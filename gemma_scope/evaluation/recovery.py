"""How many of the true features of synthetic activations an SAE recovers.

A feature has a direction d_i and a latent a decoder w_j, both concatenated over
the target sites of the SAE; c_ij is their cosine.

  mmcs          mean over features of max_j c_ij
  recovered     share of features with max_j c_ij > 0.9, and the share that a
                one-to-one assignment of latents to features can reach
  absorption    see below

Dead latents do not count as recovering anything. Only features that the SAE can
recover are scored: those present at one of its sites and one of its targets.

Absorption, as in SAEBench (arXiv 2503.09532): a parent feature is active
wherever its child is, and a latent for "child and parent" can keep the parent's
own latent silent. For a parent p and its child q:

  main       the latent with the largest cosine to d_p, and all above 0.9 (a
             parent may be split over several). The parent counts as found if
             the largest cosine is at least 0.7 and a main latent fires on at
             least half of the rows where p is active without its children. A
             pair whose parent was not found counts in `parents_found` alone.
  absorber   any other latent whose decoder has a cosine of at least 0.3 with
             the part of d_p orthogonal to d_q and with the part of d_q
             orthogonal to d_p. A pure latent for q is not an absorber.
  absorbed   a row where p and q are active and an absorber fires, but no main
             latent does.

`absorption` is the absorbed share of the rows where both are active, as a mean
over pairs. `missed_alone` is how often no main latent fires where p is active
alone; a weak detector would have this rate everywhere.

Controls come from `controls` and are scored by the same functions at the same
L0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import optimize

from gemma_scope import release, sae, sites
from gemma_scope.activations import harvest, synthetic
from gemma_scope.evaluation import controls

FOUND = 0.9  # cosine from which a feature counts as recovered
_MAIN = 0.7
_LEANS = 0.3
_LEAST = 10  # rows of each kind, so that a pair is scored
_ROWS = 4096  # rows scored at once

Params = Mapping[str, np.ndarray]
Rows = Mapping[sites.Site, np.ndarray]


def recovery(
  params: Params,
  truth: synthetic.Truth,
  rows: Rows,
  f_true_RG: np.ndarray,
  read: Sequence[sites.Site],
  write: Sequence[sites.Site],
) -> dict[str, Any]:
  """Scores released parameters against the true features; the result is JSON.

  Args:
    params: of one SAE, transcoder, crosscoder or cross-layer transcoder.
    truth: the true features.
    rows: held-out raw activations [R, D] of each site.
    f_true_RG: the true features' coefficients on these rows.
    read, write: the sites that the SAE reads and writes.

  Returns:
    'l0', 'fvu' (total over dimensions, mean over targets; noise limits it to
    about `noise_fvu`), 'dead' (share of latents that never fire here), 'mmcs',
    'mmcs_weighted' (by frequency), 'recovered', 'recovered_distinct',
    'features' (number scored), 'absorption', 'missed_alone', 'parents_found'
    (None if there are no pairs with enough rows) and 'pairs' (number of pairs
    in the mean of absorption).
  """
  several = np.ndim(params['W_enc']) == 3
  x = controls.beside(rows, read, several)
  y = controls.beside(rows, write, several)
  fires_RF, fvu = _forward(params, x, y)
  alive_F = fires_RF.any(0)
  d_GD, scored_G = _directions(truth, read, write)
  w_FD = _unit(np.reshape(params['W_dec'], (fires_RF.shape[1], -1)))
  c_GF = np.where(alive_F, d_GD @ w_FD.T, 0)
  best_G = c_GF.max(1)
  weight_G = truth.frequency_G * scored_G
  # The most features that can be matched to distinct latents, all above FOUND.
  hit = np.float64(c_GF[scored_G] > FOUND)
  distinct = hit[optimize.linear_sum_assignment(hit, maximize=True)].sum()
  noise = truth.settings.noise
  return {
    'l0': float(fires_RF.sum(1, dtype=np.int64).mean()),
    'fvu': fvu,
    'noise_fvu': noise / (1 + noise),
    'dead': float(1 - alive_F.mean()),
    'mmcs': float(best_G[scored_G].mean()),
    'mmcs_weighted': float(best_G @ weight_G / weight_G.sum()),
    'recovered': float((best_G[scored_G] > FOUND).mean()),
    'recovered_distinct': float(distinct / scored_G.sum()),
    'features': int(scored_G.sum()),
    **_absorption(fires_RF, f_true_RG > 0, (c_GF, d_GD, w_FD), scored_G, truth),
  }


def _forward(params, x, y) -> tuple[np.ndarray, float]:
  """Which latents fire [R, F of all layers], and FVU as a mean over targets."""

  @jax.jit
  def run(x):
    with jax.default_matmul_precision('highest'):
      f = sae.encode(params, x)
      return f > 0, sae.decode(params, f, x)

  fires, error = [], 0.0
  for start in range(0, len(x), _ROWS):
    rows = slice(start, start + _ROWS)
    active, y_hat = jax.device_get(run(x[rows]))
    fires.append(active.reshape(len(active), -1))
    error = error + np.sum((y[rows] - y_hat).astype(np.float64) ** 2, (0, -1))
  total = np.sum((y - y.mean(0, dtype=np.float64)) ** 2, (0, -1))
  return np.concatenate(fires), float(np.mean(error / total))


def _unit(w_FD: np.ndarray) -> np.ndarray:
  w_FD = np.asarray(w_FD, np.float64)
  norm_F1 = np.linalg.norm(w_FD, axis=1, keepdims=True)
  return w_FD / np.maximum(norm_F1, 1e-12)


def _directions(truth, read, write) -> tuple[np.ndarray, np.ndarray]:
  """Unit directions over all targets [G, L D], and which features to score."""
  d_GD = np.concatenate([truth.directions[site] for site in write], 1)
  at_inputs_GD = np.concatenate([truth.directions[site] for site in read], 1)
  scored_G = d_GD.any(1) & at_inputs_GD.any(1)
  if not scored_G.any():
    raise ValueError(
      f'No true feature is present both at {", ".join(map(str, read))} and at '
      f'{", ".join(map(str, write))}; choose sites of one layer, or later '
      'targets.'
    )
  return _unit(d_GD), scored_G


def _absorption(
  fires_RF, truly_RG, directions, scored_G, truth
) -> dict[str, Any]:
  """Absorption; `directions` are cosines, feature directions and decoders."""
  c_GF, d_GD, w_FD = directions
  pairs = [
    (parent, child)
    for child, parent in enumerate(truth.parent_G)
    if parent >= 0 and scored_G[child]
  ]
  enough, absorbed, missed = 0, [], {}
  for parent, child in pairs:
    siblings = truth.parent_G == parent
    alone_R = truly_RG[:, parent] & ~truly_RG[:, siblings].any(1)
    both_R = truly_RG[:, parent] & truly_RG[:, child]
    if min(alone_R.sum(), both_R.sum()) < _LEAST:
      continue
    enough += 1
    main_F = c_GF[parent] > FOUND
    main_F[np.argmax(c_GF[parent])] = True
    silent_R = ~fires_RF[:, main_F].any(1)
    missed_alone = float(silent_R[alone_R].mean())
    if missed_alone > 0.5 or c_GF[parent].max() < _MAIN:
      continue
    missed[int(parent)] = missed_alone
    cosine = float(d_GD[parent] @ d_GD[child])
    parts_2D = _unit(
      [d_GD[parent] - cosine * d_GD[child], d_GD[child] - cosine * d_GD[parent]]
    )
    leans_F = (parts_2D @ w_FD.T >= _LEANS).all(0) & ~main_F
    by_others_R = fires_RF[:, leans_F].any(1)
    absorbed.append(float((silent_R & by_others_R)[both_R].mean()))
  mean = lambda values: float(np.mean(list(values))) if values else None
  return {
    'absorption': mean(absorbed),
    'missed_alone': mean(missed.values()),
    'parents_found': len(absorbed) / enough if enough else None,
    'pairs': len(absorbed),
  }


HELD_OUT = 10**6  # a chunk beyond the end of any store


def score(
  saes: Sequence[release.Released],
  store: str | os.PathLike[str],
  poll: Callable[[], None] = lambda: None,
  report: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
  """Scores SAEs trained on a synthetic store, and controls.

  Args:
    saes: the SAEs to score.
    store: the folder that launch/synthetic.py wrote.
    poll: called often; may raise to stop.
    report: called with the number of SAEs done.

  Returns:
    For each name l0, fvu, dead and `recovery`; the same for each control in
    `controls`, and for the control with the least FVU in `control`. Controls
    are fitted on the store's first rows. Everything is scored on rows that are
    not in the store.
  """
  truth = synthetic.truth(store)
  layout = harvest.Layout.of(
    chunk_rows=2**14, seq_len=128, batch=1, lm_batch=1, dtype='float32'
  )
  source = synthetic.Source(truth.settings, layout)

  def rows_of(chunk):
    parts, _ = harvest.rows(source, chunk, poll)
    return {site: np.concatenate(x) for site, x in parts.items()}

  fitted_on, rows = rows_of(0), rows_of(HELD_OUT)
  f_RG = synthetic.latents(truth.settings, HELD_OUT, layout.rows)
  scores = {}
  for released in saes:
    poll()
    wiring = released.wiring

    def metrics(params, wiring=wiring):
      scored = recovery(params, truth, rows, f_RG, wiring.sites, wiring.targets)
      figures = {key: scored[key] for key in ('l0', 'fvu', 'dead')}
      return {**figures, 'recovery': scored}

    own = metrics(released.load())
    shape = controls.Shape(wiring, released.card['width'])
    (fitted,) = controls.fit(shape, [own['l0']], fitted_on)
    of_controls = {kind: metrics(make()) for kind, make in fitted.items()}
    scores[released.name] = {
      **own,
      'tokens': layout.rows,
      'control': min(of_controls.values(), key=lambda scored: scored['fvu']),
      'controls': of_controls,
    }
    report(len(scores))
  return scores
