r"""Evaluates SAEs on held-out text: L0, FVU, loss recovered, with controls.

  gemma-scope evaluate --config=tiny --workdir=runs/tiny \
      --release=runs/tiny/release --out=scores.json
  gemma-scope evaluate --config=gemma_scope_2b --config.lm.checkpoint=... \
      --release=google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_176 \
      --workdir=runs/2b --out=scores.json
  gemma-scope evaluate --lm=gemma3-270m --workdir=runs/270m \
      --release=google/gemma-scope-2-270m-pt/resid_post/... --out=scores.json

The config names the language model, the text and the number of sequences
(evaluation.sequences). With --lm in its place no config is needed: the text is
English prose (Python for the embedded model). All SAEs are evaluated in one
pass over the text.
"""

from __future__ import annotations

import pathlib
import sys

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(required=False),
  command_line.text(
    'lm',
    None,
    'The language model, such as gemma3-270m or tiny, in place of --config; '
    'its weights are found by this name.',
  ),
  command_line.whole(
    'sequences', 64, 'With --lm: how many sequences to evaluate on.', low=1
  ),
  command_line.local_folder(
    'workdir',
    'Folder that holds the tokenised text, in tokens/; it is made where it '
    'does not exist.',
    required=True,
  ),
  command_line.paths(
    'release',
    'The SAEs: releases, folders of single SAEs in any published format, or '
    'their paths on the Hugging Face hub.',
    required=True,
  ),
  command_line.text(
    'site',
    '',
    'Site of a params.npz that has no card: resid_post/12, or of a transcoder '
    'mlp_in/12:mlp_out/12.',
  ),
  command_line.new_file(
    'out',
    'JSON file to write, with all metrics and their intervals; its folder is '
    'made where it does not exist.',
    required=True,
  ),
  name='evaluate',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    config = parsed.config if parsed.lm is None else _default(parsed)
    if config is None or (parsed.lm and parsed.config):
      raise ValueError('Give one of --config and --lm: the language model.')
    from gemma_scope import config as config_lib

    config_lib.check(config)
    out = pathlib.Path(parsed.out)
    if out.exists():
      raise ValueError(f'{out} exists; choose another file for --out.')
    # A folder that cannot be made is refused before the work.
    out.parent.mkdir(parents=True, exist_ok=True)
    workdir = pathlib.Path(parsed.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    from gemma_scope import pipeline
    from gemma_scope.release import table
    from gemma_scope.release.formats import published
    from gemma_scope.runtime import interrupt as interrupt_lib

    about = published.described(parsed.site, config.lm.name)
    saes = published.open_all(','.join(parsed.release), about=about)
    try:
      with interrupt_lib.Interrupt() as interrupt:
        scores = pipeline.evaluate_saes(config, workdir, saes, interrupt, out)
    except interrupt_lib.Interrupted:
      sys.exit('stopped; nothing was written')
    rows = [(sae.card, scores[sae.name]) for sae in saes]
    print(table.table(rows))
    print(table.note(rows))


def _default(parsed):
  """The settings of an evaluation on text that every machine has."""
  from gemma_scope import config as config_lib

  config = config_lib.load('tiny')
  if parsed.lm != config.lm.name:
    config.lm.name, config.text.source = parsed.lm, 'prose'
  config.evaluation.sequences = parsed.sequences
  return config


if __name__ == '__main__':
  main()
