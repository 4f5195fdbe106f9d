"""How many rows of a text fit into one pass of the model.

  forward    bytes of a row: activations of one layer, and its attention scores
             [heads, T, T] a few times
  gradient   the same for every layer, since the backward pass reads them again

A pass gets as many rows as fit into `BUDGET` bytes, a power of two, so that few
programs are compiled. A text of which not even one row fits is refused with the
longest length that does.
"""

from __future__ import annotations

from collections.abc import Callable

from gemma_scope.language_model import gemma as lm

BUDGET = 2 << 30
_STREAMS = 8  # arrays [T, D] of a layer that are alive at once
_SCORES = 4  # arrays [heads, T, T]


def forward(gemma: lm.Gemma, length: int, latents: int = 0) -> int:
  """Bytes of one row of `length` tokens in a pass without gradient.

  Args:
    latents: those that an edit encodes at each token; 0 where it reads only the
      latents that it changes.
  """
  c = gemma.config
  per_token = _STREAMS * c.d_model + 3 * c.d_ff + 2 * latents
  return 4 * length * (per_token + _SCORES * c.num_heads * length)


def gradient(gemma: lm.Gemma, length: int, latents: int = 0) -> int:
  """Bytes of one row of `length` tokens in a pass with its gradient."""
  return (gemma.config.num_layers + 1) * forward(gemma, length, latents)


def rows(
  row_bytes: Callable[[lm.Gemma, int, int], int],
  gemma: lm.Gemma,
  length: int,
  most: int,
  latents: int = 0,
) -> int:
  """Rows of one pass, a power of two of at most `most`.

  Args:
    row_bytes: `forward` or `gradient`.
    length: tokens of a row.
    most: more are never needed.

  Raises:
    ValueError: not even one row fits.
  """
  count = min(BUDGET // row_bytes(gemma, length, latents), most)
  if count < 1:
    raise ValueError(
      f'The text has {length:,} tokens; {gemma.config.name} can be traced over '
      f'at most {longest(row_bytes, gemma, latents):,} within '
      f'{BUDGET / 2**30:.3g} GiB. Give a shorter text.'
    )
  return 1 << (count.bit_length() - 1)


def longest(
  row_bytes: Callable[[lm.Gemma, int, int], int],
  gemma: lm.Gemma,
  latents: int = 0,
) -> int:
  """The longest text of which one row fits into `BUDGET`."""
  low, high = 0, 1 << 20
  while high - low > 1:
    middle = (low + high) // 2
    fits = row_bytes(gemma, middle, latents) <= BUDGET
    low, high = (middle, high) if fits else (low, middle)
  return low
