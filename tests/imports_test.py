"""What importing the package loads."""

from __future__ import annotations

import ast
import pathlib
import sys

from tests.helpers.shell import ROOT, run


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
