"""Features, tokens and dose-response curves, displayed in a notebook.

`show` and `tokens` return objects that a notebook renders as HTML and that
print as text. Text from models and corpora is escaped.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope.microscope.session import Session
from gemma_scope.release import Released
from gemma_scope.text import tokenizers

_BEFORE, _AFTER = 10, 5  # tokens of context around an example
_POSITIVE, _NEGATIVE = '46,139,87', '205,92,92'  # red, green, blue


@dataclasses.dataclass(frozen=True)
class Display:
  """HTML for a notebook, and the same as text."""

  text: str
  html: str

  def _repr_html_(self) -> str:
    return self.html

  def __repr__(self) -> str:
    return self.text


def tokens(pieces: Sequence[str], values: Sequence[float]) -> Display:
  """Tokens shaded by a value: green if positive, red if negative.

  Args:
    pieces: the tokens, such as `Tokenizer.pieces` returns.
    values: one for each token; the largest magnitude has the full colour.
  """
  largest = max(map(abs, values), default=0) or 1
  shown, text = [], []
  for piece, value in zip(pieces, values, strict=True):
    word = _visible(piece)
    colour = _POSITIVE if value >= 0 else _NEGATIVE
    shown.append(
      f'<span title="{value:.3g}" style="background:rgba({colour},'
      f'{abs(value) / largest:.2f})">{html.escape(word)}</span>'
    )
    text.append(f'{word}[{value:.3g}]' if abs(value) > largest / 20 else word)
  return Display(''.join(text), f'<pre>{"".join(shown)}</pre>')


def show(
  session: Session, sae: Released, feature: int, examples: int = 5
) -> Display:
  """What a feature fires on and writes: label, density, examples, logit lens.

  Args:
    session: the run.
    sae: one of its SAEs, indexed.
    feature: the latent.
    examples: number of texts with the largest activations.
  """
  index, pieces = session.index(sae), session.tokenizer.pieces
  if not 0 <= feature < len(index.max_F):
    raise ValueError(
      f'There is no feature {feature}: the SAE has {len(index.max_F):,}.'
    )
  label = session.named(sae)(feature) or 'never fires'
  lines = [
    _line(
      f'Feature {feature} of {sae.name}: {label}. It fires on '
      f'{index.density_F[feature]:.2%} of the tokens, at most '
      f'{index.max_F[feature]:.3g}.'
    )
  ]
  for name in ('positive', 'negative'):
    ids_FL = getattr(index, f'{name}_FL')
    if ids_FL is not None:
      verb = 'raises' if name == 'positive' else 'lowers'
      words = pieces(map(int, ids_FL[feature][:8]))
      lines.append(
        _line(f'{verb}: ' + ', '.join(map(repr, map(_visible, words))))
      )
  windows_EW = index.windows('top', feature)
  for e in range(min(examples, len(windows_EW))):
    n, t = index.top_sequence_FE[feature, e], index.top_position_FE[feature, e]
    if n >= 0:
      lines.append(_example(index, pieces, (n, t), windows_EW[e]))
  return Display(
    '\n'.join(line.text for line in lines),
    ''.join(line.html for line in lines),
  )


def _line(text: str) -> Display:
  return Display(text, f'<div>{html.escape(text)}</div>')


def _example(index, pieces, peak: tuple[int, int], window_W) -> Display:
  """The text around one activation; the window is centred on it."""
  (n, t), middle = peak, len(window_W) // 2
  start = max(t - min(_BEFORE, middle), 1)
  stop = min(
    t + _AFTER + 1, index.sequences_NT.shape[1], t + len(window_W) - middle
  )
  ids = index.sequences_NT[n, start:stop]
  values = window_W[start - t + middle : stop - t + middle]
  return tokens(pieces(map(int, ids)), [float(v) for v in values])


def _visible(piece: str) -> str:
  return tokenizers.readable(piece).replace('\n', '\u21b5')


def dose_response(curve: Sequence[Mapping[str, Any]], key: str = 'delta_logit'):
  """Plots `effects.dose_response` next to its controls; a matplotlib figure.

  Args:
    curve: what `effects.dose_response` returns.
    key: 'delta_logit', 'kl' or 'delta_loss'.
  """
  from matplotlib import figure

  drawing = figure.Figure(figsize=(5, 3), layout='constrained')
  axes = drawing.subplots()
  strength = [point['strength'] for point in curve]
  control = np.array([point['control'][key] for point in curve])
  axes.fill_between(
    strength, control[:, 1], control[:, 2], color='0.85', label='controls'
  )
  axes.plot(strength, control[:, 0], color='0.5')
  axes.plot(strength, [point[key] for point in curve], 'o-', label='feature')
  axes.set_xlabel('strength, in units of the largest activation')
  axes.set_ylabel(key.replace('_', ' '))
  axes.legend(frameon=False)
  return drawing
