"""Chooses the functions for a device: a kernel if it has one, else the plain
one.

TPUs from v4 on use `tpu` and `tpu_encode`, GPUs use `gpu` and `gpu_encode`,
both if d is a whole number of tiles. Everything else uses `plain`. The choice
is made when a program is traced, by the devices of its mesh.
"""

from __future__ import annotations

import jax


def on(device: jax.Device, function):
  """One of the sums of `plain`, or the device's kernel if the shapes fit.

  A kernel is never batched: under `vmap` it runs for one SAE after the other.
  """
  if device.platform not in ('tpu', 'gpu'):
    return function
  from gemma_scope.sae.kernels import (
    gpu,
    tpu,  # Pallas: seconds to import
  )

  kernels = {'tpu': tpu, 'gpu': gpu}[device.platform]
  kernel = getattr(kernels, function.__name__)

  def run(a, i_RK, b, *options):
    if not kernels.fits(device.device_kind, b.shape[1]):
      return function(a, i_RK, b, *options)
    run_kernel = lambda a, i_RK, b: kernel(a, i_RK, b, *options)
    return jax.custom_batching.sequential_vmap(run_kernel)(a, i_RK, b)

  return run


def encoder(device: jax.Device, width: int, dtype: str):
  """The fused encoder of the device (`tpu_encode.encode`), or None.

  It multiplies as XLA does at the default precision. At another precision its
  candidates would differ from those of the dense step.
  """
  exact = jax.config.jax_default_matmul_precision not in (None, 'default')
  if device.platform not in ('tpu', 'gpu') or (dtype == 'float32' and exact):
    return None
  from gemma_scope.sae.kernels import gpu, gpu_encode, tpu, tpu_encode

  kernels, encode = {
    'tpu': (tpu, tpu_encode.encode),
    'gpu': (gpu, gpu_encode.encode),
  }[device.platform]
  if not kernels.fits(device.device_kind, width):
    return None

  def run(x_BD, W_FD, bias_F, least_F, count):
    run_encoder = lambda *arrays: encode(*arrays, count)
    factors = x_BD.astype(dtype), W_FD.astype(dtype)
    return jax.custom_batching.sequential_vmap(run_encoder)(
      *factors, bias_F, least_F
    )

  return run
