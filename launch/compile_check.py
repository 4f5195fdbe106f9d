r"""Compiles a config's programs for a TPU pod, on a machine without one.

  pip install libtpu==0.0.50     # the compiler; see launch/lock/ci.in
  gemma-scope compile-check --topology=v5p:2x2x4 \
      --config='configs/gemma_scope_2b.py:set=1m;layers=12' \
      --config.mesh.data=1 --config.mesh.latent=16 --out=check.jsonl

Shows for each device: memory next to the chip's, FLOPs, bytes, collectives, and
the compiler's estimate of the time next to the roofline. An estimate is not a
measurement. Exits with code 1 if a program does not fit.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(),
  command_line.words(
    'topology', (), 'TPU topologies, such as v5p:2x2x4.', required=True
  ),
  command_line.words(
    'programs', ('harvest', 'step'), 'What to compile: harvest, step.'
  ),
  command_line.path('out', 'File to append JSON lines to.', default=''),
  name='compile-check',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as given:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # the pod's devices are descriptions
    if given.out:
      pathlib.Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    from gemma_scope.performance import compile_check

    fits = True
    for topology in given.topology:
      for found in compile_check.check(given.config, topology, given.programs):
        record = {**found, 'config': given.config_name}
        print('\n'.join(compile_check.lines(record)), flush=True)
        fits &= record['fits']
        if given.out:
          with open(given.out, 'a') as file:
            file.write(json.dumps(record) + '\n')
    sys.exit(0 if fits else 1)


if __name__ == '__main__':
  main()
