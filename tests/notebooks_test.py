"""The tutorial runs from top to bottom, and says what it claims."""

from __future__ import annotations

import ast
import copy
import os
import pathlib
import re

import pytest

import gemma_scope

PATH = (
  pathlib.Path(gemma_scope.__file__).parents[1] / 'notebooks' / 'tutorial.ipynb'
)
nbformat = pytest.importorskip('nbformat', reason='nbformat is not installed')


@pytest.fixture(scope='module')
def written():
  return nbformat.read(PATH, as_version=4)


def code(book):
  return [cell for cell in book.cells if cell.cell_type == 'code']


def said(cell) -> str:
  return ''.join(
    output.get('text', '') for output in cell.outputs if 'text' in output
  )


def test_it_imports_and_defines_nothing(written):
  for cell in code(written):
    for node in ast.walk(ast.parse(cell.source)):
      assert not isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_outputs_are_committed_and_name_no_machine(written):
  for cell in code(written)[2:]:
    assert cell.execution_count
    assert not [o for o in cell.outputs if o.output_type == 'error']
  text = ''.join(said(cell) for cell in code(written))
  assert not re.search(r'(?<!\w)/(home|root|work|tmp|Users)/', text)


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
  setup = code(book)[1]
  assert "'runs/tutorial'" in setup.source
  setup.source = setup.source.replace("'runs/tutorial'", repr(str(tmp_path)))
  # One device, as a reader has; most of the time is compilation: less of it.
  flags = os.environ['XLA_FLAGS']
  os.environ['XLA_FLAGS'] = ' '.join(
    flag for flag in flags.split() if 'device_count' not in flag
  )
  try:
    client = nbclient.NotebookClient(
      book, timeout=600, kernel_name='python3',
      resources={'metadata': {'path': str(PATH.parent)}},
    )  # fmt: skip
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
      text, re.MULTILINE,
    )
  )  # fmt: skip
  change, least, most = map(float, line.groups())
  assert change > most > least
  assert text.count('rank correlation') == 4
