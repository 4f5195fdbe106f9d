"""Compiles the programs of a run for a TPU pod and reports their needs.

  config, topology -> mesh of the pod's devices (`topologies`)
    harvest   the forward pass with all taps (`harvest.ModelSource`)
    step      the training step of all stacks (`setup.step_of`)
  -> lowered from shapes alone, compiled by the TPU's own compiler
  -> HBM, FLOPs, bytes, collectives of one device; two times:

  estimate  the compiler's estimate, if it gives a possible one
  roofline  max(FLOPs / peak, bytes / HBM rate), with FLOPs by arithmetic

Neither is a measurement. The compiler counts a loop over the SAEs of a stack as
one turn. Its estimate and its bytes are therefore multiplied by `turns`, the
ratio of the FLOPs by arithmetic to its FLOPs. Estimates faster than the chip's
peak are discarded.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import mesh as mesh_lib
from gemma_scope import specs
from gemma_scope.activations import harvest
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.performance import topologies
from gemma_scope.sae import fold
from gemma_scope.training import auto_mesh, setup

_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_BITS = {'pred': 8, 's8': 8, 'u8': 8, 'bf16': 16, 'f16': 16, 's64': 64}
_UNITS = {'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
  """One program on one device of a pod.

  Attributes:
    program: 'harvest' or 'step'.
    tokens: sequences times length of a pass, or rows of a step.
    flops: by arithmetic, per device (matmuls alone).
    compiler_flops: by the compiler, with each loop counted once; None if it
      failed.
    turns: number of turns of the loop that the compiler counts once.
    bytes: bytes read and written in HBM, by the compiler, times `turns`.
    arguments, temporaries, output: bytes of HBM; output does not include
      results that reuse the memory of arguments.
    hbm_bytes: peak bytes of HBM.
    estimated_s: the compiler's estimate, or None.
    roofline_s: see above.
    collectives: kind -> {'count', 'bytes'}, the bytes of their results.
    compile_s: time to compile.
    error: the compiler's error, if it failed.
  """

  program: str
  tokens: int
  flops: float
  compiler_flops: float | None = None
  turns: float = 1.0
  bytes: float | None = None
  arguments: int | None = None
  temporaries: int | None = None
  output: int | None = None
  hbm_bytes: int | None = None
  estimated_s: float | None = None
  roofline_s: float | None = None
  collectives: dict[str, dict[str, int]] = dataclasses.field(
    default_factory=dict
  )
  compile_s: float = 0.0
  error: str = ''


def check(
  config: ConfigDict, topology: str, programs=('harvest', 'step')
) -> Iterator[dict[str, Any]]:
  """Compiles a config's programs for a topology.

  Args:
    config: a complete config; `config.mesh` must fit the pod's devices.
    topology: the pod, such as 'v5p:2x2x4'.
    programs: 'harvest', 'step' or both.

  Yields:
    For each program the fields of `Program`, with `topology`, `devices`,
    `chips`, `fits`, `hbm_capacity_bytes`, `arithmetic_bytes` (of the whole run,
    by `auto_mesh`), `utilisation` (of the estimate; of the roofline where there
    is none) and `advice` where it does not fit; with the second of the programs
    `together_bytes`, what the run holds at most.

  Raises:
    ValueError: the config or the mesh is not possible.
  """
  if config.end_to_end.beta:
    raise ValueError(
      'End-to-end steps cannot be compiled here; set end_to_end.beta=0.'
    )
  pod = topologies.pod(topology)
  mesh = auto_mesh.make(config, pod.devices, pod.device.hbm)
  model = setup.dimensions(config)
  config_lib.check(config, model, mesh.devices.shape)
  lower = {'harvest': _harvest, 'step': _step}
  expected = auto_mesh.memory(config, model, mesh.devices.shape, pod.device.hbm)
  compiled = {}
  for name in programs:
    program = _compiled(*lower[name](config, mesh), pod, mesh)
    compiled[name] = program
    record = _described(program, pod, config, mesh)
    record['arithmetic_bytes'] = int(expected.all)
    if len(compiled) == 2 and not any(p.error for p in compiled.values()):
      record['together_bytes'] = int(
        expected.chunks + _together(*compiled.values())
      )
    yield record


def _together(first: Program, second: Program) -> int:
  """Bytes that both keep, and what one of them needs while it runs."""
  argument_bytes = first.arguments + second.arguments
  return argument_bytes + max(
    program.hbm_bytes - program.arguments for program in (first, second)
  )


def job(config: ConfigDict, topology: str) -> tuple[ConfigDict, list[str]]:
  """A config that fits a pod, and the arguments of the runs that it takes.

  Where the pod cannot train all SAEs in one run, the config is that of the
  largest of several; else it is the one given, and the list is empty.

  Raises:
    ConfigError: the pod cannot train them in several runs either.
  """
  pod = topologies.pod(topology)
  model_and_pod = setup.dimensions(config), len(pod.devices), pod.device.hbm
  try:
    auto_mesh.choose(config, *model_and_pod)
    return config, []
  except config_lib.ConfigError:
    if not (parts := auto_mesh.split(config, *model_and_pod)):
      raise
  runs = [
    config_lib.apply_argument(config.copy_and_resolve_references(), part)
    for part in parts
  ]
  # Of equal ones the last: its pass of the model has the most layers.
  size = lambda i: (auto_mesh.state_bytes(runs[i], model_and_pod[0]), i)
  return runs[max(range(len(runs)), key=size)], parts


def _harvest(config: ConfigDict, mesh):
  """Name, tokens and FLOPs of the forward pass, and a function to lower it."""
  sites_read = specs.site_list(config)
  layers = 1 + max(site.layer for site in sites_read)
  gemma, tensors = weights.shapes(
    config.lm.name, config.lm.checkpoint, config.lm.dtype, mesh, layers
  )
  layout = setup.layout(config)
  source = harvest.ModelSource(gemma, None, sites_read, None, layout, mesh)
  tokens_BT = jax.ShapeDtypeStruct(
    (layout.lm_batch, layout.seq_len),
    jnp.int32,
    sharding=source.tokens_place,
  )
  params = traverse_util.unflatten_dict(tensors, sep='/')
  count = layout.lm_batch * layout.seq_len
  flops = count * forward_flops(gemma.config, layers)
  lower = lambda: source.harvest.lower(params, tokens_BT)
  return 'harvest', count, flops / mesh.size, lower


def forward_flops(model: lm.AnyConfig, layers: int) -> float:
  """Of the matrices of `layers` layers, a token; scores are left out."""
  return 2.0 * sum(map(model.matmul_weights, range(layers)))


def _step(config: ConfigDict, mesh):
  """Name, rows and FLOPs of the training step, and a function to lower it."""
  model = setup.dimensions(config)
  stacks, _ = setup.make_stacks(config, model)
  sites_read = specs.site_list(config)
  rows = config.train.batch
  batch = {
    site: jax.ShapeDtypeStruct(
      (rows, site.width(model)),
      jnp.dtype(config.activations.dtype),
      sharding=mesh_lib.sharding(mesh, 'data', None),
    )
    for site in sites_read
  }
  scalar = lambda dtype: jax.ShapeDtypeStruct(
    (), dtype, sharding=mesh_lib.sharding(mesh)
  )
  centred = config.activations.centre != 'none'
  normalisation = {
    site: fold.Normalisation(
      scalar(jnp.float32),
      jax.ShapeDtypeStruct(
        (site.width(model),), jnp.float32, sharding=mesh_lib.sharding(mesh)
      )
      if centred
      else None,
    )
    for site in sites_read
  }
  step = setup.step_of(config, stacks, None, mesh)
  flops = sum(s.module.flops(rows) * len(s.seeds) for s in stacks)
  lower = lambda: step.lower(
    setup.abstract_states(stacks, mesh),
    batch,
    normalisation,
    scalar(jnp.int32),
    (),
  )
  return 'step', rows, flops / mesh.size, lower


def _compiled(name, tokens, flops, lower, pod, mesh) -> Program:
  start = time.monotonic()
  try:
    with topologies.targeted(mesh):
      compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    # 'Used 20.06G of 15.75G hbm': the one failure that a size explains.
    bytes_used = re.search(
      r'Used ([\d.]+)([BKMGT]) of [\d.]+[BKMGT] hbm', str(error)
    )
    size = (
      int(float(bytes_used[1]) * _UNITS[bytes_used[2]]) if bytes_used else None
    )
    return Program(
      name,
      tokens,
      flops,
      hbm_bytes=size,
      roofline_s=flops / pod.device.flops,
      compile_s=time.monotonic() - start,
      error=str(error).splitlines()[0][:300],
    )
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  compiler_flops = float(cost['flops'])
  turns = flops / compiler_flops if flops > 1.5 * compiler_flops else 1.0
  hbm_bytes_moved = turns * float(cost.get('bytes accessed', 0))
  estimate = turns * float(cost.get('optimal_seconds', 0))
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  arguments = memory.argument_size_in_bytes
  bytes_used = arguments + memory.temp_size_in_bytes + output
  return Program(
    name,
    tokens,
    flops,
    compiler_flops,
    turns,
    hbm_bytes_moved,
    arguments,
    memory.temp_size_in_bytes,
    output,
    max(bytes_used, getattr(memory, 'peak_memory_in_bytes', 0)),
    estimate if estimate_holds(estimate, flops / pod.device.flops) else None,
    max(flops / pod.device.flops, hbm_bytes_moved / pod.device.hbm_rate),
    collectives(compiled.as_text()),
    time.monotonic() - start,
  )


def estimate_holds(estimate: float, shortest: float) -> bool:
  """Whether an estimated time is possible: finite, no faster than the chip."""
  return math.isfinite(estimate) and estimate > 0.9 * shortest


_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
_CALL = re.compile(
  rf'= (.*?) ({"|".join(_COLLECTIVES)})(-start)?\(', re.MULTILINE
)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """Collectives in an HLO text: kind -> count and bytes of their results."""
  by_kind: dict[str, dict[str, int]] = {}
  for result, kind, start in _CALL.findall(hlo):
    sizes = []
    for dtype, dimensions in _SHAPE.findall(result):
      count = math.prod(int(n) for n in dimensions.split(',') if n)
      bits = _BITS.get(dtype, 32)
      sizes.append(count * bits // 8)
    # A started one names its operands, and then its results.
    size = sum(sizes) // (2 if start and len(sizes) > 1 else 1)
    totals = by_kind.setdefault(kind, {'count': 0, 'bytes': 0})
    totals['count'] += 1
    totals['bytes'] += size
  return by_kind


def _described(program: Program, pod, config, mesh) -> dict[str, Any]:
  seconds = program.estimated_s or program.roofline_s
  known = program.hbm_bytes is not None
  fits = not program.error and known and program.hbm_bytes <= pod.device.hbm
  record = {
    'topology': pod.name,
    'devices': len(pod.devices),
    'chips': pod.chips,
    'mesh': dict(mesh.shape),
    **dataclasses.asdict(program),
    'fits': fits,
    'hbm_capacity_bytes': int(pod.device.hbm),
    'utilisation': program.flops / pod.device.flops / seconds,
  }
  if not fits:
    record['advice'] = advice(program, config, mesh.devices.shape)
  return record


def advice(program: Program, config: ConfigDict, mesh) -> str:
  """Advice on settings to change so that a program fits in memory."""
  if program.program == 'harvest':
    return (
      'halve activations.lm_batch, or raise mesh.latent, which splits the '
      'language model'
    )
  members, data, latent = mesh
  suggestions = [f'raise mesh.latent above {latent}, which splits each SAE']
  if data > 1:
    suggestions.append(f'at the cost of mesh.data ({data})')
  if (
    np.prod([len(config.collection[field]) for field in ('layers', 'widths')])
    > 1
  ):
    suggestions.append(
      'or train fewer members at once (layers=, widths=, sparsity=)'
    )
  if config.sae.matmul_dtype == 'float32':
    suggestions.append("or set sae.matmul_dtype='bfloat16'")
  return ', '.join(suggestions)


def lines(record: dict[str, Any]) -> Iterator[str]:
  """A record as text for the terminal."""
  gib = lambda size: '-' if size is None else f'{size / 2**30:.2f} GiB'
  ms = lambda seconds: 'none' if seconds is None else f'{1e3 * seconds:.2f} ms'
  yield (
    f'{record["program"]} on {record["topology"]}: {record["devices"]} '
    f'devices, {record["chips"]} chips, mesh {record["mesh"]}, '
    f'{record["tokens"]:,} tokens'
  )
  yield (
    f'  HBM a device  {gib(record["hbm_bytes"])} of '
    f'{gib(record["hbm_capacity_bytes"])}: arguments '
    f'{gib(record["arguments"])}, temporaries {gib(record["temporaries"])}, '
    f'output {gib(record["output"])}'
    f'{"" if record["fits"] else "   DOES NOT FIT"}'
  )
  if record['error']:
    yield f'  the compiler says: {record["error"]}'
  if not record['fits']:
    yield f'  to make it fit: {record["advice"]}'
  compiler_flops = record['compiler_flops']
  yield (
    f'  FLOPs         {record["flops"]:.3g} by arithmetic, '
    f'{"-" if compiler_flops is None else f"{compiler_flops:.3g}"} by the '
    f'compiler; bytes {record["bytes"] or float("nan"):.3g}'
  )
  time_used = 'estimate' if record['estimated_s'] else 'roofline'
  yield (
    f'  time          estimate {ms(record["estimated_s"])}, roofline '
    f'{ms(record["roofline_s"])}; utilisation {record["utilisation"]:.0%} by '
    f'the {time_used}'
  )
  for kind, totals in sorted(record['collectives'].items()):
    yield (
      f'  {kind:13s} {totals["count"]} of {totals["bytes"] / 2**20:,.1f} MiB '
      'together'
    )
  yield f'  compiled in   {record["compile_s"]:.1f} s'
