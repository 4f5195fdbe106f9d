"""Every command explains its flags, and answers a wrong one in a sentence."""

from __future__ import annotations

import importlib
import logging
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import logging as absl_logging

import launch
from gemma_scope import command_line, path_values
from launch import cli_page, microscope


def every_command() -> dict[str, command_line.Flags]:
  found = {}
  for name in launch.COMMANDS:
    if name == 'microscope':
      for command in microscope.COMMANDS:
        found[f'microscope {command}'] = microscope.flags(command)
    else:
      module = importlib.import_module(f'launch.{name.replace("-", "_")}')
      found[name] = module.FLAGS
  return found


COMMANDS = every_command()


def fails(capsys, *words: str) -> str:
  """What a command says that ends at once, and not well."""
  with pytest.raises(SystemExit) as end:
    launch.main(words)
  assert end.value.code not in (0, None)
  said = capsys.readouterr().err
  if isinstance(end.value.code, str):  # the interpreter would print it
    said += end.value.code
  assert said.strip() and 'Traceback' not in said
  return said


def complete(name: str) -> list[str]:
  """A command with a value for each flag that it needs."""
  needed = [f for f in COMMANDS[name].declared if f.required]
  value = {'config': 'tiny', 'whole': '1'}
  given = [f'--{f.name}={value.get(f.kind, "x")}' for f in needed]
  return [*name.split(), *given]


@pytest.mark.parametrize('name', COMMANDS)
def test_help_shows_every_flag(name, capsys):
  with pytest.raises(SystemExit) as end:
    launch.main([*name.split(), '--help'])
  assert end.value.code == 0
  said = capsys.readouterr().out
  assert max(map(len, said.splitlines())) <= 100
  for flag in COMMANDS[name].declared:
    assert flag.usage in said
    assert flag.help[0].isupper() and flag.help.endswith('.'), flag


@pytest.mark.parametrize('name', COMMANDS)
def test_a_wrong_flag_is_a_sentence(name, capsys):
  whole = complete(name)
  assert 'Unexpected argument' in fails(capsys, *whole, 'word')
  for flag in COMMANDS[name].declared:
    typo = flag.name[:-2] + flag.name[:-3:-1]
    if typo != flag.name and len(flag.name) > 3:
      said = fails(capsys, *whole, f'--{typo}=1')
      assert 'Unknown' in said and f'--{flag.name}' in said
    wrong = []
    if flag.kind in ('whole', 'number'):
      wrong = ['many', '']
      wrong += ['1.5'] if flag.kind == 'whole' else ['nan']
      wrong += [] if flag.low is None else [str(flag.low - 1)]
      wrong += [] if flag.high is None else [str(flag.high + 1)]
    elif flag.kind == 'choice':
      wrong = [flag.choices[0] + 'x', '']
    elif flag.kind == 'switch':
      wrong = ['maybe']
    elif flag.kind == 'config':
      wrong = ['tinny', 'tiny:layer=1', 'tiny:layers=x', 'x' * 5000, 'a\0b']
      wrong += [
        '/dev/null',
        str(pathlib.Path(__file__).parents[1] / 'README.md'),
      ]
    elif flag.kind in ('path', 'paths'):
      wrong = ['a\0b', 'x' * 5000]
    for value in wrong:
      said = fails(capsys, *whole, f'--{flag.name}={value}')
      assert flag.name in said or value.partition(':')[2] in said
      assert len(said.strip().splitlines()) == 1 and len(said) < 999, said
    if flag.required:
      rest = [word for word in whole if not word.startswith(f'--{flag.name}=')]
      if len(rest) > len(name.split()):
        assert f'--{flag.name}' in fails(capsys, *rest)


@pytest.mark.parametrize('name', COMMANDS)
def test_without_arguments_a_command_shows_its_usage(name, capsys):
  if not COMMANDS[name].needs_flags:
    assert name == 'benchmark'  # it measures with its defaults
    return
  with pytest.raises(SystemExit) as end:
    launch.main(name.split())
  assert end.value.code == 2
  assert 'Usage: ' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['what', 'arch', 'dtype', 'branch', 'lm'])
def test_an_unknown_word_of_the_benchmark_is_a_sentence(name, capsys):
  said = fails(capsys, 'benchmark', f'--{name}=x')
  assert f'--{name} must be of' in said and said.endswith('found x.')


def test_commands_are_listed_and_suggested(capsys):
  for words in ([], ['--help']):
    with pytest.raises(SystemExit):
      launch.main(words)
    said = capsys.readouterr().out
    assert all(f'  {name} ' in said for name in launch.COMMANDS)
  assert "Did you mean 'train'" in fails(capsys, 'trian')
  assert "Did you mean 'build'" in fails(capsys, 'microscope', 'bild')


def test_values_have_the_type_of_their_flag(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  flags = command_line.Flags(
    'Does it.',
    command_line.config(required=False),
    command_line.path('out', 'Where.'),
    command_line.paths('release', 'Which.'),
    command_line.words('change', (), 'What.'),
    command_line.whole('batch', 3, 'How many.'),
    command_line.switch('dry_run', True, 'Whether.'),
    name='it',
  )
  given = ['--out', '~/x', '--release=~/a,b', '--nodry_run']
  given += ['--config=tiny:layers=3', '--config.train.steps', '5']
  with flags.parse(given) as values:
    assert values.out == '/home/me/x'
    assert values.release == ['/home/me/a', 'b'] and values.change == []
    assert values.batch == 3 and values.dry_run is False
    assert values.config.collection.layers == (3,)
    assert values.config.train.steps == 5
    assert values.config_name == 'tiny:layers=3'
  with flags.parse([]) as values:
    assert values.config is None and values.dry_run is True


def test_an_error_of_the_work_is_shown_as_its_sentence(capsys):
  flags = command_line.Flags('Does it.', name='it')
  kinds = ValueError, RuntimeError, OSError, ImportError
  for error in (kind('no') for kind in kinds):
    with pytest.raises(SystemExit, match=f'{type(error).__name__}: no'):
      with flags.parse([]):
        raise error
    with pytest.raises(type(error)):
      with flags.parse(['--debug']):
        raise error
  with pytest.raises(SystemExit, match="'/a/b' cannot be used: Not a dir.*y.$"):
    with flags.parse([]):
      raise NotADirectoryError(20, 'Not a directory', '/a/b')
  with pytest.raises(KeyError):  # a mistake of ours
    with flags.parse([]):
      raise KeyError('x')


def test_orbax_shows_no_tracebacks_of_a_save_that_failed(capsys):
  with command_line.Flags('x', name='x', needs_flags=False).parse([]):
    logger = absl_logging.get_absl_logger()
  error = OSError, OSError(5, 'Input/output error'), None
  for path, shown in (
    ('/lib/orbax/checkpoint/_src/futures/future.py', False),
    ('/lib/gemma_scope/runtime/checkpoints.py', True),
  ):
    record = logging.LogRecord('absl', 40, path, 1, 'failed', None, error)
    assert bool(logger.filter(record)) is shown


def test_a_path_that_does_not_exist_is_suggested(tmp_path):
  (tmp_path / 'runs' / 'tiny').mkdir(parents=True)
  wanted = str(tmp_path / 'runs' / 'tiny')
  assert path_values.existing(wanted, 'workdir').is_dir()
  for typo in (f'{tmp_path}/runs/tinny', f'{tmp_path}/rums/tiny'):
    with pytest.raises(ValueError) as error:
      path_values.existing(typo, 'workdir')
    assert str(error.value).endswith(f'Did you mean {wanted!r}?')
  with pytest.raises(ValueError, match="no file or folder '/nowhere/x'.$"):
    path_values.existing('/nowhere/x', 'workdir')


def test_the_page_of_commands_is_the_code():
  page = cli_page.PAGE.read_text(encoding='utf-8')
  assert page == cli_page.page(), 'run launch/cli_page.py'


def test_a_script_says_how_it_is_called_from_a_checkout():
  done = subprocess.run(
    [sys.executable, 'launch/prepare_text.py'],
    cwd=cli_page.PAGE.parents[1],
    env=os.environ | {'PYTHONPATH': '.'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert 'Usage: python launch/prepare_text.py --source=TEXT' in done.stdout


@pytest.mark.parametrize('name', COMMANDS)
def test_no_path_is_an_address(name, capsys, tmp_path, monkeypatch):
  """No flag makes a folder named 'gs:' of gs://bucket/run."""
  monkeypatch.chdir(tmp_path)
  for flag in COMMANDS[name].declared:
    if flag.kind not in ('path', 'paths') or flag.address:
      continue
    given = [w for w in complete(name) if not w.startswith(f'--{flag.name}=')]
    for address in ('gs://bucket/run', 's3://bucket/run', 'memory://run'):
      said = fails(capsys, *given, f'--{flag.name}={address}')
      assert f'--{flag.name}' in said and address in said
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', COMMANDS)
def test_a_file_in_the_place_of_a_folder_is_a_sentence(name, capsys, tmp_path):
  """Each flag of a folder refuses a file, and each path one below a file."""
  file = tmp_path / 'a_file'
  file.write_text('x')
  sentence = f'{str(file)!r} is not a folder.'
  for flag in COMMANDS[name].declared:
    if flag.kind != 'path':
      continue
    folder = flag.help.startswith('Folder')
    writes = re.search('[Ff]ile to (write|append)', flag.help)
    wanted = 'folder' if folder else 'file' if writes else ''
    assert flag.target == wanted, flag.help
    given = [w for w in complete(name) if not w.startswith(f'--{flag.name}=')]
    for path in (file, file / 'below')[not folder :]:
      said = fails(capsys, *given, f'--{flag.name}={path}')
      assert f'--{flag.name}: {sentence}' in said
    if writes:
      for path in (tmp_path, '/dev/null', '/proc/a_file', '/proc/no/such/one'):
        said = fails(capsys, *given, f'--{flag.name}={path}')
        assert said.startswith(f'--{flag.name}')
  assert file.read_text() == 'x'
