"""A command's flags: declared once, parsed, explained, and its errors shown.

  FLAGS = Flags(
    __doc__,
    config(),
    path('workdir', 'Folder of the run.', required=True),
    whole('batch', 32, 'Sequences in a forward pass.', low=1),
  )

  def main(arguments: list[str] | None = None) -> None:
    with FLAGS.parse(arguments) as given:
      train(given.config, given.workdir)

`--help` shows the docstring and every flag. An error that the user can mend
(a wrong flag, a ValueError, RuntimeError or OSError inside the block) is shown
as its message, without a traceback, and ends the process with code 1 (2 for a
wrong flag); --debug shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import textwrap
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags
from absl import logging

from gemma_scope import config as config_lib
from gemma_scope import files, path_values

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Flag:
  """One flag. `kind` is what its value is, see the functions below.

  `address`: whether a path may be an address, such as gs://bucket/folder.
  `target`: 'folder' of a path to one that may be new, 'file' of one to write.
  """

  kind: str
  name: str
  default: Any
  help: str
  required: bool = False
  choices: tuple[str, ...] = ()
  low: float | None = None
  high: float | None = None
  address: bool = False
  target: str = ''

  @property
  def usage(self) -> str:
    """'--batch=N', as the help shows it."""
    if self.kind == 'switch':
      return f'--[no]{self.name}'
    value = '|'.join(self.choices) or {
      'whole': 'N',
      'number': 'X',
      'path': 'PATH',
      'paths': 'PATH,...',
      'words': 'A,B,...',
      'config': 'FILE[:FIELDS]',
    }.get(self.kind, 'TEXT')
    return f'--{self.name}={value}'

  def define(self, values: absl_flags.FlagValues) -> None:
    """Registers the flag with absl, which parses it."""
    definition = self.name, self.default, self.help
    bounds = {'lower_bound': self.low, 'upper_bound': self.high}
    match self.kind:
      case 'whole':
        absl_flags.DEFINE_integer(*definition, flag_values=values, **bounds)
      case 'number':
        absl_flags.DEFINE_float(*definition, flag_values=values, **bounds)
      case 'switch':
        absl_flags.DEFINE_bool(*definition, flag_values=values)
      case 'choice':
        name, default, text = definition
        absl_flags.DEFINE_enum(
          name, default, self.choices, text, flag_values=values
        )
      case 'words' | 'paths':
        absl_flags.DEFINE_list(*definition, flag_values=values)
      case _:
        absl_flags.DEFINE_string(*definition, flag_values=values)

  def read(self, value: Any) -> Any:
    """The parsed value as the command gets it: paths without '~'."""
    match self.kind, value:
      case 'path', str():
        return self._path(value)
      case 'paths', list():
        return [self._path(item) for item in value if item]
      case 'number', float() if value != value:
        raise absl_flags.Error(f'--{self.name} must be a number; found nan')
    return value

  def _path(self, value: str) -> str:
    try:
      path_values.check(value, f'--{self.name}')
      if not self.address:
        files.refuse_address(value, f'--{self.name}')
      path_ = os.path.expanduser(value)
      if path_ and not files.scheme(path_):
        path_values.check_target(path_, f'--{self.name}', self.target)
    except ValueError as error:
      raise absl_flags.Error(str(error)) from None
    return path_


def text(name: str, default: str | None, help_: str, **options) -> Flag:
  """A string."""
  return Flag('text', name, default, help_, **options)


def whole(name: str, default: int | None, help_: str, **options) -> Flag:
  """A whole number, from `low` to `high`."""
  return Flag('whole', name, default, help_, **options)


def number(name: str, default: float | None, help_: str, **options) -> Flag:
  """A number, from `low` to `high`."""
  return Flag('number', name, default, help_, **options)


def switch(name: str, default: bool, help_: str) -> Flag:
  """--name or --noname."""
  return Flag('switch', name, default, help_)


def choice(
  name: str, default: str | None, choices: Sequence[str], help_: str
) -> Flag:
  """One of a few words."""
  return Flag('choice', name, default, help_, choices=tuple(choices))


def words(name: str, default: Sequence[str], help_: str, **options) -> Flag:
  """Words separated by commas."""
  return Flag('words', name, list(default), help_, **options)


def folder(name: str, help_: str, **options) -> Flag:
  """A folder, which may be new: a path, or an address (gs://, s3://)."""
  note = ' It may be in a bucket: gs://... or s3://...'
  return local_folder(name, help_ + note, address=True, **options)


def local_folder(name: str, help_: str, **options) -> Flag:
  """A folder of this machine, which may be new."""
  return path(name, help_, target='folder', **options)


def path(name: str, help_: str, default: str | None = None, **options) -> Flag:
  """A file or folder; '~' is expanded, and an address refused.

  `address=True` allows one (gs://...) for what can read it.
  """
  return Flag('path', name, default, help_, **options)


def new_file(name: str, help_: str, **options) -> Flag:
  """A file that the command writes; its folder is made where it is not."""
  return path(name, help_, target='file', **options)


def paths(name: str, help_: str, **options) -> Flag:
  """Paths separated by commas."""
  return Flag('paths', name, None, help_, **options)


def config(required: bool = True) -> Flag:
  """--config=FILE:FIELDS, and --config.SECTION.FIELD=VALUE for any field."""
  return Flag(
    'config',
    'config',
    None,
    'The config: a file, or the name of one in configs/, such as tiny. After '
    'a colon fields of the collection may follow, as in '
    "'tiny:layers=1,2;widths=1k;sparsity=30'. --config.train.steps=100 sets "
    'any field; configs/tiny.py explains each.',
    required,
  )


_DEBUG = switch('debug', False, 'Show the traceback of an error.')


class Flags:
  """The flags of one command.

  Args:
    doc: the module's docstring: what the command does, with examples.
    *declared: its flags, in the order of the help.
    name: the command as typed, such as 'train' or 'microscope build'.
    needs_flags: whether the command without any flag shows its help; by
      default where a flag is required.
  """

  def __init__(
    self,
    doc: str,
    *declared: Flag,
    name: str,
    needs_flags: bool | None = None,
  ):
    self.doc = doc.strip()
    self.declared = (*declared, _DEBUG)
    self.name = name
    required = any(flag.required for flag in declared)
    self.needs_flags = required if needs_flags is None else needs_flags

  @contextlib.contextmanager
  def parse(self, arguments: Sequence[str] | None = None) -> Iterator[Any]:
    """Yields the values by name, and shows the errors of the block.

    Args:
      arguments: the words after the command; None for those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = '--debug' in arguments
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    if not debug:
      logging.get_absl_logger().addFilter(_is_not_told)
    with contextlib.suppress(absl_flags.Error):
      absl_flags.FLAGS.mark_as_parsed()  # libraries have flags of their own
    if '--help' in arguments or '-h' in arguments:
      show(self.help())
      sys.exit(0)
    if self.needs_flags and not arguments:
      show(self.help())
      sys.exit(2)
    try:
      values = self._values(arguments)
    except (absl_flags.Error, config_lib.ConfigError) as error:
      if debug:
        raise
      self._refuse(str(error))
    try:
      yield values
    except (ValueError, RuntimeError, OSError, ImportError) as error:
      # A module that is not there at all is a fault of the installation.
      if debug or isinstance(error, ModuleNotFoundError):
        raise
      sys.stdout.flush()
      _end(path_values.readable(path_values.sentence(error)))
    except KeyboardInterrupt:
      if debug:
        raise
      sys.exit('stopped')

  def _values(self, arguments: list[str]) -> types.SimpleNamespace:
    configs = any(flag.kind == 'config' for flag in self.declared)
    overrides = []
    if configs:
      arguments, overrides = _take_overrides(arguments)
    values = absl_flags.FlagValues()
    for flag in self.declared:
      flag.define(values)
    values.set_gnu_getopt(True)
    extra = values(['command', *arguments])[1:]
    if extra:
      raise absl_flags.Error(
        f'Unexpected argument {extra[0]!r}; flags start with --, and a value '
        'with spaces or * needs quotes'
      )
    missing = [
      flag.usage
      for flag in self.declared
      if flag.required and not values[flag.name].value
    ]
    if missing:
      verb = 'is' if len(missing) == 1 else 'are'
      raise absl_flags.Error(f'{" and ".join(missing)} {verb} required')
    parsed = types.SimpleNamespace(
      **{f.name: f.read(values[f.name].value) for f in self.declared}
    )
    if configs:
      parsed.config_name = parsed.config
      parsed.config = parsed.config and config_lib.load(parsed.config)
      if overrides and parsed.config is None:
        raise absl_flags.Error(
          f'--config.{overrides[0][0]} changes a config, and no --config is '
          'given'
        )
      for name, value in overrides:
        config_lib.override(parsed.config, name, value)
      if parsed.config is not None:
        config_lib.resolve_paths(parsed.config)
    return parsed

  def _refuse(self, message: str) -> NoReturn:
    # absl writes 'Did you mean: a or b ?'
    sentence = path_values.readable(message.strip())
    sentence = re.sub(r'mean: (.*) \?', r'mean --\1?', sentence)
    sentence = sentence[0].upper() + sentence[1:]
    end = '' if sentence.endswith(('.', '?')) else '.'
    print(f'{sentence}{end} --help lists the flags.', file=sys.stderr)
    sys.exit(2)

  def help(self) -> str:
    """Usage, what the command does, and every flag with its default."""
    required = [flag.usage for flag in self.declared if flag.required]
    command = f'gemma-scope {self.name}'
    usage = f'Usage: {" ".join([command, *required])} [flags]'
    lines = [
      *textwrap.wrap(
        usage, _WIDTH, subsequent_indent=' ' * 4, break_on_hyphens=False
      ),
      '',
      self.doc,
      '',
      'Flags:',
    ]
    for flag in self.declared:
      lines.append(f'  {flag.usage}')
      lines.append(
        textwrap.fill(
          describe(flag),
          _WIDTH,
          initial_indent=' ' * 6,
          subsequent_indent=' ' * 6,
        )
      )
    return examples('\n'.join(lines))


def _is_not_told(record: Any) -> bool:
  """Whether a record is no traceback of Orbax: a sentence tells what failed."""
  return not (record.exc_info and '/orbax/' in record.pathname)


def _end(message: str) -> NoReturn:
  """Shows the error and ends the process with code 1.

  After a save that failed, threads of Orbax wait for minutes for what will not
  come, and the interpreter would wait for them.
  """
  waiting = {type(thread).__name__ for thread in threading.enumerate()}
  if '_SignalingThread' in waiting:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
  sys.exit(message)


def show(text_: str) -> None:
  """Prints a long text; a reader that stops early (`| head`) is no error."""
  try:
    print(text_, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def examples(doc: str) -> str:
  """A docstring's commands as they are typed here.

  'gemma-scope train' is there where the project is installed; in a checkout it
  is a script of launch/.
  """
  script = pathlib.Path(sys.argv[0])
  if script.suffix != '.py':
    return doc
  return re.sub(
    r'gemma-scope ([a-z-]+)',
    lambda match: f'python launch/{match[1].replace("-", "_")}.py',
    doc,
  )


def describe(flag: Flag) -> str:
  """A flag's help with its default and bounds."""
  if flag.required:
    return f'{flag.help} Required.'
  if flag.default is None or flag.default in ('', []):
    return flag.help
  if flag.default is False:
    return flag.help
  default = flag.default
  if isinstance(default, list):
    default = ','.join(default)
  if default is True:
    default = f'--{flag.name}'
  return f'{flag.help} Default: {default}.'


def _take_overrides(arguments: list[str]):
  """Takes --config.NAME=VALUE (or two words, or --noconfig.NAME) out."""
  remaining, overrides = [], []
  words_left = iter(arguments)
  for word in words_left:
    head, equals, value = word.partition('=')
    bare = head.lstrip('-')
    if not word.startswith('-') or not bare.startswith(
      ('config.', 'noconfig.')
    ):
      remaining.append(word)
      continue
    name = bare.partition('.')[2]
    if bare.startswith('no'):
      value = 'false'
    elif not equals:
      value = next(words_left, '')
      if not value or value.startswith('--'):
        raise absl_flags.Error(f'{word} needs a value: {word}=VALUE')
    overrides.append((name, value))
  return remaining, overrides
