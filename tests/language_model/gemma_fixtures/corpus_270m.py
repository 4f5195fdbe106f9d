"""Texts of the fixtures of Gemma 3 270M, the same on every machine.

No run of spaces is longer than the longest piece of spaces, 31. Longer ones are
cut from the left by SentencePiece, as when Gemma was trained (31 and 9 of 40);
the merges that `transformers` derives from the vocabulary double (16 and 24).
"""

from __future__ import annotations

import pathlib
import random
import re

import numpy as np

HERE = pathlib.Path(__file__).parent
CODE = '''def fibonacci(n: int) -> int:
  """The n-th number, by recursion."""
  if n < 2:
    return n
\treturn fibonacci(n - 1) + fibonacci(n - 2)


print([fibonacci(i) for i in range(10)])  # 0, 1, 1, 2, 3, 5, 8, 13, 21, 34
'''
CHAT = """<start_of_turn>user
Which river flows through Cairo, and where does it end?<end_of_turn>
<start_of_turn>model
The Nile flows through Cairo and ends in the Mediterranean Sea.<end_of_turn>
"""
SPACES = 'fox  jumps   over\n\n\n  the \t\t dog' + ' ' * 30 + 'and '
SPACES += '\u3000naïve 日本 🦊.'
# Unicode ranges of what a document may hold, and white space of all kinds.
SCRIPTS = {
  'latin': [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F)],
  'greek, cyrillic': [(0x391, 0x3C9), (0x410, 0x44F)],
  'hebrew, arabic': [(0x5D0, 0x5EA), (0x627, 0x64A)],
  'devanagari, thai': [(0x905, 0x939), (0xE01, 0xE30)],
  'cjk': [(0x4E00, 0x9FA5), (0x3041, 0x3096), (0x30A1, 0x30FA)],
  'hangul': [(0xAC00, 0xD7A3)],
  'emoji': [(0x1F300, 0x1F64F), (0x1F680, 0x1F6C5), (0x2600, 0x26FF)],
  'symbols': [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x2190, 0x22FF)],
  'combining': [(0x61, 0x7A), (0x300, 0x36F), (0x200B, 0x200F)],
  'private, astral': [(0xE000, 0xE0FF), (0x10000, 0x100FF), (0x20000, 0x200FF)],
}
SPACE = (
    ' ', '  ', '   ', ' ' * 7, ' ' * 20, ' ' * 31, '\n', '\n\n', '\n' * 5,
    '\n' * 40, '\t', '\t\t', ' \n', '\r\n', '\r', '\xa0', '\u3000', '\u2009',
    '\x0b', '\x0c', '\u2028', '\ufeff', '\x00', '\x7f',
)  # fmt: skip


def texts() -> dict[str, str]:
  """Those whose activations are compared; prose is longer than two windows."""
  licence = (HERE.parents[2] / 'LICENSE').read_text()
  prose = ' '.join(licence.split())[:7000]
  return {'prose': prose, 'code': CODE, 'chat': CHAT, 'spaces': SPACES}


def documents() -> dict[str, str]:
  """Those whose tokens are compared."""
  found = {'licence': (HERE.parents[2] / 'LICENSE').read_text(), **texts()}
  for name, ranges in SCRIPTS.items():
    rng = random.Random(name)
    words = [
      ''.join(
        chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 9))
      )
      for _ in range(300)
    ]
    found[name] = _mixed(rng, words)
  rng = random.Random('prose')
  words = texts()['prose'].split() + CODE.split() + CHAT.split()
  found['words'] = _mixed(rng, words * 4, ' ')
  found['digits'] = _mixed(
    rng, [str(rng.randrange(10**12)) for _ in range(500)]
  )
  found['spaces only'] = ''.join(rng.choices(SPACE, k=3000))
  found['nested'] = '\n'.join(
    ' ' * rng.randrange(40) + rng.choice(words) for _ in range(2000)
  )
  return {name: re.sub(' {32,}', ' ' * 31, x) for name, x in found.items()}


def _mixed(rng: random.Random, words: list[str], space: str = '') -> str:
  """Words in a random order, with white space between, most of them `space`."""
  drawn = rng.choices(words, k=2500)
  gaps = [
    space if space and rng.random() < 0.8 else rng.choice(SPACE) for _ in drawn
  ]
  return ''.join(a + b for a, b in zip(drawn, gaps, strict=True))


def projections(x_ND: np.ndarray) -> np.ndarray:
  """[N, 1 + 4]: the norm, and products with directions of about its size."""
  directions = np.random.default_rng(0).standard_normal((x_ND.shape[1], 4))
  norm = np.linalg.norm(x_ND, axis=1, keepdims=True)
  return np.concatenate([norm, x_ND @ directions], 1).astype(np.float32)
