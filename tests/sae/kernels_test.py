"""Kernels give what the plain functions that define them give.

On a CPU they run in Pallas' interpreters: the TPU's simulates its memories and
copies. Where libtpu is installed, they are compiled for pods as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from gemma_scope import mesh as mesh_lib
from gemma_scope.performance import topologies
from gemma_scope.sae import architectures
from gemma_scope.sae.kernels import (
  choice,
  gpu,
  gpu_encode,
  plain,
  tpu,
  tpu_encode,
)
from gemma_scope.training import objectives

KEYS = jax.random.split(jax.random.key(0), 4)
INTERPRET = {'tpu': pltpu.InterpretParams(), 'gpu': True}
KERNELS = {'tpu': tpu, 'gpu': gpu}
ENCODERS = {'tpu': tpu_encode.encode, 'gpu': gpu_encode.encode}


TILES, ODD = (16, 8, 128, 128), (9, 130, 300, 256)


@functools.cache
@functools.partial(jax.jit, static_argnums=range(5))
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


@functools.cache  # compiled once, for all fillings
def sums(platform, dtype):
  """Every sum of a case, as its kernel and as its definition give it."""

  def both(c, i, W, v):
    arguments = {
      'gather_add': (c, i, W, dtype),
      'gather_dot': (v, i, W, dtype),
      'scatter_add': (c, i, v, len(W), dtype),
    }
    kernels, mode = KERNELS[platform], INTERPRET[platform]
    return {
      name: (getattr(kernels, name)(*a, mode), getattr(plain, name)(*a))
      for name, a in arguments.items()
    }

  return jax.jit(both)


def held_to_definitions(platform, filling, size, dtype):
  found = sums(platform, dtype)(*case(filling, *size))
  for name, (by_kernel, defined) in found.items():
    np.testing.assert_allclose(
      by_kernel, defined, rtol=1e-4, atol=1e-4, err_msg=name
    )


@pytest.mark.parametrize('filling', ['full', 'some', 'none', 'one latent'])
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_sums_are_those_of_the_definitions(platform, filling):
  held_to_definitions(platform, filling, TILES, 'float32')


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_sizes_that_are_no_tiles(platform):
  """Slots of one tile and two, rows and latents that fill none; bfloat16."""
  held_to_definitions(platform, 'some', ODD, 'bfloat16')


@functools.partial(jax.jit, static_argnums=range(3))
def factors(rows, latents, width):
  """x [B, D] and W [F, D] that bfloat16 holds, and a bias and a least [F]."""
  of = lambda key, *shape: jax.random.normal(key, shape)
  x, W = of(KEYS[0], rows, width) * width**-0.5, of(KEYS[1], latents, width)
  x, W = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, W))
  return x, W, 0.1 * of(KEYS[2], latents), 1 + 0.1 * of(KEYS[3], latents)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encoded(platform, count, x, W, bias, least):
  """i, z and the number of candidates, by the kernel and by the mask."""
  z = x @ W.T
  i, found = plain.select(z + bias > least, count)
  z = jnp.take_along_axis(z, i, 1)
  z = jnp.where(jnp.arange(count) < found[:, None], z, plain.ABSENT)
  encode = ENCODERS[platform]
  return encode(x, W, bias, least, count, interpret=True), (i, z, found)


def held_to_mask(platform, x, W, bias, least, count, most_of_all):
  """Same latents, in order, same counts, z to rounding; the counts' range."""
  kept, (i, z, found) = encoded(platform, count, x, W, bias, least)
  np.testing.assert_array_equal(kept[0], i)
  np.testing.assert_array_equal(kept[2], found)
  np.testing.assert_allclose(kept[1], z, rtol=1e-4, atol=1e-5)
  assert int(found.max()) in most_of_all
  return found


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_an_encoder_keeps_candidates_alone(platform):
  """Rows and latents that fill no block, more candidates than a row holds."""
  x, W, bias, least = factors(70, 1100, 128)
  held_to_mask(platform, x, W, bias, least + 1, 96, range(1, 97))
  found = held_to_mask(platform, x, W, bias, least, 160, range(161, 1000))
  assert int(jnp.min(found)) < 160  # and some rows hold all of theirs


@pytest.mark.parametrize('least, count', [(99.0, 0), (-99.0, 512), (2.0, 0)])
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_an_encoder_finds_none_or_all(platform, least, count):
  x, W, bias, _ = factors(8, 512, 128)
  if least == 2:  # what is equal to the bound is no candidate
    W = jnp.zeros_like(W).at[:, 0].set(1)
    x, bias = jnp.full_like(x, 2), jnp.zeros_like(bias)
  least = jnp.full(512, least)
  found = held_to_mask(platform, x, W, bias, least, 16, (count,))
  assert int(jnp.min(found)) == count


@pytest.mark.parametrize(
  'arch, shape',
  [('jumprelu', (2, 2, 2)), ('gated', (1, 1, 4))],
)
def test_a_step_whose_encoder_is_a_kernel(
  monkeypatch, short_loops, arch, shape
):
  """Gives what it gives without, in the sparse way and in the dense one."""
  mesh = mesh_lib.make(
    dict(zip(mesh_lib.AXES, shape, strict=True)),
    jax.devices()[: int(np.prod(shape))],
  )
  module = architectures.ARCHITECTURES[arch](
    d_in=128, d_out=128, width=256, matmul_dtype='bfloat16'
  )
  objective = objectives.Objective('target_l0' if arch == 'jumprelu' else 'l1')
  keys = jax.random.split(KEYS[0], 2)
  x = jax.random.normal(keys[0], (32, 128)) * 128**-0.5
  params = module.init(keys[1], x)['params']
  if arch == 'jumprelu':
    params['log_threshold'] += jnp.log(100.0)
  else:
    params['b_gate'] -= 0.1
  one = jnp.float32(1)
  batch = objectives.Batch(x, x, 20 * one, one, one, jnp.zeros(256, bool))

  def step(limit):
    found = jax.jit(
      lambda params: objectives.value_and_grad(
        module, objective, params, batch, objectives.Room(limit, mesh)
      )
    )(params)
    return found[0][1].sparse, found

  without = [step(limit) for limit in (64, 2)]
  kernel = lambda x, W, bias, least, count: tpu_encode.encode(
    x, W, bias, least, count, interpret=True
  )
  monkeypatch.setattr(choice, 'encoder', lambda *_: kernel)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  for limit, taken, (sparse_before, before) in zip(
    (64, 2), (1, 0), without, strict=True
  ):
    sparse_now, now = step(limit)
    assert sparse_now == sparse_before == taken
    jax.tree.map(close, now, before)


@dataclasses.dataclass(frozen=True)
class Device:
  """What `choice.on` asks of a device."""

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
      found = choice.on(device, function)(*arguments)
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
  add = choice.on(Device('gpu', 'H100'), plain.gather_add)
  both = lambda a: jnp.stack([a, a[::-1]])
  found = jax.vmap(lambda c, i: add(c, i, W, 'float32'))(both(c), both(i))
  alone = plain.gather_add(c, i, W)
  np.testing.assert_allclose(found[0], alone, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found[1], alone[::-1], rtol=1e-4, atol=1e-4)


def test_gpu_kernels_are_lowered_to_triton():
  c, i, W, v = case('full')
  bias = W[:, 0]
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
      (lambda *a: gpu_encode.encode(*a, 8), (v, W, bias, bias)),
    ):
      traced = jax.jit(function).trace(*arguments)
      text = traced.lower(lowering_platforms=('cuda',)).as_text()
      assert 'triton' in text


_COMPILE = """
import jax, jax.numpy as jnp
from gemma_scope.performance import topologies
from gemma_scope.sae.kernels import tpu, tpu_encode
pod = topologies.pod('v5e:2x2')
mesh = jax.sharding.Mesh(pod.devices[:1], ('x',))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
R, K, N, D = 4096, 128, 2**17, 2304
i, c = of(jnp.int32, R, K), of(jnp.float32, R, K)
i_2K, c_2K = of(jnp.int32, R, 2 * K), of(jnp.float32, R, 2 * K)
v, W, b = (of(jnp.float32, *s) for s in ((R, D), (N, D), (N,)))
with topologies.targeted(mesh):
  for function, arguments in (
    (tpu.gather_add, (c, i, W)),
    (tpu.gather_dot, (v, i, W)),
    (tpu.gather_add, (c_2K, i_2K, W)),
    (tpu.gather_dot, (v, i_2K, W)),
    (lambda c, i, v: tpu.scatter_add(c, i, v, N), (c, i, v)),
    (lambda *a: tpu_encode.encode(*a, K), (v, W, b, b)),
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
  # W in bfloat16 is 0.56 GiB, pre-activations would be 2.
  assert len(temporaries) == 6 and max(temporaries) < 2**30
