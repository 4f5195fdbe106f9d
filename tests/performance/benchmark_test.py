"""The benchmark's records, and what its programs do not do."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope.performance import benchmark
from tests.helpers import commands

pytestmark = pytest.mark.usefixtures('short_loops')


@pytest.fixture(autouse=True)
def _short(monkeypatch):
  """Each function is timed for a hundredth of a second a round."""
  short = functools.partial(benchmark.interleaved, least_s=0.01)
  monkeypatch.setattr(benchmark, 'interleaved', short)


def case(arch='jumprelu', branch='auto', limit=0, width=256, batch=64):
  return benchmark.Case(arch, 32, width, batch, 4, limit, 1, 'float32', branch)


def test_a_step_is_measured_by_what_it_does():
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 1}, jax.devices()[:1])
  cases = [
    case(branch=branch, limit=64) for branch in ('auto', 'dense', 'sparse')
  ]
  auto, dense, sparse = benchmark.steps(cases, mesh, repeats=3)
  assert auto['sparse_steps'] == sparse['sparse_steps'] == 1
  assert dense['sparse_steps'] == 0
  np.testing.assert_allclose(auto['l0'], 4, atol=1)  # thresholds for k
  for record in (auto, dense, sparse):
    assert 0 < record['tokens_per_s_low'] <= record['tokens_per_s']
    assert record['peak_bytes'] > 4 * 4 * 32 * 256  # two matrices, two moments
    share = 10 * 32 * 256 * record['tokens_per_s'] / record['matmul_flops']
    assert record['matmul_share_low'] * 0.5 < share
    assert share < record['matmul_share_high'] * 2
  with pytest.raises(ValueError, match='give a larger --limit'):
    benchmark.steps([case(branch='sparse', limit=1)], mesh, repeats=1)


@pytest.mark.parametrize('arch', ['jumprelu', 'topk', 'batch_topk'])
@pytest.mark.parametrize('branch', ['dense', 'auto'])
def test_pre_activations_stay_where_they_are(arch, branch):
  """No collective carries as much as a tenth of [B, F] over the shards."""
  rows, width = 64, 4096
  one = case(arch, branch, 8, width, rows)
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 8})
  x_NBD = jnp.ones((1, rows, 32))
  stack = one.stack()
  state = jax.eval_shape(stack.init, jax.random.key(0))
  state = jax.tree.map(
    lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
    state,
    stack.shardings(mesh),
  )
  step = jax.jit(lambda *args: stack.step(*args, mesh))
  arguments = state, x_NBD, x_NBD, jnp.int32(0), jax.random.key(0)
  text = step.lower(*arguments).compile().as_text()
  moved = re.findall(
    r'= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|all-reduce)\(', text
  )
  assert moved  # the reconstruction's sum, at least
  sizes = [int(np.prod([int(n) for n in m.split(',') if n])) for m in moved]
  assert max(sizes) < rows * width / 10, max(sizes)


def test_the_command_writes_a_line_a_measurement(tmp_path, capsys):
  out = tmp_path / 'out.jsonl'
  command = [
    'benchmark',
    '--d=32',
    '--width=256',
    '--batch=64',
    '--k=4',
    '--branch=dense',
    '--repeats=1',
    f'--out={out}',
    '--what=step,data',
    '--rows=2048',
  ]
  done = commands.run(capsys, *command)
  assert done.code == 0, done.err
  step, chunk, store = map(json.loads, out.read_text().splitlines())
  measured = 'tokens_per_s matmul_share peak_bytes'
  settings = 'arch d width batch k members dtype branch device'
  assert set(step) >= set(f'{settings} {measured}'.split())
  assert chunk['rows_per_s'] > 0 and store['bytes_per_s'] > 0
  assert len(done.out.splitlines()) == 3
