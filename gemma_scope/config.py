"""A run's settings: the config file, changes to it, checks.

A config file (configs/*.py) returns a complete `ConfigDict`; configs/tiny.py
says what each field is for. Two ways of changing one:

  tiny:layers=1;widths=1k        fields of the collection, after a colon
  --config.train.batch=512       any field

`check` refuses a config that cannot run and lists everything that is wrong with
it, before a model, a device or JAX is touched.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from gemma_scope import config_checks, files, path_values, sites
from gemma_scope.config_fields import (
  FIELDS,
  flat,
  nearest,
  problems,
  suggestion,
)

# Fields that hold a path of this machine.
_PATHS = (
  'lm.checkpoint',
  'lm.second.checkpoint',
  'lm.tokenizer',
  'text.store',
  'activations.store',
  'initialise.release',
)
# Those that may hold an address: what can be read from a bucket.
_ADDRESSES = (
  'lm.checkpoint',
  'lm.second.checkpoint',
  'text.store',
  'activations.store',
)

# Fields that older versions lack, with the values that they implied.
_ADDED = {
  'lm': {'second': {'name': '', 'checkpoint': ''}},
  'collection': {'nulls': ()},
  'activations': {'centre': 'none', 'max_norm': 0.0},
  'objective': {'active_set': False},
  'train': {
    'b1': 0.0,
    'meet_l0': False,
    'refit_decoders': False,
    'closing_batches': 64,
  },
  'text': {'column': ''},
  'evaluation': {'loss_every': 1},
  'initialise': {'whitening': 0.0},
}


class ConfigError(ValueError):
  """A config that cannot run; the message says why."""


# -------------------------------------------------------- loading and changing


def folder() -> pathlib.Path:
  """Where the project's configs are: in the package, or beside it."""
  package = pathlib.Path(__file__).parent
  packaged = package / 'configs'
  return packaged if packaged.is_dir() else package.parent / 'configs'


def load(name: str) -> ConfigDict:
  """The config that 'FILE' or 'FILE:FIELDS' names.

  Args:
    name: a path, or the name of a file in `folder()` ('tiny',
      'configs/tiny.py'); after a colon, what `apply_argument` reads.

  Raises:
    ConfigError: there is no such file, or it is no config.
  """
  path, colon, argument = name.partition(':')
  file = _file(path)
  try:
    importlib.import_module('configs')
  except ImportError:  # installed: the files import each other by this name
    sys.modules['configs'] = importlib.import_module('gemma_scope.configs')
  spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if colon else []))
  except ConfigError:
    raise
  except Exception as error:  # the file is the user's: anything may happen
    raise ConfigError(
      f'The config {str(file)!r} cannot be read: {type(error).__name__}: '
      f'{error}.'
    ) from error
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f'get_config in {str(file)!r} must return a ConfigDict; found a '
      f'{type(config).__name__}.'
    )
  return config


def read(path: pathlib.Path) -> ConfigDict:
  """The config.json of a run, of this version or an older one."""
  described = files.read_json(path)
  for section, fields in _ADDED.items():
    if isinstance(described.get(section), dict):
      described[section] = fields | described[section]
  return ConfigDict(described)


def _file(path: str) -> pathlib.Path:
  try:
    path_values.check(path, '--config')
  except ValueError as error:
    raise ConfigError(str(error)) from None
  config_file, configs = pathlib.Path(path).expanduser(), folder()
  if config_file.exists() and config_file.suffix == '.py':
    return config_file
  if config_file.exists() and not config_file.is_dir():
    raise ConfigError(f'The config {path!r} is no Python file: NAME.py.')
  same_name = configs / f'{config_file.stem}.py'
  may_be_ours = config_file.parent.name in ('', 'configs')
  if may_be_ours and same_name.is_file() and config_file.suffix in ('', '.py'):
    return same_name
  names = sorted(
    file.stem
    for file in configs.glob('*.py')
    if 'def get_config' in file.read_text(encoding='utf-8')
  )
  raise ConfigError(
    f'There is no config {path!r}.{suggestion(config_file.stem, names)} '
    f'--config is a file, or one of {", ".join(names)}.'
  )


def apply_argument(config: ConfigDict, argument: str | None) -> ConfigDict:
  """Applies 'layers=12,20;widths=16k;sparsity=30,60' to `config.collection`.

  Any field of the collection may be named; lists are separated by commas,
  layers may be a range (`0-25`), widths are spelled as in Gemma Scope.

  Raises:
    ConfigError: an unknown field (with a suggestion) or a value that does not
      parse.
  """
  names = config.collection.keys()
  for assignment in filter(None, (argument or '').split(';')):
    name, separator, text = assignment.partition('=')
    name = name.strip()
    if name not in names or not separator:
      raise ConfigError(
        f'{assignment!r} is not field=value with a field of the collection '
        f'({", ".join(names)}).{suggestion(name, names)}'
      )
    override(config, f'collection.{name}', text.strip(), assignment)
  return config


def override(
  config: ConfigDict, name: str, text: str, shown: str | None = None
) -> None:
  """Sets the field 'train.steps' from text, by the type that it has.

  Args:
    config: changed.
    name: of the field.
    text: its value; a list is separated by commas.
    shown: what the user wrote, for the message.

  Raises:
    ConfigError: no such field (with a suggestion), or no such value.
  """
  if (name, text) == ('mesh', 'auto'):
    config.mesh.update(dict.fromkeys(config.mesh, 0))
    return
  values = flat(config)
  if name not in values:
    subfields = [field for field in values if field.startswith(f'{name}.')]
    by_last_part = {field.rpartition('.')[2]: field for field in values}
    similar = nearest(name, values)
    if similar is None:  # right but for its section
      similar = by_last_part.get(nearest(name.rpartition('.')[2], by_last_part))
    hint = f' Did you mean {similar!r}?' if similar else ''
    hint = f' Its fields are {", ".join(subfields)}.' if subfields else hint
    raise ConfigError(f'The config has no field {name!r}.{hint}')
  holder, field = _holder(config, name)
  try:
    holder[field] = _parse(name, values[name], text)
  except (ValueError, TypeError, SyntaxError) as error:
    raise ConfigError(
      f'{shown or f"--config.{name}={text}"!r} does not parse: {error}.'
    ) from error


def _holder(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
  """The section of the field 'train.steps', and its name there."""
  *sections, field = name.split('.')
  for section in sections:
    config = config[section]
  return config, field


def _parse(name: str, old_value: Any, text: str) -> Any:
  """Text as a value of the field's type; ValueError where it is none."""
  if isinstance(old_value, tuple):
    return _parse_list(name, text)
  if isinstance(old_value, bool):
    if text.lower() not in ('true', 'false'):
      raise ValueError(f'it must be true or false; found {text!r}')
    return text.lower() == 'true'
  if isinstance(old_value, str):
    return text
  kind = 'a whole number' if isinstance(old_value, int) else 'a number'
  try:
    return type(old_value)(text)
  except ValueError:
    raise ValueError(f'it must be {kind}; found {text!r}') from None


def _parse_list(name: str, text: str) -> tuple:
  if text.startswith(('(', '[')):  # as Python writes it
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, list | tuple) else (value,)
  items = [item.strip() for item in text.split(',') if item.strip()]
  if name == 'collection.layers':
    return tuple(layer for item in items for layer in _layer_range(item))
  if name == 'collection.widths':
    return tuple(map(sites.parse_width, items))
  field = FIELDS.get(name)
  return tuple(map(field.type if field else str, items))


def _layer_range(text: str) -> range:
  first, dash, last = text.partition('-')
  if not first.isdigit() or (dash and not last.isdigit()):
    raise ValueError(f'a layer is a number or a range such as 0-25, not {text}')
  return range(int(first), int(last or first) + 1)


def resolve_paths(config: ConfigDict) -> None:
  """Replaces '~' by the home folder in every field that holds a path.

  Raises:
    ConfigError: a store that the config names does not exist, or a path is an
      address (gs://...) where none can be read.
  """
  for name in _PATHS:
    holder, field = _holder(config, name)
    path = os.path.expanduser(holder[field])
    scheme = files.scheme(path)
    if scheme and name not in _ADDRESSES:
      raise ConfigError(
        f'{name} must be a path on this machine; found the address '
        f'{files.show(path)}.'
      )
    if scheme not in ('', 'gs', 's3'):
      raise ConfigError(
        f'{name} must be a path, or an address gs:// or s3://; found '
        f'{files.show(path)}.'
      )
    holder[field] = path
    local = path and not scheme
    if field == 'store' and local and not os.path.isdir(path):
      raise ConfigError(
        f'{name}: there is no folder {files.show(path)}.{files.near(path)}'
      )


# --------------------------------------------------------------------- checks


def check(
  config: ConfigDict,
  model: sites.Dimensions | None = None,
  mesh_shape: Sequence[int] | None = None,
) -> None:
  """Refuses what cannot run.

  Args:
    config: the run's.
    model: the language model's dimensions, when known.
    mesh_shape: sizes of ('sae', 'data', 'latent'), when known.

  Raises:
    ConfigError: everything that is wrong, one sentence each.
  """
  by_field = problems(config)
  refused = [
    sentence for sentences in by_field.values() for sentence in sentences
  ]
  # A check that reads a section with a wrong field would report it again.
  wrong_sections = {name.partition('.')[0] for name in by_field}
  for sections, sentences in config_checks.CHECKS:
    if not wrong_sections & set(sections):
      refused += sentences(config)
  if not refused and model is not None:
    refused += config_checks.model(config, model)
  if not refused and mesh_shape is not None:
    refused += config_checks.mesh(config, model, mesh_shape)
  if refused:
    raise ConfigError(_together(refused))


def _together(sentences: list[str]) -> str:
  if len(sentences) == 1:
    return sentences[0]
  lines = [f'  {i}. {sentence}' for i, sentence in enumerate(sentences, 1)]
  return '\n'.join([f'The config has {len(sentences)} problems:', *lines])
