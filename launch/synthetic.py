"""Writes synthetic activations with a known answer; run again to continue.

  .venv/bin/python launch/synthetic.py --out=runs/synthetic --chunks=16
  .venv/bin/python launch/synthetic.py --out=runs/clt --chunks=16 \
      --sites=mlp_in/0,mlp_in/1,mlp_out/0,mlp_out/1

An activation store, and beside it features.npz with the features it is made of
(gemma_scope/synthetic.py says how). A config with lm.name 'synthetic', the same
seq_len, chunk_rows, lm_batch and dtype, and activations.store=runs/synthetic
trains from it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

from absl import app, flags, logging

from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease
from gemma_scope.runtime import progress as progress_lib

OUT = flags.DEFINE_string('out', None, 'Folder of the activation store.')
CHUNKS = flags.DEFINE_integer('chunks', None, 'Chunks to hold in the end.')
flags.mark_flags_as_required(['out', 'chunks'])

# Those of configs/tiny.py; rows are independent, and a sequence is a count.
CHUNK_ROWS = flags.DEFINE_integer(
  'chunk_rows', 2**16, 'Rows a chunk, at least.'
)
SEQ_LEN = flags.DEFINE_integer('seq_len', 128, 'Tokens a sequence, with BOS.')
LM_BATCH = flags.DEFINE_integer('lm_batch', 32, 'Sequences counted together.')
DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ('float32', 'bfloat16'), 'Of the rows.'
)

# One flag for each field of synthetic.Settings; not given: its default.
flags.DEFINE_integer('features', None, 'Features in all.')
flags.DEFINE_integer('d_model', None, 'Width of every site.')
flags.DEFINE_float('l0', None, 'Mean number of features that fire.')
flags.DEFINE_float('zipf', None, 'Exponent of their frequencies by rank.')
flags.DEFINE_float('max_frequency', None, 'Cap on a frequency.')
flags.DEFINE_integer('parents', None, 'Features that have children.')
flags.DEFINE_integer('children', None, 'Children of each.')
flags.DEFINE_float('child_share', None, 'How often a child joins its parent.')
flags.DEFINE_integer('groups', None, 'Correlated groups; 0: none.')
flags.DEFINE_float('correlation', None, 'Of two features of one group.')
flags.DEFINE_float('spread', None, 'Of the logarithm of a coefficient.')
flags.DEFINE_float('noise', None, "Its variance, a share of the features'.")
flags.DEFINE_float('bias', None, "Its norm, by the features' deviation.")
flags.DEFINE_list('sites', None, 'Sites, such as mlp_in/0,mlp_out/0.')
flags.DEFINE_integer('seed', None, 'Of everything.')


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  from gemma_scope.activations import harvest, store, synthetic

  out = pathlib.Path(OUT.value)
  fields = [field.name for field in dataclasses.fields(synthetic.Settings)]
  given = {name: flags.FLAGS[name].value for name in fields}
  given = {name: value for name, value in given.items() if value is not None}
  if 'sites' in given:
    given['sites'] = tuple(given['sites'])
  try:
    sizes = (CHUNKS.value, CHUNK_ROWS.value, LM_BATCH.value, SEQ_LEN.value - 1)
    if min(sizes) < 1:
      raise ValueError(
        'chunks, chunk_rows and lm_batch are at least 1 and seq_len at least '
        f'2; found {sizes[0]}, {sizes[1]}, {sizes[2]} and {sizes[3] + 1}.'
      )
    layout = harvest.Layout.of(
      chunk_rows=CHUNK_ROWS.value,
      seq_len=SEQ_LEN.value,
      batch=1,
      lm_batch=LM_BATCH.value,
      dtype=DTYPE.value,
    )
    source = synthetic.Source(synthetic.Settings(**given), layout)
    out.mkdir(parents=True, exist_ok=True)
    with lease.Lease(out), interrupt_lib.Interrupt() as interrupt:
      progress = progress_lib.Progress(
        CHUNKS.value, layout.rows, label='synthetic'
      )
      store.write_store(
          out, source, CHUNKS.value,
          synthetic.facts(source.truth, layout.dtype), interrupt.check,
          lambda chunk: progress.update(chunk + 1),
      )  # fmt: skip
      synthetic.write_truth(out, source.truth)
      progress.close()
  except interrupt_lib.Interrupted:
    print('stopped; the same command continues')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
