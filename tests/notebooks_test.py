"""The tutorial runs from top to bottom; the cases compile and have outputs."""

from __future__ import annotations

import ast
import collections
import copy
import importlib
import os
import pathlib
import re
import sys

import pytest

import gemma_scope

FOLDER = pathlib.Path(gemma_scope.__file__).parents[1] / 'notebooks'
PATH = FOLDER / 'tutorial.ipynb'
CASES = ('bias', 'entities', 'wrong_answer')
DATA = ('professions', 'entities', 'capitals')
nbformat = pytest.importorskip('nbformat', reason='nbformat is not installed')


@pytest.fixture(scope='module')
def written():
  return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope='module', params=('tutorial', *CASES))
def any_book(request):
  return nbformat.read(FOLDER / f'{request.param}.ipynb', as_version=4)


def code(book):
  return [cell for cell in book.cells if cell.cell_type == 'code']


def said(cell) -> str:
  """All text of a cell's outputs, HTML too."""
  shown = [''.join(output.get('text', '')) for output in cell.outputs]
  for output in cell.outputs:
    data = output.get('data', {})
    shown += [data[key] for key in data if key.startswith('text/')]
  return ''.join(shown)


def test_it_imports_and_defines_nothing(any_book):
  for cell in code(any_book):
    for node in ast.walk(ast.parse(cell.source)):
      assert not isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_outputs_are_committed_and_name_no_machine(any_book):
  assert [cell.execution_count for cell in code(any_book)] == list(
    range(1, len(code(any_book)) + 1)
  )
  for cell in code(any_book):
    assert not [o for o in cell.outputs if o.output_type == 'error']
    assert not [o for o in cell.outputs if o.get('name') == 'stderr']
    assert not re.search(r'(?<!\w)/(home|root|work|tmp|Users)/', said(cell))
  pictures = [
    output
    for cell in code(any_book)
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]
  assert len(pictures) >= 2
  assert 'TODO' not in ''.join(cell.source for cell in any_book.cells)


def test_everything_that_it_uses_exists(any_book):
  """Modules, and the functions of modules, as the notebook names them."""
  modules = {}
  tree = ast.parse('\n'.join(cell.source for cell in code(any_book)))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and 'gemma_scope' in node.module:
      parent = importlib.import_module(node.module)
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        if not hasattr(parent, alias.name):
          importlib.import_module(name)
        modules[alias.asname or alias.name] = getattr(parent, alias.name)
  assert len(modules) > 3
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = modules.get(node.value.id)
      if isinstance(module, type(ast)):
        assert hasattr(module, node.attr), f'{node.value.id}.{node.attr}'


@pytest.fixture
def data(monkeypatch):
  monkeypatch.setattr(sys, 'path', [str(FOLDER), *sys.path])
  return {name: importlib.import_module(name) for name in DATA}


def test_invented_names_have_the_words_of_known_ones(data):
  entities = data['entities']
  everything = {name for names in entities.KINDS.values() for name in names}
  for kind, names in entities.KINDS.items():
    rows = entities.rows(names, kind)
    assert {name for name, known, *_ in rows if known} == set(names)
    for half in (False, True):
      words = {True: [], False: []}
      for name, known, _, held_out in rows:
        if held_out == half:
          words[known] += enumerate(name.split())
          assert known or name not in everything
      first, second = map(collections.Counter, words.values())
      assert first == second


def test_prompts_of_cases_are_distinct(data):
  professions = data['professions']
  assert len(set(professions.PROFESSIONS)) == len(professions.PROFESSIONS)
  assert not set(professions.HE) & set(professions.SHE)
  assert all(text.count('{}') == 1 for text in professions.TEMPLATES)
  capitals = data['capitals']
  places, right, wrong = zip(*capitals.CAPITALS, strict=True)
  assert len(set(places)) == 21 and not set(right) & set(wrong)
  assert not any(p in text for p in places for text in capitals.UNRELATED)


def test_two_lines_change_the_model(written):
  first, second = code(written)[:2]
  assert len(first.source.splitlines()) == 2
  names = {
    target.id
    for node in ast.parse(first.source).body
    for target in ast.walk(node)
    if isinstance(target, ast.Name)
  }
  assert names == {'MODEL', 'CHECKPOINT', 'SAE'}
  assert 'MODEL' in second.source and 'CHECKPOINT' in second.source


def test_it_runs(written, tmp_path):
  nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed')
  pytest.importorskip('ipykernel', reason='ipykernel is not installed')
  book = copy.deepcopy(written)
  model, setup = code(book)[:2]
  assert model.source.startswith("MODEL, CHECKPOINT = 'gemma3-270m', ''")
  model.source = "MODEL, CHECKPOINT, SAE = 'tiny', '', ''"
  assert "'runs/tutorial'" in setup.source
  setup.source = setup.source.replace("'runs/tutorial'", repr(str(tmp_path)))
  # One device, as a reader has; most of the time is compilation: less of it.
  flags = os.environ['XLA_FLAGS']
  os.environ['XLA_FLAGS'] = ' '.join(
    flag for flag in flags.split() if 'device_count' not in flag
  )
  try:
    client = nbclient.NotebookClient(
      book,
      timeout=600,
      kernel_name='python3',
      resources={'metadata': {'path': str(PATH.parent)}},
    )
    client.execute()
  finally:
    os.environ['XLA_FLAGS'] = flags
  text = '\n'.join(said(cell) for cell in code(book))
  own, twin = re.findall(r"(?:the SAE|random) +{.*'fvu': ([\d.]+)", text)
  assert float(own) < 0.6 * float(twin)
  # The dose-response at strength 1 is beyond all its controls.
  line = next(
    re.finditer(
      r'^ 1\.00 .*logit ([+-][\d.]+) .*\(([+-][\d.]+) to ([+-][\d.]+)\)',
      text,
      re.MULTILINE,
    )
  )
  change, least, most = map(float, line.groups())
  assert change > most > least
  assert text.count('rank correlation') == 4
