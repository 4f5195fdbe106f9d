"""Controls that are trained with a part held at its random start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope import specs
from gemma_scope.training import closing, setup

KEY = jax.random.key(0)


def trained(nulls: str, steps=30, architecture='jumprelu'):
  """The stack, its initial state, and the state after some steps."""
  config = tiny.get_config(
    'layers=1;sites=resid_post;widths=64;sparsity=4;'
    f'architectures={architecture}'
  )
  config.collection.nulls = nulls
  config_lib.check(config)
  (one,), (group,) = setup.make_stacks(config, setup.dimensions(config))

  @jax.jit
  def train(key):
    directions = jax.random.normal(jax.random.key(1), (20, 128)) / 128**0.5

    def take(state, i):
      codes = jax.random.bernoulli(jax.random.fold_in(key, i), 0.1, (64, 20))
      x_NBD = (codes @ directions)[None] + 0.05
      return one.step(state, x_NBD, x_NBD, 50 + i, key)

    begun = one.init(key)
    return begun, jax.lax.scan(take, begun, jnp.arange(steps))[0]

  begun, state = jax.device_get(train(KEY))
  return one, [spec.null for spec in group], begun, state


@pytest.fixture(scope='module')
def run():
  return trained(specs.NULLS)


def test_each_null_holds_its_part_and_trains_the_rest(run):
  _, nulls, begun, state = run
  assert nulls == ['', *specs.NULLS]

  def moved(name, null):
    i = nulls.index(null)
    return np.abs(state.params[name][i] - begun.params[name][i]).max()

  assert moved('W_dec', 'frozen_decoder') == 0
  assert moved('W_enc', 'frozen_encoder') == 0
  for null in nulls:
    for name in ('W_dec', 'W_enc', 'b_enc', 'b_dec', 'log_threshold'):
      if (name, null) not in (
        ('W_dec', 'frozen_decoder'),
        ('W_enc', 'frozen_encoder'),
      ):
        assert moved(name, null) > 1e-3, (name, null)


def test_soft_frozen_decoders_stay_near_their_start(run):
  _, nulls, begun, state = run
  cosine = np.sum(begun.params['W_dec'] * state.params['W_dec'], -1)
  soft = cosine[nulls.index('soft_frozen_decoder')]
  assert 0.8 - 1e-5 < soft.min() < 0.81
  assert cosine[0].min() < 0.75  # the SAE itself goes further
  np.testing.assert_allclose(
    np.linalg.norm(state.params['W_dec'], axis=-1), 1, rtol=1e-5
  )


def test_an_sae_is_the_same_beside_nulls(run):
  alone = trained(())
  for name, value in alone[3].params.items():
    np.testing.assert_allclose(
      run[3].params[name][0], value[0], rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_the_closing_phase_leaves_frozen_decoders_alone(run):
  one, nulls, _, state = run
  rng = np.random.default_rng(5)
  x_BD = (rng.normal(size=(256, 128)) / 128**0.5).astype(np.float32)
  after = closing.refit_decoders(
    one, jax.device_put(state), lambda: iter([{one.sites[0]: x_BD}])
  )
  for i, null in enumerate(nulls):
    same = np.array_equal(after.params['W_dec'][i], state.params['W_dec'][i])
    assert same == ('decoder' in null), null


def test_names_tell_nulls_from_saes():
  config = tiny.get_config('layers=1;sites=resid_post;widths=64;sparsity=4')
  config.collection.nulls = ('frozen_encoder',)
  names = [spec.name for spec in specs.members(config)]
  assert names == [
    'resid_post/1/jumprelu/width_64/target_l0_4/seed_0',
    'resid_post/1/frozen_encoder_jumprelu/width_64/target_l0_4/seed_0',
  ]
  assert specs.null_of('frozen_encoder_jumprelu') == 'frozen_encoder'
  assert specs.null_of('jumprelu') == specs.null_of(None) == ''
