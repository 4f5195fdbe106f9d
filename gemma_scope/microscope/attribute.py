"""Why did it say that: a logit, or a difference of two, traced to latents.

  m = logit a - logit b, after one token of a text
  y_TD = sum_i f_Ti W_dec[i] + offset + error_TD        at each target

  gradient    a_Ti = f_Ti W_dec[i] . dm/dy_T
  integrated  the same with dm/dy averaged along y - (1 - s)(y - offset), s in
              (0, 1): latents and error add up to m less what it is without them
              (Sundararajan et al., arXiv 1703.01365; as in Marks et al., arXiv
              2403.19647, who also keep the error as a node)
  exact       m less what it is with the latent set to 0 at all tokens

The gradient is that of the whole model after the SAE: layers that follow, and
other targets among them, respond. Exact effects of the latents that are said to
matter, and of some that are not, stand beside what was predicted, with rank
correlation and slope.

A latent passes if its exact effect is beyond that of every as long vector along
another latent's decoder, and beyond that of every latent that the same search
finds in a random SAE with as many latents on. Where no more pass the first than
chance lets, one in `controls` + 1, none does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae, sites, splice
from gemma_scope.microscope import effects, intervene
from gemma_scope.microscope import rows as rows_lib
from gemma_scope.microscope.intervene import Change, Rows, Subject

_AT_ONCE = 8  # passes with a gradient


def attribute(
  subject: Subject,
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
  *,
  position: int | None = None,
  top: int = 10,
  others: int = 20,
  controls: int = 19,
  steps: int = 16,
  seed: int = 0,
  random_sae: bool = True,
) -> dict[str, Any]:
  """Latents behind a logit or a difference of two; plain for JSON.

  Args:
    subject: the SAE in its model.
    tokens_T: ids, BOS first.
    logit: tokens (a, b); b None: a's logit alone.
    position: of the token after which the logit is read; by default the last.
    top: latents that are measured, by each of the two predictions.
    others: latents that fire too, drawn from the rest, for the correlation.
    controls: as long vectors beside each.
    steps: of the integral.
    seed: of what is drawn.
    random_sae: whether the search is repeated in one.

  Returns:
    `value` (m); `without` (m without latents and error), `latents`, `error`,
    `other` (integrated: shares of value - without, `other` being what the
    integral misses); `exact_error` and `exact_latents`, measured with each of
    them removed at once; `features`, the measured ones, the largest exact
    effects first: `feature`, `gradient`, `integrated`, `exact`, `by_token` (of
    the gradient), `control` (the largest of its own), `beyond_control`,
    `passes`, `chosen` (False for the others); `agreement`, for each prediction
    `spearman` and `slope`; `random_sae`, the exact effects of its latents;
    `passing`, `chance` and `verdict`.

  Raises:
    ValueError: a token that is not of the vocabulary, a position outside.
  """
  tokens_T = [int(i) for i in tokens_T]
  position = len(tokens_T) - 1 if position is None else position
  check(subject, tokens_T, logit, position)
  found = _search(subject, tokens_T, logit, position, steps)
  order = [np.argsort(-np.abs(found[k]), kind='stable')[:top] for k in _WAYS]
  fires = found['fires']
  chosen = [
    i for i in dict.fromkeys(np.concatenate(order).tolist()) if fires[i]
  ]
  rng = np.random.default_rng(seed)
  rest = rng.permutation(np.setdiff1d(np.flatnonzero(fires), chosen))[:others]
  measured = [*chosen, *map(int, rest)]
  exact, control_CN = _exact(
    subject, tokens_T, logit, position, measured, len(chosen), controls, seed
  )
  twin = []
  if random_sae and chosen:
    twin = _random(subject, tokens_T, logit, position, top, steps, seed)
  features = []
  for n, i in enumerate(measured):
    mine = n < len(chosen)
    most = float(np.abs(control_CN[:, n]).max()) if mine and controls else None
    line = {
      'feature': i,
      **{way: float(found[way][i]) for way in _WAYS},
      'exact': float(exact[n]),
      'by_token': found['by_token'][i].tolist(),
      'control': most,
      'beyond_control': most is not None and bool(abs(exact[n]) > most),
      'chosen': mine,
    }
    bar = max(map(abs, twin), default=0.0)
    line['passes'] = line['beyond_control'] and bool(abs(exact[n]) > bar)
    features.append(line)
  beyond = sum(line['beyond_control'] for line in features)
  chance = by_chance(len(chosen), controls)
  if beyond <= chance:
    for line in features:
      line['passes'] = False
  passing = [line['feature'] for line in features if line['passes']]
  features.sort(key=lambda line: (not line['chosen'], -abs(line['exact'])))
  return {
    **{key: found[key] for key in _FACTS},
    'features': features,
    'agreement': {way: agreement(features, way) for way in _WAYS},
    'random_sae': twin,
    'passing': passing,
    'beyond_control': beyond,
    'chance': chance,
    'verdict': _verdict(len(chosen), beyond, chance, passing, twin),
  }


_WAYS = ('gradient', 'integrated')
_FACTS = (
  'value', 'without', 'latents', 'error', 'other', 'exact_latents',
  'exact_error',
)  # fmt: skip


def _largest(found, top: int) -> list[int]:
  """Latents that fire, the `top` of each prediction."""
  order = [np.argsort(-np.abs(found[k]), kind='stable')[:top] for k in _WAYS]
  both = dict.fromkeys(np.concatenate(order).tolist())
  return [i for i in both if found['fires'][i]]


def check(subject, tokens_T, logit, position) -> None:
  """ValueError for a token or a position that is not there."""
  size = subject.gemma.config.vocab_size
  for token in [*tokens_T, *(t for t in logit if t is not None)]:
    if not 0 <= token < size:
      raise ValueError(f'There is no token {token}; the model has {size:,}.')
  if not 0 <= position < len(tokens_T):
    raise ValueError(
      f'There is no position {position} in a text of {len(tokens_T)} tokens.'
    )


def _verdict(count, beyond, chance, passing, twin) -> str:
  if not count:
    return 'No latent fires on this text.'
  said = f'{beyond} of {count} latents have more effect than as long vectors'
  if beyond <= chance:
    return f'No feature passes: {said}, and chance alone lets {chance}.'
  if not passing:
    return (
      f'No feature passes: {said}, but none more than the latents of a random '
      'SAE that the same search finds.'
    )
  also = " and than a random SAE's" if twin else ''
  return f'{said}; {len(passing)} of them more than these{also}.'


def by_chance(count: int, controls: int) -> int:
  """As many latents are beyond all their controls in 95 % of chance's draws."""
  from scipy import stats  # slow to import

  return int(stats.binom.ppf(0.95, count, 1 / (controls + 1))) if count else 0


def agreement(features: Sequence[dict], way: str) -> dict[str, float | None]:
  """Rank correlation of a prediction with the exact effects, and the slope.

  slope is that of exact on predicted through zero: 1 where they agree.
  """
  from scipy import stats

  predicted, exact = (
    np.array([line[key] for line in features]) for key in (way, 'exact')
  )
  square = float(predicted @ predicted)
  if len(features) < 3 or not square or not np.ptp(exact):
    return {'spearman': None, 'slope': None}
  return {
    'spearman': float(stats.spearmanr(predicted, exact).statistic),
    'slope': float(predicted @ exact / square),
  }


# Predictions.


def _search(subject, tokens_T, logit, position, steps) -> dict[str, Any]:
  """Both predictions of all latents, summed over tokens."""
  tokens_1T = effects.padded([tokens_T])
  keep_T = ~np.isin(tokens_1T[0], subject.special)
  parts = _parts(
    subject.gemma, subject.lm_params, subject.params, subject.place, tokens_1T,
    keep_T,
  )  # fmt: skip
  # Along the path; then y, the offset, and y without error or without latents.
  path = tuple(map(np.asarray, parts['path']))
  error = tuple(map(np.asarray, parts['error']))
  s_S = (np.arange(steps) + 0.5) / steps
  shifts = [
    np.stack([*(-(1 - s_S)[:, None, None] * p), 0 * p, -p, -e, e - p])
    for p, e in zip(path, error, strict=True)
  ]
  values, slopes = [], []
  for start in range(0, steps + 4, _AT_ONCE):
    at = np.arange(start, min(start + _AT_ONCE, steps + 4))
    value_S, slope = _slopes(
      subject.gemma, subject.lm_params, subject.place.targets, tokens_1T,
      tuple(a[np.resize(at, _AT_ONCE)] for a in shifts), position, logit[0],
      -1 if logit[1] is None else logit[1],
    )  # fmt: skip
    values.append(np.asarray(value_S)[: len(at)])
    slopes.append([np.asarray(g)[: len(at)] for g in slope])
  value_S = np.concatenate(values)
  slope = [np.concatenate(column) for column in zip(*slopes, strict=True)]
  at_y = tuple(g[steps] for g in slope)
  along = tuple(g[:steps].mean(0) for g in slope)
  per = subject.params['W_dec'], parts['f'], parts['error']
  gradient_TF, _ = _contracted(*per, at_y)
  integrated_TF, missed = _contracted(*per, along)
  length = len(tokens_T)
  latents, missed = float(np.sum(integrated_TF)), float(missed)
  value, without, no_error, no_latents = map(float, value_S[steps:])
  return {
    'gradient': np.asarray(gradient_TF).sum(0),
    'integrated': np.asarray(integrated_TF).sum(0),
    'by_token': np.asarray(gradient_TF)[:length].T,
    'fires': np.asarray(parts['f'] > 0).any(0),
    'value': value,
    'without': without,
    'latents': latents,
    'error': missed,
    'other': value - without - latents - missed,
    'exact_latents': value - no_latents,
    'exact_error': value - no_error,
  }


@functools.partial(jax.jit, static_argnames=('gemma', 'place'))
def _parts(gemma, lm_params, params, place, tokens_1T, keep_T):
  """f [T, F]; at each target the error and y - offset, 0 at special tokens."""
  at = tuple(sorted({*place.sites, *place.targets}))
  taps = gemma.forward(lm_params, tokens_1T, taps=at, logits=False).taps
  x, y = (
    splice.stacked([taps[s] for s in where], place.several)[0]
    for where in (place.sites, place.targets)
  )
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
    error = y - sae.decode(params, f, x)
    path = y - sae.decode(params, jnp.zeros_like(f), x)
  kept = lambda a: jnp.where(keep_T.reshape(-1, *[1] * (a.ndim - 1)), a, 0)
  several = lambda a: jnp.moveaxis(a, -2, 0) if place.several else a[None]
  return {
    'f': kept(f).reshape(len(f), -1),
    'error': tuple(several(kept(error))),
    'path': tuple(several(kept(path))),
  }


@functools.partial(jax.jit, static_argnames=('gemma', 'targets'))
def _slopes(
  gemma, lm_params, targets: tuple[sites.Site, ...], tokens_1T, shifts,
  position, plus, minus,
):  # fmt: skip
  """m and its gradient at each target, at y + shift [S, T, D]."""
  tokens_ST = jnp.broadcast_to(tokens_1T, (len(shifts[0]), tokens_1T.shape[1]))
  at = splice.last(gemma)

  def total(shifts):
    edits = {
      site: functools.partial(jnp.add, shift)
      for site, shift in zip(targets, shifts, strict=True)
    }
    x_STD = gemma.forward(
      lm_params, tokens_ST, taps=(at,), edits=edits, logits=False
    ).taps[at]
    logits_SV = gemma.unembed(lm_params, x_STD[:, position][:, None])[:, 0]
    m_S = logits_SV[:, plus] - jnp.where(minus < 0, 0, logits_SV[:, minus])
    return jnp.sum(m_S), m_S

  (_, m_S), slope = jax.value_and_grad(total, has_aux=True)(shifts)
  return m_S, slope


@jax.jit
def _contracted(W_dec, f_TF, error, slope):
  """What each latent writes, and the error, times the slopes."""
  with jax.default_matmul_precision('highest'):
    if W_dec.ndim == 4:  # [L, F, M, D]
      a_TF = sum(
        jnp.einsum('td,lfd->tlf', g_TD, W_dec[:, :, m]).reshape(f_TF.shape)
        for m, g_TD in enumerate(slope)
      )
    else:
      a_TF = slope[0] @ W_dec.T
    missed = sum(
      jnp.sum(e_TD * g_TD) for e_TD, g_TD in zip(error, slope, strict=True)
    )
    return a_TF * f_TF, missed


# Measurements.


def _exact(
  subject, tokens_T, logit, position, features, chosen, controls, seed
):
  """Exact effects of ablations [N], and of the controls of the first [C, N]."""
  if not features:
    return np.zeros(0), np.zeros((controls, 0))
  own = intervene.rows(subject, [[Change(i)] for i in features])
  first = Rows(*(array[:chosen] for array in own))
  every = [own]
  every += [
    intervene.control(subject, first, seed + c) for c in range(controls)
  ]
  found = effects.effects(
    subject, effects.padded([tokens_T]),
    Rows(*map(np.concatenate, zip(*every, strict=True))), logit=logit,
  )  # fmt: skip
  change_B = (found.clean_logit_BT - found.logit_BT)[:, position]
  exact_N, rest = change_B[: len(features)], change_B[len(features) :]
  return exact_N, rest.reshape(controls, chosen)


def _random(subject, tokens_T, logit, position, top, steps, seed):
  """Exact effects of the latents that the same search finds in a random SAE."""
  twin = random_subject(subject, [tokens_T], seed)
  found = _search(twin, tokens_T, logit, position, steps)
  chosen = _largest(found, top)
  exact, _ = _exact(twin, tokens_T, logit, position, chosen, 0, 0, seed)
  return sorted(map(float, exact), key=lambda v: -abs(v))


def random_subject(
  subject: Subject, texts: Sequence[Sequence[int]], seed: int = 0
) -> Subject:
  """A random SAE of this shape with the same L0 on these texts (`controls`)."""
  tokens_PT = effects.padded(texts)
  keep_PT = ~np.isin(tokens_PT, subject.special)
  x_by_site = rows_lib.activations(
    subject.gemma, subject.lm_params, tokens_PT, subject.place, len(tokens_PT)
  )
  params = {key: np.asarray(a) for key, a in subject.params.items()}
  made = rows_lib.control(x_by_site, keep_PT, subject.place, params, seed)
  f_BF = rows_lib.latents(
    made, rows_lib.read_at(x_by_site, subject.place, keep_PT)
  )
  return Subject(
    subject.gemma, subject.lm_params, made, subject.place, f_BF.max(0),
    subject.special,
  )  # fmt: skip


def report(found: dict[str, Any], named=lambda feature: '') -> str:
  """`attribute`'s result as lines of text.

  Args:
    named: feature -> its label, or ''.
  """
  whole = found['value'] - found['without']
  # Of parts that cancel, shares say nothing.
  clear = abs(whole) > (abs(found['latents']) + abs(found['error'])) / 10
  share = lambda v: f'{v:.3f} ({v / whole:.0%})' if clear else f'{v:.3f}'
  lines = [
    f'value {found["value"]:.3f}, without latents and error '
    f'{found["without"]:.3f}',
    f'integrated: latents {share(found["latents"])}, error '
    f'{share(found["error"])}, missed {share(found["other"])}',
    f'removed at once: latents {found["exact_latents"]:.3f}, error '
    f'{found["exact_error"]:.3f}',
    f'{"feature":>8} {"gradient":>9} {"integrated":>10} {"exact":>8} '
    f'{"control":>8}',
  ]
  for line in found['features']:
    if line['chosen']:
      lines.append(
        f'{line["feature"]:>8} {line["gradient"]:>9.3f} '
        f'{line["integrated"]:>10.3f} {line["exact"]:>8.3f} '
        f'{line["control"] or 0:>8.3f} {"passes" if line["passes"] else "":6} '
        f'{named(line["feature"])}'.rstrip()
      )
  for way, one in found['agreement'].items():
    if one['slope'] is not None:
      lines.append(
        f'{way} against exact, {len(found["features"])} latents: rank '
        f'correlation {one["spearman"]:.2f}, slope {one["slope"]:.2f}'
      )
  if found['random_sae']:
    most = ', '.join(f'{abs(v):.3f}' for v in found['random_sae'][:3])
    lines.append(f'a random SAE: its latents have at most {most}')
  return '\n'.join([*lines, found['verdict']])
