"""The standard library of this Python: code, docstrings and pydoc topics.

Left out are tests, site-packages, the character tables of `encodings` (a
megabyte of near copies, which would leak between train and eval),
`_sysconfigdata*` (differs by machine) and the file that holds the pydoc topics
(its entries are documents of their own).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import os
import pathlib
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator

from gemma_scope.text import corpus

_NOT_LIBRARY = frozenset(
  {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests'}
  | {'idle_test', 'encodings'}
)


def read() -> Iterator[corpus.Document]:
  """The code of each module, then each one's docstrings, then the topics."""
  for name, text in modules():
    yield corpus.Document(name, corpus.valid(text))
  for name, text in modules():
    prose = docstrings(text, _module_name(name))
    yield corpus.Document(f'{name}#docstrings', corpus.valid(prose), group=name)
  by_topic = topics()
  for topic in sorted(by_topic):
    yield corpus.Document(
      f'pydoc_data/topics#{topic}', corpus.valid(by_topic[topic])
    )


def modules() -> Iterator[tuple[str, str]]:
  """Relative path and code of each module, in the order of the paths.

  Raises:
    ValueError: there is no module at all.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  names = _library_paths(root)
  if not names:
    raise ValueError(
      f'No .py file was found under {root}, where this Python keeps its '
      'standard library; use another Python or another text source.'
    )
  for name in names:
    text = decode((root / name).read_bytes())
    if text is not None:
      yield name, text


def topics() -> dict[str, str]:
  """The text of `help('TOPIC')` for each topic; {} if it is not installed."""
  try:
    return importlib.import_module('pydoc_data.topics').topics
  except ImportError:  # some distributions package it separately
    return {}


def _library_paths(root: pathlib.Path) -> list[str]:
  """Relative posix paths of the library's modules, sorted."""
  paths = []
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
    relative = pathlib.Path(folder).relative_to(root)
    for file in files:
      name = (relative / file).as_posix()
      left_out = name == 'pydoc_data/topics.py'
      left_out |= file.startswith('_sysconfigdata')
      if file.endswith('.py') and not left_out:
        paths.append(name)
  return sorted(paths)


def decode(data: bytes) -> str | None:
  """Decodes as Python itself would (PEP 263); None if Python could not."""
  try:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return io.TextIOWrapper(io.BytesIO(data), encoding).read()
  except (SyntaxError, UnicodeDecodeError, LookupError):
    return None


def _module_name(path: str) -> str:
  names = path.removesuffix('.py').split('/')
  if names[-1] == '__init__' and len(names) > 1:
    names = names[:-1]
  return '.'.join(names)


def parsed(code: str) -> ast.Module | None:
  """The syntax tree of a module; None if this Python cannot parse it."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # invalid escapes in old modules
      return ast.parse(code)
  except (SyntaxError, ValueError, RecursionError):
    return None


def docstrings(code: str, module: str) -> str:
  """All docstrings of a module as prose, each under its qualified name."""
  tree = parsed(code)
  if tree is None:
    return ''
  sections = []

  def visit(node: ast.AST, name: str) -> None:
    prose = ast.get_docstring(node, clean=False)
    if prose and inspect.cleandoc(prose):
      sections.append(f'{name}\n\n{inspect.cleandoc(prose)}\n')
    inside(node, name)

  def inside(node: ast.AST, name: str) -> None:
    for child in ast.iter_child_nodes(node):
      if isinstance(
        child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
      ):
        visit(child, f'{name}.{child.name}')
      elif isinstance(child, (ast.stmt, ast.ExceptHandler)):
        inside(child, name)  # definitions under if, try, with

  visit(tree, module)
  return '\n\n'.join(sections)
