"""English text from the documentation of the installed packages.

  standard library                pydoc's topics, docstrings, comments
  PACKAGES, as installed          their descriptions (what the package index
                                  shows), .md, .rst and .txt files, docstrings,
                                  comments and long strings of their modules
    -> paragraphs(text)           sentences; no code, tables or signatures
    -> one document per file      paragraphs that no earlier document had

A paragraph is dropped if more than half of its five-word sequences occur in
earlier paragraphs. Otherwise boilerplate, or a README that repeats a docstring,
would be in both train and eval.

The documents depend on the version of Python and on the versions in
`versions()`, which the manifest of a token store keeps.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import itertools
import pathlib
import platform
import re
from collections.abc import Iterator

from gemma_scope.text import corpus, standard_library

# The distributions of requirements.txt whose documentation is long. A fixed
# list: what else an environment holds does not change the text.
PACKAGES = (
  'absl-py',
  'anyio',
  'array-record',
  'attrs',
  'chex',
  'click',
  'cloudpickle',
  'clu',
  'einops',
  'etils',
  'flax',
  'fonttools',
  'fsspec',
  'gemma',
  'grain',
  'humanize',
  'jax',
  'jaxlib',
  'jaxtyping',
  'kauldron',
  'markdown-it-py',
  'matplotlib',
  'ml-collections',
  'numpy',
  'optax',
  'orbax-checkpoint',
  'packaging',
  'pillow',
  'pluggy',
  'protobuf',
  'psutil',
  'pygments',
  'pyparsing',
  'pytest',
  'python-dateutil',
  'requests',
  'rich',
  'safetensors',
  'scipy',
  'simplejson',
  'starlette',
  'tensorboardx',
  'tensorflow-datasets',
  'tensorstore',
  'toolz',
  'tqdm',
  'typeguard',
  'typing-extensions',
  'urllib3',
  'uvicorn',
  'wrapt',
)
_TESTS = frozenset({'test', 'tests', 'testing', 'testdata', 'licenses'})
_NO_PROSE = re.compile(
  r'licen[cs]e|copying|authors|notice|entry_points|top_level|labels|classes'
  r'|url_checksums|names\.txt|categories',
  re.IGNORECASE,
)
_STRING_WORDS = 25  # fewer, outside docstrings, is a message
_DOCUMENT_WORDS = 40
_PARAGRAPH_WORDS = 10
_SHINGLE = 5  # words
_EVAL_ONE_IN = 20  # documents: the corpus is small


def versions() -> dict[str, str]:
  """The version of each package that documents come from."""
  by_package = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      by_package[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass  # not in `versions`: so another text
  return by_package


def read() -> Iterator[corpus.Document]:
  """Prose documents in a fixed order, without repeated paragraphs."""
  known_runs: set[int] = set()
  for name, text in itertools.chain(_standard_library(), _packages()):
    new_paragraphs = _without_dangling(
      [
        paragraph
        for paragraph in paragraphs(text)
        if _is_new(paragraph, known_runs)
      ]
    )
    if (
      sum(len(paragraph.split()) for paragraph in new_paragraphs)
      >= _DOCUMENT_WORDS
    ):
      yield corpus.Document(
        name, corpus.valid(_joined(new_paragraphs)), eval_one_in=_EVAL_ONE_IN
      )


def _standard_library() -> Iterator[tuple[str, str]]:
  topics = standard_library.topics()
  for topic in sorted(topics):
    yield f'pydoc/{topic}', topics[topic]
  for name, code in standard_library.modules():
    yield f'python/{name}', english(code)


def _packages() -> Iterator[tuple[str, str]]:
  for package in PACKAGES:
    try:
      distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
      continue
    description = distribution.metadata.get_payload()
    yield f'{package}/description', str(description or '')
    for file in sorted(distribution.files or (), key=str):
      if _TESTS & set(file.parts) or '..' in file.parts:
        continue
      if file.suffix not in ('.py', '.md', '.rst', '.txt'):
        continue
      if file.suffix != '.py' and _NO_PROSE.search(str(file)):
        continue
      path = pathlib.Path(str(file.locate()))
      if path.is_file():
        data = path.read_bytes()
        text = standard_library.decode(data) or ''
        if file.suffix == '.py':
          text = english(text)
        yield f'{package}/{file.as_posix()}', text


def english(code: str) -> str:
  """Docstrings, comments of several lines and long strings of a module.

  They keep their order, and each begins a paragraph. The result is '' if the
  code cannot be parsed.
  """
  tree = standard_library.parsed(code)
  if tree is None:
    return ''
  nodes = list(ast.walk(tree))
  formatted = {
    id(part)
    for node in nodes
    if isinstance(node, ast.JoinedStr)
    for part in ast.walk(node)
  }
  docstrings = {
    id(node.body[0].value)
    for node in nodes
    if isinstance(node, _DOCUMENTED)
    and node.body
    and isinstance(node.body[0], ast.Expr)
  }
  texts = _comments(code)
  for node in nodes:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
      continue
    short = len(node.value.split()) < _STRING_WORDS
    if id(node) in formatted or (id(node) not in docstrings and short):
      continue
    texts.append((node.lineno, inspect.cleandoc(node.value)))
  return '\n\n'.join(text for _, text in sorted(texts))


def _comments(code: str) -> list[tuple[int, str]]:
  """Runs of at least three comment lines, with the number of the first."""
  runs, run = [], []
  for number, line in enumerate([*code.splitlines(), ''], 1):
    comment = _COMMENT.match(line)
    if comment:
      run.append(comment[1])
      continue
    if len(run) >= 3 and not _LEGAL.search(' '.join(run)):
      runs.append((number - len(run), '\n'.join(run)))
    run = []
  return runs


_COMMENT = re.compile(r'\s*#+(?!\w) ?(.*)')
_LEGAL = re.compile(r'copyright|licen[cs]e', re.IGNORECASE)
_DOCUMENTED = (
  ast.Module,
  ast.ClassDef,
  ast.FunctionDef,
  ast.AsyncFunctionDef,
)

# Paragraphs.

_BULLET = re.compile(r'(?:[-*+•]|\(?\d{1,2}[.)])\s+(?=\S)')
_DIRECTIVE = re.compile(r'\.\.\s+([\w-]+)::')
_TALKS = frozenset(  # directives whose body is text
  {'note', 'warning', 'important', 'tip', 'caution', 'attention', 'hint'}
  | {'seealso', 'versionadded', 'versionchanged', 'deprecated', 'admonition'}
  | {'danger', 'topic', 'sidebar', 'epigraph'}
)
_RULE = re.compile(r'\s*([=\-~^"\'`#*+.:_])\1{2,}[\s=\-~+|:]*$')
_ENTRY = re.compile(  # of a parameter list: `name (type): text`, `:param x: `
  r'(?::\w[^:]*:|@\w+(?: \w+:)?|\*{0,2}`*[\w.\[\]]+`*(?:\s*\([^)]*\))?:)\s+'
)
_MARKUP = (
  (re.compile(r'!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])'), ''),  # images
  (re.compile(r'\[([^\]]+)\]\([^)\s]+\)'), r'\1'),  # links
  (re.compile(r'\[([^\]]+)\]\[[^\]]*\]'), r'\1'),
  (re.compile(r'\s?\[#?\w+\]_'), ''),  # footnotes
  (re.compile(r':[\w:+-]+:`~?([^`<]+?)(?:\s*<[^`>]+>)?`'), r'\1'),  # roles
  (re.compile(r'`([^`<]+?)\s*<[^`>]+>`__?'), r'\1'),
  (re.compile(r'``(.+?)``'), r'\1'),
  (re.compile(r'`([^`]+)`(?:__?)?'), r'\1'),
  (re.compile(r'\*\*([^*]+)\*\*'), r'\1'),
  (re.compile(r'(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])'), r'\1'),
  (re.compile(r'(?<!\w)_([^_\s][^_]*)_(?!\w)'), r'\1'),
  (re.compile(r'</?[A-Za-z][^>]*>'), ''),
  (re.compile(r'\\(?=[^\w\s])|\s*\\\s'), ''),
  (re.compile(r'\s+'), ' '),
)
_SENTENCE = re.compile(r'(?<=[.!?])["\')]*\s+(?=["\'(]?[A-Z])')
_WORD = re.compile(r'["\'(\[]*[A-Za-z][A-Za-z\'’/-]*[)\]"\']*[.,;:!?]*[)"\']*')
_NUMBER = re.compile(r'[(]?[+-]?\d[\d.,]*%?[)]?[.,;:]?')
_SYMBOLS = re.compile(r'[{}<>=|\\_@#$^~\[\]%]')
_COMMON = frozenset(
  'a all also an and any are as at be been but by can do does each for from '
  'get has have if in into is it its may more must no not of on one only or '
  'other same should so such than that the their them then there these they '
  'this to two use used using was we when where which will with you '
  'your'.split()
)


def paragraphs(text: str) -> list[str]:
  """The paragraphs of a text that are English sentences, without markup.

  A list item keeps its '- '.
  """
  english_paragraphs = []
  for raw in _blocks(text):
    bullet = _BULLET.match(raw)
    body = raw[bullet.end() :] if bullet else raw
    entry = _ENTRY.match(body)
    if entry and not entry.group().lower().startswith(('note:', 'warning:')):
      body = body[entry.end() :]
    for pattern, replacement in _MARKUP:
      body = pattern.sub(replacement, body)
    body = ' '.join(
      sentence
      for sentence in _SENTENCE.split(body.strip())
      if not re.search('https?:', sentence)
    )
    if _is_prose(body):
      english_paragraphs.append(f'- {body}' if bullet else body)
  return english_paragraphs


def _blocks(text: str) -> Iterator[str]:
  """Paragraphs and list items, each on one line; literal blocks are left out.

  What is indented deeper than a paragraph that ends in '::', or than a
  directive that is no remark, is literal.
  """
  lines: list[str] = []  # of the block at hand
  fenced, literal = False, None

  def block() -> str:
    text = ' '.join(line.strip() for line in lines)
    lines.clear()
    return text

  for line in [*text.expandtabs().splitlines(), '']:
    stripped = line.strip()
    indent = len(line) - len(line.lstrip())
    if stripped.startswith(('```', '~~~')):
      fenced = not fenced
      lines.clear()
      continue
    if fenced:
      continue
    if literal is not None and stripped:
      if indent > literal:
        continue
      literal = None
    if not stripped:
      if lines and lines[-1].rstrip().endswith('::'):
        literal = len(lines[0]) - len(lines[0].lstrip())
      if lines:
        yield block()
      continue
    directive = _DIRECTIVE.match(stripped)
    if directive or stripped.startswith('..'):
      if lines:
        yield block()
      if directive and directive[1] in _TALKS:
        continue
      literal = indent
      continue
    if _RULE.match(line):  # under a heading, or of a table
      lines.clear()
      continue
    if lines and _starts_anew(lines, line, indent):
      yield block()
    lines.append(line)


def _starts_anew(lines: list[str], line: str, indent: int) -> bool:
  """Whether a line begins another paragraph than the lines before it."""
  first_indent = len(lines[0]) - len(lines[0].lstrip())
  previous_indent = len(lines[-1]) - len(lines[-1].lstrip())
  stripped = line.strip()
  if _BULLET.match(stripped) or stripped.startswith((':', '>>>', '@')):
    return True
  if _ENTRY.match(stripped) and lines[-1].rstrip().endswith(('.', '!', '?')):
    return True
  if _BULLET.match(lines[0].strip()):
    return indent <= first_indent
  if indent < previous_indent:
    return True
  # A term and its text: `name : type` above, deeper lines below.
  return indent > previous_indent and not _ENTRY.match(lines[0].strip())


def _is_prose(text: str) -> bool:
  """Whether a paragraph looks like English sentences."""
  words = text.split()
  if len(words) < _PARAGRAPH_WORDS or not re.match(r'["\'(]?[A-Z]', text):
    return False
  if not re.search(r'[.!?:]["\')]*$', text) or '>>>' in text:
    return False
  plain = sum(
    bool(_WORD.fullmatch(word) or _NUMBER.fullmatch(word)) for word in words
  )
  common = sum(word.lower().strip('.,;:()"\'') in _COMMON for word in words)
  numbers = sum(bool(_NUMBER.fullmatch(word)) for word in words)
  letters = sum(character.isalpha() for character in text)
  capitals = sum(character.isupper() for character in text)
  return (
    plain >= 0.85 * len(words)
    and common >= 0.25 * len(words)
    and numbers <= 0.15 * len(words)
    and capitals <= 0.15 * letters
    and len(_SYMBOLS.findall(text)) <= 0.01 * len(text)
  )


def _is_new(paragraph: str, known_runs: set[int]) -> bool:
  """Whether most word sequences of a paragraph are new; adds them to "
  "`known_runs`."""
  words = re.findall(r'[a-z]+', paragraph.lower())
  runs = {
    int.from_bytes(
      hashlib.blake2b(
        ' '.join(words[i : i + _SHINGLE]).encode(), digest_size=8
      ).digest(),
      'big',
    )
    for i in range(max(len(words) - _SHINGLE + 1, 1))
  }
  known = len(runs & known_runs)
  if 2 * known > len(runs):
    return False
  known_runs |= runs
  return True


def _without_dangling(found_paragraphs: list[str]) -> list[str]:
  """Drops last sentences that announce what was left out ('For example:')."""
  sentences = []
  for text, following in itertools.zip_longest(
    found_paragraphs, found_paragraphs[1:], fillvalue=''
  ):
    announces = re.search(r':+["\')]*$', text)
    if announces and not following.startswith('- '):
      text = ' '.join(_SENTENCE.split(text)[:-1])
      if len(text.split()) < _PARAGRAPH_WORDS:
        continue
    sentences.append(text)
  return sentences


def _joined(listed: list[str]) -> str:
  """Blank lines between paragraphs, none between the items of a list."""
  text = listed[0]
  for previous, paragraph in zip(listed, listed[1:], strict=False):
    in_list = previous.startswith('- ') and paragraph.startswith('- ')
    text += ('\n' if in_list else '\n\n') + paragraph
  return text + '\n'
