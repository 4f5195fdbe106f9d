"""What a collection says of itself: the one table and the model card.

A row is `(card, metrics)`: the card that a trained SAE carries and what
`evaluate` measured, or None. The table is one function with two faces, plain
text for a terminal and Markdown for the model card, so that the two can never
disagree. Every figure stands beside that of the control: a randomly
initialised member of the same shape and sparsity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from gemma_scope import places, sites

Row = tuple[dict, dict | None]

_COLUMNS = (
  *('type', 'site', 'writes', 'layer', 'width', 'architecture', 'seed'),
  *('target', 'L0', 'FVU', 'delta loss', 'dead %'),
  *('control FVU', 'control delta'),
)
_SPARSITY = {'target_l0': 'L0', 'quadratic_l0': 'L0', 'l0': 'lambda'}
_TYPES = {
  'sae': 'sparse autoencoder',
  'transcoder': 'transcoder',
  'crosscoder': 'weakly causal crosscoder',
  'clt': 'cross-layer transcoder',
}


def value(metric: object) -> float | None:
  """Measured figure ({'value', 'low', 'high', ...} or number) -> float."""
  number = metric.get('value') if isinstance(metric, dict) else metric
  if isinstance(number, bool) or not isinstance(number, int | float):
    return None
  try:
    return float(number) if math.isfinite(number) else None
  except OverflowError:
    return None


def control(metrics: dict | None) -> dict:
  """Figures of the randomly initialised twin; {} where there are none."""
  found = (metrics or {}).get('control')
  return found if isinstance(found, dict) else {}


def order(row: Row) -> tuple:
  """Sort key: place, width, architecture, L0, seed."""
  card, metrics = row
  l0 = value((metrics or {}).get('l0'))
  return (
    places.order(places.of(card)),
    card['width'],
    architecture(card),
    math.inf if l0 is None else l0,
    str(card.get('seed', '')),
    str(card.get('name', '')),
  )


def architecture(card: dict) -> str:
  """'jumprelu', or 'jumprelu, affine' where there is an affine skip."""
  found = str(card.get('architecture', ''))
  return f'{found}, affine' if card.get('affine') else found


def sparsity(card: dict) -> str:
  """What the member was asked for: 'L0 50', 'lambda 0.0006' or 'l1 4'."""
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
  """One line per member, by place, width and L0, the control beside.

  Args:
    rows: (card, metrics) pairs; metrics None shows dashes.
    markdown: Markdown, with 95 % intervals; else aligned plain text.
    columns: room for plain text; intervals are shown where they fit.

  Returns:
    The table, without a newline at its end. FVU is the fraction of variance
    unexplained, delta loss is in nats per token.
  """
  rows = sorted(rows, key=order)
  wide = _cells(rows, intervals=True)
  if markdown:
    head, *body = wide
    rule = ['---'] * _text_columns(head)
    rule += ['---:'] * (len(head) - len(rule))
    return '\n'.join(
      f'| {" | ".join(escape(cell) for cell in line)} |'
      for line in (head, rule, *body)
    )
  text = _aligned(wide)
  if len(text.partition('\n')[0]) > columns:
    text = _aligned(_cells(rows, intervals=False))
  return text


def model_card(
  rows: Sequence[Row],
  paths: Sequence[str],
  *,
  title: str | None,
  license_name: str,
  picture: str | None,
) -> str:
  """Hugging Face model card of a release, as Markdown with YAML front matter.

  Args:
    rows: (card, metrics) of every member.
    paths: each member's folder below the release, in the order of `rows`.
    title: heading, or None.
    license_name: Hugging Face licence identifier, such as 'apache-2.0'.
    picture: file name of the frontier's picture beside the card, or None.
  """
  front = {
    'license': license_name,
    'library_name': 'gemma_scope',
    'tags': ['sparse-autoencoder', 'interpretability', 'gemma'],
  }
  # JSON values are YAML values, whatever characters they hold.
  parts = ['---']
  parts += [f'{key}: {json.dumps(item)}' for key, item in front.items()]
  models = ', '.join(_distinct(rows, 'model')) or 'a language model'
  what = 'Sparse autoencoders'
  if any(card['type'] != 'sae' for card, _ in rows):
    what += ' and transcoders'
  heading = f'{what} for {models}' if title is None else title
  parts += ['---', '', f'# {escape(heading)}', '']
  parts += [
    f'{_counted(rows)} trained with gemma_scope on the activations of '
    f'{models}. Files, keys and shapes are those of Gemma Scope 1 '
    '([arXiv:2408.05147](https://arxiv.org/abs/2408.05147)): `W_enc` '
    '[d_in, F], `b_enc` [F], `W_dec` [F, d_out], `b_dec` [d_out], '
    '`threshold` [F], float32. They work on raw activations: the scale used '
    'in training is folded in.',
    *_more_keys(rows),
    '',
    '```python',
    'from gemma_scope import release, sae',
    f"params, card = release.load('{paths[0]}')",
    'f = sae.encode(params, x)',
    'y_hat = sae.decode(params, f, x)',
    '```',
    '',
    'Without gemma_scope: `p = numpy.load(".../params.npz")`, '
    '`z = x @ p["W_enc"] + p["b_enc"]`, '
    '`f = numpy.maximum(z, 0) * (z > p["threshold"])`, '
    '`y_hat = f @ p["W_dec"] + p["b_dec"]`.',
    '',
    '## What was measured',
    '',
    table(rows, markdown=True),
    '',
    _measured(rows),
    '',
  ]
  if picture:
    parts += [f'![Sparsity-fidelity frontier]({picture})', '']
  parts += ['## How they were made', '', *_provenance(rows), '']
  parts += [
    '`manifest.json` lists every file with its size and SHA-256; '
    '`release.load` and `release.verify` check them. `config.json` beside '
    'each `params.npz` says how that SAE was trained, `metrics.json` what '
    'was measured.',
    '',
  ]
  return '\n'.join(parts)


def escape(text: object) -> str:
  """Text on one line of Markdown that can open no cell, tag, link or code."""
  line = ' '.join(str(text).split())
  line = line.encode('utf-8', 'backslashreplace').decode('utf-8')
  for mark in '\\|<>[]`':
    line = line.replace(mark, f'&#{ord(mark)};')
  return line


def _counted(rows: Sequence[Row]) -> str:
  """'3 sparse autoencoders (jumprelu, topk), 1 transcoder (jumprelu)'."""
  parts = []
  for kind, name in _TYPES.items():
    found = [row for row in rows if row[0]['type'] == kind]
    if found:
      architectures = sorted({architecture(card) for card, _ in found} - {''})
      shown = f' ({escape("; ".join(architectures))})' if architectures else ''
      parts.append(f'{len(found)} {name}{"s" * (len(found) > 1)}{shown}')
  return ', '.join(parts)


def _more_keys(rows: Sequence[Row]) -> list[str]:
  """Paragraphs on what Gemma Scope 1's form leaves open, where it is there."""
  found = []
  if any(places.of(card).several for card, _ in rows):
    found.append(
      'Crosscoders and cross-layer transcoders have a leading axis of their L '
      'layers, in the order of `sites` and `targets` in `config.json`: `W_enc` '
      '[L, d_in, F], `W_dec` [L, F, L, d_out]; x is [..., L, d_in], f is '
      '[..., L, F]. A latent writes to its own layer and those after it, so '
      '`W_dec[l, :, m]` is zero for m < l. Their width is L times F.'
    )
  if any(card.get('affine') for card, _ in rows):
    found.append(
      'An affine skip `W_skip` [d_in, d_out] adds `x @ p["W_skip"]` to y_hat.'
    )
  trained = {str(card.get('architecture')) for card, _ in rows}
  if trained & {'topk', 'matryoshka_topk'}:
    found.append(
      'Where there is a `k`, only the k largest latents of a token stay.'
    )
  return [line for text in found for line in ('', text)]


def _measured(rows: Sequence[Row]) -> str:
  counts = [value((metrics or {}).get('tokens')) for _, metrics in rows]
  counts = sorted({count for count in counts if count})
  if not counts:
    return 'None of these has been evaluated.'
  tokens = ' to '.join(f'{n:,.0f}' for n in {counts[0]: 0, counts[-1]: 0})
  return (
    f'Measured on {tokens} tokens each. FVU: fraction of variance '
    'unexplained, of what is reconstructed, against its mean. Delta loss: '
    "nats per token added to the language model's loss when the "
    'reconstruction takes its place, BOS kept clean. Dead: latents that never '
    'fired. '
    '±: 95 % interval, sequences as clusters. Control: a randomly '
    'initialised member of the same shape and sparsity. With several layers, '
    'FVU and delta loss are means over those written, each replaced alone.'
  )


def _provenance(rows: Sequence[Row]) -> list[str]:
  """A list of what the members share; what differs is given as a range."""
  lines = []
  for label, key in (
    ('Language model', 'model'),
    ('Training tokens', 'tokens'),
    ('Training steps', 'steps'),
    ('Seed', 'seed'),
    ('Code', 'code'),
  ):
    found = _distinct(rows, key)
    if found:
      shown = ', '.join(found[:6]) + (', ...' if len(found) > 6 else '')
      lines.append(f'- {label}: {shown}')
  texts = {json.dumps(card.get('text'), sort_keys=True) for card, _ in rows}
  for text in sorted(texts - {'null'}):
    found = json.loads(text)
    items = found.items() if isinstance(found, dict) else [('source', found)]
    shown = '; '.join(f'{escape(k)}: {escape(v)}' for k, v in items)
    lines.append(f'- Text: {shown}')
  return lines or ['- No provenance was recorded.']


def _distinct(rows: Sequence[Row], key: str) -> list[str]:
  found = [card[key] for card, _ in rows if card.get(key) is not None]
  numbers = all(isinstance(item, int) for item in found)
  found = set(found if numbers else map(str, found))
  return [
    f'{item:,}' if numbers and key in ('tokens', 'steps') else escape(item)
    for item in sorted(found)
  ]


def _cells(rows: Sequence[Row], *, intervals: bool) -> list[list[str]]:
  """Header and body of the table; a column that says nothing is left out."""
  lines = [_line(*row, intervals) for row in rows]

  def differs(key):
    return len({line[key] for line in lines}) > 1

  said = {
    'type': any(line['type'] != 'sae' for line in lines),
    'writes': any(line['writes'] != line['site'] for line in lines),
    'architecture': differs('architecture'),
    'seed': differs('seed'),
  }
  head = [key for key in _COLUMNS if said.get(key, True)]
  return [head, *([line[key] for key in head] for line in lines)]


def _line(card: dict, metrics: dict | None, intervals: bool) -> dict[str, str]:
  """Every cell of a row, by its column."""
  place, metrics = places.of(card), metrics or {}
  twin, dead = control(metrics), value(metrics.get('dead'))
  cells = (
    place.type,
    place.kind,
    place.targets[0].kind,
    place.layers(),
    sites.width_name(card['width']),
    architecture(card) or '-',
    str(card.get('seed', '-')),
    sparsity(card),
    _figure(metrics.get('l0'), 1, intervals),
    _figure(metrics.get('fvu'), 3, intervals),
    _figure(metrics.get('delta_loss'), 4, intervals),
    '-' if dead is None else f'{100 * dead:.1f}',
    _figure(twin.get('fvu'), 3, False),
    _figure(twin.get('delta_loss'), 4, False),
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
      # The wider side, so that ± never says less than was found.
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
  shown = [
    '  '.join(
      cell.ljust(width) if i < words else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  shown.insert(1, '-' * len(shown[0]))
  return '\n'.join(shown)
