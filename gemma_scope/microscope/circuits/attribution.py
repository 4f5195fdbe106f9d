"""Attribution of a logit, or of a logit difference, to latents.

  m = logit a - logit b, after one token of a text
  y_TD = sum_i f_Ti W_dec[i] + offset + error_TD        at each target

  gradient    a_Ti = f_Ti W_dec[i] . dm/dy_T
  integrated  the same with dm/dy averaged along y - (1 - s)(y - offset), s in
              (0, 1): latents and error add up to m - (m without both)
              (Sundararajan et al., arXiv 1703.01365; as in Marks et al., arXiv
              2403.19647, who also keep the error as a node)
  exact       m - (m with the latent set to 0 at all tokens)

The gradient runs through the whole model after the SAE, including later layers
that the SAE also writes to. The latents with the largest predictions, and some
others, are then ablated; rank correlation and slope compare the predictions
with the exact effects. For a crosscoder of the residual stream, only a latent's
decoder of its own layer counts, and the error is left out (`intervene`).

The latents shown are the largest of many, so the control is a search of the
same size (`permutation_test`): decoders are shuffled among the latents at equal
norm, the search is repeated and the latents it finds are ablated. A latent
passes if at most 5 % of the shuffles contain an effect as large. If latents
meant nothing, one text in twenty would still show a latent that passes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import (
  budget,
  effects,
  intervene,
  permutation_test,
)
from gemma_scope.microscope.circuits.intervene import Change, Rows, Subject
from gemma_scope.runtime import progress
from gemma_scope.sae import released

_AT_ONCE = 8  # maximum number of rows in a pass with a gradient
LEVEL = 0.05
_WAYS = ('gradient', 'integrated')
_FACTS = 'value without latents error other exact_latents exact_error'


@dataclasses.dataclass(frozen=True)
class Search:
  """How many latents to ablate and how many shuffles to test against.

  Attributes:
    top: latents to ablate for each of the two predictions.
    others: random other latents that fire, ablated for the correlation.
    shuffles: shuffles of the decoders; with fewer than 19 no latent can pass.
    steps: integration steps.
    seed: random seed of the shuffles and of the other latents.
  """

  top: int = 10
  others: int = 20
  shuffles: int = 19
  steps: int = 16
  seed: int = 0


def attribute(
  subject: Subject,
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
  position: int | None = None,
  settings: Search | None = None,
) -> dict[str, Any]:
  """Attributes a logit, or a logit difference, to latents.

  Args:
    subject: the SAE in its model.
    tokens_T: ids, BOS first.
    logit: tokens (a, b) of the logit difference; if b is None, logit a alone.
    position: the token after which the logit is read; by default the last.
    settings: how many latents and shuffles.

  Returns:
    A dictionary for JSON: `value` (m) and `without` (m without latents and
    error); `latents`, `error` and `other`, the integrated parts of value -
    without (`other` is the integration error); `exact_latents` and
    `exact_error`, the effects of removing all latents or the error; `features`,
    the latents that were ablated, the largest exact effects first, with
    `feature`, `gradient`, `integrated`, `exact`, `by_token` (gradient at each
    token), `control` (the largest effect of the same values along other
    decoders), `p`, `passes` and `chosen` (False for random others);
    `agreement`, with `spearman` and `slope` of each prediction; `shuffled`, the
    largest effect of each shuffle; `passing` and `verdict`.

  Raises:
    ValueError: a token is not in the vocabulary, the position is outside the
      text, or there is no other latent to shuffle with.
  """
  position = len(tokens_T) - 1 if position is None else position
  check(subject, tokens_T, logit, position)
  tokens_T = [int(i) for i in tokens_T[: position + 1]]
  settings = settings or Search()
  predicted = search(subject, tokens_T, logit, settings.steps)
  fires = np.flatnonzero(predicted['fires'])
  chosen = _largest(predicted, settings.top)
  rng = np.random.default_rng(settings.seed)
  others = rng.permutation(np.setdiff1d(fires, chosen))[: settings.others]
  measured = [*chosen, *map(int, others)]
  query = permutation_test.Query(subject, tuple(tokens_T), logit)
  exact, control_CN = _exact(query, measured, len(chosen), settings)
  shuffled = np.zeros(0)
  if chosen:
    slopes = [predicted['slope'][way] for way in _WAYS]
    shuffles = permutation_test.Shuffles(
      settings.top, settings.shuffles, settings.seed
    )
    shuffled = permutation_test.largest(query, predicted['f'], slopes, shuffles)
  features = []
  for n, i in enumerate(measured):
    selected = n < len(chosen)
    p_value = permutation_test.p_value(exact[n], shuffled) if selected else None
    line = {
      'feature': i,
      **{way: float(predicted[way][i]) for way in _WAYS},
      'exact': float(exact[n]),
      'by_token': predicted['by_token'][i].tolist(),
      'control': float(np.abs(control_CN[:, n]).max()) if selected else None,
      'p': p_value,
      'passes': selected and p_value <= LEVEL,
      'chosen': selected,
    }
    features.append(line)
  passing = [line['feature'] for line in features if line['passes']]
  features.sort(key=lambda line: (not line['chosen'], -abs(line['exact'])))
  return {
    **{key: predicted[key] for key in _FACTS.split()},
    'features': features,
    'agreement': {way: agreement(features, way) for way in _WAYS},
    'shuffled': sorted(map(float, shuffled), reverse=True),
    'passing': passing,
    'verdict': verdict(len(chosen), len(passing), shuffled),
  }


def _largest(predicted, top: int) -> list[int]:
  """The `top` latents of each prediction, if they fire."""
  order = [
    np.argsort(-np.abs(predicted[k]), kind='stable')[:top] for k in _WAYS
  ]
  union = dict.fromkeys(np.concatenate(order).tolist())
  return [latent for latent in union if predicted['fires'][latent]]


def check(subject, tokens_T, logit, position) -> None:
  """Raises ValueError if a token or the position does not exist."""
  size = subject.gemma.config.vocab_size
  for token in [*tokens_T, *(token for token in logit if token is not None)]:
    if not 0 <= token < size:
      raise ValueError(
        f'There is no token {token}; the vocabulary has {size:,} tokens.'
      )
  if not 0 <= position < len(tokens_T):
    raise ValueError(
      f'Position {position} is outside the text of {len(tokens_T)} tokens.'
    )


def verdict(count: int, passing: int, shuffled: np.ndarray) -> str:
  """One sentence: how many of the ablated latents pass the test."""
  if not count:
    return 'No latent fires on this text.'
  if len(shuffled) < round(1 / LEVEL) - 1:
    return f'Not tested: {len(shuffled)} shuffles are too few to pass.'
  control = f'(largest control effect {shuffled.max():.3f})'
  if not passing:
    return f'No latent exceeds the shuffled-decoder control {control}.'
  verb = 'exceeds' if passing == 1 else 'exceed'
  return (
    f'{passing} of {count} latents {verb} the shuffled-decoder control '
    f'{control}.'
  )


def agreement(features: Sequence[dict], way: str) -> dict[str, float | None]:
  """Rank correlation and slope of the exact effects against a prediction.

  The slope is of a regression through zero; it is 1 if both agree.
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


def search(
  subject: Subject,
  tokens_T: Sequence[int],
  logit: tuple[int, int | None],
  steps: int,
) -> dict[str, Any]:
  """Both predictions for all latents, for a logit after the last token.

  Returns:
    `f` [T, F]; `slope`, dm/df [T, F] for each prediction; `gradient` and
    `integrated` [F]; `by_token` [F, T]; `fires` [F]; and the totals that
    `attribute` returns.
  """
  tokens_1T, length = effects.padded([tokens_T]), len(tokens_T)
  keep_T = intervene.counted(subject, tokens_1T)[0][0]
  model = subject.gemma, subject.lm_params
  f_TF, path, error = _parts(
    *model, subject.params, subject.place, tokens_1T, keep_T
  )
  f_TF = np.asarray(f_TF)[:length]
  # The path; then y, the offset, y without the error, y without latents.
  s_S = (np.arange(steps) + 0.5) / steps
  shifts = [
    np.stack([*(-(1 - s_S)[:, None, None] * y), 0 * y, -y, -e, e - y])
    for y, e in zip(map(np.asarray, path), map(np.asarray, error), strict=True)
  ]
  values, slopes = [], []
  batch = budget.rows(
    budget.gradient, subject.gemma, tokens_1T.shape[1], _AT_ONCE
  )
  for start in progress.track(range(0, steps + 4, batch), 'gradients'):
    chunk = np.arange(start, min(start + batch, steps + 4))
    value_S, slope = _slopes(
      (subject.gemma, subject.place.targets),
      subject.lm_params,
      tokens_1T,
      tuple(shift[np.resize(chunk, batch)] for shift in shifts),
      (length - 1, logit[0], -1 if logit[1] is None else logit[1]),
    )
    values.append(np.asarray(value_S)[: len(chunk)])
    slopes.append([np.asarray(slope_STD)[: len(chunk)] for slope_STD in slope])
  value_S = np.concatenate(values)
  slope = [np.concatenate(column) for column in zip(*slopes, strict=True)]
  W_dec, once = subject.params['W_dec'], subject.carried
  predicted = {'f': f_TF, 'fires': (f_TF > 0).any(0), 'slope': {}}
  slope_of = {
    'gradient': tuple(slope_STD[steps] for slope_STD in slope),
    'integrated': tuple(slope_STD[:steps].mean(0) for slope_STD in slope),
  }
  for way, slopes in slope_of.items():
    slope_TF, missed = map(np.asarray, _contracted(W_dec, error, slopes, once))
    predicted['slope'][way] = slope_TF[:length]
    predicted[way] = (f_TF * slope_TF[:length]).sum(0)
  predicted['by_token'] = (f_TF * predicted['slope']['gradient']).T
  value, without, no_error, no_latents = map(float, value_S[steps:])
  latents, missed = float(predicted['integrated'].sum()), float(missed)
  return predicted | {
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
  """f [T, F]; y - offset and the error at each target, 0 where not kept."""
  tapped = tuple(sorted({*place.sites, *place.targets}))
  taps = gemma.forward(lm_params, tokens_1T, taps=tapped, logits=False).taps
  x, y = (
    released.stacked([taps[site] for site in side], place.several)[0]
    for side in (place.sites, place.targets)
  )
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
    if intervene.carried(place):
      path = jnp.einsum('tlf,lfld->tld', f, params['W_dec'])
      error = jnp.zeros_like(path)
    else:
      error = y - sae.decode(params, f, x)
      path = y - sae.decode(params, jnp.zeros_like(f), x)
  masked = lambda a: jnp.where(keep_T.reshape(-1, *[1] * (a.ndim - 1)), a, 0)
  by_layer = lambda a: jnp.moveaxis(a, -2, 0) if place.several else a[None]
  return (
    masked(f).reshape(len(f), -1),
    tuple(by_layer(masked(path))),
    tuple(by_layer(masked(error))),
  )


@functools.partial(jax.jit, static_argnums=0)
def _slopes(static, lm_params, tokens_1T, shifts, measure):
  """m and its gradient at each target, at y + shift [S, T, D].

  Args:
    static: Gemma and the targets.
    measure: m's position and two tokens; -1 where the second is none.
  """
  gemma, targets = static
  position, plus, minus = measure
  tokens_ST = jnp.broadcast_to(tokens_1T, (len(shifts[0]), tokens_1T.shape[1]))
  end = splice.last(gemma)

  def total(shifts):
    edits = {
      site: functools.partial(jnp.add, shift)
      for site, shift in zip(targets, shifts, strict=True)
    }
    x_STD = gemma.forward(
      lm_params, tokens_ST, taps=(end,), edits=edits, logits=False
    ).taps[end]
    logits_SV = gemma.unembed(lm_params, x_STD[:, position][:, None])[:, 0]
    m_S = logits_SV[:, plus] - jnp.where(minus < 0, 0, logits_SV[:, minus])
    return jnp.sum(m_S), m_S

  (_, m_S), slope = jax.value_and_grad(total, has_aux=True)(shifts)
  return m_S, slope


@functools.partial(jax.jit, static_argnames='once')
def _contracted(W_dec, error, slope, once: bool):
  """dm/df of each latent (decoder . slope), and the effect of the error."""
  with jax.default_matmul_precision('highest'):
    if W_dec.ndim == 2:
      slope_TF = slope[0] @ W_dec.T
    elif once:
      g_TLD = jnp.stack(slope, 1)
      slope_TF = jnp.einsum('tld,lfld->tlf', g_TLD, W_dec)
    else:  # [L, F, M, D]
      slope_TF = sum(
        jnp.einsum('td,lfd->tlf', g_TD, W_dec[:, :, m])
        for m, g_TD in enumerate(slope)
      )
    missed = sum(
      jnp.sum(e_TD * g_TD) for e_TD, g_TD in zip(error, slope, strict=True)
    )
  return slope_TF.reshape(len(slope_TF), -1), missed


# Measurements.


def _exact(query: permutation_test.Query, features, chosen: int, settings):
  """Exact effects of ablations [N] and of the controls [C, chosen].

  Args:
    chosen: the first `chosen` features get controls.
  """
  controls = settings.shuffles
  if not features:
    return np.zeros(0), np.zeros((controls, 0))
  subject = query.subject
  ablations = intervene.rows(subject, [[Change(i)] for i in features])
  selected, others = (
    Rows(*(array[rows_slice] for array in ablations))
    for rows_slice in (slice(chosen), slice(chosen, None))
  )
  sets = intervene.with_controls(subject, selected, controls, settings.seed)
  change_B = permutation_test.exact(query, intervene.stacked([sets, others]))
  of_selected, control, of_others = np.split(
    change_B, [chosen, chosen * (1 + controls)]
  )
  effects = np.concatenate([of_selected, of_others])
  return effects, control.reshape(controls, chosen)


def report(
  result: dict[str, Any], named: Callable[[int], str] = lambda feature: ''
) -> str:
  """`attribute`'s result as lines of text.

  Args:
    named: returns a feature's label, or ''.
  """
  difference = result['value'] - result['without']
  # Percentages mean nothing if the parts cancel.
  clear = abs(difference) > (abs(result['latents']) + abs(result['error'])) / 10
  share = lambda v: f'{v:.3f} ({v / difference:.0%})' if clear else f'{v:.3f}'
  lines = [
    f'value {result["value"]:.3f}; without latents and SAE error '
    f'{result["without"]:.3f}',
    f'integrated gradients: latents {share(result["latents"])}, SAE error '
    f'{share(result["error"])}, integration error {share(result["other"])}',
    f'ablated: all latents {result["exact_latents"]:.3f}, SAE error '
    f'{result["exact_error"]:.3f}',
    f'{"feature":>8} {"gradient":>9} {"integrated":>10} {"exact":>8} '
    f'{"control":>8} {"p":>5}',
  ]
  for line in result['features']:
    if line['chosen']:
      lines.append(
        f'{line["feature"]:>8} {line["gradient"]:>9.3f} '
        f'{line["integrated"]:>10.3f} {line["exact"]:>8.3f} '
        f'{line["control"]:>8.3f} {line["p"]:>5.2f} '
        f'{"passes" if line["passes"] else "":6} '
        f'{named(line["feature"])}'.rstrip()
      )
  for way, agreed in result['agreement'].items():
    if agreed['slope'] is not None:
      lines.append(
        f'{way} against exact, {len(result["features"])} latents: rank '
        f'correlation {agreed["spearman"]:.2f}, slope {agreed["slope"]:.2f}'
      )
  return '\n'.join([*lines, result['verdict']])
