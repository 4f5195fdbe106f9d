"""Sizes of the mesh's axes by arithmetic, where the config has 0 (mesh=auto).

The cost of one training step is estimated for every split of n devices into
'sae' x 'data' x 'latent' that the config can use. Time is measured in bytes
that a device's memory could move meanwhile:

  arithmetic  6 B F (d_in + d_out) / (data latent) FLOPs a member, at 200 a byte
  memory      28 bytes a parameter / latent (read by the forward and backward
              pass, read and written by the optimiser), 24 B F / (data latent)
  links       data > 1: the gradient, twice; latent > 1: four sums of [B, d] and
              their gradients; at a fifth of the memory's rate

The larger of the first two, plus the third, for the members / sae that a place
takes in turn. The cheapest way whose state fits wins; of equal ones, the one
with less memory. Chips differ by less than a factor of two in these ratios.

Memory of a device, in bytes: the state / (sae latent), two gradients of the
largest member / latent, its activations, the batch, the language model /
(data latent), twice the rows of one of its passes and the chunks of rows that
stay on the devices, both split over all axes (`chunk_memory`). docs/scale.md
compares it with the compiler's.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import config_checks, sites, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunk_memory
from gemma_scope.language_model import weights
from gemma_scope.runtime import checksums
from gemma_scope.training import setup, stack

_FLOPS_A_BYTE = 200.0  # bfloat16 FLOP/s over bytes/s of HBM: 166 to 560
_LINKS = 5.0  # rate of HBM over that of the links between chips
_SHARE = 0.9  # of a device's memory; the compiler needs room
_GIB = 2**30


class Memory(NamedTuple):
  """Bytes of a device: all that a run holds, and its chunks of rows."""

  all: float
  chunks: float


class Way(NamedTuple):
  """One way to split the devices: its sizes, memory and cost a step."""

  sizes: tuple[int, ...]
  bytes: float
  cost: float


def make(
  config: ConfigDict, devices=None, hbm: float | None = None, report=None
) -> Mesh:
  """The mesh of a run: the sizes in its config, or those chosen for its 0s.

  Args:
    config: the run's.
    devices: all devices, or those of a pod to compile for.
    hbm: bytes of memory of one of them; None asks the first.
    report: takes a line with the choice and its reason.

  Raises:
    ConfigError: nothing fits; the message has commands of smaller runs.
  """
  mesh_devices = [devices] if devices is not None else []
  if 0 not in config.mesh.values():
    return mesh_lib.make(config.mesh, *mesh_devices)
  devices = jax.devices() if devices is None else devices
  if hbm is None:
    hbm = min(checksums.from_all(_memory(devices[0])))
  model = setup.dimensions(config)
  fastest, ways = choose(config, model, len(devices), hbm)
  if report is not None:
    report(reason(fastest, ways, len(devices), hbm))
  return mesh_lib.make(
    dict(zip(mesh_lib.AXES, fastest.sizes, strict=True)), devices
  )


def choose(
  config: ConfigDict, model: sites.Dimensions, devices: int, hbm: float
) -> tuple[Way, list[Way]]:
  """The cheapest way that fits, and all ways, cheapest first.

  Raises:
    ConfigError: nothing fits.
  """
  ways = sorted(
    _ways(config, model, devices, hbm), key=lambda way: (way.cost, way.bytes)
  )
  if not ways:
    raise config_lib.ConfigError(
      f'No mesh of {devices} devices can split this config: the data axis must '
      'divide train.batch, activations.lm_batch and evaluation.batch, the '
      'latent axis the widths, the sae axis the number of SAEs of a kind.'
    )
  fitting = [way for way in ways if way.bytes <= _SHARE * hbm]
  if not fitting:
    raise config_lib.ConfigError(_too_large(config, model, devices, hbm, ways))
  return fitting[0], ways


def memory(
  config: ConfigDict,
  model: sites.Dimensions,
  sizes: tuple[int, ...],
  hbm: float,
) -> Memory:
  """Memory of a device, by arithmetic, on a mesh of these sizes."""
  stacks, _ = setup.make_stacks(config, model)
  sized = [_Sized.of(stack_) for stack_ in stacks]
  lm_bytes = _language_model_bytes(config)
  return _memory_of(config, model, sized, lm_bytes, sizes, hbm)


def state_bytes(config: ConfigDict, model: sites.Dimensions) -> float:
  """Bytes of the training state of all SAEs."""
  stacks, _ = setup.make_stacks(config, model)
  return sum(_Sized.of(one).state for one in stacks)


def _too_large(config, model, devices, hbm, ways) -> str:
  least = min(ways, key=lambda way: way.bytes)
  sentence = (
    f'The {len(specs.members(config))} SAEs need {least.bytes / _GIB:.0f} GiB '
    f'on each of {devices} devices at least (mesh {_shown(least.sizes)}), and '
    f'a device has {hbm / _GIB:.0f}'
  )
  parts = split(config, model, devices, hbm)
  if not parts:
    return f'{sentence}: take more devices, or narrower SAEs.'
  return (
    f'{sentence}: train them in {len(parts)} runs, with {", ".join(parts)} in '
    "the config's argument and a folder for each."
  )


def split(
  config: ConfigDict, model: sites.Dimensions, devices: int, hbm: float
) -> list[str]:
  """The config in as few runs as fit, by their arguments; [] if none do.

  By layers where that is possible (['layers=0-12', 'layers=13-25']), else also
  by widths, and then by sparsities (['widths=65k;sparsity=50', ...]).
  """
  for parts in _partitions(config):
    if all(_fits(config, part, model, devices, hbm) for part in parts):
      return parts
  return []


def _partitions(config: ConfigDict) -> Iterator[list[str]]:
  """Ways to split a collection into runs, fewest first."""
  c = config.collection
  single = ['']  # each layer alone, or all: an SAE over layers needs them
  if not specs.over_layers(config):
    layers = tuple(c.layers)
    for count in range(2, len(layers) + 1):
      size = -(-len(layers) // count)
      groups = [layers[i : i + size] for i in range(0, len(layers), size)]
      yield [f'layers={_range(group)}' for group in groups]
    single = [f'layers={layer}' for layer in layers]
  widths = [f'widths={sites.width_name(width)}' for width in c.widths]
  sparsities = [f'sparsity={value:g}' for value in c.sparsity]
  for parts in (widths,), (widths, sparsities):
    every = itertools.product(single, *parts)
    yield [';'.join(filter(None, part)) for part in every]


def _fits(config, part: str, model, devices: int, hbm: float) -> bool:
  run = config_lib.apply_argument(config.copy_and_resolve_references(), part)
  ways = _ways(run, model, devices, hbm)
  return any(way.bytes <= _SHARE * hbm for way in ways)


def _range(layers: tuple[int, ...]) -> str:
  if layers[-1] - layers[0] == len(layers) - 1 > 0:
    return f'{layers[0]}-{layers[-1]}'
  return ','.join(map(str, layers))


def reason(way: Way, other_ways: list[Way], devices: int, hbm: float) -> str:
  """One line: the choice, its memory, and what the next best would cost."""
  text = (
    f'mesh {_shown(way.sizes)} of {devices} devices, chosen: about '
    f'{way.bytes / _GIB:.1f} of {hbm / _GIB:.0f} GiB a device'
  )
  cheaper = [
    alternative for alternative in other_ways if alternative.cost < way.cost
  ]
  dearer = [
    alternative
    for alternative in other_ways
    if alternative.cost >= way.cost and alternative is not way
  ]
  if cheaper:
    text += (
      f'; {_shown(cheaper[0].sizes)} would be faster and needs '
      f'{cheaper[0].bytes / _GIB:.0f} GiB'
    )
  if dearer:
    text += (
      f'; {_shown(dearer[0].sizes)} would take '
      f'{dearer[0].cost / way.cost:.2f} times as long'
    )
  return text


def _shown(sizes: tuple[int, ...]) -> str:
  return ' x '.join(
    f'{name} {size}' for name, size in zip(mesh_lib.AXES, sizes, strict=True)
  )


def _ways(config, model, devices: int, hbm: float) -> Iterator[Way]:
  """Every split of the devices that the config can use."""
  stacks, _ = setup.make_stacks(config, model)
  sized = [_Sized.of(stack_) for stack_ in stacks]
  lm_bytes = _language_model_bytes(config)
  for sizes in _sizes(config.mesh, devices):
    if not list(config_checks.mesh(config, model, sizes)):
      yield _way(config, model, sized, lm_bytes, sizes, hbm)


def _sizes(axes, devices: int) -> Iterator[tuple[int, ...]]:
  """All sizes whose product is the number of devices; those given stay."""
  wanted_sizes = [axes[name] for name in mesh_lib.AXES]
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  for sae in divisors:
    for data in divisors:
      if devices % (sae * data) == 0:
        sizes = sae, data, devices // sae // data
        if all(
          wanted < 1 or wanted == size
          for wanted, size in zip(wanted_sizes, sizes, strict=True)
        ):
          yield sizes


# Module -> bytes of a member's state, its parameters: to trace it takes long.
_per_member: dict[str, tuple[float, float]] = {}


class _Sized(NamedTuple):
  """A stack in numbers."""

  members: int
  state: float  # bytes of all members
  params: float  # parameters of one member
  d: int  # d_in + d_out
  width: int

  @classmethod
  def of(cls, stack_: stack.Stack) -> _Sized:
    members, module = len(stack_.seeds), stack_.module
    if repr(module) not in _per_member:
      state = jax.eval_shape(stack_.init, jax.random.key(0))
      leaves, params = map(jax.tree.leaves, (state, state.params))
      size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
      count = sum(math.prod(leaf.shape) for leaf in params)
      _per_member[repr(module)] = size / members, count / members
    size, count = _per_member[repr(module)]
    d = module.d_in + module.d_out
    return cls(members, size * members, count, d, module.width)


def _way(config, model, sized, lm_bytes, sizes, hbm) -> Way:
  size = _memory_of(config, model, sized, lm_bytes, sizes, hbm)
  return Way(sizes, size.all, _cost(config, sized, sizes))


def _cost(config, sized, sizes) -> float:
  sae, data, latent = sizes
  rows = config.train.batch / data
  cost = 0.0
  for sized_stack in sized:
    arithmetic = (
      6 * rows * sized_stack.width * sized_stack.d / latent / _FLOPS_A_BYTE
    )
    memory = (
      28 * sized_stack.params / latent + 24 * rows * sized_stack.width / latent
    )
    links = 0.0
    if data > 1:
      links += 8 * sized_stack.params / latent * (1 - 1 / data)
    if latent > 1:
      links += 16 * rows * sized_stack.d * (1 - 1 / latent)
    member_cost = max(arithmetic, memory) + _LINKS * links
    cost += sized_stack.members / sae * member_cost
  return cost


def _memory_of(config, model, sized, lm_bytes, sizes, hbm) -> Memory:
  sae, data, latent = sizes
  rows = config.train.batch / data
  widths = {site: site.width(model) for site in specs.site_list(config)}
  width = sum(widths.values())
  itemsize = jnp.dtype(config.activations.dtype).itemsize
  size = sum(sized_stack.state for sized_stack in sized) / (sae * latent)
  size += max(
    8 * sized_stack.params / latent + 24 * rows * sized_stack.width / latent
    for sized_stack in sized
  )
  size += 2 * rows * width * itemsize + lm_bytes / (data * latent)
  row_bytes = functools.partial(_row_bytes, sizes, widths.values(), itemsize)
  if not config.activations.store:
    sequences = config.activations.lm_batch
    size += 2 * sequences * config.text.seq_len * row_bytes(sequences)
  chunks = _chunk_bytes(config, row_bytes(config.train.batch), hbm)
  return Memory(size + chunks, chunks)


def _row_bytes(
  sizes: tuple[int, ...], widths: Iterable[int], itemsize: int, count: int
) -> float:
  """Bytes that a row of all sites takes of each device (`chunk_memory`).

  Args:
    sizes: of the mesh.
    widths: of the sites.
    itemsize: bytes of a number.
    count: sequences of a pass, or rows of a batch.
  """
  shape = dict(zip(mesh_lib.AXES, sizes, strict=True))
  parts = math.prod(shape[axis] for axis in chunk_memory.axes(shape, count))
  numbers = sum(
    width / shape.get(chunk_memory.columns(shape, width), 1) for width in widths
  )
  return itemsize * numbers / parts


def _chunk_bytes(config, row_bytes: float, hbm: float) -> float:
  """Bytes of a device that chunks of rows of all sites take."""
  activations = config.activations
  size = activations.chunk_rows * row_bytes
  on_device, ahead = chunk_memory.held(
    activations.memory, activations.ahead, (size, 0.0), (hbm, 0.0)
  )
  return on_device * (1 + ahead) * size


def _language_model_bytes(config) -> float:
  if config.activations.store:
    return 0.0
  layers = 1 + max(site.layer for site in specs.site_list(config))
  lm = config.lm
  models = (lm.name, lm.checkpoint), specs.second_model(config)
  return sum(_bytes_of(*model, lm.dtype, layers) for model in models if model)


@functools.cache
def _bytes_of(name: str, checkpoint: str, dtype: str, layers: int) -> float:
  _, tensors = weights.shapes(name, checkpoint, dtype, None, layers)
  return sum(
    math.prod(tensor.shape) * tensor.dtype.itemsize
    for tensor in tensors.values()
  )


def _memory(device) -> float:
  """Bytes of a device's memory; of a CPU's, its share of the host's."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return float(stats['bytes_limit'])
  host_bytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return host_bytes / max(1, jax.local_device_count())
