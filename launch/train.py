"""Trains, evaluates and releases a collection of SAEs; run again to continue.

.venv/bin/python launch/train.py --config=configs/tiny.py --workdir=runs/tiny
... --config='configs/gemma_scope_2b.py:set=16k;layers=12,20;sparsity=30,60'
... --config.train.steps=100     (any field of the config)
"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(arguments: list[str]) -> None:
  if arguments[1:]:
    raise app.UsageError(f'What is {arguments[1]!r}? Flags start with --.')
  logging.set_verbosity(logging.WARNING)
  from gemma_scope import config as config_lib

  try:
    config_lib.check(CONFIG.value)  # before jax, a model or a device
    from gemma_scope import pipeline
    from gemma_scope.runtime import cluster

    with cluster.joined():
      pipeline.run(CONFIG.value, WORKDIR.value)
  except (ValueError, RuntimeError, OSError) as error:
    if flags.FLAGS.pdb:
      raise
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
