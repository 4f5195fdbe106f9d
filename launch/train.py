r"""Trains, evaluates and releases a collection of SAEs.

  gemma-scope train --config=tiny --workdir=runs/tiny
  gemma-scope train --workdir=runs/2b \
      --config='configs/gemma_scope_2b.py:set=16k;layers=12,20;sparsity=30,60'
  ... --config.train.steps=100     (any field of the config)

The same command continues a run that was stopped, at any stage. The exit code
is 0 after SIGTERM or Ctrl-C, and 1 where the cloud said that it will take a
machine away, so that what started the command starts it again.
"""

from __future__ import annotations

import sys

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
    from gemma_scope.runtime import cluster, preemption

    with cluster.joined():
      done = pipeline.run(parsed.config, parsed.workdir)
      again = not done and preemption.of_any_machine()
    if again:
      sys.exit('A machine will be taken away: start the same command again.')


if __name__ == '__main__':
  main()
