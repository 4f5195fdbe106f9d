"""The folder of one SAE: params.npz and its card, held to each other.

The keys are those of Gemma Scope 1, all float32. Crosscoders and cross-layer
transcoders have a leading axis of L layers, and F latents in each:

  W_enc  [d_in, F]   b_enc [F]        W_enc  [L, d_in, F]      b_enc [L, F]
  W_dec  [F, d_out]  b_dec [d_out]    W_dec  [L, F, L, d_out]  b_dec [L, d_out]
  threshold [F]                       threshold [L, F]
  W_skip [d_in, d_out], or [L, d_in, d_out]   if there is an affine skip
  k []                                latents that a TopK keeps on each token

Of a crosscoder of two models d_in and d_out are twice the width of the site:
the first half of a row is the first model's.

A latent writes to no layer before its own, so W_dec[l, :, m] is zero for m < l.
The card (config.json) says type, sites, targets, d_in, d_out and width; it
bounds how many bytes params.npz may have before that file is opened.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from gemma_scope import files, sites
from gemma_scope.release import manifest, npz, paths

Params = dict[str, np.ndarray]

KEYS = ('W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold')
OPTIONAL_KEYS = ('W_skip', 'k')

_ZIP_BYTES = 1 << 14  # directory and headers of a params.npz, with room


def digest(params: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of the parameters' values, independent of the file format."""
  sha256 = hashlib.sha256()
  for name in sorted(params):
    array = np.ascontiguousarray(params[name], np.float32)
    sha256.update(f'{name} {array.shape} '.encode())
    sha256.update(array.data)
  return sha256.hexdigest()


def fit(params: Mapping[str, np.ndarray], card: object) -> Params:
  """Checks parameters as `read` does; returns them in the file's order."""
  wiring = check_card(card, 'the card', None)
  subject = f'The SAE {files.show(card.get("name", wiring))}'
  names = [key for key in (*KEYS, *OPTIONAL_KEYS) if key in params]
  if set(params) - set(names) or set(KEYS) - set(params):
    raise files.Refused(
      f'{subject} has {", ".join(sorted(params))}; expected {", ".join(KEYS)} '
      f'and at most {", ".join(OPTIONAL_KEYS)}.'
    )
  arrays = {key: np.asarray(params[key]) for key in names}
  for key, array in arrays.items():
    if array.dtype != np.float32:
      raise files.Refused(
        f'{subject} has {key} in {array.dtype}; a release holds float32.'
      )
    if not np.isfinite(array).all():
      raise files.Refused(f'{subject} has values in {key} that are not finite.')
  try:
    check_shapes({key: array.shape for key, array in arrays.items()}, card)
    _check_values(arrays, card)
  except files.Refused as error:
    raise files.Refused(f'{subject} {error}.') from None
  return arrays


def read_card(
  folder: pathlib.Path, name: str | None, listed: dict | None
) -> dict | None:
  """Reads config.json; arguments as of `read`.

  Returns:
    The card, checked; None where there is no config.json and no manifest.
  """
  path = folder / 'config.json'
  if not listed and not os.path.lexists(path):
    return None
  card = manifest.read_json(path, (listed or {}).get('config.json'))
  check_card(card, path, name)
  return manifest.public(card)


def read(
  folder: pathlib.Path,
  name: str | None,
  listed: dict | None,
  max_bytes: int,
) -> tuple[Params, dict]:
  """Reads one folder -> (params, card).

  Args:
    folder: holds params.npz and, unless it is a bare download, config.json.
    name: its path in a release, which the card must agree with, or None.
    listed: its entry in the manifest, {file: {'bytes', 'sha256'}}, or None.
    max_bytes: the largest params.npz to accept, whatever the card says.

  Raises:
    files.Refused: the folder is no complete, unchanged SAE.
  """
  card = read_card(folder, name, listed)
  if card is not None:
    max_bytes = min(max_bytes, nbytes(card, affine=True) + _ZIP_BYTES)
  path = folder / 'params.npz'
  expected = (listed or {}).get('params.npz', {})
  if expected and path.is_file() and path.stat().st_size != expected['bytes']:
    raise files.Refused(
      f'{files.show(path)} has {path.stat().st_size:,} bytes and its manifest '
      f'says {expected["bytes"]:,}; fetch or write it again.'
    )
  params = npz.read(
    path,
    required=KEYS,
    optional=OPTIONAL_KEYS,
    check=lambda shapes: check_shapes(shapes, card),
    max_bytes=max_bytes,
    sha256=expected.get('sha256'),
  )
  try:
    _check_values(params, card or {})
  except files.Refused as error:
    raise files.Refused(f'{files.show(path)} {error}.') from None
  if card is None:
    card = sizes_of({key: array.shape for key, array in params.items()})
  return params, card


def sizes_of(shapes: npz.Shapes) -> dict:
  """The sizes of a card, from the shapes of parameters."""
  check_shapes(shapes, None)
  sizes = {
    'd_in': shapes['W_enc'][-2],
    'd_out': shapes['b_dec'][-1],
    'width': math.prod(shapes['b_enc']),
  }
  return sizes | ({'affine': True} if 'W_skip' in shapes else {})


def check_card(
  card: object, path: str | os.PathLike[str], name: str | None
) -> sites.Wiring:
  """Checks sizes, sites, and that they agree with the folder's name.

  Args:
    card: what was read.
    path: where it was read, for messages.
    name: path of the SAE in its release, or None.
  """
  shown = files.show(path)
  if not isinstance(card, dict):
    raise files.Refused(f'{shown} is not a card: expected a JSON object.')
  for key in ('d_in', 'd_out', 'width'):
    number = card.get(key)
    if type(number) is not int or not 0 < number < 1 << 31:
      raise files.Refused(
        f'{shown} has {key} = {files.show(number)}; expected a whole number '
        'above 0.'
      )
  try:
    wiring = sites.wiring_of(card)
  except ValueError as error:
    raise files.Refused(
      f'{shown} does not name the sites of an SAE: {str(error)[:300]}'
    ) from None
  layers = len(wiring.sites) if wiring.several else 1
  if card['width'] % layers:
    raise files.Refused(
      f'{shown} has width = {card["width"]}, which is no multiple of its '
      f'{layers} layers.'
    )
  if wiring.sites == wiring.targets and card['d_in'] != card['d_out']:
    raise files.Refused(
      f'{shown} has d_in = {card["d_in"]} and d_out = {card["d_out"]}, and a '
      f'{wiring.type} writes what it reads.'
    )
  if wiring.pair and card['d_in'] % 2:
    raise files.Refused(
      f'{shown} has d_in = {card["d_in"]}, which two models of one width '
      'cannot share.'
    )
  if type(card.get('affine', False)) is not bool:
    raise files.Refused(
      f'{shown} has affine = {files.show(card["affine"])}; expected true or '
      'false.'
    )
  if name is not None:
    match = paths.MEMBER.fullmatch(name)
    expected = paths.folder(card), card.get('affine', False)
    # Before version 0.4 '1k' stood for 1536 latents too.
    folders = expected[0], paths.folder(card, lambda width: f'{width // 1000}k')
    is_affine = match['affine'] is not None
    if match['folder'] not in folders or is_affine is not expected[1]:
      raise files.Refused(
        f'{shown} is the card of {expected[0]} with'
        f'{"" if expected[1] else "out"} an affine skip, and its folder is '
        f'{name}.'
      )
  return wiring


def _shapes(card: dict, layers: int) -> npz.Shapes:
  """Shapes for the card's sizes; `layers` is 0 if there is no layer axis."""
  d_in, d_out = card['d_in'], card['d_out']
  lead, width = (layers,) * bool(layers), card['width'] // (layers or 1)
  return {
    'W_enc': (*lead, d_in, width),
    'b_enc': (*lead, width),
    'W_dec': (*lead, width, *lead, d_out),
    'b_dec': (*lead, d_out),
    'threshold': (*lead, width),
    'W_skip': (*lead, d_in, d_out),
    'k': (),
  }


def _layers(card: dict) -> int:
  wiring = sites.wiring_of(card)
  return len(wiring.sites) if wiring.several else 0


def nbytes(card: dict, affine: bool | None = None) -> int:
  """Size of the parameters in float32, of a card that was checked.

  Args:
    card: the card.
    affine: whether there is a W_skip; None: what the card says.
  """
  affine = card.get('affine', False) if affine is None else affine
  shapes = _shapes(card, _layers(card))
  return 4 * sum(
    math.prod(shape)
    for key, shape in shapes.items()
    if affine or key != 'W_skip'
  )


def check_shapes(shapes: npz.Shapes, card: dict | None):
  """Checks shapes against the card, or without a card against each other."""
  if card is None:
    W_enc, b_dec = shapes['W_enc'], shapes['b_dec']
    if len(W_enc) not in (2, 3) or len(b_dec) != len(W_enc) - 1:
      raise files.Refused(
        f'has W_enc {W_enc} and b_dec {b_dec}; expected [d_in, F] and [d_out], '
        'or [L, d_in, F] and [L, d_out]'
      )
    *lead, d_in, width = W_enc
    layers = lead[0] if lead else 0
    card = {'d_in': d_in, 'width': width * (layers or 1), 'd_out': b_dec[-1]}
  else:
    layers = _layers(card)
    if card.get('affine', False) is not ('W_skip' in shapes):
      raise files.Refused(
        f'has {"" if "W_skip" in shapes else "no "}W_skip, and its card says '
        f'affine: {str(card.get("affine", False)).lower()}'
      )
  for key, expected in _shapes(card, layers).items():
    if key in shapes and shapes[key] != expected:
      hint = ', transposed' if shapes[key] == expected[::-1] else ''
      several = f', L = {layers} and' if layers else ','
      raise files.Refused(
        f'has {key} {shapes[key]}{hint}; expected {expected} for d_in = '
        f'{card["d_in"]}{several} F = {_shapes(card, layers)["b_enc"][-1]}, '
        f'd_out = {card["d_out"]}'
      )


def _check_values(params: Mapping[str, np.ndarray], card: dict):
  """Checks thresholds, zeros of W_dec, and k."""
  if params['threshold'].min() < 0:
    raise files.Refused('holds thresholds below 0')
  W_dec = params['W_dec']
  if W_dec.ndim == 4:
    for layer in range(1, len(W_dec)):
      if W_dec[layer, :, :layer].any():
        raise files.Refused(
          f'has latents of its layer number {layer} that write to an earlier '
          'one; expected zeros in W_dec[l, :, m] for m < l'
        )
  if 'k' in params:
    k, width = float(params['k']), params['b_enc'].size
    if not (k.is_integer() and 1 <= k <= width):
      raise files.Refused(
        f'has k = {k:g}; expected a whole number from 1 to {width:,}'
      )
    if card.get('k') is not None and card['k'] != k:
      raise files.Refused(
        f'has k = {k:g}, and its card says {files.show(card["k"])}'
      )
