"""Kernels give what the plain functions that define them give.

On a CPU they run in Pallas' interpreters: the TPU's simulates its memories and
copies. Where libtpu is installed, they are compiled for pods as well.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from gemma_scope import topologies
from gemma_scope.kernels import gpu, plain, tpu

KEYS = jax.random.split(jax.random.key(0), 4)
INTERPRET = {'tpu': pltpu.InterpretParams(), 'gpu': True}
KERNELS = {'tpu': tpu, 'gpu': gpu}


def case(filling: str, rows=16, slots=8, latents=128, width=128):
  """c, i [R, K], W [N, D], v [R, D]; slots behind the used ones have c = 0."""
  c = jax.random.normal(KEYS[0], (rows, slots))
  i = jax.random.randint(KEYS[1], (rows, slots), 0, latents)
  if filling == 'none':
    c = jnp.zeros_like(c)
  elif filling == 'some':
    used = jnp.arange(slots) < jnp.arange(rows)[:, None] % slots
    c, i = jnp.where(used, c, 0), jnp.where(used, i, 0)
  elif filling == 'one latent':  # all pairs in one row of the result
    i = jnp.full_like(i, latents - 1)
  W = jax.random.normal(KEYS[2], (latents, width))
  return c, i, W, jax.random.normal(KEYS[3], (rows, width))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('filling', ['full', 'some', 'none', 'one latent'])
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_sums_are_those_of_the_definitions(platform, filling, dtype):
  c, i, W, v = case(filling)
  kernels, how = KERNELS[platform], INTERPRET[platform]
  assert kernels.fits(*i.shape, len(W), W.shape[1])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  for name, arguments in (
    ('gather_add', (c, i, W, dtype)),
    ('gather_dot', (v, i, W, dtype)),
    ('scatter_add', (c, i, v, len(W), dtype)),
  ):
    found = getattr(kernels, name)(*arguments, how)
    close(found, getattr(plain, name)(*arguments))


@pytest.mark.parametrize('width', [384, 640])
def test_odd_widths_on_a_gpu(width):
  c, i, W, v = case('some', 5, 3, 17, width)
  np.testing.assert_allclose(
    gpu.gather_add(c, i, W, 'float32', True), plain.gather_add(c, i, W),
    rtol=1e-4, atol=1e-4,
  )  # fmt: skip
  np.testing.assert_allclose(
    gpu.scatter_add(c, i, v, 17, 'float32', True),
    plain.scatter_add(c, i, v, 17), rtol=1e-4, atol=1e-4,
  )  # fmt: skip


def test_pre_activations_become_a_bit_each():
  x = jax.random.normal(KEYS[0], (256, 128))
  W = jax.random.normal(KEYS[1], (4096, 128))
  bound = 10 + jax.random.normal(KEYS[2], (4096,))
  bits = tpu.encode_bits(x, W, bound, interpret=INTERPRET['tpu'])
  assert bits.shape == (256, 128) and bits.dtype == jnp.uint32
  z, at = np.asarray(x @ W.T), np.arange(4096)
  found = np.asarray(bits)[:, at // 32] >> (at % 32).astype(np.uint32) & 1
  sure = np.abs(z - np.asarray(bound)) > 1e-3  # of the order of its sums
  np.testing.assert_array_equal((found == 1)[sure], (z > bound)[sure])
  assert 0.05 < found.mean() < 0.4 and sure.mean() > 0.99


def test_a_step_takes_kernels_where_the_shapes_fit(monkeypatch):
  """The choice itself, with the kernels run in their interpreter."""
  c, i, W, v = case('some')
  called = []

  def spied(name):
    def kernel(*arguments):
      called.append(name)
      return getattr(gpu, f'_{name}')(*arguments, True)

    monkeypatch.setattr(gpu, f'_{name}', getattr(gpu, name), raising=False)
    monkeypatch.setattr(gpu, name, kernel)
    kernel.__name__ = name

  for name in ('gather_add', 'gather_dot', 'scatter_add'):
    spied(name)
  for function, arguments in (
    (plain.gather_add, (c, i, W, 'float32')),
    (plain.gather_dot, (v, i, W, 'float32')),
    (plain.scatter_add, (c, i, v, len(W), 'float32')),
  ):
    found = plain.on('gpu', function)(*arguments)
    np.testing.assert_allclose(
      found, function(*arguments), rtol=1e-4, atol=1e-4
    )
  assert called == ['gather_add', 'gather_dot', 'scatter_add']
  plain.on('gpu', plain.gather_add)(c, i, W[:, :100], 'float32')
  assert len(called) == 3  # 100 columns are no blocks
  assert plain.on('cpu', plain.gather_add) is plain.gather_add


def test_gpu_kernels_are_lowered_to_triton():
  c, i, W, v = case('full')
  device = getattr(jax.sharding, 'AbstractDevice', None)
  where = contextlib.nullcontext()
  if device is not None:  # the chip that a GPU kernel is lowered for
    h100 = device('NVIDIA H100 80GB HBM3', 132, 'gpu')
    mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=h100)
    where = jax.sharding.use_abstract_mesh(mesh)
  with where:
    for function, arguments in (
      (gpu.gather_add, (c, i, W)),
      (gpu.gather_dot, (v, i, W)),
      (lambda c, i, v: gpu.scatter_add(c, i, v, len(W)), (c, i, v)),
    ):
      traced = jax.jit(function).trace(*arguments)
      text = traced.lower(lowering_platforms=('cuda',)).as_text()
      assert 'triton' in text


_COMPILE = """
import jax, jax.numpy as jnp
from gemma_scope import topologies
from gemma_scope.kernels import tpu
pod = topologies.pod('v5e:2x2')
mesh = jax.sharding.Mesh(pod.devices[:1], ('x',))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
R, K, N, D = 4096, 128, 2**17, 2304
i, c = of(jnp.int32, R, K), of(jnp.float32, R, K)
v, W, b = (of(jnp.float32, *s) for s in ((R, D), (N, D), (N,)))
with topologies.targeted(mesh):
  for function, arguments in (
    (tpu.gather_add, (c, i, W)),
    (tpu.gather_dot, (v, i, W)),
    (lambda c, i, v: tpu.scatter_add(c, i, v, N), (c, i, v)),
    (tpu.encode_bits, (v, W, b)),
  ):
    jitted = jax.jit(function, out_shardings=place)
    memory = jitted.lower(*arguments).compile().memory_analysis()
    print(memory.temp_size_in_bytes)
"""


@pytest.mark.skipif(
  not topologies.is_there(), reason='libtpu, the TPU compiler, is not installed'
)
def test_tpu_kernels_compile_at_true_size():
  done = subprocess.run(
    [sys.executable, '-c', _COMPILE], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  temporaries = [int(line) for line in done.stdout.split()]
  # Pre-activations would be 2 GiB.
  assert len(temporaries) == 4 and max(temporaries) < 2**28
