"""The sparse step's inner loops: plain functions, and kernels that they define.

  plain       the definitions, for a CPU and for shapes that do not fit
  tpu         sums over the few latents of a row, for TPU: rows moved by DMA
  tpu_encode  the encoder that keeps candidates alone, for TPU
  gpu         the sums for GPU, by Triton
  gpu_encode  that encoder for GPU
  choice      which of them a device runs

No kernel has run on the hardware that it is for: each is held to its definition
in an interpreter, and was compiled by the TPU's compiler or by Triton's.
"""
