"""The mathematics of one SAE.

Reading order; a module imports only from those above it:

  activation_functions  JumpReLU and its gradient estimators, TopK, BatchTopK
  kernels               Pallas kernels for TPU and GPU
  sparse                sums over the few active latents of a row
  decoders              norms and directions of decoders
  autoencoder           one SAE: the Flax module; released encode and decode
  architectures         JumpReLU, TopK, BatchTopK, Gated, ReLU
  fold                  scales and decoder norms folded into parameters and back
  released              parameters of released SAEs on the devices
"""

from gemma_scope.sae.autoencoder import Autoencoder, decode, encode
from gemma_scope.sae.decoders import (
  decoder_norm,
  near,
  remove_parallel,
  unit_rows,
)

__all__ = [
  'Autoencoder',
  'decode',
  'decoder_norm',
  'encode',
  'near',
  'remove_parallel',
  'unit_rows',
]
