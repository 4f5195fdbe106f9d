"""Many edits, each of one token of the same text, in one partial pass.

An edit adds a vector to the activation at a site and token p. Only the S tokens
p .. p + S - 1 are scored, and only the layers from the site up change:

  slots     [text: T tokens | edit 0: S tokens | edit 1: S tokens | ...]
  position  of an edit's tokens: p, p + 1, ...
  attends   an edit's token to the text before p, and to the edit's own tokens

So the text is computed once for all edits, and each edit costs S tokens in the
layers above the site. The residual stream below the site is read once for each
text (`below`) and handed to every pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gemma_scope import sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice


def _start(target: sites.Site) -> sites.Site:
  """The residual stream that a pass with an edit at `target` starts from."""
  return target if target.kind == 'resid_post' else splice.before(target)


def below(
  gemma: lm.Gemma, lm_params: lm.Params, tokens_T: jax.Array, target: sites.Site
) -> jax.Array:
  """The residual stream [T, D] from which `run` starts."""
  start = _start(target)
  return splice.taps(gemma, lm_params, tokens_T[None], (start,))[start][0]


@functools.partial(jax.jit, static_argnames=('gemma', 'target', 'scored'))
def run(
  gemma: lm.Gemma,
  lm_params: lm.Params,
  target: sites.Site,
  below_TD: jax.Array,
  position_R: jax.Array,
  change_RD: jax.Array,
  scored: int,
) -> tuple[jax.Array, jax.Array]:
  """The residual stream that is unembedded, without and with each edit.

  Args:
    target: the site that is edited.
    below_TD: from `below`.
    position_R, change_RD: the token of each edit, and the vector that is added.
    scored: S, the number of tokens from the edited one on.

  Returns:
    Without edits at the R x S tokens, and with them, both [R, S, D]. Tokens
    beyond the text repeat its last one.
  """
  length, rows = len(below_TD), len(position_R)
  offset_S = jnp.arange(scored)
  position_RS = jnp.minimum(position_R[:, None] + offset_S, length - 1)
  packed_UD = jnp.concatenate([below_TD, below_TD[position_RS.reshape(-1)]])
  positions_1U = jnp.concatenate(
    [jnp.arange(length), (position_R[:, None] + offset_S).reshape(-1)]
  )[None]
  added_RSD = jnp.zeros((rows, scored, change_RD.shape[1]))
  added_RSD = added_RSD.at[:, 0].set(change_RD).reshape(rows * scored, -1)

  def change(y_1UD):
    return y_1UD.at[0, length:].add(added_RSD.astype(y_1UD.dtype))

  start = _start(target)
  edits = {start: lambda _: packed_UD[None].astype(below_TD.dtype)}
  if start == target:
    edits = {target: lambda _: change(packed_UD[None])}
  else:
    edits[target] = change
  end = splice.last(gemma)
  output = gemma.forward(
    lm_params,
    jnp.ones((1, length + rows * scored), jnp.int32),
    taps=(end,),
    edits=edits,
    logits=False,
    positions_BT=positions_1U,
    mask_BTT=_mask(length, position_R, scored)[None],
  )
  last_UD = output.taps[end][0]
  return (
    last_UD[position_RS],
    last_UD[length:].reshape(rows, scored, -1),
  )


def _mask(length: int, position_R: jax.Array, scored: int) -> jax.Array:
  """Which slots each slot attends to, [U, U]."""
  rows = len(position_R)
  by_slot = lambda ordinary, edits: jnp.concatenate([ordinary, edits])
  edit_U = by_slot(jnp.full(length, -1), jnp.repeat(jnp.arange(rows), scored))
  slot_U = by_slot(jnp.arange(length), jnp.tile(jnp.arange(scored), rows))
  first_U = by_slot(jnp.arange(length) + 1, jnp.repeat(position_R, scored))
  text_UU = (edit_U[None] < 0) & (slot_U[None] < first_U[:, None])
  same_UU = (edit_U[:, None] == edit_U[None]) & (edit_U[:, None] >= 0)
  return text_UU | (same_UU & (slot_U[None] <= slot_U[:, None]))
