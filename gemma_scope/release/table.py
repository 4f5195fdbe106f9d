"""The table of a release: one line for each SAE, in plain text or Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gemma_scope import sites

_COLUMNS = (
  *('type', 'site', 'writes', 'layer', 'width', 'architecture', 'seed'),
  *('target', 'L0', 'delta loss', 'KL', 'FVU', 'FVU inliers'),
  *('never fired %', 'silent %'),
  *('control delta', 'control KL', 'control FVU'),
)
# The controls of an evaluation, in the order of the table's cells.
CONTROLS = ('random', 'least_squares', 'pca')
FEW_CLUSTERS = 20  # with fewer, an interval is rough
_SPARSITY = {'target_l0': 'L0', 'quadratic_l0': 'L0', 'l0': 'lambda'}
TYPE_NAMES = {
  'sae': 'sparse autoencoder',
  'transcoder': 'transcoder',
  'crosscoder': 'weakly causal crosscoder',
  'clt': 'cross-layer transcoder',
}
PAIR = 'model-diffing crosscoder'  # of one site of two models


def value(metric: object) -> float | None:
  """A metric, {'value', 'low', 'high', ...} or a number, as a float."""
  number = metric.get('value') if isinstance(metric, dict) else metric
  if isinstance(number, bool) or not isinstance(number, int | float):
    return None
  try:
    return float(number) if math.isfinite(number) else None
  except OverflowError:
    return None


def has_rule(metrics: dict | None) -> bool:
  """Whether outliers by the SAE's own card were left as they are."""
  outliers = (metrics or {}).get('outliers')
  return isinstance(outliers, dict) and outliers.get('rule') == 'card'


def comparable(metrics: dict | None) -> dict:
  """Metrics whose FVU is of the tokens that the SAE is for.

  Where the card has a rule of outliers, 'fvu' of the SAE and of its controls is
  that without them.
  """
  metrics = metrics or {}
  if not has_rule(metrics):
    return metrics

  def without_outliers(figures):
    if not isinstance(figures, dict) or 'fvu_inliers' not in figures:
      return figures
    return {**figures, 'fvu': figures['fvu_inliers']}

  controls = metrics.get('controls')
  if isinstance(controls, dict):
    controls = {
      kind: without_outliers(figures) for kind, figures in controls.items()
    }
  return {
    **without_outliers(metrics),
    'control': without_outliers(metrics.get('control')),
    'controls': controls,
  }


def control(metrics: dict | None) -> dict:
  """Figures of the strongest control; {} where there are none."""
  strongest = (metrics or {}).get('control')
  return strongest if isinstance(strongest, dict) else {}


def silent(card: dict) -> dict:
  """'share' of latents that were silent for the last 'tokens' of training.

  {} for a card without the counter, and for a shorter training.
  """
  found = card.get('silent')
  found = found if isinstance(found, dict) else {}
  tokens, trained = value(found.get('tokens')), value(card.get('tokens'))
  return found if tokens and trained and tokens <= trained else {}


def _controls(metrics: dict, key: str, digits: int) -> str:
  """A figure of each control, 'random, least squares, PCA'; or of the one."""
  controls = metrics.get('controls')
  if not isinstance(controls, dict):
    return _figure(control(metrics).get(key), digits, False)
  figures = [(controls.get(kind) or {}).get(key) for kind in CONTROLS]
  return ', '.join(_figure(figure, digits, False) for figure in figures)


def order(row: Row) -> tuple:
  """Sort key: wiring, width, architecture, L0, seed; nulls beside their SAE."""
  card, metrics = row
  l0 = value((metrics or {}).get('l0'))
  return (
    sites.wiring_order(sites.wiring_of(card)),
    card['width'],
    architecture(card).removeprefix(f'{card.get("null") or ""}_'),
    math.inf if l0 is None else l0,
    str(card.get('seed', '')),
    str(card.get('name', '')),
  )


def type_name(card: dict) -> str:
  """What an SAE is called in the model card of a release."""
  return PAIR if sites.wiring_of(card).pair else TYPE_NAMES[card['type']]


def architecture(card: dict) -> str:
  """'jumprelu', or 'jumprelu, affine' where there is an affine skip."""
  name = str(card.get('architecture', ''))
  return f'{name}, affine' if card.get('affine') else name


def sparsity(card: dict) -> str:
  """The sparsity setting: 'L0 50', 'lambda 0.0006' or 'l1 4'."""
  setting = card.get('sparsity')
  if not isinstance(setting, dict) or not setting:
    return '-'
  kind = str(setting.get('kind', ''))
  amount = value(setting.get('value'))
  shown = '-' if amount is None else f'{amount:g}'
  return f'{_SPARSITY.get(kind, kind)} {shown}'


def table(
  rows: Sequence[Row], *, markdown: bool = False, columns: int = 100
) -> str:
  """One line for each SAE, by site, width and L0, next to its control.

  Args:
    rows: (card, metrics) pairs; metrics None shows dashes.
    markdown: Markdown, with 95 % intervals; else aligned plain text.
    columns: room for plain text; intervals are shown where they fit.

  Returns:
    The table, without a newline at its end. Delta loss and KL are in nats a
    token, FVU is the fraction of variance unexplained (inliers: without rows of
    outlying norm), never fired the share of latents that are off on all
    evaluated tokens, silent that of training's own counter. Of the controls
    there are three figures where all were measured (random, least squares,
    PCA), and the least of their KL.
  """
  rows = sorted(rows, key=order)
  cells = _cells(rows, intervals=True)
  if markdown:
    head, *body = cells
    rule = ['---'] * _text_columns(head)
    rule += ['---:'] * (len(head) - len(rule))
    return '\n'.join(
      f'| {" | ".join(escape(cell) for cell in line)} |'
      for line in (head, rule, *body)
    )
  text = _aligned(cells)
  if len(text.partition('\n')[0]) > columns:
    text = _aligned(_cells(rows, intervals=False))
  return text


def note(rows: Sequence[Row]) -> str:
  """What the intervals of a table rest on; '' where it is not known."""
  clusters = {
    (metrics['clusters'], str(metrics.get('clustered_by', 'sequences')))
    for _, metrics in rows
    if metrics and isinstance(metrics.get('clusters'), int)
  }
  sentences = []
  for count, kind in sorted(clusters):
    text = f'95 % intervals over {count} {kind} as independent draws'
    if count < FEW_CLUSTERS:
      text += f'; with fewer than {FEW_CLUSTERS} they are rough'
    sentences.append(f'{text}.')
  if any(has_rule(metrics) for _, metrics in rows):
    sentences.append(
      "Tokens that are outliers by an SAE's card are left as they are: they "
      'count for FVU only; FVU inliers and control FVU are without them.'
    )
  return ' '.join(sentences)


def _cells(rows: Sequence[Row], *, intervals: bool) -> list[list[str]]:
  """Header and body of the table, without columns that say nothing."""
  lines = [_line(*row, intervals) for row in rows]

  def differs(key):
    return len({line[key] for line in lines}) > 1

  shown_columns = {
    'type': any(line['type'] != 'sae' for line in lines),
    'writes': any(line['writes'] != line['site'] for line in lines),
    'architecture': differs('architecture'),
    'seed': differs('seed'),
    'KL': any(line['KL'] != '-' for line in lines),
    'control KL': any(line['control KL'] != '-' for line in lines),
    'silent %': any(line['silent %'] != '-' for line in lines),
    'FVU inliers': any(line['FVU inliers'] != '-' for line in lines),
  }
  head = [key for key in _COLUMNS if shown_columns.get(key, True)]
  return [head, *([line[key] for key in head] for line in lines)]


def _line(card: dict, metrics: dict | None, intervals: bool) -> dict[str, str]:
  """Every cell of a row, by its column."""
  wiring, metrics = sites.wiring_of(card), metrics or {}
  shares = metrics.get('dead'), silent(card).get('share')
  cells = (
    wiring.type,
    wiring.kind,
    wiring.targets[0].kind,
    wiring.layers(),
    sites.width_name(card['width']),
    architecture(card) or '-',
    str(card.get('seed', '-')),
    sparsity(card),
    _figure(metrics.get('l0'), 1, intervals),
    _figure(metrics.get('delta_loss'), 4, intervals),
    _figure(metrics.get('kl'), 4, intervals),
    _figure(metrics.get('fvu'), 3, intervals),
    _figure(metrics.get('fvu_inliers'), 3, intervals),
    *(
      '-' if share is None else f'{100 * share:.1f}'
      for share in map(value, shares)
    ),
    _controls(metrics, 'delta_loss', 3),
    _figure(control(metrics).get('kl'), 3, False),
    _controls(comparable(metrics), 'fvu', 3),
  )
  return dict(zip(_COLUMNS, cells, strict=True))


def _figure(metric: object, digits: int, intervals: bool) -> str:
  number = value(metric)
  if number is None:
    return '-'
  shown = f'{number:.{digits}f}'
  if intervals and isinstance(metric, dict):
    low, high = value(metric.get('low')), value(metric.get('high'))
    if low is not None and high is not None:
      # The wider side, so that ± never understates the interval.
      shown += f' ±{max(high - number, number - low):.{digits}f}'
  return shown


def _text_columns(head: Sequence[str]) -> int:
  return head.index('target') + 1


def _aligned(lines: Sequence[Sequence[str]]) -> str:
  """Words to the left, figures to the right, a rule under the header."""
  words = _text_columns(lines[0])
  widths = [
    max(len(cell) for cell in column) for column in zip(*lines, strict=True)
  ]
  aligned = [
    '  '.join(
      cell.ljust(width) if i < words else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  aligned.insert(1, '-' * len(aligned[0]))
  return '\n'.join(aligned)


def escape(text: object) -> str:
  """Text on one line of Markdown that can open no cell, tag, link or code."""
  line = ' '.join(str(text).split())
  line = line.encode('utf-8', 'backslashreplace').decode('utf-8')
  for character in '\\|<>[]`':
    line = line.replace(character, f'&#{ord(character)};')
  return line


Row = tuple[dict, dict | None]
