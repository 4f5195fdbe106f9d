"""One SAE's folder: params.npz and its card, checked against each other.

The keys are Gemma Scope 1's: W_enc [d_in, F], b_enc [F], W_dec [F, d_out],
b_dec [d_out], threshold [F], all float32, and W_skip [d_in, d_out] where there
is a linear skip. The card (config.json) says site, d_in, d_out and width; it
bounds how many bytes params.npz may have before that file is opened.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from gemma_scope import manifest, npz, sites

Params = dict[str, np.ndarray]

KEYS = ('W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold')
OPTIONAL_KEYS = ('W_skip',)

_ZIP_BYTES = 1 << 14  # directory and headers of a params.npz, with room


def fit(params: Mapping[str, np.ndarray], card: object) -> Params:
  """Returns the parameters, in the file's order, if `read` would take them."""
  check_card(card, pathlib.Path('member'), None)
  what = f'The SAE {npz.show(card.get("name", card["site"]))}'
  names = [key for key in (*KEYS, *OPTIONAL_KEYS) if key in params]
  if set(params) - set(names) or set(KEYS) - set(params):
    raise npz.Refused(
      f'{what} has {", ".join(sorted(params))}; expected '
      f'{", ".join(KEYS)} and at most {", ".join(OPTIONAL_KEYS)}.'
    )
  arrays = {key: np.asarray(params[key]) for key in names}
  for key, array in arrays.items():
    if array.dtype != np.float32:
      raise npz.Refused(
        f'{what} has {key} in {array.dtype}; a release holds float32.'
      )
    if not np.isfinite(array).all():
      raise npz.Refused(f'{what} has values in {key} that are not finite.')
  if arrays['threshold'].size and arrays['threshold'].min() < 0:
    raise npz.Refused(f'{what} has thresholds below 0.')
  try:
    _check_shapes({k: a.shape for k, a in arrays.items()}, card)
  except npz.Refused as error:
    raise npz.Refused(f'{what} {error}.') from None
  return arrays


def read(
  folder: pathlib.Path,
  name: str | None,
  files: dict | None,
  max_bytes: int,
) -> tuple[Params, dict]:
  """Reads one folder -> (params, card).

  Args:
    folder: holds params.npz and, unless it is a bare download, config.json.
    name: its path in a release, which the card must agree with, or None.
    files: its entry in the manifest, {file: {'bytes', 'sha256'}}, or None.
    max_bytes: the largest params.npz to accept, whatever the card says.

  Raises:
    npz.Refused: anything that is not a whole, unchanged SAE.
  """
  expected = files or {}
  config = folder / 'config.json'
  card = None
  if files or os.path.lexists(config):
    card = manifest.read_json(config, expected.get('config.json'))
    check_card(card, folder, name)
    max_bytes = min(max_bytes, _bytes_of(card) + _ZIP_BYTES)
  path = folder / 'params.npz'
  if files and path.is_file() and not path.is_symlink():
    size = path.stat().st_size
    if size != expected['params.npz']['bytes']:
      raise npz.Refused(
        f'{npz.show(path)} has {size:,} bytes and its manifest says '
        f'{expected["params.npz"]["bytes"]:,}; fetch or write it again.'
      )
  params = npz.read(
    path,
    required=KEYS,
    optional=OPTIONAL_KEYS,
    check=lambda shapes: _check_shapes(shapes, card),
    max_bytes=max_bytes,
    sha256=expected.get('params.npz', {}).get('sha256'),
  )
  if params['threshold'].min() < 0:
    raise npz.Refused(f'{npz.show(path)} holds thresholds below 0.')
  if card is None:
    (d_in, width), d_out = params['W_enc'].shape, len(params['b_dec'])
    card = {'d_in': d_in, 'd_out': d_out, 'width': width}
  return params, card


def check_card(card: object, folder: pathlib.Path, name: str | None):
  """Sizes are whole numbers; site and width agree with the folder's name."""
  where = npz.show(folder / 'config.json')
  if not isinstance(card, dict):
    raise npz.Refused(f'{where} is not a card: expected a JSON object.')
  for key in ('d_in', 'd_out', 'width'):
    number = card.get(key)
    if type(number) is not int or not 0 < number < 1 << 31:
      raise npz.Refused(
        f'{where} has {key} = {npz.show(number)}; expected a whole number '
        'above 0.'
      )
  try:
    site = sites.parse(card.get('site', ''))
  except (TypeError, ValueError) as error:
    raise npz.Refused(f'{where} names no site: {str(error)[:200]}') from None
  if name is None:
    return
  kind, layer, width = manifest.MEMBER.fullmatch(name).groups()
  if (kind, int(layer)) != (site.kind, site.layer) or (
    width != sites.width_name(card['width'])
  ):
    raise npz.Refused(
      f'{where} is the card of {site} with {card["width"]} latents, and its '
      f'folder is {name}.'
    )


def _shapes(card: dict) -> npz.Shapes:
  d_in, width, d_out = card['d_in'], card['width'], card['d_out']
  return {
    'W_enc': (d_in, width),
    'b_enc': (width,),
    'W_dec': (width, d_out),
    'b_dec': (d_out,),
    'threshold': (width,),
    'W_skip': (d_in, d_out),
  }


def _bytes_of(card: dict) -> int:
  return 4 * sum(math.prod(shape) for shape in _shapes(card).values())


def _check_shapes(shapes: npz.Shapes, card: dict | None):
  """Shapes are those of the card, or else agree among themselves."""
  if card is None:
    if len(shapes['W_enc']) != 2 or len(shapes['b_dec']) != 1:
      raise npz.Refused(
        f'has W_enc {shapes["W_enc"]} and b_dec {shapes["b_dec"]}; expected '
        '[d_in, F] and [d_out]'
      )
    d_in, width = shapes['W_enc']
    card = {'d_in': d_in, 'width': width, 'd_out': shapes['b_dec'][0]}
  for key, expected in _shapes(card).items():
    if key in shapes and shapes[key] != expected:
      hint = ', transposed' if shapes[key] == expected[::-1] else ''
      raise npz.Refused(
        f'has {key} {shapes[key]}{hint}; expected {expected} for d_in = '
        f'{card["d_in"]}, F = {card["width"]}, d_out = {card["d_out"]}'
      )
