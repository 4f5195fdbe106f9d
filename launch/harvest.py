r"""Writes activations to disk, to train on many times.

  gemma-scope harvest --config=tiny --workdir=runs/harvest \
      --out=runs/store --chunks=16

Reads the text once with the language model and keeps the activations of all
sites of the config. Training with --config.activations.store=runs/store then
sees the same batches as with the model itself. The same command continues a
harvest that was stopped. On several hosts each writes chunks of its own, with a
model on its own devices.
"""

from __future__ import annotations

import pathlib

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(),
  command_line.folder(
    'workdir',
    'Folder that holds the tokenised text, in tokens/; it is made where it '
    'does not exist.',
    required=True,
  ),
  command_line.folder(
    'out', 'Folder of the activation store to write.', required=True
  ),
  command_line.whole(
    'chunks',
    None,
    'Number of chunks to write, of activations.chunk_rows rows each.',
    required=True,
    low=1,
  ),
  name='harvest',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope import config as config_lib

    config = parsed.config
    config_lib.check(config)
    if config.activations.store:
      raise ValueError(
        'activations.store names a store to read, and harvest writes one to '
        '--out: leave activations.store empty.'
      )
    from gemma_scope.runtime import cluster, remote

    with (
      cluster.joined(),
      remote.folder(parsed.workdir) as workdir,
      remote.folder(parsed.out) as out,
    ):
      harvest(config, workdir, out, parsed.chunks)


def harvest(config, workdir: pathlib.Path, out: pathlib.Path, chunks: int):
  """Writes this process's chunks of the store."""
  import jax

  from gemma_scope import config as config_lib
  from gemma_scope import mesh as mesh_lib
  from gemma_scope import specs
  from gemma_scope.activations import store
  from gemma_scope.runtime import cluster, opened, preemption
  from gemma_scope.runtime import interrupt as interrupt_lib
  from gemma_scope.runtime import progress as progress_lib
  from gemma_scope.training import setup

  if specs.second_model(config):
    raise config_lib.ConfigError(
      'An activation store holds the rows of one model: leave lm.second empty.'
    )
  mesh = mesh_lib.make(config.mesh, jax.local_devices())
  config_lib.check(config, setup.dimensions(config), mesh.devices.shape)
  workdir.mkdir(parents=True, exist_ok=True)
  out.mkdir(parents=True, exist_ok=True)
  report = print if cluster.first() else lambda line: None
  try:
    with (
      opened.exclusive(out),
      interrupt_lib.Interrupt(alone=True) as interrupt,
    ):
      source, facts = setup.make_source(config, workdir, mesh, report)
      passes = 0

      def poll():
        nonlocal passes
        interrupt.check()
        passes += 1

      with progress_lib.Progress(
        chunks,
        source.layout.rows,
        label='harvest',
        status=lambda: f'pass {passes:,}, {source.parts:,} in a chunk',
      ) as progress:
        report_chunk = lambda chunk: progress.update(chunk + 1)
        store.write_store(out, source, chunks, facts, poll, report_chunk)
  except interrupt_lib.Interrupted:
    # The others must not wait for this one; a machine that goes is no end.
    if jax.process_count() > 1 or preemption.noticed():
      raise RuntimeError('stopped; the same command continues') from None
    print('stopped; the same command continues')


if __name__ == '__main__':
  main()
