"""One latent of a crosscoder of two models, taken out of either model.

  x_m - f_j v_mj   in the place of x_m, in the rows that count

v_mj is what a latent of 1 is worth in model m. Everything else stays as it is:
reconstruction errors play no part. Loss is that of the next token less the
clean model's, KL from the clean model to the ablated one, both in nats at
tokens where the latent is active.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import sae, sites
from gemma_scope.activations import outliers
from gemma_scope.evaluation import batches as batches_lib
from gemma_scope.evaluation import estimates, latent_scaling, passes
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice

_STREAMS = 4  # ablated residual streams unembedded at once
_EXAMPLES, _CONTEXT = 5, 8  # tokens that a latent fires on most; those before


@dataclasses.dataclass(frozen=True)
class Models:
  """Two models on one mesh, None for one device."""

  gemmas: tuple[lm.Gemma, lm.Gemma]
  params: tuple[lm.Params, lm.Params]
  mesh: Mesh | None

  @classmethod
  def of(cls, loaded: Sequence[tuple[lm.Gemma, lm.Params]], mesh) -> Models:
    """Models of equal shape share one module: one compilation serves both."""
    (gemma, params), (second, second_params) = loaded
    renamed = dataclasses.replace(second.config, name=gemma.config.name)
    second = gemma if renamed == gemma.config else second
    return cls((gemma, second), (params, second_params), mesh)

  def taps(self, model: int, tokens_BT, sites_read: tuple[sites.Site, ...]):
    """site -> [B, T, D] in one of the models."""
    return splice.taps(
      self.gemmas[model], self.params[model], tokens_BT, sites_read
    )


class Pair(NamedTuple):
  """A crosscoder of two models.

  Attributes:
    params: released, on the devices.
    wiring: its site in both.
    bounds: of ordinary norms there.
  """

  params: dict[str, jax.Array]
  wiring: sites.Wiring
  bounds: outliers.Bounds

  @property
  def site(self) -> sites.Site:
    """Its site, in the first model."""
    return self.wiring.sites[0]

  def keep(self, x: Sequence[jax.Array], keep_BT: jax.Array) -> jax.Array:
    """`keep_BT` without rows that are outliers in either model."""
    rows = dict(zip(self.wiring.sites, x, strict=True))
    return keep_BT & ~outliers.is_outlier(rows, self.bounds)


@functools.partial(jax.jit, static_argnames='mesh')
def latents(params, chosen_K, x, keep_BT, mesh) -> jax.Array:
  """Some latents of a crosscoder, [B, T, K]; 0 where a row does not count."""

  def of_slice(keep_Bt, *parts):
    x_BtD = jnp.concatenate(
      [x_BtD_.astype(jnp.float32) for x_BtD_ in parts], -1
    )
    return sae.encode(params, x_BtD)[..., chosen_K] * keep_Bt[..., None]

  with jax.default_matmul_precision('highest'):
    return splice.join(splice.by_slices(of_slice, mesh, keep_BT, *x))


@jax.jit
def _without(x_BTD, f_BTK, number, vector_D) -> jax.Array:
  """x without what latent `number` of K writes."""
  f_BT1 = jax.lax.dynamic_slice_in_dim(f_BTK, number, 1, 2)
  return (x_BTD.astype(jnp.float32) - f_BT1 * vector_D).astype(x_BTD.dtype)


class Ablation:
  """Effects of single latents on the next token.

  Args:
    models: the two.
    pair: the crosscoder.
    chosen: latents to take out, one at a time.
    vectors_MKD: what a latent of 1 is worth in each model, raw.
    show: token ids -> the text of an example.
  """

  def __init__(
    self,
    models: Models,
    pair: Pair,
    chosen: Sequence[int],
    vectors_MKD: np.ndarray,
    show: Callable[[np.ndarray], str],
  ):
    self._models, self._pair, self._show = models, pair, show
    self._chosen_K, self._vectors_MKD = np.asarray(chosen, int), vectors_MKD
    last = splice.last(models.gemmas[0])
    self._at = splice.before(pair.site), pair.site, last
    self._examples: list[list[tuple[float, str]]] = [[] for _ in chosen]

  def run(
    self, batches: batches_lib.Batches, tick: Callable[[], None]
  ) -> list[dict[str, Any]]:
    """Effects on a text, of each latent.

    Args:
      batches: the text.
      tick: called often; may raise to stop.

    Returns:
      {'effect': {'first': {'kl': figure, 'loss': figure}, 'second': ...},
      'examples': [[f, text], ...]} of each.
    """
    tallies = [
      [estimates.Tally(batches.clusters, batches.length) for _ in (0, 1)]
      for _ in self._chosen_K
    ]
    for number, batch in enumerate(batches):
      positions_t = batches.loss_positions(number)
      cluster_Bt = batch.cluster_BT[:, positions_t]
      for k, m, where_Bt, values in self._of_batch(batch, positions_t):
        for name, value_Bt in values.items():
          tallies[k][m].add(name, value_Bt, where_Bt, cluster_Bt)
        tick()
    return [
      {
        'effect': {
          name: _figures(tally)
          for name, tally in zip(
            latent_scaling.MODELS, models_tallies, strict=True
          )
        },
        'examples': [list(example) for example in examples],
      }
      for models_tallies, examples in zip(tallies, self._examples, strict=True)
    ]

  def _of_batch(
    self, batch: batches_lib.Batch, positions_t: np.ndarray
  ) -> Iterator[tuple[int, int, np.ndarray, dict[str, np.ndarray]]]:
    """(latent's number, model, where it counts, values there) of a batch."""
    models, pair, mesh = self._models, self._pair, self._models.mesh
    taps = [models.taps(m, batch.tokens_BT, self._at) for m in (0, 1)]
    x = tuple(tap[pair.site] for tap in taps)
    keep_BT = pair.keep(x, batch.keep_BT)
    f_BTK = latents(pair.params, self._chosen_K, x, keep_BT, mesh)
    host_arrays = passes.fetched((f_BTK, batch.tokens_BT, batch.keep_BT), mesh)
    host_BTK, tokens_BT, counts_BT = jax.device_get(host_arrays)
    self._keep_examples(host_BTK, tokens_BT.astype(np.int32))
    counts_Bt = (counts_BT[:, positions_t] > 0) & (
      counts_BT[:, positions_t + 1] > 0
    )
    for start in range(0, len(self._chosen_K), _STREAMS):
      group = range(start, min(start + _STREAMS, len(self._chosen_K)))
      for m in (0, 1):
        ends = self._ends(m, batch, taps[m], f_BTK, group)
        loss_Btn, kl_Btn = jax.device_get(
          passes.losses(
            models.gemmas[m],
            models.params[m],
            batch.tokens_BT,
            ends,
            positions_t,
            mesh,
          )
        )
        for i, k in enumerate(group, 1):
          where_Bt = counts_Bt & (host_BTK[:, positions_t, k] > 0)
          change_Bt = loss_Btn[..., i] - loss_Btn[..., 0]
          values = {
            'loss': change_Bt,
            'kl': kl_Btn[..., i],
            'tokens': np.ones_like(change_Bt),
          }
          yield k, m, where_Bt, values

  def _ends(self, m: int, batch, tap, f_BTK, group) -> tuple[jax.Array, ...]:
    """Last residual streams: the clean one, then one without each latent.

    A group that is not full is filled with the clean stream, because another
    number of streams would be another program.
    """
    gemma, params = self._models.gemmas[m], self._models.params[m]
    before, site, last = self._at
    ends = [tap[last]] * (1 + _STREAMS)
    for i, k in enumerate(group, 1):
      y_BTD = _without(tap[site], f_BTK, k, self._vectors_MKD[m, k])
      ends[i] = passes.residual(
        gemma, params, batch.tokens_BT, site, y_BTD, tap[before]
      )
    return tuple(ends)

  def _keep_examples(self, f_BTK: np.ndarray, tokens_BT: np.ndarray) -> None:
    """Adds this batch's tokens that the latents fire on most."""
    for k, examples in enumerate(self._examples):
      f_BT = f_BTK[..., k]
      for flat_index in np.argsort(f_BT, axis=None)[::-1][:_EXAMPLES]:
        b, t = np.unravel_index(flat_index, f_BT.shape)
        if f_BT[b, t] > 0:
          ids = tokens_BT[b, max(0, t - _CONTEXT) : t + 1]
          examples.append((float(f_BT[b, t]), self._show(ids)))
      examples.sort(reverse=True)
      del examples[_EXAMPLES:]


def _figures(tally: estimates.Tally) -> dict[str, Any]:
  """KL and change of the loss a token, with intervals over clusters."""
  tokens_G = tally['tokens'][:, 0]
  return {
    name: estimates.figure(tally[name][:, 0], tokens_G, tokens_G.sum())
    for name in ('kl', 'loss')
  }
