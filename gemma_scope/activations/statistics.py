"""Statistics of a site's rows, to look at before training.

  mean       |E x|^2 / E |x|^2: how much of the second moment is one vector
  variance   E |x - E x|^2, which dimensions carry it, and their kurtosis
             E (x_d - E x_d)^4 / (E (x_d - E x_d)^2)^2 (3 for a Gaussian)
  spectrum   eigenvalues l of the covariance: the components that carry 90 % of
             their sum, and the effective rank exp(-sum_i p_i log p_i) with
             p = l / sum l (Roy and Vetterli, EUSIPCO 2007)
  norms      quantiles, and the outliers by the rule of `outliers`: how many,
             on which tokens and at which positions

Moments are sums over rows, taken about a fixed vector close to the mean, in
float32 within a part of a chunk and in float64 across parts. They are kept for
all rows and for rows that are no outliers. A part is reduced on the devices;
the host keeps one norm and one token per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import harvest

QUANTILES = (0.0, 0.01, 0.5, 0.99, 0.999, 0.9999, 1.0)
_SHOWN = 8  # dimensions, tokens and positions in a table

# (chunk) -> its tokens [N, T], or None if the text is not available.
Tokens = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Request:
  """What to measure.

  Attributes:
    chunks: number of chunks to read; the first one sets the outlier bounds.
    max_norm: rows with a norm above `max_norm` times the median are outliers.
  """

  chunks: int
  max_norm: float


@dataclasses.dataclass
class Moments:
  """Sums of d = x - shift over some rows, float64."""

  rows: float = 0.0
  d_D: Any = 0.0  # sums of d, d^2, d^3, d^4
  d2_D: Any = 0.0
  d3_D: Any = 0.0
  d4_D: Any = 0.0
  gram_DD: Any = 0.0  # of d d^T

  def add(self, sums) -> None:
    """Adds the sums of one part."""
    for field, value in zip(dataclasses.fields(self), sums, strict=True):
      total = getattr(self, field.name) + np.asarray(value, np.float64)
      setattr(self, field.name, total)

  def describe(self, shift_D: np.ndarray) -> dict[str, Any]:
    """The table's figures; {} without rows."""
    if not self.rows:
      return {}
    mean_D = self.d_D / self.rows
    second_D = self.d2_D / self.rows
    variance_D = np.maximum(second_D - mean_D**2, 0)
    fourth_D = (
      self.d4_D / self.rows
      - 4 * mean_D * self.d3_D / self.rows
      + 6 * mean_D**2 * second_D
      - 3 * mean_D**4
    )
    with np.errstate(invalid='ignore', divide='ignore'):
      kurtosis_D = fourth_D / variance_D**2
    total = variance_D.sum()
    centre = float(np.square(mean_D + shift_D).sum())
    covariance_DD = self.gram_DD / self.rows - np.outer(mean_D, mean_D)
    l_D = np.maximum(np.linalg.eigvalsh(covariance_DD)[::-1], 0)
    p_D = l_D / max(l_D.sum(), 1e-300)
    positive = p_D[p_D > 0]
    largest = np.argsort(-variance_D, kind='stable')[:_SHOWN]
    return {
      'rows': int(self.rows),
      'rms': float(np.sqrt(centre + total)),
      'mean_share': centre / (centre + total) if centre + total else 0.0,
      'variance': float(total),
      'kurtosis': float(np.median(kurtosis_D[variance_D > 0])),
      'dimensions': [
        {
          'dimension': int(d),
          'variance_share': float(variance_D[d] / total) if total else 0.0,
          'kurtosis': float(kurtosis_D[d]),
        }
        for d in largest
      ],
      'components_90': int(np.searchsorted(np.cumsum(p_D), 0.9) + 1),
      'effective_rank': float(np.exp(-(positive * np.log(positive)).sum())),
    }


def measure(
  source: harvest.Raw,
  mesh: Mesh,
  request: Request,
  tokens: Tokens | None = None,
  poll: harvest.Poll = harvest.never,
  report: Callable[[int, int], None] = lambda part, parts: None,
) -> dict[sites.Site, dict[str, Any]]:
  """The statistics of every site over the source's first chunks.

  Args:
    source: gives the rows.
    mesh: the devices.
    request: how much to read, and which rows are outliers.
    tokens: gives the tokens of a chunk, to name those of the outliers.
    poll: called often; may raise to stop.
    report: called after each part with the parts done and their total.

  Returns:
    By site: `all` and `ordinary` (see `Moments.describe`), `norm` (quantiles),
    `outliers`, `special` and `not_finite` (rows left out of all figures).
  """
  meters = {
    site: _Meter(width, request.max_norm, mesh)
    for site, width in source.widths.items()
  }
  length = source.layout.seq_len - 1
  for chunk in range(request.chunks):
    parts = {site: [] for site in source.widths}
    for i, part in enumerate(source.passes(chunk, poll)):
      for site, x in part.items():
        parts[site].append(x)
      report(chunk * source.parts + i + 1, request.chunks * source.parts)
    counts_R = source.counts(chunk)
    token_R = np.full(counts_R.size, -1, np.int64)
    if tokens is not None:
      token_R = tokens(chunk)[:, 1:].reshape(-1)
    position_R = np.arange(counts_R.size) % length + 1
    for site, meter in meters.items():
      poll()
      meter.add(parts.pop(site), counts_R, token_R, position_R)
  return {site: meter.describe() for site, meter in meters.items()}


class _Meter:
  """One site's running sums."""

  def __init__(self, width: int, max_norm: float, mesh: Mesh):
    self._max_norm, self._mesh = max_norm, mesh
    # Replicated, so that every process of a pod can read them.
    replicated = mesh_lib.sharding(mesh)
    self._norms_of = jax.jit(_norms, out_shardings=replicated)
    self._sums_of = jax.jit(_sums, out_shardings=replicated)
    self._bound: float | None = None
    self._shift_D: np.ndarray | None = None
    self._all, self._ordinary = Moments(), Moments()
    self._norm, self._token, self._position = [], [], []
    self._special = self._not_finite = 0

  def add(self, parts, counts_R, token_R, position_R) -> None:
    """Adds a chunk: its parts [..., D]; masks and tokens of its rows [R]."""
    rows = mesh_lib.sharding(self._mesh, 'data', None)
    parts = [
      x if isinstance(x, jax.Array) else mesh_lib.put(x, rows) for x in parts
    ]
    norm_R = np.concatenate([np.asarray(self._norms_of(x)) for x in parts])
    finite_R = np.isfinite(norm_R)
    usable_R = counts_R & finite_R
    self._special += int((~counts_R).sum())
    self._not_finite += int((counts_R & ~finite_R).sum())
    if self._bound is None and usable_R.any():
      self._bound = self._max_norm * float(np.median(norm_R[usable_R]))
    ordinary_R = usable_R & ~(norm_R > (self._bound or np.inf))
    start = 0
    for x in parts:
      part_rows = slice(start, start + x.size // x.shape[-1])
      start = part_rows.stop
      if self._shift_D is None and ordinary_R[part_rows].any():
        weight_R = ordinary_R[part_rows].astype(np.float32)
        sums = self._sums_of(x, weight_R, np.zeros(x.shape[-1], np.float32))
        self._shift_D = np.asarray(sums[1] / sums[0])
      if self._shift_D is None:
        continue
      for moments, chosen_R in (
        (self._ordinary, ordinary_R),
        (self._all, usable_R & ~ordinary_R),
      ):
        if chosen_R[part_rows].any():
          weight_R = chosen_R[part_rows].astype(np.float32)
          sums = jax.device_get(self._sums_of(x, weight_R, self._shift_D))
          moments.add(sums)
          if moments is self._ordinary:
            self._all.add(sums)
    for recorded, values in (
      (self._norm, norm_R),
      (self._token, token_R),
      (self._position, position_R),
    ):
      recorded.append(values[usable_R])

  def describe(self) -> dict[str, Any]:
    """See `measure`."""
    shift_D = 0.0 if self._shift_D is None else self._shift_D
    norm_R, token_R, position_R = (
      np.concatenate(values) if values else np.zeros(0)
      for values in (self._norm, self._token, self._position)
    )
    all_rows, ordinary = (
      moments.describe(shift_D) for moments in (self._all, self._ordinary)
    )
    table = {
      'special': self._special,
      'not_finite': self._not_finite,
      'all': all_rows,
      'ordinary': ordinary,
    }
    if norm_R.size:
      table['norm'] = {
        f'{q:g}': float(v)
        for q, v in zip(QUANTILES, np.quantile(norm_R, QUANTILES), strict=True)
      }
      table['outliers'] = self._outliers(norm_R, token_R, position_R)
      table['outliers']['variance_share'] = (
        1 - _total(ordinary) / _total(all_rows) if _total(all_rows) else 0.0
      )
    return table

  def _outliers(self, norm_R, token_R, position_R) -> dict[str, Any]:
    outlier_R = norm_R > self._bound
    tokens, counts = np.unique(token_R[outlier_R], return_counts=True)
    order = np.argsort(-counts, kind='stable')[:_SHOWN]
    places, at_places = np.unique(position_R[outlier_R], return_counts=True)
    common = np.argsort(-at_places, kind='stable')[:_SHOWN]
    return {
      'max_norm': self._max_norm,
      'norm_bound': self._bound,
      'rows': int(outlier_R.sum()),
      'share': float(outlier_R.mean()),
      'tokens': [
        {
          'token': int(tokens[i]),
          'rows': int(counts[i]),
          'of': int((token_R == tokens[i]).sum()),
        }
        for i in order
        if tokens[i] >= 0
      ],
      'positions': [
        {'position': int(places[i]), 'rows': int(at_places[i])} for i in common
      ],
    }


def _total(figures) -> float:
  """Sum of squared distances to the mean."""
  return figures.get('variance', 0.0) * figures.get('rows', 0)


def _norms(x):
  x = x.astype(jnp.float32)
  return jnp.sqrt(jnp.sum(jnp.square(x), -1)).reshape(-1)


def _sums(x, weight_R, shift_D):
  """Sums over the rows of weight 1: their number, d, d^2, d^3, d^4, d d^T."""
  x_RD = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  kept_R1 = weight_R[:, None] > 0
  d_RD = jnp.where(kept_R1, x_RD - shift_D, 0)  # also where x is not finite
  powers = [jnp.sum(d_RD**n, 0) for n in (1, 2, 3, 4)]
  gram_DD = jnp.einsum('rd,re->de', d_RD, d_RD)
  return (jnp.sum(weight_R), *powers, gram_DD)


def to_text(name: str, table: dict[str, Any]) -> str:
  """One site's statistics as a text table; see `measure`."""
  all_rows, ordinary = table['all'], table['ordinary']
  if not all_rows:
    return f'{name}\n  no usable row'
  outliers, norm = table['outliers'], table['norm']

  def table_row(label, key, number_format):
    return (
      f'  {label:42} {all_rows[key]:>12{number_format}} '
      f'{ordinary[key]:>12{number_format}}'
    )

  lines = [
    name,
    f'  {"":42} {"all rows":>12} {"ordinary":>12}',
    table_row('rows', 'rows', ',d'),
    table_row('root mean square norm', 'rms', '.5g'),
    table_row('share of E|x|^2 that is the mean', 'mean_share', '.1%'),
    table_row('variance', 'variance', '.4g'),
    table_row('kurtosis of a dimension, median', 'kurtosis', '.1f'),
    table_row('components for 90 % of the variance', 'components_90', 'd'),
    table_row('effective rank', 'effective_rank', '.1f'),
  ]
  for label, figures in (('all rows', all_rows), ('ordinary', ordinary)):
    shown = ', '.join(
      f'{dimension["dimension"]}: {dimension["variance_share"]:.1%} (kurtosis '
      f'{dimension["kurtosis"]:.0f})'
      for dimension in figures['dimensions'][:4]
    )
    lines.append(f'  dimensions by share of variance, {label}: {shown}')
  quantiles = ', '.join(
    f'{float(quantile):.2%} {value:.4g}' for quantile, value in norm.items()
  )
  lines += [
    f'  quantiles of the norm: {quantiles}',
    f'  outliers, norm above {outliers["norm_bound"]:.5g} '
    f'({outliers["max_norm"]:g} medians): {outliers["rows"]:,} rows '
    f'({outliers["share"]:.3%}), {outliers["variance_share"]:.1%} of the sum '
    'of squares about the mean',
  ]
  if outliers['tokens']:
    shown = ', '.join(
      f'{row.get("piece", row["token"])!r} {row["rows"]} of {row["of"]:,}'
      for row in outliers['tokens']
    )
    lines.append(f'  their tokens: {shown}')
  if outliers['positions']:
    shown = ', '.join(
      f'{row["position"]} ({row["rows"]})' for row in outliers['positions']
    )
    lines.append(f'  their commonest positions: {shown}')
  left_out = f'{table["special"]:,} special tokens'
  if table['not_finite']:
    left_out += f', {table["not_finite"]:,} rows with NaN or infinity'
  return '\n'.join([*lines, f'  left out: {left_out}'])
