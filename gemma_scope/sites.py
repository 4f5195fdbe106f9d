"""Where an activation is read in a Gemma block: the one spelling of "where".

One block of Gemma 2 and 3, with the sites in the order they are computed:

  resid_pre ─┬─ attn_in ── attention ── attn_out ── W_O ── attn_raw ── attn_add
             └──────────────────────────────(+)──────────────────────────┘
  resid_mid ─┬─ mlp_in_ungained ── mlp_in ── mlp_hidden ── mlp_raw ── mlp_out
             └──────────────────────────────(+)──────────────────────────┘
  resid_post

Gemma Scope trains on `attn_out` (concatenated heads before W_O), `mlp_out`
(after the post-MLP norm) and `resid_post`; its transcoders read
`mlp_in_ungained` (Gemma Scope 1) or `mlp_in` (Gemma Scope 2, norm gain
included). Source: arXiv 2408.05147 section 3.1; Gemma Scope 2 paper.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

KINDS = (
  'resid_pre',  # input of the block
  'attn_in',  # after the pre-attention norm
  'attn_out',  # concatenated heads, before W_O
  'attn_raw',  # after W_O, before the post-attention norm
  'attn_add',  # after the post-attention norm: what the residual receives
  'resid_mid',  # resid_pre + attn_add (read only)
  'mlp_in_ungained',  # x / rms(x) of resid_mid
  'mlp_in',  # the same times the norm's gain (1 + scale)
  'mlp_hidden',  # gelu(gate) * up
  'mlp_raw',  # MLP output before the post-MLP norm
  'mlp_out',  # after the post-MLP norm: what the residual receives
  'resid_post',  # output of the block
)
READ_ONLY = frozenset({'resid_mid'})


class Dimensions(Protocol):
  """What a site needs to know of a model (`lm.Config` has it)."""

  d_model: int
  d_ff: int
  num_layers: int
  num_heads: int
  head_dim: int


@dataclasses.dataclass(frozen=True, order=True)
class Site:
  """A layer (counted from zero) and a kind from `KINDS`."""

  layer: int
  kind: str

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f'There is no site kind {self.kind!r}; the kinds are '
        f'{", ".join(KINDS)}.'
      )
    if self.layer < 0:
      raise ValueError(f'A layer counts from 0; found {self.layer}.')

  def __str__(self) -> str:
    return f'{self.kind}/{self.layer}'

  def width(self, model: Dimensions) -> int:
    """Width D of the activation here."""
    if self.kind == 'attn_out':
      return model.num_heads * model.head_dim
    return model.d_ff if self.kind == 'mlp_hidden' else model.d_model

  def check(self, model: Dimensions) -> Site:
    """Returns itself, or raises when the model has no such layer."""
    if self.layer >= model.num_layers:
      raise ValueError(
        f'{self} asks for layer {self.layer}, and the model has layers 0 to '
        f'{model.num_layers - 1}.'
      )
    return self


def parse(text: str) -> Site:
  """`'resid_post/12'` -> `Site(12, 'resid_post')`."""
  match = re.fullmatch(r'(\w+)/(\d+)', text)
  if not match:
    raise ValueError(
      f'A site is written kind/layer, as in resid_post/12; found {text!r}.'
    )
  return Site(int(match[2]), match[1])


def width_name(width: int) -> str:
  """Number of latents in Gemma Scope's names: 16384 -> '16k', 2^20 -> '1m'."""
  if width >= 1_000_000:
    return f'{width // 1_000_000}m'
  return f'{width // 1_000}k' if width >= 1_000 else str(width)


def parse_width(text: str) -> int:
  """'16k' -> 16384, '1m' -> 2^20, '640' -> 640 (k and m are powers of two)."""
  match = re.fullmatch(r'(\d+)([km]?)', text.strip().lower())
  if not match:
    raise ValueError(f'A width looks like 16384 or 16k; found {text!r}.')
  number, unit = int(match[1]), match[2]
  if not unit:
    return number
  # '16k', '65k' and '131k' are 2^14, 2^16, 2^17: the power of two whose name
  # it is.
  for power in range(10, 31):
    if width_name(2**power) == f'{number}{unit}':
      return 2**power
  raise ValueError(
    f'{text!r} is not the name of a power of two; write the number itself.'
  )
