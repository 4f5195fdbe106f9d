"""Writes activations to disk, to train on many times; run again to continue.

  .venv/bin/python launch/harvest.py --config=configs/tiny.py \
      --workdir=runs/harvest --out=runs/store --chunks=16

Harvests the config's sites in one pass, `--chunks` chunks of its
activations.chunk_rows. Then `--config.activations.store=runs/store` trains from
it, on the same batches as from the model.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease
from gemma_scope.runtime import progress as progress_lib

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the token store.')
OUT = flags.DEFINE_string('out', None, 'Folder of the activation store.')
CHUNKS = flags.DEFINE_integer('chunks', None, 'Chunks to hold in the end.')
flags.mark_flags_as_required(['config', 'workdir', 'out', 'chunks'])


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  from gemma_scope import config as config_lib
  from gemma_scope import mesh as mesh_lib
  from gemma_scope.activations import store
  from gemma_scope.training import setup

  config, out = CONFIG.value, pathlib.Path(OUT.value)
  try:
    config_lib.check(config)
    if config.activations.store:
      raise ValueError(
        'activations.store is set: a store is read, not written.'
      )
    workdir = pathlib.Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with lease.Lease(out), interrupt_lib.Interrupt() as interrupt:
      mesh = mesh_lib.make(config.mesh)
      source, facts = setup.make_source(config, workdir, mesh, print)
      progress = progress_lib.Progress(
        CHUNKS.value, source.layout.rows, label='harvest'
      )
      store.write_store(
          out, source, CHUNKS.value, facts, interrupt.check,
          lambda chunk: progress.update(chunk + 1),
      )  # fmt: skip
      progress.close()
  except interrupt_lib.Interrupted:
    print('stopped; the same command continues')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
