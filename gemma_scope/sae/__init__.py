"""The mathematics of one SAE.

Reading order; a module imports only from those above it:

  activation_functions  JumpReLU and its estimators, TopK, BatchTopK
  kernels               Pallas kernels for its sums, on TPU and GPU
  sparse                the few latents of a row that matter, and sums over them
  autoencoder           one SAE: the Flax module, released encode and decode
  architectures         JumpReLU, TopK, BatchTopK, Gated, ReLU
  fold                  scales and decoder norms, into the parameters and back
"""

from gemma_scope.sae.autoencoder import (
  Autoencoder,
  decode,
  decoder_norm,
  encode,
  remove_parallel,
  unit_rows,
)

__all__ = [
  'Autoencoder',
  'decode',
  'decoder_norm',
  'encode',
  'remove_parallel',
  'unit_rows',
]
