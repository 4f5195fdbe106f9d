"""End-to-end fine-tuning: the loss includes the KL of the spliced model.

  L = (E + alpha beta KL) / (1 + beta) + sparsity + what else is asked for
  KL = mean over tokens of KL(p || p_hat), nats      alpha = E / (KL + 1e-8)

E is the reconstruction term of `objectives` (the mean over prefixes for a
Matryoshka SAE). p is the model's next-token distribution, and p_hat the same
with y replaced by y_hat at the SAE's target. Tokens that are left out (BOS,
padding, user turns of a chat) keep their y and do not count in the mean. alpha
is treated as a constant in the gradient. It scales both terms to the same size,
so that beta
is their ratio at any site of any model. Source: the technical paper of Gemma
Scope 2, which gives neither beta nor the learning rate.

  step s       sequences [s n, (s + 1) n) of the shuffled text, a function of
               (config, step)
  clean pass   once -> rows of every site [B, D], B = n (T - 1); if tokens are
               left out, rows wrap around as in `chunks`
  each SAE     rows -> y_hat -> its tokens' positions -> the blocks from the
               target on -> KL -> gradient, through the frozen model to the SAE

The rest of a step is as usual (`stack`). SAEs are trained one after the other,
because a pass through the model takes more memory than an SAE and the target is
part of the program. The layers below the target are not run again. Logits are
never stored (`divergence`), and of the spliced pass only the inputs of matmuls
are (`_spliced`): 0.2 GB per layer for 2,048 tokens of Gemma 2 2B in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.activations import outliers
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.sae import fold
from gemma_scope.training import objectives, stack

Batch = Mapping[str, jax.Array]  # tokens int32 [n, T], keep bool [n, T]


class Feed:
  """Gives the sequences of each step; like `chunks.Feed`, but tokens.

  Args:
    chunks: of a `ModelSource`, for the normalisation.
    sequences: n, per step.
    mesh: sequences lie on its 'data' axis.

  Attributes:
    chunks: as given.
    source: the source of the chunks; it has the language model.
    left_out: number of tokens left out so far, under 'special'; a resumed run
      restores it. A step whose batch is not finite changes nothing. Outliers
      are left out on the devices and not counted.
  """

  def __init__(self, chunks: chunks_lib.Chunks, sequences: int, mesh: Mesh):
    self.left_out = {'special': 0, 'not_finite': 0}
    self.status = ''
    self.source = chunks.source
    self.chunks = chunks
    self._count = sequences
    self._place = mesh_lib.sharding(mesh, 'data', None)

  def at(
    self, step: int, poll: Callable[[], None] = lambda: None
  ) -> dict[str, jax.Array]:
    """'tokens' int32 [n, T] and 'keep' bool [n, T] at `step`, on the devices.

    Raises:
      ValueError: all tokens are left out.
    """
    poll()
    tokens_BT = self.source.text.sequences(step * self._count, self._count)
    keep_BT = self.source.text.keep(tokens_BT)
    keep_BT &= np.arange(keep_BT.shape[1]) > 0  # BOS
    kept = int(keep_BT.sum())
    if not kept:
      raise ValueError(
        f'All {keep_BT.size} tokens of step {step} are left out (BOS, padding '
        'or user turns of a chat); raise end_to_end.sequences, or use other '
        'text.'
      )
    self.left_out['special'] += keep_BT[:, 1:].size - kept
    return {
      'tokens': mesh_lib.put(tokens_BT, self._place),
      'keep': mesh_lib.put(keep_BT, self._place),
    }

  def normalisation(
    self, centre: str = 'none', scale: str = 'rms'
  ) -> dict[sites.Site, fold.Normalisation]:
    """The normalisation of each site, measured on the first chunk."""
    chunk = self.chunks.load(0)
    return chunks_lib.measure(chunk, self.chunks.norm_bounds, centre, scale)


class Model(NamedTuple):
  """The language model in which SAEs are fine-tuned, and settings.

  Attributes:
    gemma, params: the whole model; `params` is an argument of the jitted step.
    normalisation: of each site; outlier tokens are left out.
    beta: weight of the KL.
    mesh: None on a single device.
  """

  gemma: lm.Gemma
  params: lm.Params
  normalisation: Mapping[sites.Site, fold.Normalisation]
  beta: float
  mesh: Mesh | None = None


def step_all(
  model: Model,
  stacks: Sequence[stack.Stack],
  states: tuple[stack.State, ...],
  batch: Batch,
  step: jax.Array,
  key: jax.Array,
) -> tuple[tuple[stack.State, ...], tuple[dict[str, jax.Array], ...]]:
  """One step of every stack: `stack.step_all` with the loss above.

  Args:
    model: see `Model`.
    stacks: stacks of SAEs that read one site and write one.
    states: of the stacks; the mesh's 'sae' axis must be 1.
    batch: see `Feed`.
    step, key: int32 from 0, and the key of the run.

  Returns:
    The next states, and metrics as arrays [S]; 'kl' beside the ordinary ones.
  """
  gemma, mesh = model.gemma, model.mesh
  keep_BT, normalisation = batch['keep'], model.normalisation
  sites_read = {
    site for saes in stacks for site in (*saes.sites, *saes.targets)
  }
  targets = {target for saes in stacks for target in saes.targets}
  taps_needed = (
    sites_read
    | {splice.before(target) for target in targets}
    | {splice.last(gemma)}
  )
  with jax.named_scope('clean'):
    taps = gemma.forward(
      model.params, batch['tokens'], taps=taps_needed, logits=False
    ).taps
  for site in sites_read:
    keep_BT &= jnp.all(jnp.isfinite(taps[site]), -1)
    if (bound := normalisation[site].norm_bound) is not None:
      keep_BT &= ~outliers.is_outlier({site: taps[site]}, {site: bound})
  token_R, row_BT = _correspondence(keep_BT)
  rows = {
    site: normalisation[site].apply(
      _on_data(
        taps[site].reshape(-1, taps[site].shape[-1])[token_R], mesh
      ).astype(jnp.float32)
    )
    for site in sites_read
  }

  def fidelity_at(target):
    """The `fidelity` of `objectives.loss` for members that write `target`."""

    def fidelity(error, y_hat_RD):
      y_hat_BTD = _on_data(normalisation[target].undo(y_hat_RD)[row_BT], mesh)
      kept_batch = {'tokens': batch['tokens'], 'keep': keep_BT}
      spliced_BTD = _spliced(model, kept_batch, target, y_hat_BTD, taps)
      kl = divergence(
        gemma,
        model.params,
        taps[splice.last(gemma)],
        spliced_BTD,
        keep_BT,
        mesh,
      )
      # Rounding can make the KL of equal distributions slightly negative.
      alpha = jax.lax.stop_gradient(error / (jnp.maximum(kl, 0) + 1e-8))
      total = error + alpha * model.beta * kl
      return total / (1 + model.beta), {'kl': kl}

    return fidelity

  results = [
    _step(saes, state, rows, fidelity_at, step, key)
    for saes, state in zip(stacks, states, strict=True)
  ]
  states, metrics = zip(*results, strict=True)
  return states, metrics


def divergence(
  gemma: lm.Gemma,
  params: lm.Params,
  clean_BTD: jax.Array,
  spliced_BTD: jax.Array,
  keep_BT: jax.Array,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Mean KL(clean || spliced) of the next token, in nats.

  The gradient of `spliced_BTD` is computed together with the value, slice by
  slice. So the logits (1 MB per token) are neither stored nor computed again in
  the backward pass.

  Args:
    clean_BTD, spliced_BTD: the last residual stream.
    keep_BT: the tokens to average over.
  """

  def of_slice(spliced_BtD, clean_BtD, keep_Bt):
    log_p, log_q = (
      jax.nn.log_softmax(gemma.unembed(params, x_BtD))
      for x_BtD in (clean_BtD, spliced_BtD)
    )
    kl_Bt = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    return jnp.sum(jnp.where(keep_Bt, kl_Bt, 0))

  with jax.named_scope('kl'):
    fixed_BTD = jax.lax.stop_gradient(spliced_BTD)
    sum_n, slope_nBtD = splice.by_slices(
      jax.value_and_grad(of_slice), mesh, fixed_BTD, clean_BTD, keep_BT
    )
    # Zero, with the slope for its gradient.
    moved = jnp.sum(splice.join(slope_nBtD) * (spliced_BTD - fixed_BTD))
    return (jnp.sum(sum_n) + moved) / jnp.maximum(jnp.sum(keep_BT), 1)


def _step(saes: stack.Stack, state, rows, fidelity_at, step, key):
  """`Stack.step` for each target and member in turn."""
  x_NBD = jnp.stack([rows[site] for site in saes.sites])

  def at_target(target, members):
    gradient_of = jax.value_and_grad(
      functools.partial(
        objectives.loss,
        saes.module,
        saes.objective,
        fidelity=fidelity_at(target),
      ),
      has_aux=True,
    )

    def step_one(member):
      x_and_y = x_NBD[member.setting.reads], rows[target]
      return saes.step_member(member, x_and_y, step, key, gradient_of)

    return jax.lax.map(step_one, members)

  writes_S = np.asarray(saes.setting.writes)
  groups = [np.flatnonzero(writes_S == i) for i in range(len(saes.targets))]
  seeds = jnp.asarray(saes.seeds, jnp.uint32)
  members = stack.Member(state, saes.setting, seeds)
  results = [
    at_target(target, jax.tree.map(lambda a, m=group: a[m], members))
    for target, group in zip(saes.targets, groups, strict=True)
  ]
  order_S = np.argsort(np.concatenate(groups))
  return jax.tree.map(lambda *a: jnp.concatenate(a)[order_S], *results)


def _spliced(model, batch, target, y_hat_BTD, taps) -> jax.Array:
  """The last residual stream, with y_hat at the tokens to keep."""

  # Scores, norms and gates are recomputed in the backward pass.
  @functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  )
  def run(y_hat_BTD):
    return splice.residual(
      model.gemma,
      model.params,
      batch['tokens'],
      target,
      y_hat_BTD,
      taps[splice.before(target)],
    )

  y_BTD = taps[target]
  y_hat_BTD = y_hat_BTD.astype(y_BTD.dtype)
  return run(jnp.where(batch['keep'][..., None], y_hat_BTD, y_BTD))


def _correspondence(keep_BT) -> tuple[jax.Array, jax.Array]:
  """Row -> token, [n (T - 1)], and token -> row, [n, T] (0 if there is none).

  Kept tokens in order, repeated from the start to fill the batch.
  """
  keep_R = keep_BT.reshape(-1)
  sequences, length = keep_BT.shape
  count = jnp.maximum(jnp.sum(keep_R), 1)
  token_R = jnp.argsort(~keep_R, stable=True)
  token_R = token_R[jnp.arange(sequences * (length - 1)) % count]
  row_R = jnp.maximum(jnp.cumsum(keep_R) - 1, 0)
  return token_R, row_R.reshape(keep_BT.shape)


def _on_data(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Shards rows or sequences over the axis 'data', after a gather."""
  if mesh is None:
    return x
  place = mesh_lib.sharding(mesh, 'data', *(None,) * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, place)
