r"""Compares two models with crosscoders: what does one have and the other not?

  gemma-scope diffing --config=diffing --workdir=runs/diffing \
      --config.lm.second.checkpoint=/data/gemma-3-270m-it

Trains a crosscoder of the two models at each site of the config; both read the
same tokens. Latents whose decoder is in one model only are tested by latent
scaling, which separates latents that are specific to the model from artefacts
of sparsity. Specific latents are then ablated in either model, beside shared
ones that fire as often. Prints tables and writes diffing.json. The same command
continues. docs/diffing.md has the definitions and a result.
"""

from __future__ import annotations

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(),
  command_line.folder('workdir', 'Folder of the run.', required=True),
  command_line.whole(
    'ablate', 8, 'Specific latents of each crosscoder to ablate.', low=0
  ),
  name='diffing',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope import config as config_lib
    from gemma_scope import specs

    # Before JAX, a model or a device; without a second model the sentence that
    # says so comes from below.
    if specs.second_model(parsed.config):
      config_lib.check(parsed.config)
    from gemma_scope import diffing
    from gemma_scope.runtime import cluster

    with cluster.joined():
      diffing.run(parsed.config, parsed.workdir, parsed.ablate)


if __name__ == '__main__':
  main()
