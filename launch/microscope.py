"""The microscope: what SAEs fire on, what they do, and whether to believe it.

  .venv/bin/python launch/microscope.py build --workdir=runs/tiny
  ... serve    the pages, with a live view on your own text: steer, ablate, why
  ... why --sae=resid_post/layer_2/width_1k/average_l0_33 --text='if x is not'
      (--logit=' None, self': tokens; by default the two likeliest)
  ... steer --sae=... --text='The value' --change=503:add:0.5
  ... probe --sae=... --prompts=labelled.jsonl [--pooling=mean]
  ... explain --sae=... [--features=all] [--endpoint=URL --labeller=NAME]
  ... suite [--sae=...]       ... export --model_id=gemma-2-2b --title=my-saes
  ... pages    written again, with the labels that are there

All of them take --workdir, a run's folder. build reads the run's text with its
language model, writes <workdir>/microscope and prints the address of its pages,
which open without a server. --release takes other SAEs: releases, or SAEs of
any format in a folder or on the hub, with commas. --config names model and text
where the folder is of no run:

  ... build --config=configs/gemma_scope_2b.py --config.lm.checkpoint=... \
      --workdir=runs/2b --release=google/gemma-scope-2b-pt-res/layer_20/...
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gemma_scope.runtime import interrupt

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a training run.')
RELEASE = flags.DEFINE_string('release', '', "SAEs; default: the run's.")
OUT = flags.DEFINE_string('out', None, 'Default <workdir>/microscope.')
flags.mark_flag_as_required('workdir')
OPTIONS = [
  flags.DEFINE_string('sae', '', 'One of the SAEs, by a part of its name.'),
  flags.DEFINE_integer('sequences', 1024, 'To read, for build.', 2),
  flags.DEFINE_integer('batch', 32, 'Sequences a forward pass.', 1),
  flags.DEFINE_integer('port', 8642, 'Of serve.', 1, 65535),
  flags.DEFINE_string('text', '', 'What the model has read, why and steer.'),
  flags.DEFINE_string('logit', '', 'Tokens a,b or a, for why and steer.'),
  flags.DEFINE_list('change', [], 'LATENT:KIND:STRENGTH, for steer.'),
  flags.DEFINE_integer('tokens', 48, 'To write, for steer.', 1),
  flags.DEFINE_float('temperature', 0.5, 'Of steer; 0: the likeliest.', 0.0),
  flags.DEFINE_integer('seed', 0, 'Of steer.', 0),
  flags.DEFINE_string('prompts', '', 'Labelled JSONL, for probe.'),
  flags.DEFINE_enum('pooling', 'last', ['last', 'mean', 'max'], 'For probe.'),
  flags.DEFINE_string('features', '200', 'all, a number, or latents.'),
  flags.DEFINE_string('endpoint', '', 'OpenAI-compatible, for explain.'),
  flags.DEFINE_string('labeller', '', 'Its model, or local; else rules.'),
  flags.DEFINE_integer('most_questions', 10_000, 'Sent by explain.', 1),
  flags.DEFINE_string('model_id', '', "Neuronpedia's name of the model."),
  flags.DEFINE_string('title', 'gemma-scope', 'Of the export.'),
  flags.DEFINE_string('creator', '', 'Who made the SAEs.'),
]


def main(arguments: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  from gemma_scope.microscope import commands, session

  names = ', '.join(commands.COMMANDS)
  if len(arguments) != 2 or arguments[1] not in commands.COMMANDS:
    raise app.UsageError(f'Say one of {names}, then flags.')
  opened = session.Session(
    pathlib.Path(WORKDIR.value), OUT.value and pathlib.Path(OUT.value),
    CONFIG.value, RELEASE.value,
  )  # fmt: skip
  options = commands.Options(**{flag.name: flag.value for flag in OPTIONS})
  try:
    commands.run(arguments[1], opened, options)
  except interrupt.Interrupted:
    sys.exit('stopped and saved; the same command continues')
  except KeyboardInterrupt:
    sys.exit('stopped')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
