"""What an SAE keeps of its activation and of the model's next token.

  mse, cosine, |y_hat| / |y|     over tokens, of the activation y it writes
  KL(clean || spliced)           of the next token's distribution, y_hat for y
  KL score                       (KL_zero - KL) / KL_zero, zero: 0 for y

These are what SAEBench's core has and `evaluate` has not. A figure is a ratio
of sums over sequences, with the interval of `estimates.ratio_interval`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae, sites
from gemma_scope.evaluation import estimates
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.release import sae_folder


def of(
  gemma: lm.Gemma,
  params: lm.Params,
  sae_params: sae_folder.Params,
  place: sites.Wiring,
  batches: Sequence[tuple[np.ndarray, np.ndarray]],
) -> dict[str, Mapping[str, Any]]:
  """The figures of one SAE or transcoder, over the tokens that count.

  Args:
    batches: tokens [B, T] and where they count.

  Returns:
    mse (an element), cosine, norm_ratio, l1, kl (nats a token) and kl_score,
    each {'value', 'low', 'high'}.
  """
  sae_params = {k: jnp.asarray(v) for k, v in sae_params.items()}
  parts = [
    jax.device_get(
      _sums(gemma, params, sae_params, place.sites[0], place.targets[0], *batch)
    )
    for batch in batches
  ]
  sums = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  figures = {
    'mse': (sums['error'], sums['values']),
    'cosine': (sums['cosine'], sums['tokens']),
    'norm_ratio': (sums['norm_ratio'], sums['tokens']),
    'l1': (sums['l1'], sums['tokens']),
    'kl': (sums['kl'], sums['tokens']),
    'kl_score': (sums['kl_zero'] - sums['kl'], sums['kl_zero']),
  }
  return {
    name: dict(
      zip(('value', 'low', 'high'), estimates.ratio_interval(a, b), strict=True)
    )
    for name, (a, b) in figures.items()
  }


@functools.partial(jax.jit, static_argnames=('gemma', 'site', 'target'))
def _sums(gemma, params, sae_params, site, target, tokens_BT, keep_BT):
  """Sums of each sequence over the tokens that count, [B] each."""
  at = {site, target, splice.before(target), splice.last(gemma)}
  taps = gemma.forward(params, tokens_BT, taps=at, logits=False).taps
  x_BTD, y_BTD = (taps[s].astype(jnp.float32) for s in (site, target))
  with jax.default_matmul_precision('highest'):
    f_BTF = sae.encode(sae_params, x_BTD)
    made_BTD = sae.decode(sae_params, f_BTF, x_BTD)
  kept = keep_BT[..., None]
  before_BTD = taps[splice.before(target)]
  ends = [taps[splice.last(gemma)]]
  for other_BTD in (made_BTD, jnp.zeros_like(made_BTD)):
    spliced = jnp.where(kept, other_BTD, y_BTD).astype(taps[target].dtype)
    ends.append(
      splice.residual(gemma, params, tokens_BT, target, spliced, before_BTD)
    )

  def divergences(*ends_BtD):
    clean, *others = (
      jax.nn.log_softmax(gemma.unembed(params, end)) for end in ends_BtD
    )
    kl = lambda log_q: jnp.sum(jnp.exp(clean) * (clean - log_q), -1)
    return tuple(map(kl, others))

  kl, kl_zero = map(splice.join, splice.by_slices(divergences, None, *ends))
  norm = lambda a: jnp.linalg.norm(a, axis=-1)
  scale_BT = jnp.maximum(norm(y_BTD), 1e-12)
  inner_BT = jnp.sum(y_BTD * made_BTD, -1)
  values = {
    'tokens': jnp.ones(keep_BT.shape),
    'values': jnp.full(keep_BT.shape, y_BTD.shape[-1], jnp.float32),
    'error': jnp.sum((y_BTD - made_BTD) ** 2, -1),
    'cosine': inner_BT / (scale_BT * jnp.maximum(norm(made_BTD), 1e-12)),
    'norm_ratio': norm(made_BTD) / scale_BT,
    'l1': jnp.sum(f_BTF, -1),
    'kl': kl,
    'kl_zero': kl_zero,
  }
  return {k: jnp.sum(jnp.where(keep_BT, v, 0), 1) for k, v in values.items()}
