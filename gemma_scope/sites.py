"""Sites: the places in a Gemma block where activations are read.

One block, with the sites in the order they are computed:

  resid_pre ─┬─ attn_in ── attention ── attn_out ── W_O ── attn_raw ── attn_add
             └──────────────────────────────(+)──────────────────────────┘
  resid_mid ─┬─ mlp_in_ungained ── mlp_in ── mlp_hidden ── mlp_raw ── mlp_out
             └──────────────────────────────(+)──────────────────────────┘
  resid_post

That is a block of Gemma 2 and 3. Gemma 4 multiplies resid_post by a number of
the layer, and before that

  - E2B and E4B add the per-layer input: r = resid_mid + mlp_out,
    ple_out = norm(W_out (gelu(W_gate r) * p)), p a vector of the token and the
    layer, resid_post = (r + ple_out) * number;
  - 26B-A4B has two branches of its MLP. mlp_in and mlp_hidden are those of the
    dense branch, which every token passes; the experts have an input norm of
    their own. mlp_in_ungained feeds both branches and the router:

    router_logits   W_router (mlp_in_ungained * router_scale / sqrt(D)), [E]
    expert_shares   the softmax of the logits, of the k largest alone and
                    divided by their sum; 0 for the other experts, [E]
    experts_out     norm(sum over e of expert_shares_e * scale_e * MLP_e)
    mlp_raw         norm(dense branch) + experts_out
    mlp_out         norm(mlp_raw): what the residual receives

Gemma Scope trains on `attn_out` (concatenated heads before W_O), `mlp_out`
(after the post-MLP norm) and `resid_post`; its transcoders read
`mlp_in_ungained` (Gemma Scope 1) or `mlp_in` (Gemma Scope 2, norm gain
included). Source: arXiv 2408.05147 section 3.1; Gemma Scope 2 paper.

What an SAE reads and writes is its `Wiring`:

  type        reads                      writes
  sae         one site                   the same site
  transcoder  one site                   another site of its layer
  crosscoder  several layers, one kind   the same sites
  clt         several layers, one kind   another kind, in each of these layers
  crosscoder  one site of two models     the same site of both: a `pair`

A latent of a crosscoder or of a cross-layer transcoder (CLT) belongs to one
layer, reads there, and writes to that layer and to those after it. Where two
models are compared, every latent reads and writes both; the site of the second
model is written second:resid_post/12, and its activation stands to the right
of the first model's in the rows [x, x'] of such a crosscoder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol

BLOCK_KINDS = (  # of every Gemma
  'resid_pre',  # input of the block
  'attn_in',  # after the pre-attention norm
  'attn_out',  # concatenated heads, before W_O
  'attn_raw',  # after W_O, before the post-attention norm
  'attn_add',  # after the post-attention norm: what the residual receives
  'resid_mid',  # resid_pre + attn_add (read only)
  'mlp_in_ungained',  # x / rms(x) of resid_mid
  'mlp_in',  # the same times the norm's gain
  'mlp_hidden',  # gelu(gate) * up
  'mlp_raw',  # MLP output before the post-MLP norm
  'mlp_out',  # after the post-MLP norm: what the residual receives
  'resid_post',  # output of the block
)
EXPERTS = (  # of a mixture of experts
  'router_logits',  # of every expert
  'expert_shares',  # weight of every expert, 0 but for the chosen ones
  'experts_out',  # sum of the experts after their own norm
)
# In this order: synthetic activations are seeded by a kind's index.
KINDS = (
  *BLOCK_KINDS,
  'ple_out',  # what the residual receives of the per-layer input
  *EXPERTS,
)
READ_ONLY = frozenset({'resid_mid'})


class Dimensions(Protocol):
  """What a site needs to know of a model (`lm.Config` has it)."""

  num_layers: int

  def site_widths(self, layer: int) -> dict[str, int]:
    """Width of every kind of site that this layer has."""


def block_widths(d_model: int, heads: int, d_ff: int) -> dict[str, int]:
  """Kind -> width in the block that all Gemmas have.

  Args:
    heads: width of the concatenated heads.
    d_ff: width of the MLP's hidden layer.
  """
  return {
    **dict.fromkeys(BLOCK_KINDS, d_model),
    'attn_out': heads,
    'mlp_hidden': d_ff,
  }


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Dimensions of a model whose layers are all alike."""

  d_model: int
  d_ff: int
  num_layers: int
  num_heads: int
  head_dim: int

  def site_widths(self, layer: int) -> dict[str, int]:
    del layer
    return block_widths(self.d_model, self.num_heads * self.head_dim, self.d_ff)


@dataclasses.dataclass(frozen=True, order=True)
class Site:
  """A layer (counted from zero) and a kind from `KINDS`.

  `second`: in the second of two models that are compared.
  """

  layer: int
  kind: str
  second: bool = False

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f'There is no site kind {self.kind!r}; the kinds are '
        f'{", ".join(KINDS)}.'
      )
    if self.layer < 0:
      raise ValueError(f'Layers count from 0; found {self.layer}.')

  def __str__(self) -> str:
    model = 'second:' if self.second else ''
    return f'{model}{self.kind}/{self.layer}'

  def of_first(self) -> Site:
    """The same site of the first model."""
    return Site(self.layer, self.kind)

  def of_second(self) -> Site:
    """The same site of the second model."""
    return Site(self.layer, self.kind, second=True)

  def width(self, model: Dimensions) -> int:
    """Width D of the activation here; raises where the model has none."""
    widths = model.site_widths(self.layer)
    if self.kind not in widths:
      feature = 'experts' if self.kind in EXPERTS else 'per-layer inputs'
      raise ValueError(f'There is no {self} in a model without {feature}.')
    return widths[self.kind]

  def check(self, model: Dimensions) -> Site:
    """Returns itself, or raises when the model has no such layer or kind."""
    if self.layer >= model.num_layers:
      raise ValueError(
        f'{self} asks for layer {self.layer}, and the model has layers 0 to '
        f'{model.num_layers - 1}.'
      )
    self.width(model)
    return self


def parse(text: str) -> Site:
  """`'resid_post/12'` -> `Site(12, 'resid_post')`."""
  match = re.fullmatch(r'(second:)?(\w+)/(\d+)', text)
  if not match:
    raise ValueError(
      f'A site is written kind/layer, as in resid_post/12; found {text!r}.'
    )
  return Site(int(match[3]), match[2], match[1] is not None)


def width_name(width: int) -> str:
  """Number of latents in Gemma Scope's names: 16384 -> '16k', 2^20 -> '1m'.

  A number that is no power of two stands for itself: 1536 -> '1536'.
  """
  if width < 1_000 or width & (width - 1):
    return str(width)
  in_millions = width >= 1_000_000
  return f'{width // 1_000_000}m' if in_millions else f'{width // 1_000}k'


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


TYPES = ('sae', 'transcoder', 'crosscoder', 'clt')
ITSELF = ('sae', 'crosscoder')  # they write what they read
SEVERAL = ('crosscoder', 'clt')  # over several layers
_MOST_LAYERS = 1024
_LISTED = 3  # more layers in a row than this are named by the first and last


@dataclasses.dataclass(frozen=True)
class Wiring:
  """A type from `TYPES`, the sites read and the sites written, by layer."""

  type: str
  sites: tuple[Site, ...]
  targets: tuple[Site, ...]

  def __post_init__(self):
    if self.type not in TYPES:
      raise ValueError(
        f'There is no type {str(self.type)[:40]!r}; the types are '
        f'{", ".join(TYPES)}.'
      )
    if self.pair:
      self._check_pair()
      return
    reads = [site.layer for site in self.sites]
    writes = [site.layer for site in self.targets]
    kinds = (
      {site.kind for site in self.sites},
      {site.kind for site in self.targets},
    )
    itself = self.type in ITSELF
    if not (
      reads == writes == sorted(set(reads))
      and 0 < len(reads) <= (_MOST_LAYERS if self.several else 1)
      and [len(kind) for kind in kinds] == [1, 1]
      and (kinds[0] == kinds[1]) is itself
    ):
      raise ValueError(
        f'A member of type {self.type} reads '
        f'{"sites of one kind, by layer" if self.several else "one site"}, and '
        f'writes {"the same" if itself else "another kind"} in each layer; '
        f'found {_listed(self.sites)} and {_listed(self.targets)}.'
      )

  def _check_pair(self) -> None:
    first = self.sites[:1]
    expected = (*first, *(site.of_second() for site in first))
    matches = self.sites == self.targets == expected and len(set(expected)) == 2
    if not (matches and self.type == 'crosscoder'):
      raise ValueError(
        'A crosscoder of two models reads and writes one site of both, such as '
        'resid_post/2 and second:resid_post/2; found '
        f'{_listed(self.sites)} and {_listed(self.targets)} in a member of '
        f'type {self.type}.'
      )

  @property
  def pair(self) -> bool:
    """Whether it reads and writes one site of two models, side by side."""
    return any(site.second for site in (*self.sites, *self.targets))

  def check_one_model(self, name: str) -> None:
    """Refuses a crosscoder of two models where there is one."""
    if self.pair:
      raise ValueError(
        f'{name} is a {self}; measure it with gemma-scope diffing.'
      )

  @property
  def several(self) -> bool:
    """Whether parameters have an axis of layers."""
    return self.type in SEVERAL and not self.pair

  @property
  def kind(self) -> str:
    """Of the sites read."""
    return self.sites[0].kind

  @property
  def folder(self) -> str:
    """The first part of its path in a release."""
    return self.kind if self.type == 'sae' else self.type

  def layers(self, separator: str = ',', range_mark: str = '-') -> str:
    """'12', '7,13,17,22', or '0-25' for more than three layers in a row."""
    numbers = list(dict.fromkeys(site.layer for site in self.sites))
    if len(numbers) > _LISTED and numbers[-1] - numbers[0] == len(numbers) - 1:
      return f'{numbers[0]}{range_mark}{numbers[-1]}'
    return separator.join(map(str, numbers))

  def __str__(self) -> str:
    """'resid_post/12', 'transcoder mlp_in/3', 'crosscoder resid_post/0-5'."""
    place = f'{self.kind}/{self.layers()}'
    if self.pair:
      return f'{self.type} {place} of two models'
    return place if self.type == 'sae' else f'{self.type} {place}'


def wiring_of(card: Mapping[str, Any]) -> Wiring:
  """The wiring that a card names under 'type', 'sites' and 'targets'.

  Raises:
    ValueError: these do not fit together.
  """
  return Wiring(
    card.get('type'), _sites(card, 'sites'), _sites(card, 'targets')
  )


def wiring_order(wiring: Wiring) -> tuple:
  """Sort key: type, kind in the order of a block, number of layers, layers."""
  return (
    TYPES.index(wiring.type),
    KINDS.index(wiring.kind),
    len(wiring.sites),
    wiring.sites,
    wiring.targets,
  )


def _sites(card: Mapping[str, Any], key: str) -> tuple[Site, ...]:
  names = card.get(key)
  if not isinstance(names, list | tuple) or len(names) > _MOST_LAYERS:
    raise ValueError(
      f'{key} must be a list of sites, such as ["resid_post/12"].'
    )
  parsed = []
  for name in names:
    site = parse(name) if isinstance(name, str) else None
    if str(site) != name:
      raise ValueError(f'{key} has {str(name)[:80]!r}, which is no site.')
    parsed.append(site)
  return tuple(parsed)


def _listed(site_tuple: tuple[Site, ...]) -> str:
  shown = ', '.join(map(str, site_tuple[:6])) or 'none'
  return shown + (', ...' if len(site_tuple) > 6 else '')
