"""Tables of docs/benchmark.md from the lines that the two benchmarks append.

python docs/benchmark_table.py benchmark.jsonl peers.jsonl
"""

from __future__ import annotations

import json
import pathlib
import sys

# measure -> (head, cell of a record) of each column.
_RATE = ('tokens/s', lambda r: rate(r, 'tokens_per_s'))
_SHARE = ('share of matmul', lambda r: share(r, 'matmul_share'))
_PEAK = ('peak, GiB', lambda r: f'{(r.get("peak_bytes") or 0) / 2**30:.2f}')
_DEVICE = ('device', lambda r: f'{r["devices"]} {r["device"]}')


def _of(head: str, key: str = ''):
  return head, lambda r: str(r[key or head])


COLUMNS = {
  'step': [
    _of('arch'),
    _of('branch'),
    _of('dtype'),
    _of('d'),
    _of('width'),
    _of('batch'),
    _of('k'),
    _of('room', 'limit'),
    _of('members'),
    _RATE,
    _SHARE,
    ('L0', lambda r: f'{r["l0"]:.1f}'),
    ('sparse steps', lambda r: f'{r["sparse_steps"]:.0%}'),
    _PEAK,
    _DEVICE,
  ],
  'trainer': [
    _of('trainer'),
    _of('dtype'),
    _of('d'),
    _of('width'),
    _of('batch'),
    _of('k'),
    _RATE,
    ('share of its own matmul', lambda r: f'{r["matmul_share"]:.2f}'),
    ('its matmul, ms', lambda r: f'{1000 * r["matmul_s"]:.0f}'),
    _of('device'),
  ],
  'harvest': [
    _of('model', 'lm'),
    _of('sites'),
    _of('tokens a sequence', 'seq_len'),
    _of('sequences a pass', 'lm_batch'),
    _RATE,
    _SHARE,
    _PEAK,
    _DEVICE,
  ],
  'collection': [
    _of('model', 'lm'),
    _of('arch'),
    _of('branch'),
    _of('width'),
    _of('members'),
    _RATE,
    ('as single runs', lambda r: rate(r, 'single_runs_tokens_per_s')),
    ('times as fast', lambda r: share(r, 'ratio')),
    _DEVICE,
  ],
  'data': [
    _of('read from', 'measure'),
    _of('d'),
    _of('batch'),
    _of('rows'),
    ('rows/s', lambda r: rate(r, 'rows_per_s')),
    ('GB/s', lambda r: f'{r["bytes_per_s"] / 1e9:.2f}'),
    _DEVICE,
  ],
}


def rate(record, key: str) -> str:
  """Median, and its range."""
  low, high = record[f'{key}_low'], record[f'{key}_high']
  return f'{record[key]:,.0f} ({low:,.0f} to {high:,.0f})'


def share(record, key: str) -> str:
  low, high = record[f'{key}_low'], record[f'{key}_high']
  return f'{record[key]:.2f} ({low:.2f} to {high:.2f})'


def kind(record) -> str:
  """The table that a record belongs to."""
  if 'trainer' in record:
    return 'trainer'
  if record['measure'] in ('chunk', 'store'):
    return 'data'
  return record['measure']


def table(name: str, records) -> str:
  """The records in Markdown."""
  heads, cells = zip(*COLUMNS[name], strict=True)
  rows = [heads, ('---',) * len(heads)]
  rows += [[cell(record) for cell in cells] for record in records]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def main(files: list[str]) -> None:
  """Prints a table of each kind of measurement in the files."""
  if not files:
    sys.exit(__doc__)
  lines = [
    line for name in files for line in pathlib.Path(name).open() if line.strip()
  ]
  records = [json.loads(line) for line in lines]
  for name in COLUMNS:
    own_records = [record for record in records if kind(record) == name]
    if own_records:
      print(f'## {name}\n\n{table(name, own_records)}\n')


if __name__ == '__main__':
  main(sys.argv[1:])
