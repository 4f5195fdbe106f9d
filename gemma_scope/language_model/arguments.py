"""Checks the arguments of a forward pass; mistakes become one sentence.

A site may be a `Site` or its text, 'resid_post/2', and tokens may be nested
lists. Without these checks the same mistakes would end deep in Flax, XLA or a
type
checker, or go unnoticed: an id beyond the vocabulary reads the last embedding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gemma_scope import sites


def site(given: sites.Site | str) -> sites.Site:
  """A site, from a `Site` or its text."""
  if isinstance(given, sites.Site):
    return given
  if isinstance(given, str):
    return sites.parse(given)
  raise TypeError(
    f"A site is a Site or text such as 'resid_post/2'; found {given!r}."
  )


def taps(
  given: Collection[sites.Site | str] | sites.Site | str,
) -> dict[sites.Site | str, sites.Site]:
  """Maps what was asked for to sites; a single site needs no list."""
  if isinstance(given, sites.Site | str):
    given = (given,)
  return {each: site(each) for each in given}


def edits(given: Mapping[sites.Site | str, Any] | None) -> dict:
  """Sites -> functions."""
  by_site = {}
  for where, function in (given or {}).items():
    if not callable(function):
      raise TypeError(
        f'The edit at {where} is a function from the activation [B, T, D] to '
        f'its new value; found a {type(function).__name__}.'
      )
    if site(where) in by_site:
      raise ValueError(f'Two edits are given at {site(where)}.')
    by_site[site(where)] = function
  return by_site


def tokens(given: Any, vocab_size: int) -> jax.Array:
  """Tokens as int32 [B, T]; ids must be in the vocabulary.

  The values of JAX arrays are not checked, because that would wait for the
  device.
  """
  if not isinstance(given, jax.Array):
    try:
      given = np.asarray(given)
    except ValueError as error:
      raise ValueError(
        'Tokens are rows of one length, [B, T]; these rows differ in length: '
        'pad them with 0.'
      ) from error
  if given.ndim != 2 or 0 in given.shape:
    raise ValueError(
      f'Tokens have shape [B, T], a row for each sequence; found '
      f'{list(given.shape)}.'
    )
  if not jnp.issubdtype(given.dtype, jnp.integer):
    raise TypeError(f'Tokens are integers; found {given.dtype}.')
  if isinstance(given, np.ndarray):
    wrong = given[(given < 0) | (given >= vocab_size)]
    if wrong.size:
      raise ValueError(
        f'Token {wrong[0]} is not in the vocabulary of {vocab_size:,}; was the '
        "text tokenised by another model's tokenizer?"
      )
  return jnp.asarray(given, jnp.int32)


def params(
  given: Mapping[str, Any],
  wanted: Mapping[str, Any],
  depth: int,
  final: bool,
) -> None:
  """Compares the parameters that a pass reads with the shapes of the model.

  Args:
    given, wanted: trees of arrays and of shapes.
    depth: the number of layers that the pass runs through.
    final: whether it reads the final norm.
  """
  if not isinstance(given, Mapping):
    raise TypeError(
      'The parameters of a language model are a nested mapping, as '
      f'weights.load returns it; found a {type(given).__name__}.'
    )
  arrays = traverse_util.flatten_dict(given, sep='/')
  for name, want in traverse_util.flatten_dict(wanted, sep='/').items():
    layer = re.match(r'layer_(\d+)/', name)
    if layer and int(layer[1]) >= depth or name[:5] == 'final' and not final:
      continue
    if name not in arrays:
      raise ValueError(
        f'The parameters lack {name}, which this pass reads: load more layers, '
        "or another model's are given."
      )
    if arrays[name].shape != want.shape:
      raise ValueError(
        f'The parameter {name} has shape {list(arrays[name].shape)}, and '
        f'the model wants {list(want.shape)}: they belong to another model.'
      )


def dtype(given: Any) -> None:
  """Checks the name of a number type."""
  try:
    jnp.dtype(given)
  except TypeError:
    raise ValueError(
      "dtype must be the name of a number type, such as 'float32' or "
      f"'bfloat16'; found {given!r}."
    ) from None


def shape(name: str, given: Any, wanted: tuple[int, ...]) -> None:
  """Compares an optional array's shape."""
  if given is not None and jnp.shape(given) != wanted:
    raise ValueError(
      f'{name} has shape {list(jnp.shape(given))}; expected {list(wanted)}.'
    )
