"""The house: imports run one way, files stay readable."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

import pytest

import gemma_scope

PACKAGE = pathlib.Path(gemma_scope.__file__).parent
FOLDERS = [p.parent for p in sorted(PACKAGE.rglob('__init__.py'))]


def reading_order(folder: pathlib.Path) -> list[str]:
  """Modules of a package, as its docstring lists them."""
  name = '.'.join(folder.relative_to(PACKAGE.parent).parts)
  text = importlib.import_module(name).__doc__
  return re.findall(r'^  (\w+)  +', text, re.MULTILINE)


def imported(path: pathlib.Path, package: str) -> set[str]:
  """Modules of a package that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == package:
        names |= {alias.name for alias in node.names}
      elif node.module.startswith(f'{package}.'):
        names.add(node.module.removeprefix(f'{package}.').split('.')[0])
  return names


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_the_reading_order_names_every_module(folder):
  modules = {p.stem for p in folder.glob('*.py')} - {'__init__'}
  modules |= {part.parent.name for part in folder.glob('*/__init__.py')}
  order = reading_order(folder)
  assert len(order) == len(set(order))
  assert set(order) == modules


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_a_module_imports_only_from_those_above_it(folder):
  package = '.'.join(folder.relative_to(PACKAGE.parent).parts)
  order = reading_order(folder)
  for position, module in enumerate(order):
    files = [folder / f'{module}.py']
    if not files[0].exists():
      files = sorted((folder / module).rglob('*.py'))
    for file in files:
      below = imported(file, package) - set(order[:position])
      assert not below - {module}, f'{file} imports {below}'


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
      if path != PACKAGE / 'language_model' / 'gemma_package.py':
        assert not roots & {'gemma', 'kauldron'}, path


def test_files_are_short():
  for path in PACKAGE.rglob('*.py'):
    assert len(path.read_text().splitlines()) <= 420, path


# The options of `forward` are keywords, and tables of models have columns.
MANY_PARAMETERS = set(PACKAGE.glob('language_model/gemma*.py'))


def is_jitted(node: ast.FunctionDef) -> bool:
  """A compiled function takes its arrays one by one."""
  return any('jit' in ast.unparse(each) for each in node.decorator_list)


def test_functions_are_short_and_take_few_parameters():
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        where = f'{path.name}: {node.name}'
        assert node.end_lineno - node.lineno < 80, where
        given = node.args
        names = {a.arg for a in given.posonlyargs + given.args}
        names |= {a.arg for a in given.kwonlyargs}
        few = len(names - {'self', 'cls'}) <= 6 or is_jitted(node)
        assert few or path in MANY_PARAMETERS, where


def test_tests_import_helpers_and_not_each_other():
  for path in (PACKAGE.parent / 'tests').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and node.module:
        if node.module.split('.')[0] == 'tests':
          names = [node.module, *(alias.name for alias in node.names)]
          assert not any(name.endswith('_test') for name in names), path
