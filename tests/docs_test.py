"""The documentation builds without warnings, and its links lead somewhere."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

import gemma_scope
from gemma_scope.microscope.dashboard import terms

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
PAGES = [
  path
  for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')]
  if 'CHANGELOG' not in path.name
]


def links(path: pathlib.Path) -> list[str]:
  text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
  return re.findall(r'\]\(([^)\s]+)\)', text)


@pytest.mark.parametrize('path', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(path):
  for link in links(path):
    if not re.match(r'[a-z]+:|#', link):
      assert (path.parent / link.split('#')[0]).exists(), link


@pytest.mark.parametrize('path', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_of_the_project_exist(path):
  """`gemma_scope/...py` and the like, in backticks or commands."""
  names = re.findall(
    r'\b(?:gemma_scope|configs|launch|tests|docs|notebooks)/[\w/]+\.\w+',
    path.read_text(),
  )
  for name in names:
    assert (ROOT / name).exists() or name.startswith('gemma_scope/runs'), name


def plain(text: str) -> str:
  return ' '.join(re.sub(r'[`*]', '', text).lower().split())


@pytest.mark.parametrize('term, text', terms.TERMS)
def test_concepts_say_what_the_help_of_the_pages_says(term, text):
  concepts = plain((ROOT / 'docs' / 'concepts.md').read_text())
  assert plain(term) in concepts
  for sentence in re.findall(r'[^.]+', text):
    assert plain(sentence) in concepts, sentence


def test_the_site_builds_without_warnings(tmp_path):
  pytest.importorskip('mkdocstrings', reason='mkdocstrings is not installed')
  run = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', tmp_path],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert run.returncode == 0, run.stderr
  assert 'WARNING' not in run.stderr
  for name in ('library', 'training', 'microscope'):
    assert 'gemma_scope.' in (tmp_path / 'api' / f'{name}.html').read_text()
