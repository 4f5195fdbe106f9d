"""gemma-scope COMMAND: every command of launch/ under one name.

Each command is one module here; `gemma-scope train` and `launch/train.py` are
the same.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
  'train': 'Train, evaluate and release a collection of SAEs.',
  'evaluate': 'Evaluate SAEs on held-out text: L0, FVU, loss recovered.',
  'release': 'Write, convert, list or upload a release.',
  'microscope': 'Find, read, steer and check the features of SAEs.',
  'harvest': 'Write activations to disk, to train on many times.',
  'site-statistics': 'Print what the activations of each site are like.',
  'synthetic': 'Write synthetic activations whose true features are known.',
  'prepare-text': 'Tokenise a text into a token store.',
  'prepare-rollouts': "Write a chat model's answers into a token store.",
  'scaling': 'Predict the error of wide SAEs from narrow ones, and compare.',
  'diffing': 'Compare two models with crosscoders: PT against IT.',
  'benchmark': 'Measure the speed of training steps and harvests here.',
  'compile-check': 'Compile for an absent TPU pod: memory per device.',
}


def usage() -> str:
  """The commands, a line each."""
  lines = [f'  {name:17} {text}' for name, text in COMMANDS.items()]
  return '\n'.join(
    [
      'Usage: gemma-scope COMMAND [flags]',
      '',
      'Sparse autoencoders on Gemma: training, evaluation, interpretation.',
      '',
      *lines,
      '',
      'gemma-scope COMMAND --help explains a command and its flags.',
    ]
  )


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command that the first word names."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if not arguments or arguments[0] in ('--help', '-h', 'help'):
    print(usage())
    sys.exit(0 if arguments else 2)
  name = arguments[0]
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    print(
      f'There is no command {name!r}.{hint} The commands are '
      f'{", ".join(COMMANDS)}.',
      file=sys.stderr,
    )
    sys.exit(2)
  module = importlib.import_module(f'{__name__}.{name.replace("-", "_")}')
  module.main(arguments[1:])
