"""Tokens per second of ten layers of Gemma 3 270M, beside transformers.

  python docs/lm_speed.py --peer=PYTHON

PYTHON is the interpreter of another environment, with torch, transformers and
gguf. Both read the same GGUF file and compute in float32, up to the residual
stream after layer 9 and without logits; ours as a harvest does, transformers
once as it is (eager) and once under torch.compile. Each is a process of its
own that waits for its turn: rounds are interleaved, and in every round the rate
of a matrix product of the layers' size is measured in our process. Give it a
machine that does nothing else.

The share of the matmul rate counts the products with weights and the full
T x T products of attention in every layer, also where a layer's window makes
fewer necessary.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

LAYERS, ROUNDS = 10, 5
SHAPES = ((8, 256), (4, 1024))  # sequences, tokens of a sequence
D_MODEL, HEADS_DIM, KV_DIM, D_FF = 640, 1024, 256, 2048


def tokens(batch: int, length: int) -> np.ndarray:
  """BOS, then random pieces."""
  random = np.random.default_rng(0)
  pieces = random.integers(300, 200_000, (batch, length - 1))
  return np.concatenate([np.full((batch, 1), 2), pieces], 1)


def flops(batch: int, length: int) -> float:
  """Of the ten layers: products with weights, and attention's."""
  weights = D_MODEL * (2 * HEADS_DIM + 2 * KV_DIM + 3 * D_FF)
  return batch * length * LAYERS * (2 * weights + 4 * length * HEADS_DIM)


def seconds(function: Callable[[], object]) -> float:
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def serve(run: Callable[[int, int], Callable[[], object]]) -> None:
  """Answers each line "BATCH LENGTH" by the seconds of one pass."""
  passes = {}
  print('ready', flush=True)
  for line in sys.stdin:
    shape = tuple(map(int, line.split()))
    if shape not in passes:
      passes[shape] = run(*shape)
      passes[shape]()
      passes[shape]()
    print(seconds(passes[shape]), flush=True)


def ours() -> None:
  """Serves our pass; "0 0" is 20 matrix products."""
  import jax
  import jax.numpy as jnp

  from gemma_scope import sites
  from gemma_scope.language_model import weights

  gemma, params = weights.load('gemma3-270m', num_layers=LAYERS)
  taps = (sites.Site(LAYERS - 1, 'resid_post'),)
  forward = jax.jit(
    lambda params, ids: gemma.forward(params, ids, taps=taps, logits=False).taps
  )
  multiply = jax.jit(lambda a, b: a @ b)
  a, b = jnp.ones((2048, D_MODEL)), jnp.ones((D_MODEL, D_FF))

  def run(batch: int, length: int) -> Callable[[], object]:
    if not batch:
      products = lambda: [multiply(a, b) for _ in range(20)]
      return lambda: jax.block_until_ready(products())
    ids = jnp.asarray(tokens(batch, length), jnp.int32)
    return lambda: jax.block_until_ready(forward(params, ids))

  serve(run)


def transformers(path: str, compiled: bool) -> None:
  """Serves the pass of transformers, on the GGUF file at `path`."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(os.cpu_count())
  file = pathlib.Path(path)
  model = AutoModelForCausalLM.from_pretrained(
    str(file.parent), gguf_file=file.name, dtype=torch.float32
  )
  model = model.eval().model
  model.layers, model.norm = model.layers[:LAYERS], torch.nn.Identity()
  model.config.num_hidden_layers = LAYERS
  if compiled:
    model = torch.compile(model)

  def run(batch: int, length: int) -> Callable[[], object]:
    ids = torch.tensor(tokens(batch, length))
    return lambda: model(ids, use_cache=False)

  with torch.no_grad():
    serve(run)


class Worker:
  """A process that serves passes."""

  def __init__(self, python: str, *arguments: str):
    command = [python, __file__, *arguments]
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if self._process.stdout.readline().strip() != 'ready':
      raise SystemExit(f'{" ".join(command)} has ended')

  def ask(self, batch: int, length: int) -> float:
    """Seconds of one pass."""
    self._process.stdin.write(f'{batch} {length}\n')
    self._process.stdin.flush()
    return float(self._process.stdout.readline())


def compare(workers: dict[str, Worker], batch: int, length: int) -> None:
  """Prints best and median of the rounds."""
  product = 20 * 2 * 2048 * D_MODEL * D_FF
  times = {name: [] for name in workers}
  rates = []
  for number in range(ROUNDS + 1):  # the first compiles
    rate = product / workers['ours'].ask(0, 0)
    for name, worker in workers.items():
      pass_s = worker.ask(batch, length)
      times[name] += [pass_s] * (number > 0)
    rates += [rate] * (number > 0)
  print(f'{batch} x {length} tokens, matmul {max(rates) / 1e9:.0f} GFLOP/s')
  for name, pass_s in times.items():
    best, median = min(pass_s), statistics.median(pass_s)
    share = flops(batch, length) / best / max(rates)
    print(
      f'  {name:22} {batch * length / best:6.0f} tokens/s, median '
      f'{batch * length / median:.0f}; {share:.2f} of matmul',
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peer', help='interpreter with torch and transformers')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  parser.add_argument('--gguf', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.serve:
    if options.serve == 'ours':
      return ours()
    return transformers(options.gguf, options.serve == 'compiled')
  workers = {'ours': Worker(sys.executable, '--serve=ours')}
  if options.peer:
    from gemma_scope.language_model import packages

    path = f'--gguf={packages.path("gemma3-270m")}'
    for kind in ('eager', 'compiled'):
      name = f'transformers {kind}'
      workers[name] = Worker(options.peer, f'--serve={kind}', path)
  for batch, length in SHAPES:
    compare(workers, batch, length)


if __name__ == '__main__':
  main()
