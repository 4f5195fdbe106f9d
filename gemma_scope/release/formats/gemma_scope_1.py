"""Gemma Scope 1: params.npz, whose path says all else.

  google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz
  ...-2b-pt-mlp, ...-2b-pt-att, ...-2b-pt-transcoders, ...-9b-it-res, ...
  ...-2b-pt-res/embedding/width_4k/average_l0_44/params.npz

The repository says model and site, the folders layer and L0. An SAE of the
embedding was trained before the embedding is scaled by sqrt(d): that is folded
in, so that it reads and writes `resid_pre/0` like any other.
Source: arXiv 2408.05147; key names and shapes as published.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.release import npz, sae_folder
from gemma_scope.release.formats import tensors

FILE = 'params.npz'
_REPOSITORY = re.compile(
  r'gemma-scope-(?P<size>\d+b)-(?P<kind>pt|it)-(?P<site>res|mlp|att|transcoders)'
)
_FOLDER = re.compile(
  r'(?:layer_(?P<layer>\d{1,3})|embedding)/width_(?P<width>\d+[km]?)/'
  r'(?:average_l0_(?P<l0>\d{1,6})|canonical)'
)
_SITES = {
  'res': ('resid_post',) * 2,
  'mlp': ('mlp_out',) * 2,
  'att': ('attn_out',) * 2,
  'transcoders': ('mlp_in_ungained', 'mlp_out'),
}


def is_there(folder: pathlib.Path) -> bool:
  return (folder / FILE).is_file() and not (folder / 'config.json').exists()


def card_of(path: str) -> dict[str, Any]:
  """The card that the path of an SAE gives: model, type, site, L0.

  Args:
    path: with slashes; the repository's name stands anywhere in it.

  Raises:
    files.Refused: it has no repository or no folder of Gemma Scope 1.
  """
  repository, folder = _REPOSITORY.search(path), _FOLDER.search(path)
  if not (repository and folder):
    raise files.Refused(
      f'{files.show(path)} does not say which model and site it is of: keep '
      'the published folders below one that is called like their repository, '
      'such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71, or say '
      '--site=resid_post/20.'
    )
  reads, writes = _SITES[repository['site']]
  layer = int(folder['layer'] or 0)
  if folder['layer'] is None:
    reads = writes = 'resid_pre'
  model = f'gemma2-{repository["size"]}'
  card = {
    'name': f'{repository[0]}/{folder[0]}',
    'type': 'sae' if reads == writes else 'transcoder',
    'sites': [f'{reads}/{layer}'],
    'targets': [f'{writes}/{layer}'],
    'model': model if repository['kind'] == 'pt' else f'{model}-it',
    'architecture': 'jumprelu',
  }
  if folder['l0']:
    card['sparsity'] = {'kind': 'target_l0', 'value': int(folder['l0'])}
  return card


def read(
  folder: pathlib.Path, path: str
) -> tuple[dict[str, Any], Callable[[], sae_folder.Params]]:
  """One SAE: its card, and a function that reads its parameters.

  Args:
    folder: holds params.npz.
    path: see `card_of`.
  """
  shapes = npz.shapes(
    folder / FILE, required=sae_folder.KEYS, max_bytes=tensors.MAX_BYTES
  )
  card = card_of(path) | sae_folder.sizes_of(shapes)
  return card, functools.partial(_params, folder / FILE, card)


def _params(file: pathlib.Path, card: dict[str, Any]) -> sae_folder.Params:
  params = npz.read(
    file,
    required=sae_folder.KEYS,
    check=lambda shapes: sae_folder.check_shapes(shapes, card),
    max_bytes=tensors.MAX_BYTES,
  )
  if card['sites'] == ['resid_pre/0']:
    scale = np.float32(params['b_dec'].size ** 0.5)
    params['W_enc'] = params['W_enc'] / scale
    params['W_dec'] = params['W_dec'] * scale
    params['b_dec'] = params['b_dec'] * scale
  return params
