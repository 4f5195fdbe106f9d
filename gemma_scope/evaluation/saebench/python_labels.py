"""Labels of the tokens of Python source, from `tokenize` and `ast`.

  code -> a class for every character (tokenize), and what it lies in (ast)
  tokenizer's pieces -> the characters they stand for
  piece -> the labels of its first character that is not white space, or of
           its first character where there is no other

A piece's characters are found in bytes: the vocabulary writes a space as '▁'
and a byte that has no piece as <0xAB>, so that pieces, put together, are the
text again, and a piece may be a part of a character. An f-string is a string
from end to end, as it was before Python 3.12.

Labels of a token are booleans, each its own question, so that a probe, a
feature's examples and an explanation can be held against a known truth.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import keyword
import re
import tokenize
from collections.abc import Iterable, Iterator

import numpy as np

from gemma_scope.text import corpus, tokenizers

# One of these, or none (the space between tokens).
CLASSES = (
  'keyword',
  'name',
  'string',
  'comment',
  'number',
  'operator',
  'indent',
)
# Any of these.
PLACES = ('docstring', 'def_name', 'in_def', 'in_class', 'call_argument')

_BYTE = re.compile('<0x([0-9A-F]{2})>')
_OF_TYPE = {
  tokenize.STRING: 'string',
  tokenize.COMMENT: 'comment',
  tokenize.NUMBER: 'number',
  tokenize.OP: 'operator',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
  """Sequences of code with the labels of their tokens.

  Attributes:
    tokens_NT: int32, BOS first, padded with 0.
    keep_NT: bool, where a token counts: not BOS, not padding.
    labels: name -> bool [N, T].
    group_N: the document of each sequence, counted from 0.
  """

  tokens_NT: np.ndarray
  keep_NT: np.ndarray
  labels: dict[str, np.ndarray]
  group_N: np.ndarray


def of_characters(code: str) -> dict[str, np.ndarray]:
  """Label -> bool for every character of a module's source.

  Raises:
    ValueError: this Python cannot parse it.
  """
  found = {name: np.zeros(len(code), bool) for name in CLASSES + PLACES}
  starts = _line_starts(code)
  try:
    tree = ast.parse(code)
    _classes(code, starts, found)
  except (SyntaxError, tokenize.TokenError, RecursionError) as error:
    raise ValueError(
      f'The code is not Python that this version reads: {error}.'
    ) from None
  _places(tree, code, starts, found)
  return found


def _line_starts(code: str) -> np.ndarray:
  """Index of each line's first character, as tokenize and ast count lines."""
  ends = [m.end() for m in re.finditer('\r\n|\r|\n', code)]
  return np.array([0, *ends, len(code)])


def _classes(code, starts, found):
  def at(position):
    line, column = position
    return min(starts[min(line, len(starts)) - 1] + column, len(code))

  # Python 3.12 and later split an f-string; these names are theirs alone.
  opens = getattr(tokenize, 'FSTRING_START', None)
  closes = getattr(tokenize, 'FSTRING_END', None)
  inside = []
  for token in tokenize.generate_tokens(io.StringIO(code, newline='').readline):
    start, end = at(token.start), at(token.end)
    if token.type == opens and opens is not None:
      inside.append(start)
    elif token.type == closes and closes is not None:
      found['string'][inside.pop() : end] = True
    elif inside:
      continue
    elif token.type == tokenize.NAME:
      name = 'keyword' if keyword.iskeyword(token.string) else 'name'
      found[name][start:end] = True
    elif token.type in _OF_TYPE:
      found[_OF_TYPE[token.type]][start:end] = True
  known = np.any([found[name] for name in CLASSES], 0)
  for line in re.finditer('(?:^|(?<=[\r\n]))[ \t]+', code):
    part = slice(line.start(), line.end())
    found['indent'][part] = ~known[part]


def _places(tree, code, starts, found):
  lines = [code[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]

  def at(line, byte):  # ast counts columns in bytes of UTF-8
    if not byte:
      return starts[line - 1]
    prefix = lines[line - 1].encode()[:byte]
    return starts[line - 1] + len(prefix.decode())

  def mark(name, first, last):
    start = at(first.lineno, first.col_offset)
    found[name][start : at(last.end_lineno, last.end_col_offset)] = True

  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      a_class = isinstance(node, ast.ClassDef)
      mark('in_class' if a_class else 'in_def', node.body[0], node.body[-1])
      start = at(node.lineno, node.col_offset)
      words = 'class' if a_class else r'(?:async\s+)?def'
      named = re.compile(rf'{words}\s+(\w+)').match(code, start)
      if named:  # a line may be continued by a backslash before the name
        found['def_name'][slice(*named.span(1))] = True
    elif isinstance(node, ast.Call):
      for argument in [*node.args, *node.keywords]:
        mark('call_argument', argument, argument)
    if isinstance(
      node,
      (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    ):
      if ast.get_docstring(node, clean=False) is not None:
        mark('docstring', node.body[0], node.body[0])


def spans(pieces: Iterable[str], text: str) -> np.ndarray:
  """The characters that each piece stands for: int [pieces, 2], start and end.

  A piece that is a part of a character has that character.

  Raises:
    ValueError: the pieces, put together, are not the text.
  """
  parts = []
  for piece in pieces:
    byte = _BYTE.fullmatch(piece)
    parts.append(
      bytes([int(byte[1], 16)]) if byte else piece.replace('▁', ' ').encode()
    )
  data = text.replace('▁', ' ').encode()
  if b''.join(parts) != data:
    raise ValueError(
      'The pieces are not those of this text: put together they are another '
      'one. The tokenizer must be one that keeps all white space.'
    )
  # Characters begin at bytes that do not continue one.
  begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
  character = np.cumsum(begins) - 1
  ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
  first = character[ends - [len(part) for part in parts]]
  return np.stack([first, character[ends - 1] + 1], 1)


def of_pieces(pieces: Iterable[str], code: str) -> dict[str, np.ndarray]:
  """Label -> bool [pieces] of a module's source; raises as the parts do."""
  at = []
  for start, end in spans(pieces, code):
    text = code[start:end]
    blank = len(text) - len(text.lstrip())
    at.append(start + (blank if blank < len(text) else 0))
  at = np.asarray(at, np.int64)
  return {name: label[at] for name, label in of_characters(code).items()}


def windows(
  documents: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer,
  length: int,
  most: int,
) -> Labelled:
  """Sequences of `length` tokens, BOS first, of each document's code.

  Args:
    documents: modules; what this Python cannot parse is passed over.
    most: sequences of one document, spread evenly over it.
  """
  tokens, keep, group, labels = [], [], [], []
  for number, (ids, found) in enumerate(_parsed(documents, tokenizer)):
    room = length - 1
    starts = np.arange(0, len(ids), room)
    if len(starts) > most:
      starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]
    for start in starts:
      part = slice(start, start + room)
      fill = (1, room - len(ids[part]))
      tokens.append(
        np.pad(ids[part], fill, constant_values=(tokenizer.bos_id, 0))
      )
      keep.append(np.pad(np.ones(len(ids[part]), bool), fill))
      labels.append({k: np.pad(v[part], fill) for k, v in found.items()})
      group.append(number)
  if not tokens:
    raise ValueError('No document is Python source: nothing has labels.')
  return Labelled(
    np.asarray(tokens, np.int32),
    np.asarray(keep),
    {k: np.asarray([row[k] for row in labels]) for k in labels[0]},
    np.asarray(group),
  )


def _parsed(documents, tokenizer) -> Iterator[tuple[np.ndarray, dict]]:
  for document in documents:
    ids = tokenizer.encode(document.text)
    try:
      yield ids, of_pieces(tokenizer.pieces(ids), document.text)
    except ValueError:
      continue
