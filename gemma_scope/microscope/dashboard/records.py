"""What the pages show about each feature of an SAE: a record of plain JSON.

An example is a sequence and a position; its activations are float16 shares of
the feature's largest, in base64.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope.evaluation import estimates
from gemma_scope.microscope.index.store import Indexed

_TOP, _SILENT = 16, 4  # examples shown


def short(values) -> list[float | None]:
  """Four digits of each; None where there is no number."""
  return [
    rounded(value) for value in np.asarray(values, float).ravel().tolist()
  ]


def rounded(value) -> float | None:
  """Four digits; None where there is no number."""
  return float(f'{value:.4g}') if math.isfinite(value) else None


def cards_of(indexed: Indexed) -> Mapping[int, Mapping[str, Any]]:
  """The causal cards by feature; {} where nothing was measured."""
  return (indexed.effects or {}).get('cards', {})


class Features:
  """The record of each feature of an SAE."""

  def __init__(self, indexed: Indexed):
    self._indexed, index = indexed, indexed.index
    self._tokens = max(index.meta['tokens'], 1)
    plain = ('max_F', 'mean_F', 'encoder_norm_F', 'decoder_norm_F')
    self._plain = {
      name: short(getattr(index, name))
      for name in (*plain, 'threshold_F', 'cosine_F')
    }
    self._related = {
      key: _pairs(*arrays)
      for key, arrays in {
        'near': (index.neighbour_FC, index.neighbour_value_FC),
        'with': (index.cofiring_FC, index.cofiring_value_FC),
        'positive': (index.positive_FL, index.positive_value_FL),
        'negative': (index.negative_FL, index.negative_value_FL),
      }.items()
      if arrays[0] is not None
    }

  def __call__(self, j: int) -> dict[str, Any]:
    index, fired = self._indexed.index, int(self._indexed.index.fired_F[j])
    _, low, high = estimates.wilson_interval(fired, self._tokens)
    plain = self._plain
    silent = index.silent_FM[j]
    return {
      'fired': fired,
      'density': rounded(fired / self._tokens),
      'low': rounded(low),
      'high': rounded(high),
      'max': plain['max_F'][j],
      'mean': plain['mean_F'][j],
      'threshold': plain['threshold_F'][j],
      'encoder': plain['encoder_norm_F'][j],
      'decoder': plain['decoder_norm_F'][j],
      'cosine': plain['cosine_F'][j],
      'outliers': int(index.outlier_fired_F[j]),
      'histogram': index.histogram_FH[j].tolist(),
      'label': self._indexed.labels.get(j),
      'effects': cards_of(self._indexed).get(j),
      'silent': silent[silent >= 0][:_SILENT].tolist(),
      **{key: rows[j] for key, rows in self._related.items()},
      **self._examples(j),
    }

  def _examples(self, j: int) -> dict[str, Any]:
    """The top examples, then those of each tenth from the last one down.

    `at` has sequences and positions in turn, `values` the windows around them.
    """
    index = self._indexed.index
    shown_E = index.top_sequence_FE[j, :_TOP] >= 0
    sampled_QR = index.sample_sequence_FQR[j, ::-1] >= 0
    places = np.concatenate(
      [
        np.stack(
          [
            index.top_sequence_FE[j, :_TOP][shown_E],
            index.top_position_FE[j, :_TOP][shown_E],
          ],
          1,
        ),
        np.stack(
          [
            index.sample_sequence_FQR[j, ::-1][sampled_QR],
            index.sample_position_FQR[j, ::-1][sampled_QR],
          ],
          1,
        ),
      ]
    )
    shares = np.concatenate(
      [
        index.window_top_FEW[j, :_TOP][shown_E],
        index.window_sample_FQRW[j, ::-1][sampled_QR],
      ]
    )
    counts = sampled_QR.sum(1).tolist()
    documents = {}
    if index.document_NT is not None:
      documents['documents'] = index.document_NT[
        places[:, 0], places[:, 1]
      ].tolist()
    return {
      **documents,
      'at': places.ravel().tolist(),
      'values': base64.b64encode(shares.astype('<f2').tobytes()).decode(),
      'top': int(shown_E.sum()),
      'tenths': counts,  # the last tenth first
    }


def _pairs(ids_FC: np.ndarray, values_FC: np.ndarray) -> list[list[list]]:
  """[id, value] of each feature's related ones, without the empty places."""
  with np.errstate(divide='ignore', invalid='ignore'):
    scale = 10.0 ** (3 - np.floor(np.log10(np.abs(values_FC.astype(float)))))
    short_FC = np.round(values_FC * scale) / scale
  short_FC = np.where(np.isfinite(short_FC), short_FC, 0.0)
  return [
    [
      [token, value]
      for token, value in zip(ids, values, strict=True)
      if token >= 0
    ]
    for ids, values in zip(ids_FC.tolist(), short_FC.tolist(), strict=True)
  ]
