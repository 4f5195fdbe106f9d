"""Passes of the language model as compiled programs.

`Gemma.forward` as it stands runs operation by operation, and each of them is
compiled for every shape that a test has.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from gemma_scope.language_model import gemma as lm
from gemma_scope.microscope.circuits import intervene


@functools.partial(jax.jit, static_argnames=('gemma', 'taps'))
def forward(gemma, params, tokens_BT, taps=(), edits=None):
  """`Gemma.forward`; edits are `Partial`s, whose arrays are arguments."""
  return gemma.forward(params, tokens_BT, taps=taps, edits=edits)


@jax.jit
def losses(logits_BTV, tokens_BT):
  """Next-token losses [B, T - 1], those of special tokens too."""
  return lm.token_losses(logits_BTV, tokens_BT)[0]


def instead(y_BTD, put: bool = True) -> Partial:
  """An edit that puts `y_BTD` in the place of an activation, or does not."""
  return Partial(_instead, y_BTD, put)


def _instead(y_BTD, put, x_BTD):
  return jnp.where(put, y_BTD, x_BTD)


def changed(subject, tokens_BT, rows, where_BT, taps=(), projects=False):
  """A pass with the changes of `intervene`, one row for each of the batch."""
  where = subject.gemma, subject.place, tuple(taps), projects
  params = subject.lm_params, dict(subject.params)
  return _changed(where, params, tokens_BT, rows, where_BT)


@functools.partial(jax.jit, static_argnums=0)
def _changed(where, params, tokens_BT, rows, where_BT):
  (gemma, place, taps, projects), (lm_params, sae_params) = where, params
  edits = intervene.edits(place, sae_params, rows, where_BT, projects)
  return gemma.forward(lm_params, tokens_BT, taps=taps, edits=edits)
