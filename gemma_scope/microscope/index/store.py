"""The index of an SAE on disk: what each latent fires on.

A folder for each SAE holds index.json (meta) and arrays.safetensors. F counts
the latents of all layers, layer by layer. All N sequences of T tokens are kept:
an example is a sequence, a position in it, and the latent's activations around
that position.

An index is hashed when it is read; its arrays stay on disk and are mapped into
memory, so that many of them can be open at once.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gemma_scope import files, release
from gemma_scope.release import sae_folder

VERSION = 3  # 2: windows hold the values themselves, no outliers
_META, _ARRAYS = 'index.json', 'arrays.safetensors'
_MOST_META = 1 << 22
_SEAL = 'meta_sha256'  # version 2 has none


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """One SAE's index.

  Attributes:
    meta: plain JSON: 'version', 'card' and 'sae_sha256' (of the SAE), 'model',
      'corpus' (name, sha256, split), 'tokens' (that counted), 'sequences',
      'outliers' (the norm limits and the number of tokens left out, or None),
      'code' (version).
    sequences_NT: int32, the text, BOS first.
    keep_NT: bool, where a token counted.
    fired_F: int64, number of tokens on which a latent fired.
    max_F: float32, its largest activation.
    mean_F: float32, its mean activation where it fired.
    edges_H: float32, the H + 1 edges of the histogram, log-spaced.
    histogram_FH: int64, number of activations in each bin.
    top_FE, top_sequence_FE, top_position_FE: activations (float32, falling; 0
      is none), sequences and positions (int32) of the E largest, at most one
      from each document.
    sample_FQR, sample_sequence_FQR, sample_position_FQR: R activations from
      each of Q = 10 equal intervals of (0, max], whatever the order of the
      text.
    silent_FM: int32, sequences on which it never fired (-1 is none).
    cofiring_FC, cofiring_value_FC: int32 latents that fire with it most (-1 is
      none), and the Jaccard index of their tokens, falling.
    neighbour_FC, neighbour_value_FC: int32 latents of the nearest decoders, and
      their cosines, falling.
    positive_FL, positive_value_FL: int32 tokens whose logits it raises most,
      and by how much per unit of activation, falling; None where it does not
      write to a residual stream.
    negative_FL, negative_value_FL: those whose logits it lowers most, rising.
    decoder_norm_F, encoder_norm_F, cosine_F, threshold_F: float32; cosine of a
      latent's encoder and decoder (nan where their spaces differ).
    outlier_sequence_O, outlier_position_O, outlier_norm_O: tokens that the
      card's outlier rule left out of everything above, and their norms.
    outlier_fired_F: int64, on how many of these a latent fires.
    window_top_FEW, window_sample_FQRW: float16, the latent's activations around
      each example as shares of max_F, W tokens from position - W // 2 (0
      outside of the sequence). `windows` gives the activations.
    document_NT: int32, the number of each token's document in the text; None in
      older indexes.
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
  outlier_sequence_O: np.ndarray
  outlier_position_O: np.ndarray
  outlier_norm_O: np.ndarray
  outlier_fired_F: np.ndarray
  window_top_FEW: np.ndarray
  window_sample_FQRW: np.ndarray
  document_NT: np.ndarray | None = None

  @property
  def density_F(self) -> np.ndarray:
    """Share of tokens on which each latent fires."""
    return self.fired_F / max(self.meta['tokens'], 1)

  def windows(self, name: str, latent: int) -> np.ndarray:
    """A latent's activations around its examples, float32.

    Args:
      name: 'top' [E, W] or 'sample' [Q, R, W].
    """
    share = self.window_top_FEW if name == 'top' else self.window_sample_FQRW
    return share[latent].astype(np.float32) * self.max_F[latent]


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed:
  """A released SAE beside its index and its labels.

  Attributes:
    sae: the SAE; `checked` is the same and refuses other parameters.
    index: what its latents fire on.
    labels: feature -> {'text', 'by', 'score', 'control', 'low'}.
    effects: the causal cards and their summary, or None.
  """

  sae: release.Released
  index: Index
  labels: Mapping[int, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  effects: Mapping[str, Any] | None = None

  @property
  def checked(self) -> release.Released:
    """The SAE; its `load` raises ValueError if the index is of another."""
    return dataclasses.replace(self.sae, read=self._load)

  def _load(self) -> release.released.Params:
    params = self.sae.load()
    if self.index.meta['sae_sha256'] != sae_folder.digest(params):
      raise ValueError(
        f'The parameters in {self.sae.folder} have changed since '
        f'{self.sae.name} was indexed; run build again.'
      )
    return params


_FIELDS = [f.name for f in dataclasses.fields(Index) if f.name != 'meta']


def write(folder: str | os.PathLike[str], index: Index) -> None:
  """Writes an index, completely or not at all; replaces an older one."""
  folder = pathlib.Path(folder)
  if folder.exists() and not (folder / _META).exists():
    raise ValueError(f'{folder} exists and is not an index; move it away.')
  arrays = {
    name: np.ascontiguousarray(getattr(index, name))
    for name in _FIELDS
    if getattr(index, name) is not None
  }
  with files.whole_folder(folder, replace=True) as draft:
    try:
      save_file(arrays, draft / _ARRAYS)
    except SafetensorError as error:
      raise OSError(errno.EIO, str(error)) from error
    meta = {**index.meta, 'arrays_sha256': files.sha256(draft / _ARRAYS)}
    sealed = meta | {_SEAL: files.json_sha256(meta)}
    files.write_json(draft / _META, sealed, indent=1)


def read(folder: str | os.PathLike[str]) -> Index:
  """Reads an index.

  Raises:
    ValueError: it is missing, damaged or of an unknown version.
  """
  folder = pathlib.Path(folder)
  try:
    with files.open_plain(folder / _META, _MOST_META) as (file, _):
      meta = json.loads(file.read())
    if meta.get('version') not in (2, VERSION):
      raise ValueError(f'it is of version {meta.get("version")}')
    seal = meta.pop(_SEAL, None)
    if seal != files.json_sha256(meta) and (seal or meta['version'] > 2):
      raise ValueError(f'{_META} does not have its own hash')
    digest = files.sha256(folder / _ARRAYS)
    if digest != meta['arrays_sha256']:
      raise ValueError('its arrays are not those it was written with')
    arrays = _mapped(folder / _ARRAYS)
    if meta['version'] == 2:
      meta, arrays = _of_version_2(meta, arrays)
    unknown = set(arrays) ^ set(_FIELDS)
    if unknown - {name for name in _FIELDS if name[:8] in _SOME}:
      raise ValueError(f'the array {sorted(unknown)[0]} is missing or unknown')
    return Index(meta=meta, **{name: arrays.get(name) for name in _FIELDS})
  except (OSError, KeyError, TypeError, SafetensorError, ValueError) as error:
    raise ValueError(
      f'Cannot read the index {str(folder)!r}: {str(error)[:200]}. Make it '
      'again with launch/microscope.py build.'
    ) from None


# The types that an index has, as safetensors names them.
_TYPES = {
  'BOOL': np.bool_,
  'F16': np.float16,
  'F32': np.float32,
  'I32': np.int32,
  'I64': np.int64,
}


def _mapped(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file, read from disk where they are used."""
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(length))
  data = np.asarray(np.memmap(path, np.uint8, 'r', 8 + length))
  header.pop('__metadata__', None)
  return {
    name: data[slice(*tensor['data_offsets'])]
    .view(_TYPES[tensor['dtype']])
    .reshape(tensor['shape'])
    for name, tensor in header.items()
  }


# Missing where a latent moves no logits, and in older indexes.
_SOME = ('positive', 'negative', 'document')


def _of_version_2(meta, arrays):
  """The index of version 0.3.0 in today's form; ValueError where it cannot be.

  Its windows hold activations in float16, which are infinite above 65,504.
  """
  names = 'window_top_FEW', 'window_sample_FQRW'
  if not all(np.isfinite(arrays[name]).all() for name in names):
    raise ValueError(
      'version 0.3.0 wrote it, with activations that are too large for float16'
    )
  max_F = arrays['max_F']
  for name in names:
    by_latent = max_F.reshape(-1, *[1] * (arrays[name].ndim - 1))
    arrays[name] = shares(arrays[name], by_latent)
  empty = np.zeros(0, np.int32)
  return meta | {'version': VERSION, 'outliers': None}, arrays | {
    'outlier_sequence_O': empty,
    'outlier_position_O': empty,
    'outlier_norm_O': empty.astype(np.float32),
    'outlier_fired_F': np.zeros(len(max_F), np.int64),
  }


def shares(values: np.ndarray, max_F: np.ndarray) -> np.ndarray:
  """Activations as shares of a latent's largest, float16; none becomes 0."""
  share = values / np.maximum(max_F, np.finfo(np.float32).tiny)
  return np.where(values > 0, np.maximum(share, _LEAST), 0).astype(np.float16)


_LEAST = 2.0**-24  # the smallest float16 above 0
