r"""Finds, reads, steers and checks the features of SAEs.

  gemma-scope microscope build --workdir=runs/tiny
  gemma-scope microscope serve --workdir=runs/tiny
  gemma-scope microscope why --workdir=runs/tiny --text='if x is not' \
      --sae=resid_post/layer_2/width_1k/average_l0_33

Run build first: it runs the language model on the run's text and writes
dashboards, which open without a server. By default it uses the SAEs of the run
in --workdir. --release names other SAEs, in any published format, in a folder
or on the Hugging Face hub; --config then names their model and text:

  gemma-scope microscope build --workdir=runs/2b --config=gemma_scope_2b \
      --config.lm.checkpoint=... --release=google/gemma-scope-2b-pt-res/layer_20
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import sys

from gemma_scope import command_line, path_values
from gemma_scope.command_line import (
  choice,
  folder,
  number,
  path,
  switch,
  text,
  whole,
  words,
)

COMMON = (
  folder(
    'workdir', 'Folder of a training run, or a new folder.', required=True
  ),
  command_line.config(required=False),
  command_line.paths(
    'release',
    'Releases or single SAEs, separated by commas; by default the SAEs of the '
    'run.',
  ),
  command_line.local_folder(
    'out', 'Folder of the index; by default <workdir>/microscope.'
  ),
  text(
    'site',
    '',
    'Site of a params.npz that has no card: resid_post/12, or of a transcoder '
    'mlp_in/12:mlp_out/12.',
  ),
)
OPTIONS = (
  text('sae', '', 'The SAE: its name, or a part that no other name has.'),
  whole('sequences', 1024, 'Number of text sequences to index.', low=2),
  whole('batch', 32, 'Sequences per forward pass.', low=1),
  choice(
    'labels',
    'rule',
    ('rule', 'none'),
    'Label every feature that fires by a rule (rule), or none (none).',
  ),
  switch(
    'outliers',
    False,
    'Include outlier tokens, which the metrics of the SAEs leave out.',
  ),
  whole('port', 8642, 'Port that the server listens on.', low=1, high=65535),
  text('text', '', 'The prompt.', required=True),
  text(
    'logit',
    '',
    'The token whose logit is explained, or two tokens separated by a comma '
    'for their logit difference; by default the two likeliest next tokens.',
  ),
  words(
    'change',
    (),
    'The edits, as LATENT:KIND:STRENGTH: 17:add:0.5,18:clamp:2,19:ablate.',
    required=True,
  ),
  whole('tokens', 48, 'Number of tokens to generate.', low=1),
  number('temperature', 0.5, 'Sampling temperature; 0 is greedy.', low=0.0),
  whole('seed', 0, 'Random seed for sampling.', low=0),
  path(
    'prompts',
    'File of prompts: JSON lines, or .csv with a header. Each has "text" and '
    '"label" (true or false); "split" ("train" or "test") and "group" (held '
    'out together) may follow.',
    default='',
    required=True,
  ),
  choice(
    'pooling',
    'last',
    ('last', 'mean', 'max'),
    "How a latent's values are pooled over the tokens of a prompt.",
  ),
  text(
    'features',
    '200',
    'Which features to label: all, the N most frequent (such as 200), or '
    'their indices (such as 3,17; a single one with a comma, 3,).',
  ),
  text('endpoint', '', 'URL of an OpenAI-compatible server that labels.'),
  text(
    'labeller',
    '',
    "Model that labels: its name at --endpoint, or local for the run's own "
    'language model; by default features are labelled by rules.',
  ),
  whole('most_questions', 10_000, 'Maximum number of questions to ask.', low=1),
  text('model_id', '', "Neuronpedia's name for the language model."),
  text('title', 'gemma-scope', 'Name of the set of SAEs.'),
  text('creator', '', 'Who made the SAEs.'),
  text(
    'head',
    '',
    'With transcoders: explain why a head attends, as LAYER.HEAD:QUERY:KEY '
    '(tokens counted from BOS, 0).',
  ),
  text(
    'target',
    '',
    'With transcoders: trace this instead of the logit, a direction as '
    'SITE:FILE.npy or a feature as feature:LAYER/FEATURE.',
  ),
  text(
    'supernodes',
    '',
    'With transcoders: features to ablate together, either similar (those with '
    'similar edges) or a graph.json whose supernodes were made in the pages.',
  ),
  switch('all', False, 'Measure all SAEs.'),
  switch('effects', False, 'Also measure the effect of every feature.'),
  whole(
    'contexts', 4, 'Contexts in which a feature is ablated, and added.', low=2
  ),
  whole('scored', 3, 'Tokens scored from the edited one on.', low=1),
  whole(
    'sample',
    0,
    'Measure so many features of each SAE, drawn at random; 0 measures all.',
    low=0,
  ),
  number(
    'alpha',
    0.05,
    'False discovery rate over the features of an SAE.',
    low=0.0,
    high=1.0,
  ),
  switch('json', False, 'Print the result as JSON and nothing else.'),
)
# command -> what it does, and the flags that it reads.
COMMANDS = {
  'build': (
    'Index what every feature fires on and write the dashboards.',
    ('sequences', 'batch', 'labels', 'outliers', 'effects', 'json'),
  ),
  'pages': ('Rewrite the dashboards with the current labels.', ('json',)),
  'serve': (
    'Serve the dashboards locally, with a live view of your own text.',
    ('port',),
  ),
  'why': (
    'Attribute a logit to features.',
    ('text', 'sae', 'logit', 'head', 'target', 'supernodes', 'json'),
  ),
  'steer': (
    'Generate text with and without edits to features.',
    (
      'text',
      'change',
      'sae',
      'logit',
      'tokens',
      'temperature',
      'seed',
      'prompts',
      'json',
    ),
  ),
  'probe': (
    'Find the features that detect a concept, from labelled prompts.',
    ('prompts', 'sae', 'pooling', 'batch', 'json'),
  ),
  'effects': (
    'Measure the exact effect of every feature, next to controls.',
    ('sae', 'all', 'sample', 'contexts', 'scored', 'alpha', 'json'),
  ),
  'explain': (
    'Label features and score the labels.',
    ('sae', 'features', 'endpoint', 'labeller', 'most_questions', 'json'),
  ),
  'suite': ('Run the SAEBench metrics.', ('sae', 'json')),
  'export': (
    'Write files for Neuronpedia.',
    ('model_id', 'title', 'creator', 'json'),
  ),
}


def flags(command: str) -> command_line.Flags:
  """The flags of one command, followed by the flags of all commands."""
  purpose, flag_names = COMMANDS[command]
  by_name = {flag.name: flag for flag in OPTIONS}
  if command == 'steer':  # one prompt, or a file of them
    for name in ('text', 'prompts'):
      by_name[name] = dataclasses.replace(by_name[name], required=False)
  return command_line.Flags(
    purpose,
    *(by_name[name] for name in flag_names),
    *COMMON,
    name=f'microscope {command}',
  )


def usage() -> str:
  """The docstring, then one line for each command."""
  lines = [f'  {name:10} {purpose}' for name, (purpose, _) in COMMANDS.items()]
  return '\n'.join(
    [
      'Usage: gemma-scope microscope COMMAND --workdir=PATH [flags]',
      '',
      __doc__.strip(),
      '',
      *lines,
      '',
      'Run COMMAND --help for the flags of a command.',
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
      f'Unknown command {command!r}; the commands are '
      f'{", ".join(COMMANDS)}.{hint}',
      file=sys.stderr,
    )
    sys.exit(2)
  with flags(command).parse(arguments[1:]) as parsed:
    from gemma_scope.runtime import remote

    with remote.folder(parsed.workdir) as workdir:
      if parsed.config is None:
        path_values.existing(workdir, 'workdir')
      run(command, parsed, workdir)


def run(command: str, parsed, workdir: pathlib.Path) -> None:
  """Runs one command on the folder, or on the copy of a bucket's."""
  from gemma_scope.microscope import commands, session
  from gemma_scope.runtime import interrupt as interrupt_lib
  from gemma_scope.runtime import remote

  remote.fetch(workdir)
  remote.fetch(workdir / 'microscope')
  opened = session.Session(
    workdir,
    parsed.out and pathlib.Path(parsed.out),
    parsed.config,
    ','.join(parsed.release or []),
    site=parsed.site,
  )
  flag_names = COMMANDS[command][1]
  options = commands.Options(
    **{name: getattr(parsed, name) for name in flag_names}
  )
  try:
    commands.run(command, opened, options)
  except interrupt_lib.Interrupted:
    sys.exit('stopped and saved; run the same command again to continue')


if __name__ == '__main__':
  main()
