"""How much of known features an SAE recovers, beside controls.

Features have directions d_i (over all the target sites of the SAE, one after
the other), latents have decoders w_j (the same); c_ij is their cosine.

  mmcs          mean over features of max_j c_ij
  recovered     share of features with max_j c_ij > 0.9, and the share that a
                one-to-one assignment of latents to features can reach
  absorption    below

Only latents that fire on the rows given count: a dead one has found nothing.
Only features count that the SAE could find: those read at one of its sites and
written at one of its targets.

Absorption, in the spirit of SAEBench (arXiv 2503.09532): where a child fires,
its parent does too, and a latent for "child and parent" lets the parent's own
latent fall silent. For a parent p and its child q:

  main       the latent of the largest cosine to d_p, and all above 0.9 (a
             parent may be split); one of them must fire on at least half of the
             rows where p fires and none of its children do, and the largest
             cosine must be 0.7 at least. Else p was not found, and the pair
             says nothing of absorption: it counts in `parents_found` only.
  absorber   a latent that is not main, whose decoder leans on both: cosines of
             0.3 at least with the part of d_p orthogonal to d_q and with the
             part of d_q orthogonal to d_p. A pure latent of q is none.
  absorbed   a row on which p and q fire, no main latent does, and an absorber
             does.

`absorption` is the mean over found pairs of the absorbed share of the rows on
which both fire. `missed_alone` is how often no main latent fires where p fires
alone: what the failure of a mere weak detector would be.

The controls are those of `controls`, scored by the same function at the same
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
_LEAST = 10  # rows of each kind that a pair needs
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
  """Scores released parameters against the truth; JSON-able.

  Args:
    params: of one SAE, transcoder, crosscoder or cross-layer transcoder.
    truth: the features.
    rows: raw activations [R, D] of the sites, which training has not seen.
    f_true_RG: the features' coefficients on the same rows.
    read, write: the member's sites and targets; for an SAE, the same.

  Returns:
    'l0', 'fvu' (total over dimensions, mean over targets; the best that the
    noise allows is near `noise_fvu`), 'dead' (share of latents that never fire
    here), 'mmcs', 'mmcs_weighted' (by frequency), 'recovered',
    'recovered_distinct', 'features' (how many are asked), and 'absorption',
    'missed_alone', 'parents_found' (None where the truth has no pairs, or none
    that says anything), 'pairs' (how many pairs absorption is the mean of).
  """
  several = np.ndim(params['W_enc']) == 3
  x = controls.beside(rows, read, several)
  y = controls.beside(rows, write, several)
  fires_RF, fvu = _forward(params, x, y)
  alive_F = fires_RF.any(0)
  d_GD, asked_G = _directions(truth, read, write)
  w_FD = _unit(np.reshape(params['W_dec'], (fires_RF.shape[1], -1)))
  c_GF = np.where(alive_F, d_GD @ w_FD.T, 0)
  best_G = c_GF.max(1)
  weight_G = truth.frequency_G * asked_G
  # The most features that distinct latents can have, each above FOUND.
  hit = np.float64(c_GF[asked_G] > FOUND)
  distinct = hit[optimize.linear_sum_assignment(hit, maximize=True)].sum()
  noise = truth.settings.noise
  return {
    'l0': float(fires_RF.sum(1, dtype=np.int64).mean()),
    'fvu': fvu,
    'noise_fvu': noise / (1 + noise),
    'dead': float(1 - alive_F.mean()),
    'mmcs': float(best_G[asked_G].mean()),
    'mmcs_weighted': float(best_G @ weight_G / weight_G.sum()),
    'recovered': float((best_G[asked_G] > FOUND).mean()),
    'recovered_distinct': float(distinct / asked_G.sum()),
    'features': int(asked_G.sum()),
    **_absorption(fires_RF, f_true_RG > 0, (c_GF, d_GD, w_FD), asked_G, truth),
  }


def _forward(params, x, y) -> tuple[np.ndarray, float]:
  """Which latents fire [R, all F], and FVU as a mean over targets."""

  @jax.jit
  def run(x):
    with jax.default_matmul_precision('highest'):
      f = sae.encode(params, x)
      return f > 0, sae.decode(params, f, x)

  fires, error = [], 0.0
  for start in range(0, len(x), _ROWS):
    part = slice(start, start + _ROWS)
    active, y_hat = jax.device_get(run(x[part]))
    fires.append(active.reshape(len(active), -1))
    error = error + np.sum((y[part] - y_hat).astype(np.float64) ** 2, (0, -1))
  total = np.sum((y - y.mean(0, dtype=np.float64)) ** 2, (0, -1))
  return np.concatenate(fires), float(np.mean(error / total))


def _unit(w_FD: np.ndarray) -> np.ndarray:
  w_FD = np.asarray(w_FD, np.float64)
  norm_F1 = np.linalg.norm(w_FD, axis=1, keepdims=True)
  return w_FD / np.maximum(norm_F1, 1e-12)


def _directions(truth, read, write) -> tuple[np.ndarray, np.ndarray]:
  """Unit directions over all targets [G, L D], and which features are asked."""
  d_GD = np.concatenate([truth.directions[site] for site in write], 1)
  at_inputs_GD = np.concatenate([truth.directions[site] for site in read], 1)
  asked_G = d_GD.any(1) & at_inputs_GD.any(1)
  if not asked_G.any():
    raise ValueError(
      'No feature is both read at '
      f'{", ".join(map(str, read))} and written at {", ".join(map(str, write))}'
      '; choose sites of one layer, or later targets.'
    )
  return _unit(d_GD), asked_G


def _absorption(
  fires_RF, truly_RG, directions, asked_G, truth
) -> dict[str, Any]:
  """See the module; `directions`: cosines, features, decoders."""
  c_GF, d_GD, w_FD = directions
  pairs = [
    (p, q) for q, p in enumerate(truth.parent_G) if p >= 0 and asked_G[q]
  ]
  enough, absorbed, missed = 0, [], {}
  for p, q in pairs:
    siblings = truth.parent_G == p
    alone_R = truly_RG[:, p] & ~truly_RG[:, siblings].any(1)
    both_R = truly_RG[:, p] & truly_RG[:, q]
    if min(alone_R.sum(), both_R.sum()) < _LEAST:
      continue
    enough += 1
    main_F = c_GF[p] > FOUND
    main_F[np.argmax(c_GF[p])] = True
    silent_R = ~fires_RF[:, main_F].any(1)
    missed_alone = float(silent_R[alone_R].mean())
    if missed_alone > 0.5 or c_GF[p].max() < _MAIN:
      continue
    missed[int(p)] = missed_alone
    c = float(d_GD[p] @ d_GD[q])
    parts_2D = _unit([d_GD[p] - c * d_GD[q], d_GD[q] - c * d_GD[p]])
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


HELD_OUT = 10**6  # a chunk that no store holds


def score(
  saes: Sequence[release.Released],
  store: str | os.PathLike[str],
  poll: Callable[[], None] = lambda: None,
  report: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
  """Metrics of SAEs trained on a synthetic store, with controls.

  Args:
    saes: what is scored.
    store: the folder that launch/synthetic.py wrote.
    poll: called often; may raise to stop.
    report: called with the number done.

  Returns:
    name -> l0, fvu, dead, `recovery` (all of it), and the same of each control
    in `controls`, of the one of least FVU as `control`. Controls are fitted on
    the store's first rows and, like the SAE, scored on rows that it lacks.
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
  for sae_given in saes:
    poll()
    wiring = sae_given.wiring
    at = wiring.sites, wiring.targets

    def metrics(params, at=at):
      found = recovery(params, truth, rows, f_RG, *at)
      figures = {key: found[key] for key in ('l0', 'fvu', 'dead')}
      return {**figures, 'recovery': found}

    own = metrics(sae_given.load())
    shape = controls.Shape(wiring, sae_given.card['width'])
    (made,) = controls.fit(shape, [own['l0']], fitted_on)
    beside = {kind: metrics(make()) for kind, make in made.items()}
    scores[sae_given.name] = {
      **own,
      'tokens': layout.rows,
      'control': min(beside.values(), key=lambda control: control['fvu']),
      'controls': beside,
    }
    report(len(scores))
  return scores
