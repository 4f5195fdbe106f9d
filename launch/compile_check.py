"""Compiles a config's programs for a TPU pod, on a machine without one.

  .venv/bin/pip install libtpu==0.0.50     # the compiler; see launch/lock/ci.in
  .venv/bin/python launch/compile_check.py --topology=v5p:2x2x4 \
      --config='configs/gemma_scope_2b.py:set=1m;layers=12' \
      --config.mesh.data=1 --config.mesh.latent=16 --out=check.jsonl

Per device: HBM against the chip's, FLOPs, bytes, the compiler's own estimate of
the time beside the roofline, collectives. An estimate is no measurement.
"""

from __future__ import annotations

import json
import os
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'  # the pod's devices are descriptions

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
TOPOLOGY = flags.DEFINE_list('topology', None, 'Such as v5p:2x2x4.')
PROGRAMS = flags.DEFINE_list('programs', ['harvest', 'step'], 'Of these two.')
OUT = flags.DEFINE_string('out', '', 'File to append JSON lines to.')
flags.mark_flags_as_required(['config', 'topology'])


def main(arguments: list[str]) -> None:
  if arguments[1:]:
    raise app.UsageError(f'What is {arguments[1]!r}? Flags start with --.')
  logging.set_verbosity(logging.ERROR)
  from gemma_scope.performance import compile_check

  named = next(a for a in sys.argv if a.startswith('--config='))
  fits = True
  try:
    for topology in TOPOLOGY.value:
      for found in compile_check.check(CONFIG.value, topology, PROGRAMS.value):
        record = {**found, 'config': named.removeprefix('--config=')}
        print('\n'.join(compile_check.lines(record)), flush=True)
        fits &= record['fits']
        if OUT.value:
          with open(OUT.value, 'a') as file:
            file.write(json.dumps(record) + '\n')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')
  sys.exit(0 if fits else 1)


if __name__ == '__main__':
  app.run(main)
