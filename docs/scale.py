"""The tables of docs/scale.md: programs compiled for pods that are not here.

python docs/scale.py runs/scale.jsonl      # needs libtpu; goes on where it was
python docs/scale.py runs/scale.jsonl collection 27b     # these tables alone
python docs/scale.py --suites runs/suites.jsonl    # of compile-check --suites
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'

GS1 = 'layers={};sites=resid_post;widths={};sparsity=6e-4;penalty=l0'
# (table, config file, argument, mesh (sae, data, latent) or none, topology)
CASES = [
  *(
    ('step', config, GS1.format(layer, width), mesh, topology)
    for config, layer in (('gemma_scope_2b', 12), ('gemma_scope_9b', 20))
    for topology, devices in (
      ('v3:4x2', 16),
      ('v5p:2x2x1', 4),
      ('v5p:2x2x4', 16),
      ('v5e:4x4', 16),
      ('v6e:4x4', 16),
    )
    for width, mesh in (
      ('16k', (1, devices, 1)),
      ('131k', (1, 1, devices)),
      ('1m', (1, 1, devices)),
    )
  ),
  *(
    ('harvest', config, argument, mesh, topology)
    for config, argument in (
      ('gemma_scope_2b', GS1.format('0-25', '16k')),
      ('gemma_scope_9b', GS1.format('0-41', '16k')),
    )
    for mesh, topology in (
      ((1, 4, 4), 'v5p:2x2x4'),
      ((1, 4, 4), 'v5e:4x4'),
      ((1, 4, 4), 'v6e:4x4'),
    )
  ),
  *(
    ('27b', 'gemma_scope_2', argument, mesh, topology)
    for argument in (
      'model=27b;layers=40;sites=resid_post;widths=262k;sparsity=50',
      'model=27b;layers=40;sites=resid_post;widths=1m;sparsity=50',
    )
    for mesh, topology in (
      ((1, 1, 16), 'v5p:2x2x4'),
      ((1, 2, 16), 'v6e:4x8'),
    )
  ),
  *(
    (
      'collection',
      'gemma_scope_2b',
      'layers=0-25;sites=attn_out,mlp_out,resid_post;widths=16k;sparsity=50',
      mesh,
      topology,
    )
    for mesh, topology in (
      ((2, 4, 2), 'v5p:2x2x4'),
      ((2, 8, 2), 'v6e:4x8'),
      ((2, 8, 4), 'v5e:8x8'),
    )
  ),
]


def records(out: pathlib.Path, tables: list[str]):
  """Every case once; those that are in `out` already are not compiled again."""
  from gemma_scope.performance import compile_check

  done = {}
  if out.exists():
    for line in out.read_text().splitlines():
      record = json.loads(line)
      done[tuple(record['case'])] = record
  for table, name, argument, mesh, topology in CASES:
    if tables and table not in tables:
      continue
    programs = {'step': ['step'], 'harvest': ['harvest']}.get(
      table, ['harvest', 'step']
    )
    for program in programs:
      case = (table, name, argument, str(mesh), topology, program)
      if case not in done:
        config = importlib.import_module(f'configs.{name}').get_config(argument)
        config.mesh.sae, config.mesh.data, config.mesh.latent = mesh
        try:
          (record,) = compile_check.check(config, topology, [program])
        except ValueError as error:
          record = {'refused': str(error), 'program': program}
        record['case'] = case
        with open(out, 'a') as file:
          file.write(json.dumps(record) + '\n')
        done[case] = record
        print(case, record.get('refused', record.get('fits')), file=sys.stderr)
      yield done[case]


def row(record) -> str:
  table, name, argument, mesh, topology, program = record['case']
  fields = dict(part.split('=') for part in argument.split(';'))
  suite = name.removeprefix('gemma_scope_')
  if name == 'gemma_scope_2':
    suite = f'3 {fields["model"]}'
  suite += f' {fields["widths"]}'
  if 'refused' in record:
    return f'| {suite} | {program} | {topology} | {record["refused"]} |'
  hbm, cap = record['hbm_bytes'], record['hbm_capacity_bytes']
  gib = '-' if hbm is None else f'{hbm / 2**30:.1f}'
  size = ' x '.join(str(n) for n in record['mesh'].values())
  ms = lambda s: 'none' if s is None else f'{1e3 * s:.1f}'
  seconds = record['estimated_s'] or record['roofline_s']
  tokens = 1e9 * 8
  hours = seconds * tokens / record['tokens'] / 3600 * record['chips']
  moved = sum(c['bytes'] for c in record['collectives'].values()) / 2**20
  fit = f'{gib} of {cap / 2**30:.0f}' + ('' if record['fits'] else ' **no**')
  if not record['fits']:
    return (
      f'| {suite} | {program} | {topology} | {size} | {fit} | | '
      f'{ms(record["roofline_s"])} | | | | |'
    )
  return (
    f'| {suite} | {program} | {topology} | {size} | {fit} | '
    f'{ms(record["estimated_s"])} | {ms(record["roofline_s"])} | '
    f'{record["utilisation"]:.0%} | {moved:,.0f} | {hours:,.0f} | '
    f'{record["compile_s"]:.0f} |'
  )


SUITES = (
  '| suite and set | topology | runs | sae x data x latent | by arithmetic | '
  'step | pass | together, GiB |\n' + '|---|---|---|---|' + '---:|' * 4
)


def suite_rows(path: pathlib.Path):
  """A row for every set: its memory on a device, by arithmetic and compiled."""
  of_set: dict[tuple[str, str], dict[str, dict]] = {}
  for line in path.read_text().splitlines():
    record = json.loads(line)
    key = record['config'], record['topology']
    of_set.setdefault(key, {})[record.get('program', 'refused')] = record
  gib = lambda n: '-' if n is None else f'{n / 2**30:.1f}'
  for (config, topology), record_of in of_set.items():
    name = f'| {config.replace(".py:", " ")} | {topology} '
    if 'refused' in record_of:
      yield f'{name}| {record_of["refused"]["refused"]} | | | | | |'
      continue
    step, harvest = record_of['step'], record_of['harvest']
    runs = step['runs']
    shown = f'{len(runs)}, `{runs[0]}` ...' if runs else '1'
    size = ' x '.join(map(str, step['mesh'].values()))
    together, room = step.get('together_bytes'), step['hbm_capacity_bytes']
    fits = together is not None and together <= room
    yield (
      f'{name}| {shown} | {size} | {gib(step["arithmetic_bytes"])} | '
      f'{gib(step["hbm_bytes"])} | {gib(harvest["hbm_bytes"])} | '
      f'{gib(together)} of {gib(room)}{"" if fits else " **no**"} |'
    )


HEAD = (
  '| | program | topology | sae x data x latent | HBM, GiB | estimate, ms | '
  'roofline, ms | utilisation | collectives, MiB | chip-hours per 8 B tokens | '
  'compiled in, s |\n' + '|---|---|---|---|---|' + '---:|' * 6
)


def main() -> None:
  if sys.argv[1] == '--suites':
    print(SUITES, *suite_rows(pathlib.Path(sys.argv[2])), sep='\n')
    return
  tables: dict[str, list[str]] = {}
  for record in records(pathlib.Path(sys.argv[1]), sys.argv[2:]):
    tables.setdefault(record['case'][0], []).append(row(record))
  for name, rows in tables.items():
    print(f'## {name}\n\n{HEAD}')
    print('\n'.join(rows) + '\n')


if __name__ == '__main__':
  main()
