"""A config's stacks and members, and what identifies its language model."""

from __future__ import annotations

import jax
import numpy as np

from configs import recipe, tiny
from gemma_scope import mesh as mesh_lib
from gemma_scope import sae, specs
from gemma_scope.activations import outliers
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.sae import fold
from gemma_scope.training import setup, stack, trained


def test_parameters_are_known_on_any_mesh_and_told_apart():
  _, params = weights.load('tiny')
  known = int(setup._checksum(params))
  mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  assert int(setup._checksum(weights.load('tiny', mesh=mesh)[1])) == known
  params['final_norm']['scale'] = params['final_norm']['scale'].at[3].add(1e-6)
  assert int(setup._checksum(params)) != known


def test_members_of_one_shape_share_a_stack():
  config = tiny.get_config('layers=3;sites=attn_out,resid_post;widths=16k,65k')
  stacks, groups = setup.make_stacks(config, lm.SIZES['gemma2-2b'])
  shapes = [(s.module.width, s.module.d_in) for s in stacks]
  assert shapes == [(16384, 2048), (16384, 2304), (65536, 2048), (65536, 2304)]
  assert [m for group in groups for m in group] and sum(
    map(len, groups)
  ) == len(specs.members(config))
  for one, group in zip(stacks, groups, strict=True):
    for i, member in enumerate(group):
      assert one.sites[int(one.setting.reads[i])] == member.sites[0]
      assert one.targets[int(one.setting.writes[i])] == member.targets[0]
      assert float(one.setting.value[i]) == member.sparsity


def test_a_member_acts_on_raw_activations_as_its_module_on_scaled_ones():
  config = tiny.get_config('layers=1;sites=resid_post;widths=512;sparsity=8,16')
  model = weights.read_config('tiny', '')
  stacks, groups = setup.make_stacks(config, model)
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 1}, jax.devices()[:1])
  (state,) = stack.init_all(stacks, jax.random.key(0), mesh)
  state.params['b_dec'] = state.params['b_dec'] + 0.1
  long = config.train.dead_after + 1
  silent_SF = state.silent_tokens.at[:, :128].set(long)
  state = state.replace(silent_tokens=silent_SF)
  scale = 7.5
  centre = np.random.default_rng(1).normal(size=128).astype(np.float32)
  normal = fold.Normalisation(scale, centre, 57.0)
  config.activations.max_norm = 10.0
  site = groups[0][0].sites[0]
  out = trained.saes(
    config, stacks, (state,), {site: normal}, 3, {'text': {'source': 'python'}}
  )
  x_BD = np.random.default_rng(0).normal(size=(20, 128)).astype(np.float32)
  for i, one in enumerate(out):
    params, card = one.load(), one.card
    own = {name: value[i] for name, value in state.params.items()}
    expected = normal.undo(
      stacks[0].module.apply({'params': own}, normal.apply(x_BD))
    )
    found = sae.decode(params, sae.encode(params, x_BD))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert card['name'] == groups[0][i].name and card['steps'] == 3
    assert outliers.norm_bounds(card) == {site: 57.0}
    assert card['silent'] == {'share': 0.25, 'tokens': long - 1}


def test_thresholds_that_cannot_move_within_a_run_are_reported():
  """The published constants, at the published length and at a short one."""
  config = recipe.gemma_scope_1('gemma3-1b')
  assert setup.slow_thresholds(config) is None
  config.train.steps = 5000
  warning = setup.slow_thresholds(config)
  assert 'a factor of at most 1.42' in warning
  assert 'train.threshold_rate to 14 or more' in warning
  config.train.threshold_rate = 14.0
  assert setup.slow_thresholds(config) is None
  assert setup.slow_thresholds(tiny.get_config()) is None
