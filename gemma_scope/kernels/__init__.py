"""The sparse step's sums: plain functions, and kernels that they define.

  tpu    sums over the few latents of a row, for TPU: rows moved by DMA
  gpu    the same for GPU, by Triton
  plain  the definitions, for a CPU and for shapes that do not fit

`plain.on` chooses by the platform of the devices.
"""
