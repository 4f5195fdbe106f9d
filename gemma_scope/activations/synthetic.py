"""Synthetic activations with known true features: sums of sparse features.

  x = b + sum_i f_i d_i + noise               at every site, with one f
  p_i = min(cap, c rank_i^-zipf)              frequency; c such that sum p = L0
  f_i > 0 where u_i > Phi^-1(1 - p_i)         u standard normal
  u_i = sqrt(rho) g + sqrt(1 - rho) e_i       g shared by the feature's group
  f_i = exp(spread n), n standard normal      where it fires: median 1

The Gaussian copula correlates the features of a group without changing their
frequencies. A child is active only where its parent is, with probability
`child_share` (its u is in no group); absorption is measured on these pairs.
Directions are random unit vectors. With more features than dimensions they
interfere.

All sites share the coefficients, and a feature has another direction at each
site. A feature first appears at one layer (a child at its parent's) and exists

  at mlp_in and mlp_in_ungained    of that layer only
  at all other kinds               of that layer and of all later ones

Thus resid_post at several layers is data for crosscoders, mlp_in and mlp_out
for transcoders (one layer) and cross-layer transcoders (several).

Features 0 ... `parents` - 1 are the parents, the most frequent; the last
`parents * children` are the children, child j of parent j % parents. Rows are a
pure function of (settings, chunk), made in blocks of fixed size: the first rows
of a chunk are the same whatever its length.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_scope import files, sites
from gemma_scope.activations import harvest

MODEL = 'synthetic'  # a config's lm.name
FILE = 'features.npz'
_READ = ('mlp_in', 'mlp_in_ungained')
_BLOCK = 4096  # rows drawn at once; another value is another data set
# What a random stream is for: the second word of its seed.
_LATENTS, _NOISE, _DIRECTIONS, _BIRTHS = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that the data depend on.

  Attributes:
    features: G, the number of features.
    d_model: D, the width of every site.
    l0: the mean number of features that fire; children count.
    zipf: exponent of the frequencies by rank; 0 makes them equal.
    max_frequency: the largest frequency of a feature.
    parents: number of features with children.
    children: number of children of each parent.
    child_share: probability that a child is active where its parent is.
    groups: number of groups of features without a parent; 0 is none.
    correlation: rho of u within a group.
    spread: standard deviation of the logarithm of a coefficient.
    noise: variance of the isotropic noise, as a share of the features'.
    bias: norm of b, in standard deviations of the features' sum.
    sites: the sites, such as ('mlp_in/0', 'mlp_out/0').
    seed: of everything.

  Raises:
    ValueError: the settings are impossible.
  """

  features: int = 256
  d_model: int = 128
  l0: float = 8.0
  zipf: float = 0.7
  max_frequency: float = 0.1
  parents: int = 16
  children: int = 2
  child_share: float = 0.3
  groups: int = 32
  correlation: float = 0.5
  spread: float = 0.4
  noise: float = 0.05
  bias: float = 1.0
  sites: tuple[str, ...] = ('resid_post/0',)
  seed: int = 0

  def __post_init__(self):
    shares = ('max_frequency', 'child_share')
    rules = {
      'd_model, features and parents a count': (
        min(self.features, self.d_model) >= 1
        and min(self.parents, self.children, self.groups, self.seed) >= 0
      ),
      'max_frequency and child_share above 0 and below 1': all(
        0 < getattr(self, name) < 1 for name in shares
      ),
      'correlation at least 0 and below 1': 0 <= self.correlation < 1,
      'zipf, spread, noise and bias at least 0': (
        min(self.zipf, self.spread, self.noise, self.bias) >= 0
      ),
      'parents * (1 + children) at most features': (
        self.parents * (1 + self.children) <= self.features
      ),
      'at least one site, each once': (
        0 < len(self.sites) == len(set(self.sites))
      ),
    }
    for rule, holds in rules.items():
      if not holds:
        raise ValueError(
          f'Synthetic data need {rule}; found {dataclasses.asdict(self)}.'
        )
    highest_l0 = self.max_frequency * float(self._weights.sum())
    if not 0 < self.l0 < highest_l0:
      raise ValueError(
        f'With these features and max_frequency {self.max_frequency:g} a mean '
        f'L0 is above 0 and below {highest_l0:.3g}; found {self.l0:g}.'
      )
    for site in self.at:
      if site.kind in sites.READ_ONLY:
        raise ValueError(
          f'SAEs cannot be trained at {site}; choose another site.'
        )

  @property
  def at(self) -> tuple[sites.Site, ...]:
    """The sites."""
    return tuple(map(sites.parse, self.sites))

  @property
  def roots(self) -> int:
    """How many features have no parent."""
    return self.features - self.parents * self.children

  @property
  def _weights(self) -> np.ndarray:
    """How often each root and its children fire, by the root's frequency."""
    weight_N = np.ones(self.roots)
    weight_N[: self.parents] += self.children * self.child_share
    return weight_N

  @property
  def parent_G(self) -> np.ndarray:
    """Index of each feature's parent, -1 for none; int32 [G]."""
    children = np.arange(self.features - self.roots) % max(self.parents, 1)
    roots = np.full(self.roots, -1)
    return np.concatenate([roots, children]).astype(np.int32)

  @property
  def frequency_G(self) -> np.ndarray:
    """How often each feature fires; float64 [G], sum `l0`."""
    shape_N = np.arange(1, self.roots + 1) ** -self.zipf
    low, high = 0.0, self.max_frequency / float(shape_N[-1])
    for _ in range(100):  # bisection to the last bit
      c = (low + high) / 2
      p_N = np.minimum(self.max_frequency, c * shape_N)
      low, high = (c, high) if p_N @ self._weights < self.l0 else (low, c)
    share = self.child_share * p_N[self.parent_G[self.roots :]]
    return np.concatenate([p_N, share])


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
  """The true features.

  Attributes:
    settings: the settings of the data.
    directions: [G, D] of each site; a zero row where a feature is absent.
    biases: b [D] of each site.
    frequency_G: how often each feature fires.
    parent_G: index of each feature's parent, -1 for none.
  """

  settings: Settings
  directions: Mapping[sites.Site, np.ndarray]
  biases: Mapping[sites.Site, np.ndarray]
  frequency_G: np.ndarray
  parent_G: np.ndarray


def make_truth(settings: Settings) -> Truth:
  """The features of `settings`."""
  layers = sorted({site.layer for site in settings.at})
  rng = np.random.default_rng((settings.seed, _BIRTHS))
  born_G = rng.integers(len(layers), size=settings.features)
  is_child = settings.parent_G >= 0
  born_G[is_child] = born_G[settings.parent_G[is_child]]
  directions, biases = {}, {}
  for site in settings.at:
    rng = _site_stream(settings, _DIRECTIONS, site)
    d_GD = rng.standard_normal((settings.features, settings.d_model))
    d_GD /= np.linalg.norm(d_GD, axis=1, keepdims=True)
    layer_index = layers.index(site.layer)
    present = (
      born_G == layer_index if site.kind in _READ else born_G <= layer_index
    )
    directions[site] = (d_GD * present[:, None]).astype(np.float32)
    b_D = rng.standard_normal(settings.d_model)
    b_D *= settings.bias / np.linalg.norm(b_D)
    b_D *= math.sqrt(_variance(settings, directions[site]))
    biases[site] = b_D.astype(np.float32)
  return Truth(
    settings, directions, biases, settings.frequency_G, settings.parent_G
  )


def _site_stream(settings, purpose, site, *more) -> np.random.Generator:
  kind = sites.KINDS.index(site.kind)
  return np.random.default_rng(
    (settings.seed, purpose, kind, site.layer, *more)
  )


def _variance(settings: Settings, d_GD: np.ndarray) -> float:
  """Variance of the features' sum over all dimensions, were they independent.

  Var f = p E[f^2] - (p E[f])^2 with the moments of a log-normal; what
  correlation adds has random sign, because directions are random.
  """
  p_G, s = settings.frequency_G, settings.spread
  variance_G = p_G * math.exp(2 * s**2) - p_G**2 * math.exp(s**2)
  return float(variance_G @ np.sum(d_GD.astype(np.float64) ** 2, 1))


def _block(settings: Settings, chunk: int, block: int) -> np.ndarray:
  """The coefficients of one block, float32 [_BLOCK, G]."""
  # Seeds must differ in more than trailing zeros, so the last word is never 0.
  rng = np.random.default_rng((settings.seed, _LATENTS, chunk, block + 1))
  roots, parent_G = settings.roots, settings.parent_G
  u_RG = rng.standard_normal((_BLOCK, settings.features), np.float32)
  if settings.groups and settings.correlation:
    rho = np.float32(settings.correlation)
    shared = rng.standard_normal((_BLOCK, settings.groups), np.float32)
    u_RG[:, :roots] *= np.sqrt(1 - rho)
    u_RG[:, :roots] += (
      np.sqrt(rho) * shared[:, np.arange(roots) % settings.groups]
    )
  normal = statistics.NormalDist()
  p_G = settings.frequency_G.copy()
  p_G[roots:] = settings.child_share
  fires_RG = u_RG > np.float32(
    [-normal.inv_cdf(probability) for probability in p_G]
  )
  fires_RG[:, roots:] &= fires_RG[:, parent_G[roots:]]
  f_RG = np.zeros_like(u_RG)
  count = int(np.count_nonzero(fires_RG))
  f_RG[fires_RG] = np.exp(
    np.float32(settings.spread) * rng.standard_normal(count, np.float32)
  )
  return f_RG


def latents(settings: Settings, chunk: int, rows: int) -> np.ndarray:
  """The true coefficients f of a chunk's first rows, float32 [rows, G]."""
  blocks = range(-(-rows // _BLOCK))
  return np.concatenate([_block(settings, chunk, b) for b in blocks])[:rows]


class Source:
  """Rows of synthetic activations; like `harvest.ModelSource`.

  Args:
    settings: the settings of the data.
    layout: the sizes of chunks; rows are independent, and its sequences only
      set the number of rows.
  """

  def __init__(self, settings: Settings, layout: harvest.Layout):
    self.layout = layout
    self.truth = make_truth(settings)
    self.sites = settings.at
    self.widths = dict.fromkeys(self.sites, settings.d_model)
    self.parts = -(-layout.rows // _BLOCK)

  def passes(self, chunk: int, poll: Callable[[], None] = lambda: None):
    """See `harvest.Raw`: each part is a block, after a poll."""
    settings, count = self.truth.settings, self.layout.rows
    for block in range(self.parts):
      poll()
      f_RG = _block(settings, chunk, block)
      rows = {}
      for site in self.sites:
        d_GD = self.truth.directions[site]
        rng = _site_stream(settings, _NOISE, site, chunk, block + 1)
        x_RD = rng.standard_normal((_BLOCK, settings.d_model), np.float32)
        variance = settings.noise * _variance(settings, d_GD)
        x_RD *= np.float32(math.sqrt(variance / settings.d_model))
        x_RD += f_RG @ d_GD + self.truth.biases[site]
        x_RD = x_RD[: count - block * _BLOCK]
        rows[site] = x_RD.astype(self.layout.dtype)
      yield rows

  def counts(self, chunk: int) -> np.ndarray:
    """See `harvest.Raw`: all rows count."""
    return np.ones(self.layout.rows, bool)


def facts(truth: Truth, dtype: str) -> dict[str, Any]:
  """The facts of an activation store of these data; rows are in `dtype`."""
  settings, checksum = truth.settings, 0
  for site in settings.at:
    for array in (truth.directions[site], truth.biases[site]):
      checksum = zlib.crc32(array, checksum)
  return {
    'model': MODEL,
    'model_dtype': dtype,
    'parameters': checksum,
    'seed': settings.seed,
    'text': {'source': MODEL, **json.loads(_to_json(settings))},
    'dimensions': {
      'd_model': settings.d_model,
      'd_ff': settings.d_model,
      'num_layers': max(site.layer for site in settings.at) + 1,
      'num_heads': 1,
      'head_dim': settings.d_model,
    },
  }


def _to_json(settings: Settings) -> str:
  return json.dumps(dataclasses.asdict(settings))


def write_truth(folder: pathlib.Path, truth: Truth) -> None:
  """Writes the true features to `folder`/features.npz."""
  arrays = {
    'settings': np.array(_to_json(truth.settings)),
    'frequency': truth.frequency_G,
    'parent': truth.parent_G,
  }
  for site in truth.settings.at:
    arrays[f'direction.{site.kind}.{site.layer}'] = truth.directions[site]
    arrays[f'bias.{site.kind}.{site.layer}'] = truth.biases[site]
  with files.whole_file(folder / FILE) as file:
    np.savez(file, **arrays)


def truth(folder: str | os.PathLike[str]) -> Truth:
  """Reads what `write_truth` wrote.

  Raises:
    ValueError: the file is missing or damaged.
  """
  path = pathlib.Path(folder) / FILE
  try:
    with np.load(path, allow_pickle=False) as file:
      fields = json.loads(str(file['settings']))
      settings = Settings(**{**fields, 'sites': tuple(fields['sites'])})

      def per_site(name, *shape):
        arrays = {
          site: file[f'{name}.{site.kind}.{site.layer}'] for site in settings.at
        }
        if any(array.shape != shape for array in arrays.values()):
          raise ValueError(f'the shapes of {name} are not {shape}')
        return arrays

      return Truth(
        settings,
        per_site('direction', settings.features, settings.d_model),
        per_site('bias', settings.d_model),
        file['frequency'],
        file['parent'],
      )
  except FileNotFoundError:
    raise ValueError(
      f'No {FILE} in {str(folder)!r}; launch/synthetic.py writes it beside the '
      'activations.'
    ) from None
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
  ) as error:
    raise ValueError(
      f'{str(path)!r} is damaged ({str(error)[:120]}); write it again with '
      'launch/synthetic.py.'
    ) from None
