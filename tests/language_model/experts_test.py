"""Experts split over devices: the sum over all of them is the definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope.language_model import experts

B, T, D, E, F, K = 8, 5, 16, 8, 12, 3
MESHES = [(1, 2, 4), (2, 4, 1)]


@functools.cache
def inputs():
  """x, logits, and the weights of all experts; an expert's scale may be 0."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  scale = np.linspace(0, 2, E, dtype=np.float32)
  weights = experts.Weights(
    draw(E, 2, F, D) / D**0.5, draw(E, F, D) / F**0.5, scale
  )
  return draw(B, T, D), draw(B, T, E), weights


# Every token to the same experts: one device has all the work. As drawn.
LOGITS = {
  'drawn': lambda logits: logits,
  'one device': lambda logits: logits + 99 * (np.arange(E) < K),
  'the last device': lambda logits: logits + 99 * (np.arange(E) >= E - K),
}


def placed(sizes):
  """The inputs on a mesh, and where x is."""
  mesh = mesh_lib.make(dict(zip(mesh_lib.AXES, sizes, strict=True)))
  at = functools.partial(mesh_lib.sharding, mesh)
  x, logits, weights = inputs()
  place = at('data', None, None)
  split = experts.Weights(
    *(
      jax.device_put(w, at('latent', *axes))
      for w, axes in zip(
        weights, ((None, None, 'data'), (None, 'data'), ()), strict=True
      )
    )
  )
  return place, jax.device_put(x, place), jax.device_put(logits, place), split


def defined(x, logits, weights):
  """y, expert by expert, on one device."""
  shares = experts.shares(logits, K)
  return experts.of_all(x, shares, weights)


def chosen(x, logits, weights, place=None):
  return experts.of_chosen(x, experts.shares(logits, K), K, weights, place)


def graded(function):
  """Value and gradients of a scalar of y."""

  def scalar(x, logits, weights):
    y = function(x, logits, weights)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

  return jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))


def close(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    limit = 1e-5 * max(float(np.abs(b).max()), 1e-3)
    np.testing.assert_allclose(a, b, atol=limit)


@pytest.mark.parametrize('kind', LOGITS)
def test_the_ragged_product_is_the_sum_and_so_are_its_gradients(kind):
  x, logits, weights = inputs()
  logits = LOGITS[kind](logits)
  wanted = graded(defined)(x, logits, weights)
  assert np.abs(wanted[0][1]).max() > 0.5
  close(graded(chosen)(x, logits, weights), wanted)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_split_over_devices_it_is_the_same(sizes):
  place, x, logits, weights = placed(sizes)
  split = graded(functools.partial(chosen, place=place))
  for change in LOGITS.values():
    changed = change(logits)
    close(split(x, changed, weights), graded(defined)(x, changed, weights))


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_edited_shares_may_name_all_experts_of_all_devices(sizes):
  place, x, logits, weights = placed(sizes)
  run = jax.jit(functools.partial(experts.of_all, place=place))
  close(run(x, logits, weights), experts.of_all(inputs()[0], logits, weights))


def test_neither_experts_nor_rows_of_pairs_cross_devices():
  place, x, logits, weights = placed((1, 1, 8))
  run = jax.jit(functools.partial(chosen, place=place))
  text = run.lower(x, logits, weights).compile().as_text()
  assert ' all-reduce(' in text
  for other in ('all-gather', 'all-to-all', 'collective-permute'):
    assert f' {other}(' not in text, other


def test_what_is_in_no_group_is_not_read():
  """On some devices a ragged product leaves anything in such rows."""
  x, logits, weights = inputs()
  real, shares = jax.lax.ragged_dot, experts.shares(logits, K)
  shares = shares.at[:, ::2].set(0)  # as on a device without their experts

  def spoil(rows, sizes):
    outside = jnp.arange(len(rows)) >= jnp.sum(sizes)
    return jnp.where(outside[:, None], jnp.nan, rows)

  @jax.custom_vjp
  def spoiled(rows, by_group, sizes):
    return spoil(real(rows, by_group, sizes), sizes)

  def forward(rows, by_group, sizes):
    y, pull = jax.vjp(lambda *of: real(*of, sizes), rows, by_group)
    return spoil(y, sizes), (pull, sizes)

  def backward(kept, y_bar):
    pull, sizes = kept
    rows_bar, by_group_bar = pull(y_bar)
    return spoil(rows_bar, sizes), by_group_bar, None

  spoiled.defvjp(forward, backward)

  def total(x):
    return jnp.sum(experts.of_chosen(x, shares, K, weights) ** 2)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.lax, 'ragged_dot', spoiled)
    found = jax.value_and_grad(total)(x)
  close(found, jax.value_and_grad(total)(x))
  assert np.isfinite(found[0]) and not found[1][:, ::2].any()


def test_experts_that_do_not_split_are_on_every_device():
  place, x, logits, _ = placed((1, 1, 8))
  six = experts.Weights(*(w[:6] for w in inputs()[2]))
  logits = logits[..., :6]
  close(
    jax.jit(functools.partial(chosen, place=place))(x, logits, six),
    defined(inputs()[0], logits, six),
  )
