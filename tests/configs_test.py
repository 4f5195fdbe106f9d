"""Every published suite: complete, runnable at its true sizes, of its number.

Nothing of those sizes is allocated: checks read configs, shapes are abstract.
"""

from __future__ import annotations

import importlib
import math
import pathlib
import re

import jax
import numpy as np
import pytest

import gemma_scope
from configs import gemma_4, gemma_scope_2, suites, tiny
from gemma_scope import config as config_lib
from gemma_scope import specs
from gemma_scope.language_model import gemma as lm
from gemma_scope.training import auto_mesh, setup
from tests.helpers import random_models

SHARED = ('__init__', 'recipe', 'suites', 'tiny')
FOLDER = pathlib.Path(gemma_scope.__file__).parents[1] / 'configs'
MODULES = {
  path.stem: importlib.import_module(f'configs.{path.stem}')
  for path in sorted(FOLDER.glob('*.py'))
  if path.stem not in SHARED
}

MULTI = ('crosscoder', 'clt', 'clt_skip')


def arguments(name: str) -> list[str]:
  """Every published collection of a suite's file, as its argument."""
  sets = MODULES[name].SETS
  if name == 'gemma_4':
    return [
      f'model={model};set={s}'
      for model in gemma_4.MODELS
      for s in sets
      if s != 'own' or model in gemma_4.OWN
    ]
  if name != 'gemma_scope_2':
    return [f'set={s}' for s in sets]
  return [
    f'model={model};tuning={tuning};set={s}'
    for model in gemma_scope_2.MODELS
    for tuning in gemma_scope_2.TUNINGS
    for s in sets
    if not s.startswith('clt') or model in ('270m', '1b')
  ]


EVERY = [(name, a) for name in MODULES for a in arguments(name)]


def config_of(name: str, argument: str = ''):
  return MODULES[name].get_config(argument or None)


def count(name: str, argument: str = '') -> int:
  return len(specs.members(config_of(name, argument)))


def fields(config, prefix=''):
  """Dotted name -> type, of a tuple the types of its elements."""
  for name, value in config.items():
    if hasattr(value, 'items'):
      yield from fields(value, f'{prefix}{name}.')
    elif isinstance(value, tuple):
      yield f'{prefix}{name}', {type(item) for item in value}
    else:
      yield f'{prefix}{name}', type(value)


@pytest.mark.parametrize('name, argument', EVERY)
def test_a_set_is_complete_and_fits_a_pod(name, argument):
  """On v5p:2x2x4, whole or in several runs of fewer layers each."""
  config = config_of(name, argument)
  assert dict(fields(config)) == dict(fields(tiny.get_config()))
  if config.lm.name.startswith('gemma4') and not random_models.HAS_GEMMA4:
    pytest.skip('Gemma 4 needs version 4 of the gemma package')
  model, hbm = lm.SIZES[config.lm.name], 95 * 2**30
  if 0 not in config.mesh.values():  # for one machine
    config_lib.check(config, model, (1, 1, 1))
    return
  whole = specs.members(config)
  try:
    runs = [config]
    auto_mesh.choose(config, model, 16, hbm)
  except config_lib.ConfigError as error:
    (parts,) = re.findall(r'with (.*) in the config', str(error))
    parts = parts.split(', ')
    assert len(parts) > 1, error
    runs = [config_of(name, f'{argument};{part}') for part in parts]
  for run in runs:
    chosen, _ = auto_mesh.choose(run, model, 16, hbm)
    assert math.prod(chosen.sizes) == 16 and chosen.bytes < hbm
    config_lib.check(run, model, chosen.sizes)
  # Every SAE is in one of the runs.
  members = [member.name for run in runs for member in specs.members(run)]
  assert sorted(members) == sorted(member.name for member in whole)


@pytest.mark.parametrize('name', MODULES)
def test_the_docstring_has_the_command_and_the_cost_of_each_set(name):
  module = MODULES[name]
  assert f'configs/{name}.py' in module.__doc__
  for s in module.SETS:
    config = module.get_config(f'set={s}')
    found = re.search(
      rf'^  {s} +([\d,]+) +([\d,]+) +([\d,]+)', module.__doc__, re.M
    )
    members, hours, gigabytes = (
      int(g.replace(',', '')) for g in found.groups()
    )
    assert members == len(specs.members(config))
    cost = suites.cost(config, lm.SIZES[config.lm.name])
    np.testing.assert_allclose((hours, gigabytes), cost, rtol=0.05, atol=0.5)


@pytest.mark.parametrize('name', MODULES)
def test_an_argument_narrows_a_set(name):
  s = list(MODULES[name].SETS)[0]
  narrow = 'widths=16k;sites=resid_post;sparsity=50;layers=3'
  if name == 'gemma_scope_transcoders':
    narrow = narrow.replace('resid_post', 'mlp_in_ungained')
  assert count(name, narrow) == count(name, f'set={s};{narrow}') == 1
  assert count(name, f'{narrow};set={s}') == 1


@pytest.mark.parametrize('name', MODULES)
def test_a_wrong_set_is_one_sentence_with_the_choices(name):
  with pytest.raises(config_lib.ConfigError) as error:
    config_of(name, 'set=everything;layers=1')
  sentence = str(error.value)
  assert "found 'everything'" in sentence and '\n' not in sentence
  assert all(s in sentence for s in MODULES[name].SETS)
  with pytest.raises(config_lib.ConfigError, match='not field=value'):
    config_of(name, 'sets=16k')


def test_other_wrong_choices_are_a_sentence():
  for argument, words in (
    ('model=2b', 'model must be one of 1b, 270m, 4b, 12b, 27b'),
    ('tuning=sft', 'tuning must be one of pt, it'),
    ('model=4b;set=clt', 'for model=270m and 1b'),
  ):
    with pytest.raises(config_lib.ConfigError, match=words):
      gemma_scope_2.get_config(argument)


def test_gemma_scope_1_has_the_papers_number_of_dictionaries():
  # Table 1: one for each model, layer, site and width, whatever the sparsity;
  # the feature-splitting suite is a part of them.
  total = 0
  for name in ('2b', '9b', '27b', '9b_it', 'transcoders'):
    for argument in arguments(f'gemma_scope_{name}'):
      c = config_of(f'gemma_scope_{name}', argument)
      total += len(specs.members(c)) // len(c.collection.sparsity)
  assert total == 457


@pytest.mark.parametrize(
  'name, argument, number',
  [
    # What is listed in the published repositories.
    ('gemma_scope_2b', 'set=16k;sites=mlp_out', 130),
    ('gemma_scope_2b', 'set=65k;sites=mlp_out', 130),
    ('gemma_scope_2b', 'set=1m', 18),
    ('gemma_scope_27b', '', 18),
    ('gemma_scope_9b_it', 'set=16k', 15),
    ('gemma_scope_9b_it', 'set=131k', 15),
    ('gemma_scope_feature_splitting', 'set=9b', 6),
    # Gemma Scope 2's table 1.
    ('gemma_scope_2', 'set=four_layers', 4 * 3 * 3 * 3),
    ('gemma_scope_2', 'model=27b;set=four_layers_1m', 4 * 3),
    ('gemma_scope_2', 'model=270m;set=all_layers', 18 * 3 * 2 * 2),
    ('gemma_scope_2', 'model=4b;set=transcoders_all_skip', 34 * 2 * 2),
    ('gemma_scope_2', 'model=12b;set=transcoders', 4 * 3 * 3),
    ('gemma_scope_2', 'model=27b;set=crosscoder', 4 * 2),
    ('gemma_scope_2', 'model=270m;set=clt', 2 * 2),
    ('gemma_4', '', 4 * 3 * 3 * 3),
    ('gemma_4', 'model=31b;set=all_layers', 60 * 3 * 2 * 2),
    ('gemma_4', 'model=26b_a4b;set=own', 4 * 3 * 3),
  ],
)
def test_number_of_members(name, argument, number):
  assert count(name, argument) == number


def test_tokens_are_the_papers():
  steps = {
    s: config_of('gemma_scope_2b', f'set={s}').train.steps
    for s in MODULES['gemma_scope_2b'].SETS
  }
  assert steps.pop('16k') == 976_562
  assert steps.pop('1m') == 3_906_250
  assert set(steps.values()) == {1_953_125}


def test_the_four_layers():
  four = {m: gemma_scope_2.four(n) for m, n in gemma_scope_2.MODELS.items()}
  assert four == {
    '270m': (5, 9, 12, 15),
    '1b': (7, 13, 17, 22),
    '4b': (9, 17, 22, 29),
    '12b': (12, 24, 31, 41),
    '27b': (16, 31, 40, 53),
  }
  for model, layers in gemma_scope_2.MODELS.items():
    assert lm.SIZES[f'gemma3-{model}'].num_layers == layers


def test_several_layers_start_from_the_sum_of_their_parts():
  for s, parts in (('crosscoder', 4 * 150), ('clt', 26 * 100)):
    config = gemma_scope_2.get_config(f'set={s}')
    assert config.train.initial_l0 == parts
    assert config.train.l0_steps == 50_000
    assert config.initialise.release.startswith('runs/1b_pt_')
  fewer = gemma_scope_2.get_config('set=crosscoder;layers=7,13;sparsity=50')
  assert fewer.train.initial_l0 == 2 * 50


def test_fine_tuned_sets_start_from_what_another_set_releases():
  sets = gemma_scope_2.SETS
  for argument in arguments('gemma_scope_2'):
    release = gemma_scope_2.get_config(argument).initialise.release
    model, tuning, s = re.fullmatch(
      'model=(.*);tuning=(.*);set=(.*)', argument
    ).groups()
    fresh = tuning == 'pt' and s not in (*MULTI, 'end_to_end')
    assert (release == '') == fresh, argument
    if not fresh:
      source = release.removeprefix(f'runs/{model}_').removesuffix('/release')
      source_tuning, _, source = source.partition('_')
      assert source in sets
      assert (source_tuning, source) != (tuning, s)


@pytest.mark.parametrize(
  'name, argument, W_enc, W_dec',
  [
    ('gemma_scope_2b', 'set=1m', (18, 2**20, 2304), (18, 2**20, 2304)),
    ('gemma_scope_9b', 'set=32k', (3, 2**15, 3584), (3, 2**15, 3584)),
    ('gemma_scope_27b', 'layers=22', (6, 2**17, 4608), (6, 2**17, 4608)),
    ('gemma_scope_9b_it', '', (15, 2**14, 3584), (15, 2**14, 3584)),
    (
      'gemma_scope_transcoders',
      '',
      (130, 2**14, 2304),
      (130, 2**14, 2304),
    ),
    (
      'gemma_scope_feature_splitting',
      'widths=16k',
      (1, 2**14, 2304),
      (1, 2**14, 2304),
    ),
    ('anthropic_jan_2025', '', (3, 2**14, 2304), (3, 2**14, 2304)),
    (
      'gemma_scope_2',
      'set=four_layers;widths=16k;sites=attn_out',
      (12, 2**14, 1024),
      (12, 2**14, 1024),
    ),
    (
      'gemma_scope_2',
      'set=crosscoder;widths=65k',
      (2, 4, 2**14, 1152),
      (2, 4, 4, 2**14, 1152),
    ),
    (
      'gemma_scope_2',
      'set=clt;widths=262080',  # released as 26 files of 10,080 latents
      (2, 26, 10_080, 1152),
      (2, 26, 26, 10_080, 1152),
    ),
  ],
)
def test_shapes_of_a_stack(name, argument, W_enc, W_dec):
  config = config_of(name, argument)
  model = lm.SIZES[config.lm.name]
  (stack,), (members,) = setup.make_stacks(config, model)
  state = jax.eval_shape(stack.init, jax.random.key(0))
  assert state.params['W_enc'].shape == W_enc
  assert state.params['W_dec'].shape == W_dec
  assert len(members) == W_enc[0]
  parameters = W_enc[-2] * W_enc[-1] * math.prod(W_enc[:-2])
  parameters += math.prod(W_dec)
  assert math.isclose(
    suites.cost(config, model)[1], 12 * parameters / 1e9, rel_tol=1e-6
  )


def test_anthropics_recipe_is_theirs_in_our_units():
  config = config_of('anthropic_jan_2025')
  model = lm.SIZES[config.lm.name]
  (stack,), _ = setup.make_stacks(config, model)
  n, root = model.d_model, math.sqrt(model.d_model)
  s, o, c = config.sae, config.objective, config.collection
  rng = np.random.default_rng(0)
  z = rng.normal(size=50) / root
  norm = rng.uniform(0.5, 2, 50)

  def sparsity(z, threshold, coefficient, scale, pre_act):
    f = np.where(z > threshold, z, 0)
    bent = coefficient * np.tanh(scale * f * norm)
    return np.sum(bent + pre_act * np.maximum(threshold - z, 0) * norm)

  ours = sparsity(
    z, s.initial_threshold, c.sparsity[-1], o.tanh_scale, o.pre_act
  )
  theirs = sparsity(z * root, 0.1, 20.0, 4.0, 3e-6)
  assert math.isclose(ours, theirs / n, rel_tol=1e-12)
  assert math.isclose(s.bandwidth * root, 2)
  assert not stack.module.unit_decoder and stack.module.ste_to_input
  o, steps = stack.optimizer, config.train.steps
  assert float(o.rate_factor(0)) == float(o.rate_factor(steps * 4 // 5)) == 1
  assert abs(float(o.sparsity_factor(steps // 2)) - 0.5) < 1e-6


def test_the_second_model_of_diffing_follows_the_first():
  config = config_of('diffing')
  assert specs.second_model(config) == ('gemma3-270m', '')  # the control
  config_lib.override(config, 'lm.name', 'gemma3-1b')
  assert specs.second_model(config) == ('gemma3-1b', '')
  config_lib.override(config, 'lm.second.name', 'gemma3-4b')
  assert specs.second_model(config) == ('gemma3-4b', '')
  assert config.lm.name == 'gemma3-1b'
