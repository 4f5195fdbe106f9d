"""Evaluates a release on held-out text: L0, FVU, delta loss, controls beside.

  .venv/bin/python launch/evaluate.py --config=configs/tiny.py \
      --workdir=runs/tiny --release=runs/tiny/release --out=scores.json

  ... --config=configs/gemma_scope_2b.py --config.lm.checkpoint=... \
      --release=google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_176

The config names the language model, the text and evaluation.sequences; the
release, or any SAE in a folder or on the hub that formats.published reads, the
SAEs. Several paths are joined by commas; all in one pass over the text.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gemma_scope.runtime import interrupt as interrupt_lib

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the token store.')
RELEASE = flags.DEFINE_list('release', None, 'Releases, or SAEs anywhere.')
OUT = flags.DEFINE_string('out', None, 'JSON to write, with all the metrics.')
flags.mark_flags_as_required(['config', 'workdir', 'release', 'out'])


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  from gemma_scope import pipeline
  from gemma_scope.release import table
  from gemma_scope.release.formats import published

  try:
    out = pathlib.Path(OUT.value)
    if out.exists():
      raise ValueError(f'{out} is there already; name another file.')
    saes = [sae for path in RELEASE.value for sae in published.load_all(path)]
    workdir = pathlib.Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    with interrupt_lib.Interrupt() as interrupt:
      scores = pipeline.evaluate_saes(
        CONFIG.value, workdir, saes, interrupt, out
      )
    print(table.table([(card, scores[card['name']]) for _, card in saes]))
  except interrupt_lib.Interrupted:
    sys.exit('stopped; nothing was written')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
