"""Documents of the Python standard library, and which are held out."""

from __future__ import annotations

import pytest

from gemma_scope.text import corpus as corpus_lib
from gemma_scope.text import (
  sources,
  standard_library,
)


@pytest.fixture(scope='session')
def library() -> dict[str, corpus_lib.Document]:
  """All of `python`, with the docstrings (seconds to parse) of 100 modules."""
  whole, parsed = standard_library.docstrings, []

  def docstrings(code: str, module: str) -> str:
    parsed.append(module)
    return whole(code, module) if len(parsed) <= 100 else ''

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(standard_library, 'docstrings', docstrings)
    found = list(sources.documents('python'))
  assert len(parsed) > 300
  assert len({d.name for d in found}) == len(found)
  return {d.name: d for d in found}


def test_python_is_code_docstrings_and_topics(library):
  assert 'import' in library['json/decoder.py'].text
  assert 'abc.ABCMeta\n\n' in library['abc.py#docstrings'].text
  assert 'def ' in library['pydoc_data/topics#function'].text
  names = list(library)
  assert not any('/tests/' in n or 'site-packages' in n for n in names)
  assert not any(n.startswith(('test/', '/', 'encodings/')) for n in names)
  assert not any('sysconfigdata' in n for n in names)
  code = [n for n in names if '#' not in n]
  assert code == sorted(code) and code == names[: len(code)]
  assert sum(len(library[n].text) for n in code) > 5e6


def test_docstrings_of_nested_definitions():
  code = (
    '"""Top."""\nclass A:\n  """  A.\n\n    more\n  """\n'
    '  async def f(self):\n    """F."""\n    def g(): "G."\n'
    'if True:\n  def h():\n    """H."""\n  def empty(): ""\n'
  )
  prose = standard_library.docstrings(code, 'm')
  sections = ['m\n\nTop.', 'm.A\n\nA.\n\nmore', 'm.A.f\n\nF.']
  sections += ['m.A.f.g\n\nG.', 'm.h\n\nH.']
  assert prose == '\n\n\n'.join(sections) + '\n'
  assert standard_library.docstrings('def (', 'm') == ''


def test_splits_are_disjoint_by_document_and_near_two_per_cent(corpus, library):
  found = [corpus_lib.Document(f'document {i}', 'x') for i in range(20_000)]
  held_out = sum(d.split == 'eval' for d in found)
  assert 300 < held_out < 500
  source = f'files:{corpus}/*.txt'
  train = {d.name for d in sources.documents(source, 'train')}
  held = {d.name for d in sources.documents(source, 'eval')}
  assert train and held and not train & held and len(train | held) == 300
  # A module and its docstrings are on the same side.
  sides = {}
  for name, document in library.items():
    if '/topics#' not in name:
      sides.setdefault(name.partition('#')[0], set()).add(document.split)
  assert all(len(side) == 1 for side in sides.values())
  assert {'train'} in sides.values() and {'eval'} in sides.values()
