"""Many prompts at once: logits and losses under an edit, and attributions.

  ablation     x' = x - sum_i f_i W_dec[i]      latents i of an SAE set to 0
  projection   x' = x - P (x - c)               P projects on given directions
  addition     x' = x + v

An edit changes every token but the first (BOS) and applies to all prompts of a
set. It is a `jax.tree_util.Partial` whose arrays are arguments of the compiled
program, so that edits of the same kind, site and shape compile once.
`intervene` has the edits that differ from row to row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_scope import sae, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import readout
from gemma_scope.microscope.circuits.intervene import Subject
from gemma_scope.runtime import progress
from gemma_scope.text import tokenizers

# Lengths and numbers of latents are rounded up to a multiple, for few programs.
_ROUND, _TOGETHER = 4, 16

Model = tuple[lm.Gemma, lm.Params]
Edits = Mapping[sites.Site, Partial]


def tokens(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  """Token ids of texts [N, T], BOS first, and the last position of each [N]."""
  ids = [readout.with_bos(tokenizer, text) for text in texts]
  length = -(-max(map(len, ids)) // _ROUND) * _ROUND
  tokens_NT = np.zeros((len(ids), length), np.int32)
  for row_T, row in zip(tokens_NT, ids, strict=True):
    row_T[: len(row)] = row
  return tokens_NT, np.array([len(row) - 1 for row in ids])


def ablation(params: Mapping[str, np.ndarray], features: Sequence[int]):
  """The edit that sets latents of an SAE of one site to zero.

  Raises:
    ValueError: the SAE is of several layers, a transcoder or a TopK SAE.
  """
  if params['W_dec'].ndim != 2 or 'W_skip' in params or 'k' in params:
    raise ValueError(
      'Only latents of an SAE of one site with thresholds can be ablated in a '
      'set of prompts; use intervene for others.'
    )
  index, count = np.asarray(features, np.int32), len(features)
  index = np.pad(index, (0, (-count % _TOGETHER) if count else _TOGETHER))
  ablated = {key: np.asarray(array) for key, array in params.items()}
  for key in ('b_enc', 'threshold', 'W_dec'):
    ablated[key] = ablated[key][index]
  ablated['W_enc'] = ablated['W_enc'][:, index]
  ablated['W_dec'][count:] = 0
  return Partial(_without, ablated)


def projection(directions_KD: np.ndarray, centre_D: np.ndarray | float = 0.0):
  """The edit that projects out the span of K directions.

  Args:
    directions_KD: the directions.
    centre_D: c, whose part along the directions stays. Where activations have a
      large mean, as in a residual stream, give it: 0 removes it too.
  """
  basis_DK, size_K, _ = np.linalg.svd(
    np.asarray(directions_KD, np.float64).T, full_matrices=False
  )
  basis_DK = basis_DK * (size_K > 1e-6 * size_K.max())
  padding = (0, 0), (0, -basis_DK.shape[1] % _TOGETHER)
  centre_D = np.broadcast_to(centre_D, basis_DK.shape[:1])
  arrays = np.pad(basis_DK, padding), centre_D
  return Partial(_projected, *(array.astype(np.float32) for array in arrays))


def addition(vector_D: np.ndarray):
  """The edit that adds a vector at each token but the first."""
  return Partial(_added, np.asarray(vector_D, np.float32))


def _without(params, x_BTD):
  with jax.default_matmul_precision('highest'):
    f_BTK = sae.encode(params, x_BTD.astype(jnp.float32))
    return _spare_first(x_BTD, -f_BTK @ params['W_dec'])


def _projected(basis_DK, centre_D, x_BTD):
  return _spare_first(x_BTD, -((x_BTD - centre_D) @ basis_DK) @ basis_DK.T)


def _added(vector_D, x_BTD):
  return _spare_first(x_BTD, jnp.broadcast_to(vector_D, x_BTD.shape))


def _spare_first(x_BTD, change_BTD):
  change_BTD = jnp.asarray(change_BTD).at[:, 0].set(0)
  return (x_BTD + change_BTD).astype(x_BTD.dtype)


def logits(
  model: Model,
  tokens_NT: np.ndarray,
  last_N: np.ndarray,
  token_ids: Sequence[int] | None = None,
  edits: Edits | None = None,
  batch: int = 32,
) -> np.ndarray:
  """Logits after the last token of each prompt, float32 [N, K].

  Args:
    model: the language model and its parameters.
    tokens_NT, last_N: as `tokens` returns them.
    token_ids: the K tokens whose logits are returned; None for all.
    edits: site -> edit.
    batch: prompts in a forward pass.
  """
  gemma, params = model
  wanted_K = None if token_ids is None else np.asarray(token_ids, np.int32)
  edits, batches = dict(edits or {}), []
  for start in progress.track(range(0, len(tokens_NT), batch), 'prompts'):
    rows = np.resize(
      np.arange(start, min(start + batch, len(tokens_NT))), batch
    )
    logits_BK = _logits(
      gemma, params, tokens_NT[rows], last_N[rows], wanted_K, edits
    )
    batches.append(np.asarray(logits_BK))
  return np.concatenate(batches)[: len(tokens_NT)]


@functools.partial(jax.jit, static_argnames='gemma')
def _logits(gemma, params, tokens_BT, last_B, wanted_K, edits):
  end = splice.last(gemma)
  x_BTD = gemma.forward(
    params, tokens_BT, taps=(end,), edits=edits, logits=False
  ).taps[end]
  x_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], 1)
  return gemma.unembed(params, x_B1D, wanted_K)[:, 0]


def losses(
  model: Model,
  tokens_NT: np.ndarray,
  edits: Edits | None = None,
  batch: int = 4,
) -> np.ndarray:
  """Next-token losses of texts in nats [N, T - 1]; nan where none counts."""
  batches, edits = [], dict(edits or {})
  for start in progress.track(range(0, len(tokens_NT), batch), 'texts'):
    rows = np.resize(
      np.arange(start, min(start + batch, len(tokens_NT))), batch
    )
    batches.append(np.asarray(_losses(*model, tokens_NT[rows], edits)))
  loss_NT = np.concatenate(batches)[: len(tokens_NT)]
  counts_NT = (tokens_NT[:, 1:] > 0) & (tokens_NT[:, 1:] != 2)
  return np.where(counts_NT, loss_NT, np.nan)


@functools.partial(jax.jit, static_argnames='gemma')
def _losses(gemma, params, tokens_BT, edits):
  end = splice.last(gemma)
  x_BTD = gemma.forward(
    params, tokens_BT, taps=(end,), edits=edits, logits=False
  ).taps[end]

  def of_slice(x_BtD, next_Bt):
    logp = jax.nn.log_softmax(gemma.unembed(params, x_BtD))
    return -jnp.take_along_axis(logp, next_Bt[..., None], -1)[..., 0]

  slices = splice.by_slices(of_slice, None, x_BTD, jnp.roll(tokens_BT, -1, 1))
  return splice.join(slices)[:, :-1]


def attributions(
  subject: Subject,
  tokens_NT: np.ndarray,
  last_N: np.ndarray,
  logit: readout.Logit,
  batch: int = 16,
) -> np.ndarray:
  """Gradient attributions of a logit difference to all latents [N, F].

  sum_t f_tF (dm/dy_t . W_dec[F]), the predicted effect of ablating a latent on
  m, the logit after the last token of each prompt. Without BOS.

  Raises:
    ValueError: the SAE reads and writes several sites.
  """
  if subject.place.sites != subject.place.targets or subject.place.several:
    raise ValueError('attributions is for SAEs that read and write one site.')
  (site,), batches = subject.place.sites, []
  pair = np.array([logit[0], logit[0] if logit[1] is None else logit[1]])
  sign = np.float32(logit[1] is not None)
  for start in progress.track(range(0, len(tokens_NT), batch), 'gradients'):
    rows = np.resize(
      np.arange(start, min(start + batch, len(tokens_NT))), batch
    )
    attribution_BF = _attributions(
      (subject.gemma, site),
      (subject.lm_params, dict(subject.params)),
      (tokens_NT[rows], last_N[rows]),
      (pair, sign),
    )
    batches.append(np.asarray(attribution_BF))
  return np.concatenate(batches)[: len(tokens_NT)]


@functools.partial(jax.jit, static_argnums=0)
def _attributions(static, params, texts, logit):
  (gemma, site), (lm_params, sae_params) = static, params
  (tokens_BT, last_B), (pair, sign) = texts, logit
  end = splice.last(gemma)

  def measure(shift_BTD):
    edits = {site: lambda x: x + shift_BTD}
    taps = gemma.forward(
      lm_params, tokens_BT, taps=(site, end), edits=edits, logits=False
    ).taps
    x_B1D = jnp.take_along_axis(taps[end], last_B[:, None, None], 1)
    both_B2 = gemma.unembed(lm_params, x_B1D, pair)[:, 0]
    return jnp.sum(both_B2[:, 0] - sign * both_B2[:, 1]), taps[site]

  width = site.width(gemma.config)
  shift_BTD = jnp.zeros((*tokens_BT.shape, width))
  slope_BTD, x_BTD = jax.grad(measure, has_aux=True)(shift_BTD)
  with jax.default_matmul_precision('highest'):
    f_BTF = sae.encode(sae_params, x_BTD)
    slope_BTF = slope_BTD @ sae_params['W_dec'].T
  return jnp.sum((f_BTF * slope_BTF)[:, 1:], 1)
