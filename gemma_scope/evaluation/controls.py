"""Controls: untrained dictionaries of the same type and L0 as an SAE.

  random          z = (x - m) / s  W_enc, columns of W_enc random with norm 1
                  f = z 1[z > theta],  y_hat = m' + g f W_dec
  least_squares   the same f; W_dec and b_dec by ridge regression of y on f
  pca             z = +-(x - m) / s  v, v the principal components of x;
                  y_hat = m' + f W_dec, the regression of y on each component

m and m' are the means of what is read and what is written, s the root mean
square of x - m at each site. theta is one number for all latents, chosen so
that the mean L0 is that of the SAE. For `pca` this keeps the largest absolute
scores of all rows together. No other choice of as many components has a smaller
squared error: neither the same number in each row nor the first components.

In `random`, W_dec = W_enc^T if the control writes the sites that it reads (SAEs
and crosscoders; in a crosscoder also for every later layer). Otherwise W_dec
has random rows of norm 1. g, one number for each target, minimises the squared
error. The ridge of `least_squares` is the best of a few on a held-out fifth of
the rows. With several layers, the principal components are computed for each
layer and write to its own target. An affine skip is zero.

Controls are fitted on rows in host memory, which should not be the rows that
they are measured on: `least_squares` has as many parameters as an SAE's
decoder. Arrays of this module always have an axis L or M of layers, of size 1
if an SAE reads one site.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import sae, sites
from gemma_scope.evaluation import ridge
from gemma_scope.language_model import splice
from gemma_scope.sae import released as released_lib

KINDS = ('random', 'least_squares', 'pca')

Rows = Mapping[sites.Site, np.ndarray]  # [R, D] of each site, raw
Params = dict[str, jax.Array]

_CHUNK = 2**24  # pre-activations on the host at once
_ROUGH = 2**20  # of them that a first guess of theta sorts
_GAIN_ROWS = 2**11
MOST_DECODER_BYTES = 2**30  # a larger least-squares decoder is not fitted


class Setting(NamedTuple):
  """The numbers of a random control, besides its key and the means."""

  scale: tuple[float, ...]  # s of each site, in its units
  threshold: float
  gain: tuple[float, ...]  # g of each target, in its units


@functools.partial(jax.jit, static_argnames=('wiring', 'width'))
def _random(key, wiring: sites.Wiring, width: int, x_D, y_D):
  """W_enc [L, D, F] and W_dec [L, F, M, D], of norm 1 a latent and target."""
  layers = len(wiring.sites)
  shape = layers, width // layers

  def directions(key, shape, like_D):
    w = jax.random.uniform(key, (*shape, len(like_D)), minval=-1, maxval=1)
    return w / jnp.linalg.norm(w, axis=-1, keepdims=True)

  W_LFD = directions(key, shape, x_D)
  if wiring.sites == wiring.targets:
    W_dec = jnp.broadcast_to(
      W_LFD[:, :, None], (*shape, layers, W_LFD.shape[-1])
    )
  else:
    W_dec = directions(jax.random.fold_in(key, 1), (*shape, layers), y_D)
  later_LM = jnp.triu(jnp.ones((layers, layers)))
  return jnp.swapaxes(W_LFD, 1, 2), W_dec * later_LM[:, None, :, None]


@functools.partial(jax.jit, static_argnames=('wiring', 'width', 'mesh'))
def make(
  key: jax.Array,
  wiring: sites.Wiring,
  means: Mapping[sites.Site, np.ndarray],
  width: int,
  setting: Setting,
  mesh: Mesh | None,
) -> Params:
  """A random control as released parameters, on raw activations."""
  x_LD = jnp.stack([means[site] for site in wiring.sites])
  y_MD = jnp.stack([means[site] for site in wiring.targets])
  W_enc, W_dec = _random(key, wiring, width, x_LD[0], y_MD[0])
  W_enc = W_enc / jnp.stack(setting.scale)[:, None, None]
  with jax.default_matmul_precision('highest'):
    b_enc = -jnp.einsum('ld,ldf->lf', x_LD, W_enc)
  params = {
    'W_enc': W_enc,
    'b_enc': b_enc,
    'W_dec': W_dec * jnp.stack(setting.gain)[:, None],
    'b_dec': y_MD,
    'threshold': jnp.full(b_enc.shape, setting.threshold, jnp.float32),
  }
  params = _released(params, wiring)
  if mesh is None:
    return params
  placement = released_lib.shardings(mesh, params)
  return jax.lax.with_sharding_constraint(params, placement)


class Shape(NamedTuple):
  """What the controls of an SAE have in common with it."""

  wiring: sites.Wiring
  width: int  # latents of the random ones, of all layers
  seed: int = 0

  @property
  def key(self) -> jax.Array:
    """Key of the random directions; independent of other SAEs evaluated."""
    name = zlib.crc32(f'{self.wiring}/{self.width}'.encode())
    return jax.random.fold_in(jax.random.key(self.seed), name)


def fit(
  shape: Shape,
  l0: Sequence[float],
  rows: Rows,
  mesh: Mesh | None = None,
  kinds: Sequence[str] = KINDS,
) -> list[dict[str, Callable[[], Params]]]:
  """Controls for each entry of `l0`, of each of `kinds`.

  Args:
    shape: what the controls read and write, and their width.
    l0: the target mean L0 on these rows. If a threshold of 0 leaves fewer
      latents, the threshold is 0.
    rows: raw activations, at least at the sites and targets.
    mesh: the mesh of the language model.
    kinds: some of `KINDS`; 'least_squares' needs 'random'.

  Returns:
    For each l0: kind -> a function that puts the released parameters on the
    devices. `least_squares` is left out where its decoder is too large.
  """
  wiring, width = shape.wiring, shape.width
  all_sites = dict.fromkeys((*wiring.sites, *wiring.targets))
  rows = {site: np.asarray(rows[site], np.float32) for site in all_sites}
  means = {
    site: rows_RD.mean(0, dtype=np.float64) for site, rows_RD in rows.items()
  }
  means = {site: mean.astype(np.float32) for site, mean in means.items()}
  squares = [
    _square(rows[site] - means[site]) / len(rows[site]) for site in wiring.sites
  ]
  scale = tuple(float(np.sqrt(max(square, 1e-30))) for square in squares)
  x = beside(rows, wiring.sites, wiring.several)
  counts = [round(mean_active * len(x)) for mean_active in l0]
  controls: list[dict[str, Callable]] = [{} for _ in counts]
  if 'random' in kinds:
    unscaled = Setting(scale, 0.0, (1.0,) * len(wiring.targets))
    control_at = functools.partial(make, shape.key, wiring, means, width)
    largest = _largest(control_at(unscaled, mesh), x, max(counts), mesh)
    for control, count in zip(controls, counts, strict=True):
      theta, f_RF = largest.first(count)
      setting = unscaled._replace(threshold=theta)
      gain = _gains(control_at(setting, mesh), x, rows, wiring, mesh)
      control['random'] = functools.partial(
        control_at, setting._replace(gain=gain), mesh
      )
      bytes_needed = decoder_bytes(wiring, width, rows)
      if 'least_squares' in kinds and bytes_needed <= MOST_DECODER_BYTES:
        decoder = _least_squares(f_RF, rows, wiring)
        control['least_squares'] = functools.partial(
          _with_decoder, control['random'], decoder, mesh
        )
  if 'pca' in kinds:
    params = _pca(rows, wiring, means, scale)
    put = functools.partial(released_lib.put, mesh=mesh)
    largest = _largest(put(_released(params, wiring)), x, max(counts), mesh)
    for control, count in zip(controls, counts, strict=True):
      theta, _ = largest.first(count)
      threshold = np.full_like(params['b_enc'], theta)
      released = _released({**params, 'threshold': threshold}, wiring)
      control['pca'] = functools.partial(put, released)
  return controls


@functools.partial(jax.jit, static_argnames='mesh')
def _fires(params, x, mesh: Mesh | None):
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
  active_R = jnp.sum((f > 0).astype(jnp.float32).reshape(len(x), -1), 1)
  return splice.everywhere(active_R, mesh)


def mean_l0(params: Params, x: np.ndarray, mesh: Mesh | None = None) -> float:
  """Mean number of latents of an SAE with f > 0 on rows in host memory."""
  active = [fires for _, fires in _by_chunks(_fires, params, x, mesh)]
  return float(np.concatenate(active).mean(dtype=np.float64))


def _by_chunks(function, params, x: np.ndarray, mesh):
  """(first row, function's rows) for chunks of rows of one size."""
  chunk = max(1, min(len(x), _CHUNK // params['b_enc'].size))
  for start in range(0, len(x), chunk):
    rows_BD = x[start : start + chunk]
    filled = np.resize(rows_BD, (chunk, *rows_BD.shape[1:]))
    yield start, np.asarray(function(params, filled, mesh))[: len(rows_BD)]


def decoder_bytes(wiring: sites.Wiring, width: int, rows: Rows) -> int:
  """Bytes of one least-squares decoder in float32."""
  return 4 * width * sum(rows[site].shape[-1] for site in wiring.targets)


def beside(
  rows: Rows, targets: Sequence[sites.Site], several: bool
) -> np.ndarray:
  """Rows of `targets` as parameters read them: [R, D]; `several`: [R, L, D]."""
  columns = [np.asarray(rows[site], np.float32) for site in targets]
  if several:
    return np.stack(columns, 1)
  if len(columns) != 1:
    raise ValueError(
      f'Parameters of one layer read or write one site; found {len(columns)}.'
    )
  return columns[0]


def _released(
  params: Mapping[str, Any], wiring: sites.Wiring
) -> dict[str, Any]:
  """Removes the axes of layers if the SAE reads one site."""
  if wiring.several:
    return dict(params)
  params = {key: array[0] for key, array in params.items()}
  params['W_dec'] = params['W_dec'][:, 0]
  return params


def _square(x: np.ndarray) -> float:
  return float(np.sum(np.square(x), dtype=np.float64))


# Thresholds.


@functools.partial(jax.jit, static_argnames='mesh')
def _z(params, x, mesh: Mesh | None):
  """Pre-activations [R, F of all layers], whole on every process."""
  with jax.default_matmul_precision('highest'):
    if params['W_enc'].ndim == 2:
      z = x @ params['W_enc'] + params['b_enc']
    else:
      z = jnp.einsum('rld,ldf->rlf', x, params['W_enc']) + params['b_enc']
  return splice.everywhere(z.reshape(len(x), -1), mesh)


class _Largest(NamedTuple):
  """The largest pre-activations of all rows together, largest first."""

  row: np.ndarray
  latent: np.ndarray
  value: np.ndarray
  shape: tuple[int, int]  # [R, F] of all

  def first(self, count: int):
    """theta above which `count` values lie, and these as a sparse [R, F]."""
    from scipy import sparse  # slow to import

    theta = 0.0 if count >= len(self.value) else float(self.value[count])
    if count <= 0:
      theta = float('inf')
    above = slice(0, int(np.searchsorted(-self.value, -theta)))
    coordinates = self.row[above], self.latent[above]
    return theta, sparse.csr_array((self.value[above], coordinates), self.shape)


def _largest(params, x: np.ndarray, count: int, mesh) -> _Largest:
  """The `count` + 1 largest pre-activations, or all above 0."""
  width = params['b_enc'].size
  sample = x[:: max(1, len(x) * width // _ROUGH)]
  z = np.concatenate(
    [z.reshape(-1) for _, z in _by_chunks(_z, params, sample, mesh)]
  )
  share = min(1.3 * count / (len(x) * width) + 2 / z.size, 1.0)
  bound = max(0.0, float(np.quantile(z, 1 - share)))
  while True:
    batches = []
    for start, z in _by_chunks(_z, params, x, mesh):
      row, latent = np.nonzero(z > bound)
      batches.append((row + start, latent, z[row, latent]))
    row, latent, value = map(np.concatenate, zip(*batches, strict=True))
    if len(value) > count or not bound:
      break
    bound = bound / 2 if bound > 1e-3 else 0.0  # the guess was too high
  order = np.argsort(-value, kind='stable')[: count + 1]
  return _Largest(row[order], latent[order], value[order], (len(x), width))


# Decoders.


@functools.partial(jax.jit, static_argnames='mesh')
def _written(params, x, mesh: Mesh | None):
  """f W_dec [R, M, D], whole on every process."""
  with jax.default_matmul_precision('highest'):
    y_hat = sae.decode(params, sae.encode(params, x), x) - params['b_dec']
  return splice.everywhere(y_hat.reshape(len(x), -1, y_hat.shape[-1]), mesh)


def _gains(params, x, rows: Rows, wiring, mesh) -> tuple[float, ...]:
  """g of each target, of least squared error on some of the rows."""
  step = -(-len(x) // _GAIN_ROWS)
  written_RMD = np.asarray(_written(params, x[::step], mesh), np.float64)
  gains = []
  for m, site in enumerate(wiring.targets):
    y_RD = rows[site][::step] - rows[site].mean(0, dtype=np.float64)
    square = _square(written_RMD[:, m])
    gains.append(float(np.sum(y_RD * written_RMD[:, m]) / max(square, 1e-30)))
  return tuple(gains)


def _with_decoder(encoder: Callable[[], Params], decoder, mesh) -> Params:
  params = encoder()
  b_enc = np.zeros(params['b_enc'].shape, np.float32)  # says how latents lie
  on_devices = released_lib.put({'b_enc': b_enc, **decoder}, mesh)
  return {**params, 'W_dec': on_devices['W_dec'], 'b_dec': on_devices['b_dec']}


def _least_squares(f_RF, rows: Rows, wiring) -> dict[str, np.ndarray]:
  """W_dec and b_dec, as released, of the least ridged squared error."""
  layers = len(wiring.targets)
  width = f_RF.shape[1] // layers
  W_dec, b_dec = [], []
  for m, site in enumerate(wiring.targets):
    # Latents of this layer and of those before it write here.
    W_FD, b_D = ridge.fit(f_RF[:, : (m + 1) * width], rows[site])
    missing = f_RF.shape[1] - len(W_FD)
    W_dec.append(np.pad(W_FD, ((0, missing), (0, 0))))
    b_dec.append(b_D)
  decoders = np.stack(W_dec, 1).reshape(layers, width, layers, -1)
  released = _released({'W_dec': decoders, 'b_dec': np.stack(b_dec)}, wiring)
  return {key: np.float32(array) for key, array in released.items()}


def _pca(rows: Rows, wiring, means, scale) -> dict[str, np.ndarray]:
  """Two latents a component, one for each sign; [L, ...], threshold 0."""
  layers, by_layer = len(wiring.sites), []
  for l, (reads, writes) in enumerate(
    zip(wiring.sites, wiring.targets, strict=True)
  ):
    x_RD = (rows[reads] - means[reads]).astype(np.float64) / scale[l]
    y_RD = (rows[writes] - means[writes]).astype(np.float64)
    variance_C, v_DC = np.linalg.eigh(x_RD.T @ x_RD / len(x_RD))
    w_CD = v_DC.T @ (x_RD.T @ y_RD) / len(x_RD)
    w_CD /= np.maximum(variance_C, 1e-12 * variance_C.max())[:, None]
    W_enc = np.concatenate([v_DC, -v_DC], 1) / scale[l]
    W_dec = np.zeros((W_enc.shape[1], layers, y_RD.shape[1]))
    W_dec[:, l] = np.concatenate([w_CD, -w_CD])
    by_layer.append(
      {
        'W_enc': W_enc,
        'b_enc': -means[reads] @ W_enc,
        'W_dec': W_dec,
        'b_dec': means[writes],
        'threshold': np.zeros(W_enc.shape[1]),
      }
    )
  return {
    key: np.stack([params[key] for params in by_layer]).astype(np.float32)
    for key in by_layer[0]
  }
