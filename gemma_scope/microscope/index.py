"""What every latent of an SAE fires on: the form in which it is kept.

A folder an SAE: index.json (meta) and arrays.safetensors. F counts all latents
(of all layers together, layer-major); N sequences of T tokens, all of them kept
so that an example is a sequence, a position in it, and the latent's values
around that position.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """One SAE's index.

  Attributes:
    meta: plain JSON: 'version', 'card' (of the SAE), 'model', 'corpus' (name,
      sha256, split), 'tokens' (that counted), 'sequences', 'code' (version).
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
    window_top_FEW, window_sample_FQRW, window_silent_FMW: float16, the latent's
      values around each example's position, W tokens, from position - W // 2 (0
      outside the sequence; silent ones from the sequence's start).
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
  window_silent_FMW: np.ndarray
