"""Every test runs on the CPU, as 8 devices, with no network."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['HF_HUB_OFFLINE'] = '1'
