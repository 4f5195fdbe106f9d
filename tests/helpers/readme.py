"""The README's code blocks, and what runs its Python on the real model.

  python -m tests.helpers.readme FOLDER

makes the demo's run in small in FOLDER, where the first block looks for it,
and runs the blocks. A process of its own: on eight devices, as in the tests,
the model is held eight times.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys

import gemma_scope
from configs import gemma3_270m
from gemma_scope import pipeline
from gemma_scope.evaluation import batches
from gemma_scope.microscope import session

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language: str) -> list[str]:
  code_blocks = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)
  return [text for name, text in code_blocks if name == language]


def small_demo(folder: pathlib.Path) -> None:
  """The demo in small, in the current folder's runs/gemma3-270m."""
  (folder / 'text.txt').write_text('\n\n'.join([README] * 8))
  config = gemma3_270m.get_config('layers=9;widths=256;sparsity=8')
  config.collection.sites = ('resid_post',)
  config.text.source, config.text.seq_len = f'files:{folder}/text.txt', 64
  config.activations.chunk_rows, config.activations.lm_batch = 2048, 16
  config.train.steps, config.train.batch = 24, 256
  config.train.warm_up, config.train.decay = 4, 8
  config.train.closing_batches, config.train.l0_steps = 4, 10
  config.evaluation.sequences, config.evaluation.batch = 4, 4
  # Controls of so small an SAE need no more.
  batches._SAMPLE_TOKENS, batches._SAMPLE_SEQUENCES = 1024, 16
  quiet = lambda _: None
  run = pathlib.Path('runs/gemma3-270m')
  pipeline.run(config, run, report=quiet)
  session.Session(run, report=quiet).build(8, 8, lambda: None)


def main(folder: pathlib.Path) -> None:
  os.chdir(folder)
  small_demo(folder)
  names = {}
  for block in blocks('python'):
    exec(block, names)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
