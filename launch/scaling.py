r"""Predicts the error of wide SAEs from narrow ones, then trains and compares.

  gemma-scope scaling --config=gemma3_270m:layers=9 --workdir=runs/scaling \
      --config.collection.sites=resid_post \
      --config.activations.store=runs/store \
      --widths=512,1024,2048,4096 --steps=225,450,900 --predict=8192

Trains SAEs of all --widths and of every target L0 of the config, in one run for
each number of --steps, and fits the error as a law of width, L0 and tokens. The
prediction for the widths of --predict is written with its sha256 before these
are trained. Then prints prediction and result, next to two baselines: the error
of the widest SAE, and a straight line. The same command continues.
"""

from __future__ import annotations

import pathlib

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(),
  command_line.local_folder(
    'workdir', 'Folder of the runs and of the prediction.', required=True
  ),
  command_line.words(
    'widths', ['512', '1024', '2048', '4096'], 'Widths to measure.'
  ),
  command_line.words(
    'steps',
    ['225', '450', '900'],
    'Steps of the runs; the schedules of the config shrink with them.',
  ),
  command_line.words(
    'predict', ['8192'], 'Widths to predict, and to train afterwards.'
  ),
  name='scaling',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope import config as config_lib

    config_lib.check(parsed.config)
    numbers = {
      name: _numbers(name, getattr(parsed, name))
      for name in ('widths', 'steps', 'predict')
    }
    from gemma_scope import scaling

    plan = scaling.Plan(
      parsed.config, numbers['widths'], numbers['steps'], numbers['predict']
    )
    scaling.run(plan, pathlib.Path(parsed.workdir))


def _numbers(name: str, words: list[str]) -> tuple[int, ...]:
  try:
    numbers = tuple(sorted(int(word) for word in words))
  except ValueError:
    numbers = ()
  if not numbers or numbers[0] < 1:
    raise ValueError(
      f'--{name} takes whole numbers above 0, separated by commas; found '
      f'{",".join(words)!r}.'
    )
  return numbers


if __name__ == '__main__':
  main()
