r"""Finds, reads, steers and checks the features of SAEs.

  gemma-scope microscope build --workdir=runs/tiny
  gemma-scope microscope serve --workdir=runs/tiny
  gemma-scope microscope why --workdir=runs/tiny --text='if x is not' \
      --sae=resid_post/layer_2/width_1k/average_l0_33

build comes first: it reads the run's text with its language model and writes
dashboards, which open without a server. The SAEs are those of the run in
--workdir; --release names others, in any published format, in a folder or on
the Hugging Face hub. For these, --config names the language model and the text:

  gemma-scope microscope build --workdir=runs/2b --config=gemma_scope_2b \
      --config.lm.checkpoint=... --release=google/gemma-scope-2b-pt-res/layer_20
"""

from __future__ import annotations

import difflib
import pathlib
import sys

from gemma_scope import command_line
from gemma_scope.command_line import (
  choice,
  number,
  path,
  switch,
  text,
  whole,
  words,
)

COMMON = (
  path('workdir', 'Folder of a training run, or a new one.', required=True),
  command_line.config(required=False),
  command_line.paths(
    'release',
    'The SAEs, separated by commas: releases or single SAEs; by default the '
    "run's own.",
  ),
  path('out', 'Folder of the index; by default <workdir>/microscope.'),
)
OPTIONS = (
  text('sae', '', 'The SAE, by any part of its name that only it has.'),
  whole('sequences', 1024, 'Sequences of text to read.', low=2),
  whole('batch', 32, 'Sequences in a forward pass.', low=1),
  choice(
    'labels',
    'rule',
    ('rule', 'none'),
    'Whether build labels all features that fire, by rule.',
  ),
  switch(
    'outliers',
    False,
    "Count outlier tokens, which the SAEs' cards leave out, like all others.",
  ),
  whole('port', 8642, 'Port of the server.', low=1, high=65535),
  text('text', '', 'The prompt.', required=True),
  text(
    'logit',
    '',
    'The token whose logit is explained, or two separated by a comma for '
    'their difference; by default the two likeliest next tokens.',
  ),
  words(
    'change',
    (),
    'The edits, as LATENT:KIND:STRENGTH: 17:add:0.5, 17:clamp:2, 17:ablate.',
    required=True,
  ),
  whole('tokens', 48, 'Tokens to generate.', low=1),
  number('temperature', 0.5, 'Of sampling; 0 is greedy.', low=0.0),
  whole('seed', 0, 'Seed of the sampling.', low=0),
  path(
    'prompts',
    'JSONL file of prompts, each with "text" and "label" (true or false).',
    default='',
    required=True,
  ),
  choice(
    'pooling',
    'last',
    ('last', 'mean', 'max'),
    'How the latents of a prompt are summarised over its tokens.',
  ),
  text(
    'features',
    '200',
    'The features to label: all, a number (of the most frequent), or their '
    'numbers, such as 3,17.',
  ),
  text('endpoint', '', 'Address of an OpenAI-compatible server that labels.'),
  text(
    'labeller',
    '',
    "The endpoint's model; or local, the run's own language model. Without "
    'it, rules label.',
  ),
  whole(
    'most_questions', 10_000, 'Most questions sent to the labeller.', low=1
  ),
  text('model_id', '', "Neuronpedia's name of the language model."),
  text('title', 'gemma-scope', 'Name of the set of SAEs.'),
  text('creator', '', 'Who made the SAEs.'),
  switch('json', False, 'Print JSON in place of a table.'),
)
# command -> what it does, and the flags that it reads.
COMMANDS = {
  'build': (
    'Read text, index what every feature fires on, write the dashboards.',
    ('sequences', 'batch', 'labels', 'outliers'),
  ),
  'pages': ('Write the dashboards again, with the labels of now.', ()),
  'serve': (
    'Serve the dashboards on this machine, with a live view of your own text.',
    ('port',),
  ),
  'why': (
    'Trace a logit to the features it depends on.',
    ('text', 'sae', 'logit'),
  ),
  'steer': (
    'Generate text with features changed, beside the unchanged model.',
    ('text', 'change', 'sae', 'logit', 'tokens', 'temperature', 'seed'),
  ),
  'probe': (
    'Find the features of a concept from labelled prompts.',
    ('prompts', 'sae', 'pooling', 'batch'),
  ),
  'explain': (
    'Label features, and score the labels.',
    ('sae', 'features', 'endpoint', 'labeller', 'most_questions', 'json'),
  ),
  'suite': ('Run the SAEBench metrics.', ('sae',)),
  'export': (
    "Write Neuronpedia's files.",
    ('model_id', 'title', 'creator'),
  ),
}


def flags(command: str) -> command_line.Flags:
  """The flags of one command, those of all commands last."""
  does, reads = COMMANDS[command]
  by_name = {flag.name: flag for flag in OPTIONS}
  return command_line.Flags(
    does,
    *(by_name[name] for name in reads),
    *COMMON,
    name=f'microscope {command}',
  )


def usage() -> str:
  """The docstring and a line for each command."""
  lines = [f'  {name:10} {does}' for name, (does, _) in COMMANDS.items()]
  return '\n'.join(
    [
      'Usage: gemma-scope microscope COMMAND --workdir=PATH [flags]',
      '',
      __doc__.strip(),
      '',
      *lines,
      '',
      'COMMAND --help explains a command and its flags.',
    ]
  )


def main(arguments: list[str] | None = None) -> None:
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if not arguments or arguments[0] in ('--help', '-h', 'help'):
    command_line.show(command_line.examples(usage()))
    sys.exit(0 if arguments else 2)
  command = arguments[0]
  if command not in COMMANDS:
    near = difflib.get_close_matches(command, COMMANDS, 1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    print(
      f'The first word must be a command ({", ".join(COMMANDS)}); found '
      f'{command!r}.{hint}',
      file=sys.stderr,
    )
    sys.exit(2)
  with flags(command).parse(arguments[1:]) as given:
    if given.config is None:
      command_line.existing(given.workdir, 'workdir')
    from gemma_scope.microscope import commands, session
    from gemma_scope.runtime import interrupt as interrupt_lib

    opened = session.Session(
        pathlib.Path(given.workdir), given.out and pathlib.Path(given.out),
        given.config, ','.join(given.release or []),
    )  # fmt: skip
    reads = COMMANDS[command][1]
    options = commands.Options(**{name: getattr(given, name) for name in reads})
    try:
      commands.run(command, opened, options)
    except interrupt_lib.Interrupted:
      sys.exit('stopped and saved; the same command continues')


if __name__ == '__main__':
  main()
