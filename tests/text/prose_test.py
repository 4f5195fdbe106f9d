"""The source `prose`: sentences stay, code goes, nothing is said twice."""

import pathlib
import re

import pytest

import gemma_scope
from gemma_scope.text import (
  corpus,
  prepare,
  prose,
  sources,
  standard_library,
  tokenizers,
)

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
DOCSTRING = """
Solves a linear system of equations by :func:`~scipy.linalg.lu`, as it is in
[1]_.

The matrix must be square, and its condition number should not be *too* large;
otherwise ``solve`` emits a warning. See https://example.org for the proof.

Parameters
----------
a : (N, N) array_like
    The matrix of coefficients, which has to be square and of full rank.
overwrite : bool, optional
    Whether.
reverse (bool): If true, the rows of the result come back in reverse order.
other: The second matrix, which is added to the first before it is solved.

The cost grows with the third power of the size. For example::

    x = solve(a, b)  # This is a comment, and it is not a part of the text.

    y = solve(a, c)

>>> solve(a, b)
array([1., 2.]) and this is output of the example, and it is not a sentence.

========  =================================================================
a         A table of the words that are in the rows is also not a paragraph.
========  =================================================================

.. math:: This is a formula, and what it says is not for the reader of text.

.. note::
   This function is slow, and it should only be used when the others fail.

- The first of the items is a sentence that goes on
  for more than one line.
- The second of them is as long as it has to be to count.

```python
This is in a fence, and it is not to be read as a paragraph of the text.
```

MUST BE CAPITAL LETTERS THAT ARE A LEGAL NOTICE AND NOT A SENTENCE TO READ.
"""


def test_sentences_stay_and_code_tables_and_lists_of_parameters_go():
  assert prose.paragraphs(DOCSTRING) == [
    'Solves a linear system of equations by scipy.linalg.lu, as it is in.',
    'The matrix must be square, and its condition number should not be too '
    'large; otherwise solve emits a warning.',
    'The matrix of coefficients, which has to be square and of full rank.',
    'If true, the rows of the result come back in reverse order.',
    'The second matrix, which is added to the first before it is solved.',
    'The cost grows with the third power of the size. For example::',
    'This function is slow, and it should only be used when the others fail.',
    '- The first of the items is a sentence that goes on for more than one '
    'line.',
    '- The second of them is as long as it has to be to count.',
  ]


def test_a_module_gives_docstrings_comments_and_long_strings_in_order():
  long = (
    'This is the description of a data set that ' + 'is long and ' * 12 + 'ends'
  )
  code = (
    '"""First."""\n# Second\n# and\n# more.\n# x\n\n'
    f'TEXT = "{long}"\n'
    'def f():\n  """Third."""\n  raise ValueError("a short message")\n'
    '  # one line\n  return f"{TEXT} and many more words than twenty five"\n'
    '# Copyright of\n# somebody who\n# owns it.\n'
  )
  assert prose.english(code).split('\n\n') == [
    'First.',
    'Second\nand\nmore.\nx',
    long,
    'Third.',
  ]
  assert prose.english('def (') == ''


def read(monkeypatch, files: dict[str, str]) -> list[corpus.Document]:
  monkeypatch.setattr(prose, '_packages', lambda: iter(files.items()))
  monkeypatch.setattr(prose, '_standard_library', lambda: iter(()))
  return list(prose.read())


def test_what_was_said_before_is_dropped_also_when_reworded(monkeypatch):
  one = (
    'The cat sat on the mat and it looked at the dog for a very long time, '
    'but the dog was asleep and did not look back at it.'
  )
  reworded = one.replace('asleep', 'tired')
  other = (
    'There are many ways to cook rice, and the one which is used in this '
    'house is to boil it in water with a little salt until it is soft.'
  )
  third = (
    'When the wind comes from the north, the boats stay in the harbour, and '
    'the people of the village mend their nets in the sun by the old wall.'
  )
  found = read(
    monkeypatch,
    {'a': f'{one}\n\n{other}', 'b': f'{reworded}\n\n{third}\n\n{third} {one}'},
  )
  assert [d.name for d in found] == ['a']  # b has too few words of its own
  found = read(
    monkeypatch, {'a': one, 'b': f'{other}\n\n{reworded}\n\n{third}'}
  )
  assert [d.text for d in found] == [f'{other}\n\n{third}\n']


def test_an_announcement_of_what_is_left_out_goes_with_it(monkeypatch):
  text = (
    'The boats stay in the harbour when the wind is from the north, and so '
    'they do here. For example::\n\n  x = 1\n\n'
    'The following are the ways to cook rice that are used in this house:\n\n'
    '- To boil it in water with a little salt until it is soft.\n'
    '- To bake it in the oven with milk and sugar for an hour.\n\n'
    'You can also do this by using the other of the functions::\n\n  y = 2\n'
  )
  [document] = read(monkeypatch, {'a': text})
  assert document.text.split('\n') == [
    'The boats stay in the harbour when the wind is from the north, and so '
    'they do here.',
    '',
    'The following are the ways to cook rice that are used in this house:',
    '',
    '- To boil it in water with a little salt until it is soft.',
    '- To bake it in the oven with milk and sugar for an hour.',
    '',
  ]


def test_installed_packages_give_clean_english_the_same_every_time(monkeypatch):
  monkeypatch.setattr(prose, 'PACKAGES', ('tqdm', 'einops', 'click', 'no-such'))
  modules = [('argparse.py', (ROOT / 'launch/train.py').read_text())]
  monkeypatch.setattr(standard_library, 'modules', lambda: iter(modules))
  found = list(sources.documents('prose'))
  assert found == list(sources.documents('prose'))
  text = '\n'.join(d.text for d in found)
  assert len(text.split()) > 20_000
  lines = [line for line in text.split('\n') if line]
  assert len(set(lines)) == len(lines)
  assert not re.search(r'>>>|```|``|https?:|\n[ \t\r]|\t| {2}', text)
  assert all(re.match(r'(?:- )?["\'(]?[A-Z]', line) for line in lines)
  names = {d.name.split('/')[0] for d in found}
  assert names >= {'pydoc', 'tqdm', 'click'}
  assert not any(str(ROOT) in d.name or d.name.startswith('/') for d in found)
  assert set(prose.versions()) == {'python', 'tqdm', 'einops', 'click'}


def test_one_document_in_twenty_is_held_out():
  found = [corpus.Document(f'{i}', 'x', eval_one_in=20) for i in range(20_000)]
  assert 800 < sum(d.split == 'eval' for d in found) < 1200


def test_every_package_is_locked():
  lock = (ROOT / 'requirements.txt').read_text().lower().replace('_', '-')
  locked = set(re.findall(r'^([a-z0-9-]+)==', lock, re.MULTILINE))
  assert set(prose.PACKAGES) <= locked
  assert sorted(prose.PACKAGES) == list(prose.PACKAGES)


def test_the_manifest_says_which_versions(tmp_path, monkeypatch):
  tokenizer = tokenizers.Tokenizer(
    str(ROOT / 'gemma_scope/language_model/tiny/tokenizer.model')
  )
  monkeypatch.setattr(prose, 'PACKAGES', ('tqdm',))
  monkeypatch.setattr(standard_library, 'modules', lambda: iter(()))
  store = prepare.prepare('prose', tokenizer, tmp_path / 's')
  assert store.manifest['revision'] == prose.versions()
  assert prepare.prepare('prose', tokenizer, tmp_path / 's').folder == (
    store.folder
  )
  versions = prose.versions() | {'tqdm': '0.0'}
  monkeypatch.setattr(prose, 'versions', lambda: versions)
  with pytest.raises(ValueError, match=r"revision is \{'tqdm': .*'0.0'\} here"):
    prepare.prepare('prose', tokenizer, tmp_path / 's')
