"""A text with a name, and the rule that holds some of them out."""

from __future__ import annotations

import dataclasses
import hashlib

SPLITS = ('train', 'eval')


@dataclasses.dataclass(frozen=True)
class Document:
  """A text with a name.

  Attributes:
    name: without an absolute path.
    text: of the document.
    group: decides the split in place of the name, where it is given: documents
      made from the same source belong together.
    eval_one_in: the share of such documents that is held out is 1 in this.
  """

  name: str
  text: str
  group: str = ''
  eval_one_in: int = 50

  @property
  def split(self) -> str:
    digest = hashlib.sha256((self.group or self.name).encode()).digest()
    held_out = int.from_bytes(digest, 'big') % self.eval_one_in == 0
    return 'eval' if held_out else 'train'


def valid(text: str) -> str:
  """Text that can be written as UTF-8: lone surrogates become '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
