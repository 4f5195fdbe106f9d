r"""Writes synthetic activations whose true features are known.

  gemma-scope synthetic --out=runs/synthetic --chunks=16
  gemma-scope synthetic --out=runs/clt --chunks=16 \
      --sites=mlp_in/0,mlp_in/1,mlp_out/0,mlp_out/1

Writes an activation store, and beside it features.npz, the features that the
activations are sums of (gemma_scope/activations/synthetic.py has the formulas).
A config with lm.name 'synthetic', activations.store=runs/synthetic and the same
seq_len, chunk_rows, lm_batch and dtype trains on it. The same command continues
one that was stopped.
"""

from __future__ import annotations

import dataclasses
import pathlib

from gemma_scope import command_line
from gemma_scope.command_line import number, whole

SETTINGS = (
  # A flag for each field of synthetic.Settings, whose defaults hold.
  whole('features', None, 'Number of features.'),
  whole('d_model', None, 'Width of every site.'),
  number('l0', None, 'Mean number of features active on a row.'),
  number('zipf', None, 'Exponent of the frequencies by rank; 0: all equal.'),
  number('max_frequency', None, 'Largest frequency of a feature.'),
  whole('parents', None, 'Features that have children.'),
  whole('children', None, 'Children of each parent.'),
  number('child_share', None, 'How often a child fires where its parent does.'),
  whole('groups', None, 'Groups of correlated features; 0: none.'),
  number('correlation', None, 'Correlation within a group.'),
  number('spread', None, "Standard deviation of a coefficient's logarithm."),
  number('noise', None, "Variance of the noise, relative to the features'."),
  number('bias', None, "Norm of the bias, relative to the features' spread."),
  command_line.words('sites', (), 'Sites, such as mlp_in/0,mlp_out/0.'),
  whole('seed', None, 'Random seed of features and rows.'),
)
FLAGS = command_line.Flags(
  __doc__,
  command_line.local_folder(
    'out', 'Folder of the activation store to write.', required=True
  ),
  whole('chunks', None, 'Number of chunks to write.', required=True, low=1),
  # As in configs/tiny.py; rows are independent, and a sequence is a count.
  whole('chunk_rows', 2**16, 'Rows of a chunk, at least.', low=1),
  whole('seq_len', 128, 'Tokens of a sequence, with BOS.', low=2),
  whole('lm_batch', 32, 'Sequences of a forward pass.', low=1),
  command_line.choice(
    'dtype', 'float32', ('float32', 'bfloat16'), 'Type of the rows.'
  ),
  *SETTINGS,
  name='synthetic',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope.activations import harvest, store, synthetic
    from gemma_scope.runtime import interrupt as interrupt_lib
    from gemma_scope.runtime import lease
    from gemma_scope.runtime import progress as progress_lib

    out = pathlib.Path(parsed.out)
    fields = [field.name for field in dataclasses.fields(synthetic.Settings)]
    settings = {name: getattr(parsed, name) for name in fields}
    settings['sites'] = tuple(settings['sites']) or None
    settings = {
      name: value for name, value in settings.items() if value is not None
    }
    layout = harvest.Layout.of(
      chunk_rows=parsed.chunk_rows,
      seq_len=parsed.seq_len,
      batch=1,
      lm_batch=parsed.lm_batch,
      dtype=parsed.dtype,
    )
    source = synthetic.Source(synthetic.Settings(**settings), layout)
    out.mkdir(parents=True, exist_ok=True)
    try:
      with lease.Lease(out), interrupt_lib.Interrupt() as interrupt:
        progress = progress_lib.Progress(
          parsed.chunks, layout.rows, label='synthetic'
        )
        store.write_store(
          out,
          source,
          parsed.chunks,
          synthetic.facts(source.truth, layout.dtype),
          interrupt.check,
          lambda chunk: progress.update(chunk + 1),
        )
        synthetic.write_truth(out, source.truth)
        progress.close()
    except interrupt_lib.Interrupted:
      print('stopped; the same command continues')


if __name__ == '__main__':
  main()
