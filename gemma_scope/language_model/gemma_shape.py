"""What the shapes of all generations of Gemma have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

_COLUMNS = (
  'd_model',
  'num_layers',
  'num_heads',
  'num_kv_heads',
  'head_dim',
  'd_ff',
  'window',
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of a Gemma text model, in this project's words.

  Where layers differ, these are the numbers of sliding layers.
  """

  name: str
  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  window: int
  pattern: str  # one letter a layer, repeated: L local (sliding), G global

  def is_global(self, layer: int) -> bool:
    """Whether a layer attends to all earlier tokens, not to a window."""
    return self.pattern[layer % len(self.pattern)] == 'G'

  def for_package(self, kinds: Any) -> dict[str, Any]:
    """Arguments that the package's TransformerConfig has in all generations.

    Args:
      kinds: the generation's enumeration of kinds of attention.
    """
    return {
      'num_embed': self.vocab_size,
      'embed_dim': self.d_model,
      'hidden_dim': self.d_ff,
      'num_heads': self.num_heads,
      'head_dim': self.head_dim,
      'num_kv_heads': self.num_kv_heads,
      'sliding_window_size': self.window,
      'attention_types': tuple(
        kinds.GLOBAL if self.is_global(layer) else kinds.LOCAL_SLIDING
        for layer in range(self.num_layers)
      ),
      'use_post_attn_norm': True,
      'use_post_ffw_norm': True,
    }


def from_row(row: Sequence[int]) -> dict[str, int]:
  """Fields of a Shape from a row of a table, d_model to window."""
  return dict(zip(_COLUMNS, row, strict=True))
