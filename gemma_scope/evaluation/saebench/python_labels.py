"""Labels for the tokens of Python source code, from `tokenize` and `ast`.

  code -> for every character its class (tokenize) and its surroundings (ast)
  pieces of the tokenizer -> the characters that each piece covers
  piece -> the labels of its first character that is not white space, or of its
           first character if all are white space

Pieces are matched to characters by bytes. The vocabulary writes a space as '▁'
and a byte without a piece as <0xAB>, so that the joined pieces are the text,
and a piece may be part of a character. An f-string is labelled as one string,
as Python before 3.12 tokenised it.

The labels are independent booleans. They are ground truth for probes, for
examples of a feature and for its labels.
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

# A character has one of these classes, or none (space between tokens).
CLASSES = (
  'keyword',
  'name',
  'string',
  'comment',
  'number',
  'operator',
  'indent',
)
# A character may be in several of these places.
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
  """Sequences of code with labels for their tokens.

  Attributes:
    tokens_NT: int32, BOS first, padded with 0.
    keep_NT: bool; False for BOS and padding.
    labels: name -> bool [N, T].
    group_N: the index of each sequence's document.
  """

  tokens_NT: np.ndarray
  keep_NT: np.ndarray
  labels: dict[str, np.ndarray]
  group_N: np.ndarray


def of_characters(code: str) -> dict[str, np.ndarray]:
  """Labels every character of a module: name -> bool [characters].

  Raises:
    ValueError: this version of Python cannot parse the code.
  """
  labels = {name: np.zeros(len(code), bool) for name in CLASSES + PLACES}
  starts = _line_starts(code)
  try:
    tree = ast.parse(code)
    _classes(code, starts, labels)
  except (SyntaxError, tokenize.TokenError, RecursionError) as error:
    raise ValueError(
      f'This version of Python cannot parse the code: {error}.'
    ) from None
  _places(tree, code, starts, labels)
  return labels


def _line_starts(code: str) -> np.ndarray:
  """The index of the first character of each line."""
  ends = [match.end() for match in re.finditer('\r\n|\r|\n', code)]
  return np.array([0, *ends, len(code)])


def _classes(code, starts, labels):
  def index(position):
    line, column = position
    return min(starts[min(line, len(starts)) - 1] + column, len(code))

  # Python 3.12 and later split f-strings, and only they have these names.
  opens = getattr(tokenize, 'FSTRING_START', None)
  closes = getattr(tokenize, 'FSTRING_END', None)
  inside = []
  for token in tokenize.generate_tokens(io.StringIO(code, newline='').readline):
    start, end = index(token.start), index(token.end)
    if token.type == opens and opens is not None:
      inside.append(start)
    elif token.type == closes and closes is not None:
      labels['string'][inside.pop() : end] = True
    elif inside:
      continue
    elif token.type == tokenize.NAME:
      name = 'keyword' if keyword.iskeyword(token.string) else 'name'
      labels[name][start:end] = True
    elif token.type in _OF_TYPE:
      labels[_OF_TYPE[token.type]][start:end] = True
  known = np.any([labels[name] for name in CLASSES], 0)
  for line in re.finditer('(?:^|(?<=[\r\n]))[ \t]+', code):
    indentation = slice(line.start(), line.end())
    labels['indent'][indentation] = ~known[indentation]


def _places(tree, code, starts, labels):
  lines = [
    code[start:stop]
    for start, stop in zip(starts[:-1], starts[1:], strict=True)
  ]

  def index(line, byte):  # ast counts columns in bytes of UTF-8
    if not byte:
      return starts[line - 1]
    prefix = lines[line - 1].encode()[:byte]
    return starts[line - 1] + len(prefix.decode())

  def mark(name, first, last):
    start = index(first.lineno, first.col_offset)
    labels[name][start : index(last.end_lineno, last.end_col_offset)] = True

  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      a_class = isinstance(node, ast.ClassDef)
      mark('in_class' if a_class else 'in_def', node.body[0], node.body[-1])
      start = index(node.lineno, node.col_offset)
      words = 'class' if a_class else r'(?:async\s+)?def'
      match = re.compile(rf'{words}\s+(\w+)').match(code, start)
      if match:  # a line may be continued by a backslash before the name
        labels['def_name'][slice(*match.span(1))] = True
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
  """The start and end of the characters that each piece covers, [pieces, 2].

  A piece that is part of a character covers that character.

  Raises:
    ValueError: the joined pieces are not the text.
  """
  encoded = []
  for piece in pieces:
    byte = _BYTE.fullmatch(piece)
    encoded.append(
      bytes([int(byte[1], 16)]) if byte else tokenizers.readable(piece).encode()
    )
  data = tokenizers.readable(text).encode()
  if b''.join(encoded) != data:
    raise ValueError(
      'The joined pieces differ from the text; use a tokenizer that keeps all '
      'white space.'
    )
  # Characters begin at bytes that do not continue one.
  begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
  character = np.cumsum(begins) - 1
  ends = np.cumsum(
    [len(piece_bytes) for piece_bytes in encoded], dtype=np.int64
  )
  first = character[ends - [len(piece_bytes) for piece_bytes in encoded]]
  return np.stack([first, character[ends - 1] + 1], 1)


def of_pieces(pieces: Iterable[str], code: str) -> dict[str, np.ndarray]:
  """Labels every piece of a module: name -> bool [pieces].

  Raises:
    ValueError: see `spans` and `of_characters`.
  """
  first = []
  for start, end in spans(pieces, code):
    text = code[start:end]
    blank = len(text) - len(text.lstrip())
    first.append(start + (blank if blank < len(text) else 0))
  first = np.asarray(first, np.int64)
  return {name: label[first] for name, label in of_characters(code).items()}


def windows(
  documents: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer,
  length: int,
  most: int,
) -> Labelled:
  """Cuts documents into labelled sequences of `length` tokens, BOS first.

  Args:
    documents: modules; those that this Python cannot parse are skipped.
    tokenizer: the language model's tokenizer.
    length: tokens in a sequence.
    most: maximum number of sequences per document, spread evenly over it.

  Raises:
    ValueError: no document can be parsed.
  """
  tokens, keep, group, labels = [], [], [], []
  for number, (ids, by_name) in enumerate(_parsed(documents, tokenizer)):
    room = length - 1
    starts = np.arange(0, len(ids), room)
    if len(starts) > most:
      starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]
    for start in starts:
      window = slice(start, start + room)
      fill = (1, room - len(ids[window]))
      tokens.append(
        np.pad(ids[window], fill, constant_values=(tokenizer.bos_id, 0))
      )
      keep.append(np.pad(np.ones(len(ids[window]), bool), fill))
      labels.append(
        {name: np.pad(label[window], fill) for name, label in by_name.items()}
      )
      group.append(number)
  if not tokens:
    raise ValueError('None of the documents is Python source code.')
  return Labelled(
    np.asarray(tokens, np.int32),
    np.asarray(keep),
    {name: np.asarray([row[name] for row in labels]) for name in labels[0]},
    np.asarray(group),
  )


def _parsed(documents, tokenizer) -> Iterator[tuple[np.ndarray, dict]]:
  for document in documents:
    ids = tokenizer.encode(document.text)
    try:
      yield ids, of_pieces(tokenizer.pieces(ids), document.text)
    except ValueError:
      continue
