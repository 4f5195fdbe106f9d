"""How many rows of a text fit into one pass of the model.

  forward    bytes per row: the activations of one layer and a few arrays of
             its attention scores [heads, T, T]
  gradient   the same for every layer, because the backward pass needs them all

A pass gets as many rows as fit into `BUDGET` bytes, rounded down to a power of
two so that few programs are compiled. If not even one row fits, the error names
the longest text that does.
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
    latents: number of latents that an edit encodes at each token; 0 if it
      encodes only the latents that it changes.
  """
  c = gemma.config
  widest = max(c.mlp_row(layer) for layer in range(c.num_layers))
  per_token = _STREAMS * c.d_model + 3 * widest + 2 * latents
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
  """Rows per pass: a power of two, at most `most`.

  Args:
    row_bytes: `forward` or `gradient`.
    length: tokens per row.
    most: upper limit.

  Raises:
    ValueError: not even one row fits into `BUDGET`.
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
  """The longest text, in tokens, for which one row fits into `BUDGET`."""
  low, high = 0, 1 << 20
  while high - low > 1:
    middle = (low + high) // 2
    fits = row_bytes(gemma, middle, latents) <= BUDGET
    low, high = (middle, high) if fits else (low, middle)
  return low
