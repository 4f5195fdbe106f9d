"""The mathematics of one SAE.

Reading order; a module imports only from those above it:

  activation_functions  JumpReLU and its gradient estimators, TopK, BatchTopK
  kernels               Pallas kernels for TPU and GPU
  sparse                sums over the few active latents of a row
  decoders              norms and directions of decoders
  autoencoder           one SAE in training: the Flax module
  architectures         JumpReLU, TopK, BatchTopK, Gated, ReLU
  fold                  scales and decoder norms folded into parameters and back
  released              released SAEs: encode, decode, parameters on the devices
"""

from gemma_scope.sae.autoencoder import Autoencoder
from gemma_scope.sae.decoders import (
  decoder_norm,
  near,
  remove_parallel,
  unit_rows,
)
from gemma_scope.sae.released import decode, encode

__all__ = [
  'Autoencoder',
  'decode',
  'decoder_norm',
  'encode',
  'near',
  'remove_parallel',
  'unit_rows',
]
