"""The model card of a release.

A row is `(card, metrics)`: an SAE's config.json and what `evaluate` measured,
or None. The table of the model card is that of the terminal (`table`); next to
every metric are those of untrained dictionaries of the same L0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from gemma_scope import sites
from gemma_scope.release import table as table_lib


def model_card(
  rows: Sequence[table_lib.Row],
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
  lines = ['---']
  lines += [f'{key}: {json.dumps(item)}' for key, item in front.items()]
  models = ', '.join(_distinct(rows, 'model')) or 'a language model'
  subject = 'Sparse autoencoders'
  if any(card['type'] != 'sae' for card, _ in rows):
    subject += ' and transcoders'
  heading = f'{subject} for {models}' if title is None else title
  lines += ['---', '', f'# {table_lib.escape(heading)}', '']
  lines += [
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
    table_lib.table(rows, markdown=True),
    '',
    _measured(rows),
    '',
  ]
  if picture:
    lines += [f'![Sparsity-fidelity frontier]({picture})', '']
  lines += ['## How they were made', '', *_provenance(rows), '']
  lines += [
    '`manifest.json` lists every file with its size and SHA-256; '
    '`release.load` and `release.verify` check them. `config.json` beside '
    'each `params.npz` says how that SAE was trained, `metrics.json` what '
    'was measured.',
    '',
  ]
  return '\n'.join(lines)


def _counted(rows: Sequence[table_lib.Row]) -> str:
  """'3 sparse autoencoders (jumprelu, topk), 1 transcoder (jumprelu)'."""
  phrases = []
  for name in (*table_lib.TYPE_NAMES.values(), table_lib.PAIR):
    rows_of_type = [row for row in rows if table_lib.type_name(row[0]) == name]
    if rows_of_type:
      architectures = sorted(
        {table_lib.architecture(card) for card, _ in rows_of_type} - {''}
      )
      shown = (
        f' ({table_lib.escape("; ".join(architectures))})'
        if architectures
        else ''
      )
      phrases.append(
        f'{len(rows_of_type)} {name}{"s" * (len(rows_of_type) > 1)}{shown}'
      )
  return ', '.join(phrases)


def _more_keys(rows: Sequence[table_lib.Row]) -> list[str]:
  """Paragraphs on what Gemma Scope 1's form leaves open, where it is there."""
  paragraphs = []
  wirings = [sites.wiring_of(card) for card, _ in rows]
  if any(wiring.several for wiring in wirings):
    paragraphs.append(
      'Crosscoders and cross-layer transcoders have a leading axis of their L '
      'layers, in the order of `sites` and `targets` in `config.json`: `W_enc` '
      '[L, d_in, F], `W_dec` [L, F, L, d_out]; x is [..., L, d_in], f is '
      '[..., L, F]. A latent writes to its own layer and those after it, so '
      '`W_dec[l, :, m]` is zero for m < l. Their width is L times F.'
    )
  if any(wiring.pair for wiring in wirings):
    paragraphs.append(
      'A model-diffing crosscoder reads and writes one site of two models, of '
      "which x holds the activations side by side: the first model's in x[..., "
      ":d_in // 2], the second model's after it."
    )
  if any(card.get('affine') for card, _ in rows):
    paragraphs.append(
      'An affine skip `W_skip` [d_in, d_out] adds `x @ p["W_skip"]` to y_hat.'
    )
  trained = {str(card.get('architecture')) for card, _ in rows}
  if trained & {'topk', 'matryoshka_topk'}:
    paragraphs.append(
      'Where there is a `k`, only the k largest latents of a token stay.'
    )
  return [line for text in paragraphs for line in ('', text)]


def _measured(rows: Sequence[table_lib.Row]) -> str:
  counts = [
    table_lib.value((metrics or {}).get('tokens')) for _, metrics in rows
  ]
  counts = sorted({count for count in counts if count})
  if not counts:
    return 'None of these has been evaluated.'
  tokens = ' to '.join(
    f'{count:,.0f}' for count in {counts[0]: 0, counts[-1]: 0}
  )
  text = (
    f'Measured on {tokens} tokens each. Delta loss: nats per token added to '
    "the language model's loss when the reconstruction takes its place, BOS "
    "kept clean. KL: of the next token's distribution, in nats. FVU: fraction "
    'of variance unexplained, against the mean; FVU inliers: without rows of '
    'outlying norm. Never fired: latents that are off on all of these tokens. '
    f'{_silent(rows)}'
    'Controls: untrained dictionaries of the same L0, in this order: a random '
    'encoder with the best gain, the same encoder with a least-squares '
    'decoder, principal components with the largest scores. With several '
    'layers, figures are means over those written, each replaced alone. '
  )
  return text + (table_lib.note(rows) or '±: 95 % interval.')


def _silent(rows: Sequence[table_lib.Row]) -> str:
  counts = {table_lib.silent(card).get('tokens') for card, _ in rows} - {None}
  if not counts:
    return ''
  tokens = ' or '.join(f'{n:,.0f}' for n in sorted(counts))
  return (
    f'Silent: latents that were off on the last {tokens} tokens of training. '
  )


def _provenance(rows: Sequence[table_lib.Row]) -> list[str]:
  """A list of what the members share; what differs is given as a range."""
  lines = []
  for label, key in (
    ('Language model', 'model'),
    ('Second language model', 'second_model'),
    ('Quantisation of its weights', 'quantisation'),
    ('Training tokens', 'tokens'),
    ('Training steps', 'steps'),
    ('Seed', 'seed'),
    ('Code', 'code'),
  ):
    values = _distinct(rows, key)
    if values:
      shown = ', '.join(values[:6]) + (', ...' if len(values) > 6 else '')
      lines.append(f'- {label}: {shown}')
  texts = {json.dumps(card.get('text'), sort_keys=True) for card, _ in rows}
  for text in sorted(texts - {'null'}):
    values = json.loads(text)
    items = values.items() if isinstance(values, dict) else [('source', values)]
    shown = '; '.join(
      f'{table_lib.escape(key)}: {table_lib.escape(value)}'
      for key, value in items
    )
    lines.append(f'- Text: {shown}')
  return lines or ['- No provenance was recorded.']


def _distinct(rows: Sequence[table_lib.Row], key: str) -> list[str]:
  values = [card[key] for card, _ in rows if card.get(key) is not None]
  numbers = all(isinstance(item, int) for item in values)
  values = set(values if numbers else map(str, values))
  return [
    f'{item:,}'
    if numbers and key in ('tokens', 'steps')
    else table_lib.escape(item)
    for item in sorted(values)
  ]
