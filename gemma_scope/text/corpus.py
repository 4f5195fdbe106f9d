"""Documents, and the rule that holds some of them out for evaluation."""

from __future__ import annotations

import dataclasses
import hashlib

SPLITS = ('train', 'eval')


@dataclasses.dataclass(frozen=True)
class Document:
  """A text with a name.

  Attributes:
    name: identifies the document; never an absolute path.
    text: its content.
    group: determines the split instead of the name: documents made from the
      same text share a group. '' uses the name.
    eval_one_in: one in this number of documents is held out.
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
