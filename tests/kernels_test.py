"""Kernels give what the plain functions that define them give.

On a CPU they run in Pallas' interpreters: the TPU's simulates its memories and
copies. Where libtpu is installed, they are compiled for pods as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
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


SIZES = ((16, 8, 128, 128), (5, 3, 17, 256), (9, 130, 300, 128))


def case(filling: str, rows=16, slots=8, latents=128, width=128):
  """c, i [R, K], W [N, D], v [R, D]; slots behind the used ones have c = 0."""
  c = jax.random.normal(KEYS[0], (rows, slots))
  i = jax.random.randint(KEYS[1], (rows, slots), 0, latents)
  if filling == 'none':
    c, i = jnp.zeros_like(c), jnp.zeros_like(i)
  elif filling == 'some':  # no two rows use as many
    used = jnp.arange(slots) < jnp.arange(rows)[:, None] % (slots + 1)
    c, i = jnp.where(used, c, 0), jnp.where(used, i, 0)
  elif filling == 'one latent':  # all pairs in one row of the result
    i = jnp.full_like(i, latents - 1)
  W = jax.random.normal(KEYS[2], (latents, width))
  return c, i, W, jax.random.normal(KEYS[3], (rows, width))


def held_to_definitions(platform, filling, size, dtype):
  c, i, W, v = case(filling, *size)
  for name, arguments in (
    ('gather_add', (c, i, W, dtype)),
    ('gather_dot', (v, i, W, dtype)),
    ('scatter_add', (c, i, v, len(W), dtype)),
  ):
    found = getattr(KERNELS[platform], name)(*arguments, INTERPRET[platform])
    np.testing.assert_allclose(
      found, getattr(plain, name)(*arguments), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('filling', ['full', 'some', 'none', 'one latent'])
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_sums_are_those_of_the_definitions(platform, filling):
  held_to_definitions(platform, filling, SIZES[0], 'float32')


@pytest.mark.parametrize('size', SIZES[1:])
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_sizes_that_are_no_tiles(platform, size):
  """K above a tile and below, latents and rows that fill none."""
  held_to_definitions(platform, 'some', size, 'bfloat16')


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


@dataclasses.dataclass(frozen=True)
class Device:
  """What `plain.on` asks of a device."""

  platform: str
  device_kind: str


def test_a_device_takes_its_kernels_where_the_shapes_fit(monkeypatch):
  c, i, W, v = case('some')
  called = []
  for kernels in (tpu, gpu):
    for name in ('gather_add', 'gather_dot', 'scatter_add'):

      def spy(*arguments, kernels=kernels, name=name):
        called.append(f'{kernels.__name__.split(".")[-1]}.{name}')
        return getattr(plain, name)(*arguments)

      monkeypatch.setattr(kernels, name, spy)

  def names(device, W=W):
    called.clear()
    for function, arguments in (
      (plain.gather_add, (c, i, W, 'float32')),
      (plain.gather_dot, (v[:, : W.shape[1]], i, W, 'float32')),
      (plain.scatter_add, (c, i, v[:, : W.shape[1]], len(W), 'float32')),
    ):
      found = plain.on(device, function)(*arguments)
      np.testing.assert_allclose(found, function(*arguments))
    return {name.split('.')[0] for name in called}, len(called)

  assert names(Device('tpu', 'TPU v5 lite')) == ({'tpu'}, 3)
  assert names(Device('gpu', 'NVIDIA H100 80GB HBM3')) == ({'gpu'}, 3)
  assert names(Device('tpu', 'TPU v3')) == (set(), 0)  # its compiler refuses
  assert names(Device('tpu', 'TPU v4'), W[:, :100]) == (set(), 0)  # no tile
  assert names(jax.devices()[0]) == (set(), 0)


def test_members_take_a_kernel_in_turn(monkeypatch):
  """vmap gives what each alone gives, and does not batch the kernel."""
  c, i, W, _ = case('some')
  interpreted = lambda *a: gpu_gather_add(*a, True)
  gpu_gather_add = gpu.gather_add
  monkeypatch.setattr(gpu, 'gather_add', interpreted)
  add = plain.on(Device('gpu', 'H100'), plain.gather_add)
  both = lambda a: jnp.stack([a, a[::-1]])
  found = jax.vmap(lambda c, i: add(c, i, W, 'float32'))(both(c), both(i))
  alone = plain.gather_add(c, i, W)
  np.testing.assert_allclose(found[0], alone, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found[1], alone[::-1], rtol=1e-4, atol=1e-4)


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
