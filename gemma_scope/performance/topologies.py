"""Descriptions of TPU pods, to compile for them without having one.

libtpu's compiler runs on any x86 machine. `pod('v5p:2x2x4')` gives descriptions
of a pod's devices, which serve for shardings and compilation. The numbers of a
chip (dense bfloat16 FLOP/s, HBM and its rate) come from the page "System
architecture" of each version in Google's Cloud TPU documentation.

A device is what JAX calls a device: a core in v3, v4 (here without megacore)
and tpu7x, and a chip in the other versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

import jax

_TFLOPS, _GIB, _GB = 1e12, 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a TPU version.

  Attributes:
    flops: bfloat16 FLOP/s.
    hbm: bytes.
    hbm_rate: bytes/s.
  """

  flops: float
  hbm: float
  hbm_rate: float


CHIPS = {
  'v3': Chip(123 * _TFLOPS, 32 * _GIB, 900 * _GB),
  'v4': Chip(275 * _TFLOPS, 32 * _GIB, 1228 * _GB),
  'v5e': Chip(197 * _TFLOPS, 16 * _GIB, 819 * _GB),
  'v5p': Chip(459 * _TFLOPS, 95 * _GIB, 2765 * _GB),
  'v6e': Chip(918 * _TFLOPS, 32 * _GIB, 1640 * _GB),
  'tpu7x': Chip(2307 * _TFLOPS, 192 * _GIB, 7380 * _GB),
}


@dataclasses.dataclass(frozen=True)
class Pod:
  """Devices of a pod to compile for, and a device's share of its chip."""

  name: str
  devices: list
  chips: int
  device: Chip


def chip_of(topology: str) -> Chip:
  """'v5p:2x2x4' -> its chip.

  Raises:
    ValueError: the text is not a topology of a known version.
  """
  version = re.fullmatch(r'(\w+):\d+(x\d+){1,2}', topology)
  if not version or version[1] not in CHIPS:
    raise ValueError(
      f'A topology looks like v5p:2x2x4, with one of {", ".join(CHIPS)}; '
      f'found {topology!r}.'
    )
  return CHIPS[version[1]]


def pod(topology: str) -> Pod:
  """The pod of a topology such as 'v5p:2x2x4', as libtpu describes it.

  Raises:
    ValueError: there is no such topology.
    RuntimeError: libtpu is not installed.
  """
  chip = chip_of(topology)
  # Without these libtpu asks a cloud's metadata server where it runs.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Only one process can hold a TPU, but several may compile for a pod.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')  # no notes on its start
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
  from jax.experimental import topologies

  if not is_there():
    raise RuntimeError(
      'The TPU compiler is not installed: pip install libtpu, in the version '
      'that jax[tpu] names.'
    )
  try:
    described = topologies.get_topology_desc(
      platform='tpu', topology_name=topology
    ).devices
  except Exception as error:  # of XLA's many kinds
    raise ValueError(
      f'libtpu knows no topology {topology!r} '
      f'({str(error).splitlines()[0][:120]}).'
    ) from None
  chips = len({tuple(device.coords) for device in described})
  share = chips / len(described)
  return Pod(
    topology,
    list(described),
    chips,
    Chip(chip.flops * share, chip.hbm * share, chip.hbm_rate * share),
  )


def targeted(mesh: jax.sharding.Mesh):
  """A context in which kernels are chosen for the chips of a mesh."""
  use_mesh = getattr(jax.sharding, 'use_abstract_mesh', None)
  return use_mesh(mesh.abstract_mesh) if use_mesh else contextlib.nullcontext()


def is_there() -> bool:
  """Whether libtpu can be imported."""
  try:
    import libtpu  # noqa: F401
  except ImportError:
    return False
  return True
