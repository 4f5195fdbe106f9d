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


def site(value: sites.Site | str) -> sites.Site:
  """A site, from a `Site` or its text."""
  if isinstance(value, sites.Site):
    return value
  if isinstance(value, str):
    return sites.parse(value)
  raise TypeError(
    f"A site is a Site or text such as 'resid_post/2'; found {value!r}."
  )


def taps(
  sites_wanted: Collection[sites.Site | str] | sites.Site | str,
) -> dict[sites.Site | str, sites.Site]:
  """Maps what was asked for to sites; a single site needs no list."""
  if isinstance(sites_wanted, sites.Site | str):
    sites_wanted = (sites_wanted,)
  return {each: site(each) for each in sites_wanted}


def edits(functions: Mapping[sites.Site | str, Any] | None) -> dict:
  """Sites -> functions."""
  by_site = {}
  for place, function in (functions or {}).items():
    if not callable(function):
      raise TypeError(
        f'The edit at {place} is a function from the activation [B, T, D] to '
        f'its new value; found a {type(function).__name__}.'
      )
    if site(place) in by_site:
      raise ValueError(f'Two edits are given at {site(place)}.')
    by_site[site(place)] = function
  return by_site


def tokens(ids: Any, vocab_size: int) -> jax.Array:
  """Tokens as int32 [B, T]; ids must be in the vocabulary.

  The values of JAX arrays are not checked, because that would wait for the
  device.
  """
  if not isinstance(ids, jax.Array):
    try:
      ids = np.asarray(ids)
    except ValueError as error:
      raise ValueError(
        'Tokens are rows of one length, [B, T]; these rows differ in length: '
        'pad them with 0.'
      ) from error
  if ids.ndim != 2 or 0 in ids.shape:
    raise ValueError(
      'Tokens have shape [B, T], a row for each sequence; found '
      f'{list(ids.shape)}.'
    )
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f'Tokens are integers; found {ids.dtype}.')
  if isinstance(ids, np.ndarray):
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
      raise ValueError(
        f'Token {wrong[0]} is not in the vocabulary of {vocab_size:,}; was the '
        "text tokenised by another model's tokenizer?"
      )
  return jnp.asarray(ids, jnp.int32)


def params(
  tree: Mapping[str, Any],
  wanted: Mapping[str, Any],
  depth: int,
  final: bool,
) -> None:
  """Compares the parameters that a pass reads with the shapes of the model.

  Args:
    tree, wanted: trees of arrays and of shapes.
    depth: the number of layers that the pass runs through.
    final: whether it reads the final norm.
  """
  if not isinstance(tree, Mapping):
    raise TypeError(
      'The parameters of a language model are a nested mapping, as '
      f'weights.load returns it; found a {type(tree).__name__}.'
    )
  arrays = traverse_util.flatten_dict(tree, sep='/')
  for name, expected in traverse_util.flatten_dict(wanted, sep='/').items():
    layer = re.match(r'layer_(\d+)/', name)
    if layer and int(layer[1]) >= depth or name[:5] == 'final' and not final:
      continue
    if name not in arrays:
      raise ValueError(
        f'The parameters lack {name}, which this pass reads: load more layers, '
        "or another model's are given."
      )
    if arrays[name].shape != expected.shape:
      raise ValueError(
        f'The parameter {name} has shape {list(arrays[name].shape)}, and the '
        f'model wants {list(expected.shape)}: they belong to another model.'
      )


def dtype(name: Any) -> None:
  """Checks the name of a number type."""
  try:
    jnp.dtype(name)
  except TypeError:
    raise ValueError(
      "dtype must be the name of a number type, such as 'float32' or "
      f"'bfloat16'; found {name!r}."
    ) from None


def shape(name: str, array: Any, wanted: tuple[int, ...]) -> None:
  """Compares an optional array's shape."""
  if array is not None and jnp.shape(array) != wanted:
    raise ValueError(
      f'{name} has shape {list(jnp.shape(array))}; expected {list(wanted)}.'
    )
