r"""Compiles a config's programs for a TPU pod, on a machine without one.

  pip install libtpu==0.0.50     # the compiler; see launch/lock/ci.in
  gemma-scope compile-check --topology=v5p:2x2x4 \
      --config='configs/gemma_scope_2b.py:set=1m;layers=12' \
      --config.mesh.data=1 --config.mesh.latent=16 --out=check.jsonl
  gemma-scope compile-check --suites=gemma_scope_2b,gemma_4 --out=suites.jsonl

Shows for each device: memory next to the chip's, FLOPs, bytes, collectives, and
the compiler's estimate of the time next to the roofline. An estimate is not a
measurement. Exits with code 1 if a program does not fit.

With --suites, every set is compiled for the pods that its suite's docstring
names, on the mesh that the suite chooses; for a set that takes several runs,
the largest, and the configs of all of them are shown. Sets that --out already
has are not compiled again.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(required=False),
  command_line.words('topology', (), 'TPU topologies, such as v5p:2x2x4.'),
  command_line.words(
    'programs', ('harvest', 'step'), 'What to compile: harvest, step.'
  ),
  command_line.words(
    'suites', (), 'Published suites in place of --config, or all.'
  ),
  command_line.new_file('out', 'File to append JSON lines to.', default=''),
  name='compile-check',
  needs_flags=True,
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # the pod's devices are descriptions
    required = parsed.config, parsed.topology
    if any(required) if parsed.suites else not all(required):
      raise ValueError('Set --config and --topology, or --suites.')
    if parsed.out:
      pathlib.Path(parsed.out).parent.mkdir(parents=True, exist_ok=True)
    from gemma_scope.performance import compile_check

    fits = True
    for record in _of_suites(parsed) if parsed.suites else _of_config(parsed):
      fits &= record.get('fits', True)
      if refused := record.get('refused'):
        print(f'{record["config"]} on {record["topology"]}: {refused}')
      else:
        print('\n'.join(compile_check.lines(record)), flush=True)
        for run in record.get('runs', ()):
          print(
            f"  one of its runs --config='configs/{record['config']};{run}'"
          )
      if parsed.out:
        with open(parsed.out, 'a') as file:
          file.write(json.dumps(record) + '\n')
    sys.exit(0 if fits else 1)


def _of_config(parsed) -> Iterator[dict[str, Any]]:
  from gemma_scope.performance import compile_check

  for topology in parsed.topology:
    for record in compile_check.check(parsed.config, topology, parsed.programs):
      yield {**record, 'config': parsed.config_name}


def _of_suites(parsed) -> Iterator[dict[str, Any]]:
  """Records of every set; one with 'refused' where nothing is compiled."""
  from configs import suites
  from gemma_scope.performance import compile_check

  published_sets = list(suites.published())
  if (
    unknown := set(parsed.suites)
    - {suite for suite, *_ in published_sets}
    - {'all'}
  ):
    raise ValueError(
      f'There is no suite {", ".join(sorted(unknown))} that names a pod; those '
      'that do are '
      f'{", ".join(dict.fromkeys(suite for suite, *_ in published_sets))}.'
    )
  compiled = set()
  if parsed.out and os.path.exists(parsed.out):
    for line in pathlib.Path(parsed.out).read_text().splitlines():
      record = json.loads(line)
      compiled.add((record['config'], record['topology']))
  for suite, argument, topology in published_sets:
    name = {'config': f'{suite}.py:{argument}', 'topology': topology}
    selected = suite in parsed.suites or 'all' in parsed.suites
    if not selected or tuple(name.values()) in compiled:
      continue
    config = importlib.import_module(f'configs.{suite}').get_config(argument)
    try:
      job, runs = compile_check.job(config, topology)
      records = compile_check.check(job, topology, parsed.programs)
      # Written together, so that none is missing where this is stopped.
      yield from [{**record, **name, 'runs': runs} for record in records]
    except ValueError as error:
      yield {**name, 'refused': str(error)}


if __name__ == '__main__':
  main()
