"""Effect of changed latents on the model: KL, losses, logits, steered text.

With q the model's prediction with changes and p without, at each position

  kl_BT = KL(p || q)      loss_BT = -log q(next token)
  logit_BT = logit of token a - logit of token b, both with changes

Each strength of a dose-response curve has controls: vectors of equal norm along
the decoders of other latents. Steered text is generated next to text without
changes from the same seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_scope import sae, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import generate, splice
from gemma_scope.microscope.circuits import budget, intervene
from gemma_scope.microscope.circuits.intervene import Change, Rows, Subject
from gemma_scope.runtime import progress
from gemma_scope.sae import released

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_SHORTEST = 32  # padded lengths are powers of two from here on
_MOST_ROWS = 64  # per pass
_LEAST_REPLY = 64  # room for generated tokens; from here on powers of two
_LIKELIEST = 8  # predicted tokens; from here on powers of two


class Effects(NamedTuple):
  """Results with changes, and without ("clean"); float32, host memory.

  Losses have T - 1 positions; entry t is the loss of token t + 1.
  """

  kl_BT: np.ndarray
  loss_BT: np.ndarray
  clean_loss_BT: np.ndarray
  logit_BT: np.ndarray
  clean_logit_BT: np.ndarray
  counts_BT: np.ndarray  # tokens that may be changed: not special, no outliers


def effects(
  subject: Subject,
  tokens_PT: np.ndarray,
  edit_rows: Rows,
  prompt_B: np.ndarray | None = None,
  *,
  logit: tuple[int, int | None] = (0, None),
  where_BT: np.ndarray | None = None,
) -> Effects:
  """Runs the model with each row of changes and without changes.

  Args:
    subject: the SAE in its model.
    tokens_PT: texts, int32, BOS first, padded with 0.
    edit_rows: the changes of B rows.
    prompt_B: the index of each row's text; by default the first text.
    logit: tokens (a, b) of the logit difference; if b is None, logit a alone.
    where_BT: tokens that the changes apply to; by default all but special ones
      and outliers, which are never changed.

  Raises:
    ValueError: the text is too long (`budget`).
  """
  tokens_PT = padded(tokens_PT)
  rows_count = len(edit_rows.feature_BK)
  prompt_B = np.zeros(rows_count, int) if prompt_B is None else prompt_B
  usual_PT, _ = intervene.counted(subject, tokens_PT)
  usual_BT = usual_PT[prompt_B]
  if where_BT is not None:
    wide_BT = np.zeros(usual_BT.shape, bool)
    wide_BT[:, : where_BT.shape[1]] = where_BT
    usual_BT = usual_BT & wide_BT
  minus = -1 if logit[1] is None else logit[1]
  before_PTD = _last(subject.gemma, subject.lm_params, tokens_PT)
  latents = subject.width if 'k' in subject.params else 0
  batch = budget.rows(
    budget.forward, subject.gemma, tokens_PT.shape[1], _MOST_ROWS, latents
  )
  batches = []
  for start in progress.track(range(0, rows_count, batch), 'passes'):
    rows_B = np.arange(start, min(start + batch, rows_count))
    filled = np.resize(rows_B, min(batch, _power(rows_count)))
    batch_rows = Rows(*(array[filled] for array in edit_rows))
    texts = _Texts(
      tokens_PT[prompt_B[filled]],
      before_PTD[prompt_B[filled]],
      usual_BT[filled],
    )
    outputs = _effects(
      (subject.gemma, subject.place, edit_rows.projects),
      (subject.lm_params, subject.params),
      texts,
      batch_rows,
      (np.int32(logit[0]), np.int32(minus)),
    )
    batches.append([np.asarray(array)[: len(rows_B)] for array in outputs])
  kl, loss, clean, logit_BT, clean_logit = (
    np.concatenate(column) for column in zip(*batches, strict=True)
  )
  counts_BT = usual_PT[prompt_B]
  return Effects(kl, loss, clean, logit_BT, clean_logit, counts_BT)


def _power(count: int) -> int:
  return 1 << max(count - 1, 0).bit_length()


def padded_length(count: int) -> int:
  """The padded length of a text of `count` tokens."""
  return max(_SHORTEST, _power(count))


def padded(tokens: Sequence[Sequence[int]], least: int = 0) -> np.ndarray:
  """Texts as int32 [P, T], padded to a power of two, at least `least`."""
  length = padded_length(max(least, *map(len, tokens)))
  padded_PT = np.zeros((len(tokens), length), np.int32)
  for i, row in enumerate(tokens):
    padded_PT[i, : len(row)] = row
  return padded_PT


@functools.partial(jax.jit, static_argnames='gemma')
def _last(gemma, lm_params, tokens_PT):
  end = splice.last(gemma)
  return gemma.forward(lm_params, tokens_PT, taps=(end,), logits=False).taps[
    end
  ]


class _Texts(NamedTuple):
  """The texts of a pass, without changes, and where changes apply."""

  tokens_BT: np.ndarray
  before_BTD: jax.Array
  where_BT: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _effects(subject, params, texts: _Texts, rows: Rows, logit):
  gemma, place, projects = subject
  lm_params, sae_params = params
  plus, minus = logit
  end = splice.last(gemma)
  edits = intervene.edits(place, sae_params, rows, texts.where_BT, projects)
  after_BTD = gemma.forward(
    lm_params, texts.tokens_BT, taps=(end,), edits=edits, logits=False
  ).taps[end]
  next_BT = jnp.roll(texts.tokens_BT, -1, 1)

  def of_slice(after_BtD, before_BtD, next_Bt):
    logits = [gemma.unembed(lm_params, x) for x in (after_BtD, before_BtD)]
    logq, logp = map(jax.nn.log_softmax, logits)
    kl_Bt = jnp.sum(jnp.exp(logp) * (logp - logq), -1)
    loss = lambda p: -jnp.take_along_axis(p, next_Bt[..., None], -1)[..., 0]
    logit = lambda z: z[..., plus] - jnp.where(minus < 0, 0, z[..., minus])
    return kl_Bt, loss(logq), loss(logp), logit(logits[0]), logit(logits[1])

  slices = splice.by_slices(
    of_slice, None, after_BTD, texts.before_BTD, next_BT
  )
  kl_BT, loss_BT, clean_BT, logit_BT, clean_logit_BT = map(splice.join, slices)
  return kl_BT, loss_BT[:, :-1], clean_BT[:, :-1], logit_BT, clean_logit_BT


def summary(result: Effects) -> list[dict]:
  """For each row: mean KL, mean change in loss, change in logit; for JSON.

  The mean KL is over the tokens that may be changed, the mean loss over those
  whose previous token may be changed too. The logit is read after the last
  token that may be changed.
  """
  lines = []
  for b, counts_T in enumerate(result.counts_BT):
    last = int(np.flatnonzero(counts_T)[-1])
    losses_T = counts_T[1:] & counts_T[:-1]
    delta_T = result.loss_BT[b] - result.clean_loss_BT[b]
    mean = float(delta_T[losses_T].mean()) if losses_T.any() else 0.0
    line = {
      'kl': float(result.kl_BT[b][counts_T].mean()),
      'delta_loss': mean,
      'delta_logit': float((result.logit_BT - result.clean_logit_BT)[b, last]),
    }
    lines.append(line)
  return lines


def dose_response(
  subject: Subject,
  tokens_T: Sequence[int],
  change: Change,
  *,
  strengths: Sequence[float] = STRENGTHS,
  logit: tuple[int, int | None],
  controls: int = 8,
) -> list[dict[str, Any]]:
  """Effects at each strength, next to controls of equal norm.

  Args:
    subject, tokens_T, logit: as in `effects`.
    change: the change; its strength is ignored.
    strengths: in units of the latent's largest value.
    controls: number of control latents; the same at every strength.

  Returns:
    For each strength `kl`, `delta_loss`, `delta_logit`, and `control`: for each
    of these (mean, min, max) over the controls. KL and delta loss are means
    over the text.
  """
  series = [
    [dataclasses.replace(change, strength=strength)] for strength in strengths
  ]
  edit_rows = intervene.with_controls(
    subject, intervene.rows(subject, series), controls
  )
  # Each control uses the same latent at every strength.
  for i in range(controls):
    of_control = slice((i + 1) * len(series), (i + 2) * len(series))
    edit_rows.writer_BK[of_control] = edit_rows.writer_BK[of_control.start]
    edit_rows.gain_BK[of_control] = edit_rows.gain_BK[of_control.start]
  means = summary(effects(subject, padded([tokens_T]), edit_rows, logit=logit))
  lines = []
  for i, strength in enumerate(strengths):
    controls_at = means[i + len(series) :: len(series)]
    spread = {
      key: [
        float(reduce([control[key] for control in controls_at]))
        for reduce in (np.mean, min, max)
      ]
      for key in means[i]
      if controls_at
    }
    lines.append({'strength': strength, **means[i], 'control': spread})
  return lines


def curve_table(curve: Sequence[dict[str, Any]]) -> str:
  """A dose-response curve as a text table; controls: mean (min to max)."""
  lines = [
    f'{"strength":>8}  KL, delta loss, delta logit; each with '
    '[control mean (min to max)]'
  ]
  for point in curve:
    cells = []
    for key, value in point.items():
      if key in point['control']:
        mean, low, high = point['control'][key]
        cells.append(f'{value:+.3f} [{mean:+.3f} ({low:+.3f} to {high:+.3f})]')
    lines.append(f'{point["strength"]:>8.2f}  ' + '  '.join(cells))
  return '\n'.join(lines)


# Latents and predictions for a text.


class Reading(NamedTuple):
  """The strongest latents of each token of a text; host memory."""

  feature_TK: np.ndarray
  value_TK: np.ndarray  # descending; 0 where fewer fire
  l0_T: np.ndarray
  unexplained_T: np.ndarray  # |y - y_hat|^2 / |y|^2
  counts_T: np.ndarray  # False at tokens that no SAE was trained on
  outlier_T: np.ndarray  # those of them that its outlier rule leaves out


def read(subject: Subject, tokens_T: Sequence[int], top: int = 10) -> Reading:
  """The `top` latents of each token, and the fraction unexplained."""
  tokens_PT, length = padded([tokens_T]), len(tokens_T)
  place = subject.place
  tapped = tuple(sorted({*place.sites, *place.targets}))
  taps = splice.taps(subject.gemma, subject.lm_params, tokens_PT, tapped)
  arrays = _read(
    subject.params,
    tuple(taps[site] for site in place.sites),
    tuple(taps[site] for site in place.targets),
    min(top, subject.width),
  )
  marks = (mark_PT[0] for mark_PT in intervene.counted(subject, tokens_PT))
  return Reading(*(np.asarray(array)[:length] for array in (*arrays, *marks)))


@functools.partial(jax.jit, static_argnames='top')
def _read(params, x, y, top: int):
  several = params['W_enc'].ndim == 3
  x, y = released.stacked(x, several)[0], released.stacked(y, several)[0]
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
    missed = y - sae.decode(params, f, x)
  axes = tuple(range(1, y.ndim))
  share_T = jnp.sum(missed**2, axes) / jnp.maximum(jnp.sum(y**2, axes), 1e-30)
  f_TF = f.reshape(len(f), -1)
  value_TK, feature_TK = jax.lax.top_k(f_TF, top)
  return feature_TK, value_TK, jnp.sum(f_TF > 0, -1), share_T


class Prediction(NamedTuple):
  """Next-token predictions after each token of a text; host memory."""

  token_TK: np.ndarray  # likeliest first
  probability_TK: np.ndarray
  loss_T: np.ndarray  # loss of token t + 1 in nats; T - 1 entries


def predict(
  gemma: lm.Gemma, lm_params: lm.Params, tokens_T: Sequence[int], top: int
) -> Prediction:
  """The `top` likeliest next tokens at each position."""
  tokens_1T, length = padded([tokens_T]), len(tokens_T)
  count = min(max(_LIKELIEST, _power(top)), gemma.config.vocab_size)
  arrays = _predict(gemma, lm_params, tokens_1T, count)
  token_TK, probability_TK, loss_T = (np.asarray(array)[0] for array in arrays)
  return Prediction(
    token_TK[:length, :top], probability_TK[:length, :top], loss_T[: length - 1]
  )


@functools.partial(jax.jit, static_argnames=('gemma', 'top'))
def _predict(gemma, lm_params, tokens_1T, top: int):
  end = splice.last(gemma)
  x_1TD = gemma.forward(lm_params, tokens_1T, taps=(end,), logits=False).taps[
    end
  ]

  def of_slice(x_1tD, next_1t):
    logp = jax.nn.log_softmax(gemma.unembed(lm_params, x_1tD))
    value, token = jax.lax.top_k(logp, top)
    own_logp = jnp.take_along_axis(logp, next_1t[..., None], -1)[..., 0]
    return token, jnp.exp(value), -own_logp

  slices = splice.by_slices(of_slice, None, x_1TD, jnp.roll(tokens_1T, -1, 1))
  return tuple(map(splice.join, slices))


# Steered text.


@dataclasses.dataclass(frozen=True)
class _At:
  """Edits for `generate`: special tokens and outliers are not changed."""

  place: sites.Wiring
  special: tuple[int, ...]
  projects: bool

  def __call__(self, params, rows, norm_bounds, tokens_BT):
    where_BT = ~jnp.isin(tokens_BT, jnp.array(self.special))
    return intervene.edits(
      self.place, params, rows, where_BT, self.projects, norm_bounds
    )


def edits_of(subject: Subject, edit_rows: Rows) -> Partial:
  """The changes of each row, as `generate` takes them."""
  return Partial(
    _At(subject.place, subject.special, edit_rows.projects),
    subject.params,
    edit_rows,
    dict(subject.norm_bounds),
  )


def steer(
  subject: Subject,
  prompt: Sequence[int],
  changes: Sequence[Change],
  sampling: generate.Sampling,
) -> dict[str, Any]:
  """Continues a prompt with and without changes, from the same seed.

  Args:
    prompt: token ids, BOS first; the changes also apply to the prompt.
    changes: changes of different latents, applied together.
    sampling: how tokens are drawn; its streams are ignored.

  Returns:
    `default` and `steered`, each with `ids` (the continuation) and its
    `perplexity` under the model without changes. `steered` also has `kl`: the
    mean of KL(without || with changes) over its tokens, in nats.
  """
  edit_rows = intervene.rows(subject, [[], list(changes)])
  # Shapes do not depend on the reply, so that no later text compiles again.
  room = max(_LEAST_REPLY, _power(sampling.max_new_tokens))
  replies = generate.generate(
    subject.gemma,
    subject.lm_params,
    [prompt, prompt],
    dataclasses.replace(sampling, streams=[0, 0]),
    edits=edits_of(subject, edit_rows),
    passes=generate.Passes(
      prompt_len=padded_length(len(prompt)), reply_len=room
    ),
  )
  texts = padded(
    [[*prompt, *map(int, reply)] for reply in replies], len(prompt) + room
  )
  cost = effects(subject, texts, edit_rows, np.arange(2))
  result = {}
  for b, name in enumerate(('default', 'steered')):
    reply = slice(len(prompt) - 1, len(prompt) - 1 + len(replies[b]))
    loss_T = cost.clean_loss_BT[b, reply]
    result[name] = {
      'ids': list(map(int, replies[b])),
      'perplexity': float(np.exp(loss_T.mean())) if len(loss_T) else None,
    }
  kl_T = cost.kl_BT[1, reply]
  result['steered']['kl'] = float(kl_T.mean()) if len(kl_T) else None
  return result
