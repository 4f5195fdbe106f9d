"""The house: imports run one way, files stay readable."""

from __future__ import annotations

import ast
import pathlib
import re

import gemma_scope

PACKAGE = pathlib.Path(gemma_scope.__file__).parent
ORDER = re.findall(r'^  (\w+)  +', gemma_scope.__doc__, re.MULTILINE)


def imported(path: pathlib.Path) -> set[str]:
  """Modules of the package that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'gemma_scope':
      names |= {alias.name for alias in node.names}
  return names


def test_the_reading_order_names_every_module():
  modules = {p.stem for p in PACKAGE.glob('*.py')} - {'__init__'}
  assert set(ORDER) == modules


def test_a_module_imports_only_from_those_above_it():
  for position, module in enumerate(ORDER):
    below = imported(PACKAGE / f'{module}.py') - set(ORDER[:position])
    assert not below, f'{module} imports {below}'


def test_only_the_language_model_imports_gemma():
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      roots = {name.split('.')[0] for name in names}
      assert not roots & {'pickle', 'dill', 'torch', 'tensorflow'}, path
      if path.name != 'lm.py':
        assert not roots & {'gemma', 'kauldron'}, path


def test_files_are_short():
  for path in PACKAGE.rglob('*.py'):
    assert len(path.read_text().splitlines()) <= 420, path
