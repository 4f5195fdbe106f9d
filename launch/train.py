r"""Trains, evaluates and releases a collection of SAEs.

  gemma-scope train --config=tiny --workdir=runs/tiny
  gemma-scope train --workdir=runs/2b \
      --config='configs/gemma_scope_2b.py:set=16k;layers=12,20;sparsity=30,60'
  ... --config.train.steps=100     (any field of the config)

The same command continues a run that was stopped, at any stage.
"""

from __future__ import annotations

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(),
  command_line.folder(
    'workdir',
    'Folder of the run; it is made where it does not exist.',
    required=True,
  ),
  name='train',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope import config as config_lib

    config_lib.check(parsed.config)  # before JAX, a model or a device
    from gemma_scope import pipeline
    from gemma_scope.runtime import cluster

    with cluster.joined():
      pipeline.run(parsed.config, parsed.workdir)


if __name__ == '__main__':
  main()
