"""Speed of a step, a harvest and a whole run, relative to a plain matmul.

Machines differ and are shared, so a rate alone says little. Each measurement is
interleaved with a matmul of the same shapes in the same process, and reported
as

  matmul_share = 10 D F members * tokens/s / FLOP/s of x @ W

which compares the dense FLOPs of a step (five matmuls of 2 D F per token) with
the rate of a plain matmul. A dense step that spends all its time in matmuls has
a share of 1. A sparse step skips four of the five matmuls and can reach 5.
Records are medians over `repeats` rounds, with minimum and maximum.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.activations import harvest as harvest_lib
from gemma_scope.activations import store
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.sae import architectures
from gemma_scope.training import objectives, optimizer, stack

_KEY = jax.random.key(0)
_SITE = sites.Site(0, 'resid_post')


@dataclasses.dataclass(frozen=True)
class Case:
  """One step to measure.

  Attributes:
    arch: 'jumprelu', 'topk', ...
    d, width, batch: D, F and B.
    k: latents that fire per row: approximately (JumpReLU) or exactly (TopK).
    limit: room for candidates in a sparse step; 0 for 1.25 k + 16 (TopK) or 2 k
      (others, whose rows differ).
    members: SAEs in the stack.
    dtype: the dtype of the factors of matmuls.
    branch: 'dense'; 'auto', a sparse step if all candidates fit; 'sparse',
      which raises an error if the step was dense.
  """

  arch: str
  d: int
  width: int
  batch: int
  k: int
  limit: int
  members: int
  dtype: str
  branch: str

  @property
  def room(self) -> int:
    if self.branch == 'dense':
      return 0
    default = self.k * 5 // 4 + 16 if self.arch == 'topk' else 2 * self.k
    return min(self.limit or default, self.width)

  def stack(self) -> stack.Stack:
    """SAEs that read one site; a learning rate of 0 keeps them unchanged."""
    module = architectures.ARCHITECTURES[self.arch](
      d_in=self.d, d_out=self.d, width=self.width, matmul_dtype=self.dtype
    )
    penalty = {'jumprelu': 'target_l0', 'gated': 'l1', 'relu': 'l1'}
    adam = optimizer.Optimizer(
        b2=0.999, eps=1e-8, clip=0.0, warm_up=0, decay=0, sparsity_warm_up=0,
        threshold_rate=1.0, steps=10**6, dead_after=10**9, theta_decay=0.999,
        adaptive_rate=0.01,
        active_limit=self.room,
    )  # fmt: skip
    count = self.members
    setting = stack.Setting(
      jnp.full(count, float(self.k)),
      jnp.zeros(count),
      *[jnp.zeros(count, jnp.int32)] * 2,
    )
    objective = objectives.Objective(penalty.get(self.arch, 'k'))
    read = (_SITE,)
    return stack.Stack(
      module, objective, read, read, setting, tuple(range(count)), adam
    )

  def start(self, saes: stack.Stack, x_BD: jax.Array, mesh) -> stack.State:
    """The state of trained members: thresholds at which k latents fire."""
    (state,) = stack.init_all((saes,), _KEY, mesh)
    if self.arch != 'jumprelu':
      return state

    def threshold(W_enc):
      # Latents of a random SAE are alike, so a sample is enough.
      step = max(1, W_enc.shape[0] // 2**14)
      z = x_BD[:128] @ W_enc[::step].T
      return jnp.quantile(z, 1 - self.k / self.width)

    raw_S = jnp.log(jax.jit(jax.vmap(threshold))(state.params['W_enc']))
    stacked = state.params['log_threshold']
    raw = jax.device_put(
      jnp.broadcast_to(raw_S[:, None], stacked.shape), stacked.sharding
    )
    return state.replace(params={**state.params, 'log_threshold': raw})


def steps(cases: Sequence[Case], mesh, repeats: int) -> list[dict[str, Any]]:
  """Rates of the steps, and of their matmuls, interleaved.

  Raises:
    ValueError: a case's branch is 'sparse' and a row had no room.
  """
  runs, infos, works = {}, {}, {}
  for case in cases:
    works[case], infos[case] = compiled(case, mesh)
    shape = case.batch, case.d, case.width, case.dtype
    runs[case] = works[case]
    runs.setdefault(shape, plain_matmul(*shape))
  times = interleaved(runs, repeats)
  records = []
  for case in cases:
    metrics = works[case].metrics
    if case.branch == 'sparse' and min(metrics['sparse_steps']) < 1:
      raise ValueError(
        f'A row has more than {case.room} candidates, so the step was dense; '
        'give a larger --limit.'
      )
    shape = case.batch, case.d, case.width, case.dtype
    matmul = 2 * case.batch * case.d * case.width / np.array(times[shape])
    rates = case.batch / np.array(times[case])
    share = 10 * case.d * case.width * case.members * rates / matmul
    records.append(
      {
        'measure': 'step',
        **dataclasses.asdict(case),
        'limit': case.room,
        **_where(mesh),
        **_spread('tokens_per_s', rates),
        **_spread('matmul_share', share),
        'matmul_flops': statistics.median(matmul),
        'l0': float(np.mean(metrics['l0'])),
        'sparse_steps': float(np.mean(metrics['sparse_steps'])),
        **infos[case],
      }
    )
  return records


class _Step:
  """A compiled step, and the state that the next call starts from."""

  def __init__(self, compiled, state, x_NBD):
    self._step, self._state, self._x, self._at = compiled, state, x_NBD, 0
    self.metrics: Mapping[str, np.ndarray] = {}

  def __call__(self):
    self._state, metrics = self._step(
      self._state, self._x, self._x, jnp.int32(self._at), _KEY
    )
    self._at += 1
    self.metrics = jax.device_get(metrics)
    jax.block_until_ready(self._state)


def compiled(case: Case, mesh, x_NBD=None):
  """A compiled step, and the compiler's estimates of its cost.

  Args:
    case: what to compile.
    mesh: the devices.
    x_NBD: rows, [1, B, D] with E|x|^2 = 1; None for random ones.
  """
  if x_NBD is None:
    x_BD = jax.random.normal(_KEY, (case.batch, case.d)) * case.d**-0.5
    x_NBD = jax.device_put(
      x_BD[None], mesh_lib.sharding(mesh, None, 'data', None)
    )
  saes = case.stack()
  state = case.start(saes, x_NBD[0], mesh)
  shardings = saes.shardings(mesh), None
  step = jax.jit(
    lambda *args: saes.step(*args, mesh),
    donate_argnums=0,
    out_shardings=shardings,
  )
  started = time.perf_counter()
  args = state, x_NBD, x_NBD, jnp.int32(0), _KEY
  compiled = step.lower(*args).compile()
  info = {'compile_s': round(time.perf_counter() - started, 2)}
  info['peak_bytes'] = _peak(compiled)
  return _Step(compiled, state, x_NBD), info


def _peak(compiled) -> int | None:
  """Peak bytes of a program on each device, as the compiler reports them."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def plain_matmul(
  batch: int, d: int, width: int, dtype: str
) -> Callable[[], None]:
  """A function that runs the encoder's matmul alone, on one device."""
  a = jax.random.normal(_KEY, (batch, d)).astype(dtype)
  b = jax.random.normal(_KEY, (d, width)).astype(dtype)
  multiply = jax.jit(
    lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
  )
  return lambda: jax.block_until_ready(multiply(a, b))


def interleaved(
  runs: Mapping[Any, Callable[[], None]], repeats: int, least_s: float = 0.2
) -> dict[Any, list[float]]:
  """Seconds per call of each function, timed in interleaved rounds.

  Each function is called twice before the first round. In a round it is called
  until `least_s` seconds have passed.
  """
  counts = {}
  for name, run in runs.items():
    run()
    began = time.perf_counter()
    run()
    counts[name] = max(1, round(least_s / (time.perf_counter() - began)))
  times: dict[Any, list[float]] = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      began = time.perf_counter()
      for _ in range(counts[name]):
        run()
      times[name].append((time.perf_counter() - began) / counts[name])
  return times


def _spread(name: str, values) -> dict[str, float]:
  """Median, smallest and largest."""
  median, smallest, largest = np.median(values), np.min(values), np.max(values)
  return {
    name: float(median),
    f'{name}_low': float(smallest),
    f'{name}_high': float(largest),
  }


def _where(mesh) -> dict[str, Any]:
  device = mesh.devices.flat[0]
  return {
    'device': device.device_kind,
    'devices': mesh.size,
    'mesh': dict(mesh.shape),
  }


def harvest(name: str, seq_len: int, lm_batch: int, mesh, repeats: int):
  """Tokens/s of a forward pass that reads the output of every block.

  Its parameters are random: the rate does not depend on them.
  """
  gemma = lm.Gemma(weights.read_config(name, ''))
  params = gemma.init(_KEY)
  layers = range(gemma.config.num_layers)
  sites_read = [sites.Site(layer, 'resid_post') for layer in layers]
  tokens = jax.random.randint(_KEY, (lm_batch, seq_len), 3, 1000)
  tokens = jax.device_put(tokens, mesh_lib.sharding(mesh, 'data', None))

  @jax.jit
  def read(params, tokens_BT):
    return gemma.forward(params, tokens_BT, taps=sites_read, logits=False).taps

  compiled = read.lower(params, tokens).compile()
  flops = (compiled.cost_analysis() or {}).get('flops', 0)
  run = lambda: jax.block_until_ready(compiled(params, tokens))
  d, d_ff = gemma.config.d_model, gemma.config.d_ff
  shape = lm_batch * seq_len, d, d_ff, 'float32'
  times = interleaved({'pass': run, 'matmul': plain_matmul(*shape)}, repeats)
  matmul = 2 * lm_batch * seq_len * d * d_ff / np.array(times['matmul'])
  rates = lm_batch * seq_len / np.array(times['pass'])
  share = flops / np.array(times['pass']) / matmul
  return {
    'measure': 'harvest',
    'lm': name,
    'seq_len': seq_len,
    'lm_batch': lm_batch,
    'sites': len(sites_read),
    **_where(mesh),
    **_spread('tokens_per_s', rates),
    **_spread('matmul_share', share),
    'flops_per_token': flops / lm_batch / seq_len,
    'peak_bytes': _peak(compiled),
  }


def collection(
  case: Case, name: str, seq_len: int, lm_batch: int, mesh, repeats: int
):
  """N SAEs trained on one shared forward pass, compared with N separate runs.

  Both go end to end: a pass over `lm_batch` sequences, then steps on its rows.
  """
  gemma = lm.Gemma(weights.read_config(name, ''))
  params, config = gemma.init(_KEY), gemma.config
  site = sites.Site(config.num_layers // 2, 'resid_post')
  tokens = jax.random.randint(_KEY, (lm_batch, seq_len), 3, 1000)
  rows = lm_batch * seq_len // case.batch
  if not rows:
    raise ValueError(
      f'{lm_batch} sequences of {seq_len} tokens do not fill a batch of '
      f'{case.batch} rows; give a larger --lm_batch or a smaller --batch.'
    )

  @jax.jit
  def read(params, tokens_BT):
    x = gemma.forward(params, tokens_BT, taps=[site], logits=False).taps[site]
    x = x.reshape(-1, config.d_model)[: rows * case.batch]
    x /= jnp.sqrt(jnp.mean(jnp.sum(jnp.square(x), -1)))
    return x.reshape(rows, 1, case.batch, -1)

  def end_to_end(case):
    case = dataclasses.replace(case, d=config.d_model)
    work, _ = compiled(case, mesh, read(params, tokens)[0])

    def run():
      for x_NBD in read(params, tokens):
        work._x = x_NBD
        work()

    return run

  single = dataclasses.replace(case, members=1)
  times = interleaved(
    {'all': end_to_end(case), 'one': end_to_end(single)}, repeats
  )
  tokens_each = rows * case.batch
  rates = tokens_each / np.array(times['all'])
  single_rates = tokens_each / np.array(times['one']) / case.members
  return {
    'measure': 'collection',
    **dataclasses.asdict(case),
    'd': config.d_model,
    'limit': case.room,
    'lm': name,
    **_where(mesh),
    **_spread('tokens_per_s', rates),
    **_spread('single_runs_tokens_per_s', single_rates),
    **_spread('ratio', rates / single_rates),
  }


class _Rows:
  """Rows of one site from memory, as a `harvest.Raw`."""

  def __init__(self, layout: harvest_lib.Layout, d: int):
    self.layout, self.sites, self.widths = layout, (_SITE,), {_SITE: d}
    self.parts = layout.sequences // layout.lm_batch
    shape = layout.lm_batch, layout.seq_len - 1, d
    self._x = jax.random.normal(_KEY, shape).astype(layout.dtype)

  def passes(self, chunk: int, poll=lambda: None) -> Iterator[dict]:
    for _ in range(self.parts):
      poll()
      yield {_SITE: self._x}

  def counts(self, chunk: int) -> np.ndarray:
    return np.ones(self.layout.rows, bool)


def data(case: Case, rows: int, mesh, repeats: int) -> list[dict[str, Any]]:
  """Rates at which a chunk is shuffled, and read from a store on disk."""
  layout = harvest_lib.Layout.of(
    chunk_rows=rows,
    seq_len=257,
    batch=case.batch,
    lm_batch=16,
    dtype='float32',
  )
  source = _Rows(layout, case.d)
  chunks = chunks_lib.Chunks(source, 0, mesh)

  def load(chunks):
    chunk = chunks.load(0)
    jax.block_until_ready(chunks.batch(chunk, layout.batches - 1))

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    facts = {'model': 'benchmark', 'text': {}}
    store.write_store(folder, source, 1, facts)
    stored = store.StoreSource(folder, (_SITE,), case.batch)
    from_disk = chunks_lib.Chunks(stored, 0, mesh)
    times = interleaved(
      {'chunk': lambda: load(chunks), 'store': lambda: load(from_disk)}, repeats
    )
  sizes = {'d': case.d, 'batch': case.batch, 'rows': layout.rows}
  rates = {kind: layout.rows / np.array(times[kind]) for kind in times}
  return [
    {'measure': source_kind, **sizes, **_where(mesh)}
    | _spread('rows_per_s', rates[source_kind])
    | _spread('bytes_per_s', 4 * case.d * rates[source_kind])
    for source_kind in ('chunk', 'store')
  ]
