"""What every latent of an SAE fires on: the form in which it is kept.

A folder an SAE: index.json (meta) and arrays.safetensors. F counts all latents
(of all layers together, layer-major); N sequences of T tokens, all of them kept
so that an example is a sequence, a position in it, and the latent's values
around that position.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gemma_scope import files

VERSION = 2
_META, _ARRAYS = 'index.json', 'arrays.safetensors'
_MOST_META = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """One SAE's index.

  Attributes:
    meta: plain JSON: 'version', 'card' and 'sae_sha256' (of the SAE), 'model',
      'corpus' (name, sha256, split), 'tokens' (that counted), 'sequences',
      'code' (version).
    sequences_NT: int32, the text, BOS first.
    keep_NT: bool, where a token counted.
    fired_F: int64, on how many tokens a latent fired.
    max_F: float32, its largest value.
    mean_F: float32, its mean where it fired.
    edges_H: float32, H + 1 edges of the histogram, log-spaced, one for all.
    histogram_FH: int64, how many values lay between them.
    top_FE, top_sequence_FE, top_position_FE: values (float32, falling; 0 is
      none), sequences and positions (int32) of the E largest, at most one a
      document.
    sample_FQR, sample_sequence_FQR, sample_position_FQR: R values from each of
      Q = 10 equal intervals of (0, max], drawn whatever the order of the text.
    silent_FM: int32, sequences on which it never fired (-1 is none).
    cofiring_FC, cofiring_value_FC: int32 latents that fire with it most (-1 is
      none), and the Jaccard index of their tokens, falling.
    neighbour_FC, neighbour_value_FC: int32 latents of the nearest decoders, and
      their cosines, falling.
    positive_FL, positive_value_FL: int32 tokens whose logits it raises most,
      and by how much per unit of activation, falling; None where it writes to
      no residual stream that is read so.
    negative_FL, negative_value_FL: those that it lowers most, rising.
    decoder_norm_F, encoder_norm_F, cosine_F, threshold_F: float32; cosine of a
      latent's encoder and decoder (nan where their spaces differ).
    window_top_FEW, window_sample_FQRW: float16, the latent's values around each
      example's position, W tokens, from position - W // 2 (0 outside the
      sequence).
  """

  meta: dict[str, Any]
  sequences_NT: np.ndarray
  keep_NT: np.ndarray
  fired_F: np.ndarray
  max_F: np.ndarray
  mean_F: np.ndarray
  edges_H: np.ndarray
  histogram_FH: np.ndarray
  top_FE: np.ndarray
  top_sequence_FE: np.ndarray
  top_position_FE: np.ndarray
  sample_FQR: np.ndarray
  sample_sequence_FQR: np.ndarray
  sample_position_FQR: np.ndarray
  silent_FM: np.ndarray
  cofiring_FC: np.ndarray
  cofiring_value_FC: np.ndarray
  neighbour_FC: np.ndarray
  neighbour_value_FC: np.ndarray
  positive_FL: np.ndarray | None
  positive_value_FL: np.ndarray | None
  negative_FL: np.ndarray | None
  negative_value_FL: np.ndarray | None
  decoder_norm_F: np.ndarray
  encoder_norm_F: np.ndarray
  cosine_F: np.ndarray
  threshold_F: np.ndarray
  window_top_FEW: np.ndarray
  window_sample_FQRW: np.ndarray

  @property
  def density_F(self) -> np.ndarray:
    """Share of tokens on which each latent fires."""
    return self.fired_F / max(self.meta['tokens'], 1)


_FIELDS = [f.name for f in dataclasses.fields(Index) if f.name != 'meta']


def write(folder: str | os.PathLike[str], index: Index) -> None:
  """Writes an index, whole or not at all; one that is there is replaced."""
  folder = pathlib.Path(folder)
  if folder.exists() and not (folder / _META).exists():
    raise ValueError(f'{folder} is there and holds no index; move it away.')
  arrays = {
    name: np.ascontiguousarray(getattr(index, name))
    for name in _FIELDS
    if getattr(index, name) is not None
  }
  with files.whole_folder(folder, replace=True) as draft:
    save_file(arrays, draft / _ARRAYS)
    digest = files.sha256(draft / _ARRAYS)
    files.write_json(
      draft / _META, {**index.meta, 'arrays_sha256': digest}, indent=1
    )


def read(folder: str | os.PathLike[str]) -> Index:
  """Reads an index.

  Raises:
    ValueError: one sentence on what is missing, damaged or of another version.
  """
  folder = pathlib.Path(folder)
  try:
    with files.open_plain(folder / _META, _MOST_META) as (file, _):
      meta = json.loads(file.read())
    if meta.get('version') != VERSION:
      raise ValueError(f'is of version {meta.get("version")}')
    found = files.sha256(folder / _ARRAYS)
    if found != meta['arrays_sha256']:
      raise ValueError('has other arrays than it was written with')
    arrays = load_file(folder / _ARRAYS)
    unknown = set(arrays) ^ set(_FIELDS)
    if unknown - {name for name in _FIELDS if name[:8] in _SOME}:
      raise ValueError(f'lacks or adds {sorted(unknown)[0]}')
    return Index(meta=meta, **{name: arrays.get(name) for name in _FIELDS})
  except (OSError, KeyError, TypeError, SafetensorError, ValueError) as error:
    raise ValueError(
      f'{str(folder)!r} is no index that can be read ({str(error)[:200]}); '
      'make it again with launch/microscope.py build.'
    ) from None


_SOME = ('positive', 'negative')  # not there where a latent moves no logits
