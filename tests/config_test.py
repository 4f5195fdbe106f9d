"""Arguments and checks: what cannot run is refused in a sentence."""

from __future__ import annotations

import copy
import pathlib
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

import gemma_scope
from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope import config_fields, specs
from gemma_scope.language_model import gemma as lm

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
MODEL = lm.SIZES['gemma2-2b']


def test_the_argument_selects_the_collection():
  config = tiny.get_config(
    'layers=12,20-22;sites=resid_post;widths=16k,65k,1m;sparsity=30,60.5;seeds=1,2'
  )
  c = config.collection
  assert c.layers == (12, 20, 21, 22)
  assert c.widths == (16384, 65536, 2**20)
  assert c.sparsity == (30.0, 60.5) and c.seeds == (1, 2)
  names = [m.name for m in specs.members(config)]
  assert len(names) == len(set(names)) == 4 * 3 * 2 * 2
  assert 'resid_post/20/jumprelu/width_1m/target_l0_60.5/seed_2' in names


@pytest.mark.parametrize(
  'argument, words',
  [
    ('layer=12', "Did you mean 'layers'"),
    ('width=1k', "Did you mean 'widths'"),
    ('widths=17k', 'power of two'),
    ('layers=a', 'does not parse'),
    ('layers=1-', 'does not parse'),
    ('layers', 'field=value'),
  ],
)
def test_a_wrong_argument_is_a_sentence(argument, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    tiny.get_config(argument)


@pytest.mark.parametrize(
  'name, text, value',
  [
    ('train.steps', '7', 7),
    ('train.eps', '1e-6', 1e-6),
    ('train.learning_rate', '1', 1.0),
    ('collection.skip', 'true', True),
    ('collection.widths', '1k,1536', (1024, 1536)),
    ('collection.widths', '(512,)', (512,)),
    ('collection.layers', '0-2', (0, 1, 2)),
    ('collection.architectures', "('topk', 'relu')", ('topk', 'relu')),
    ('sae.matryoshka', '0.5,1', (0.5, 1.0)),
    ('text.source', 'files:a=b/*.txt', 'files:a=b/*.txt'),
    ('lm.second.checkpoint', '/a/b', '/a/b'),
  ],
)
def test_an_override_has_the_type_of_its_field(name, text, value):
  config = tiny.get_config()
  config_lib.override(config, name, text)
  found = config_fields.flat(config)[name]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  'name, text, words',
  [
    ('train.bacth', '3', "Did you mean 'train.batch'"),
    ('optimizer.learning_rate', '3', "Did you mean 'train.learning_rate'"),
    ('train', '3', 'Its fields are train.active_limit'),
    ('train.steps', '1.5', "a whole number; found '1.5'"),
    ('train.b2', 'high', 'a number'),
    ('collection.skip', 'maybe', 'true or false'),
    ('collection.sparsity', '8,x', 'does not parse'),
    ('collection.widths', '(512', 'does not parse'),
  ],
)
def test_a_wrong_override_is_a_sentence(name, text, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    config_lib.override(tiny.get_config(), name, text)


def test_a_config_is_found_by_its_name_or_its_path(tmp_path):
  default = tiny.get_config('layers=3').to_dict()
  for name in ('tiny', 'configs/tiny.py', str(ROOT / 'configs/tiny.py')):
    assert config_lib.load(f'{name}:layers=3').to_dict() == default
  for name in ('tinny', 'configs/tinny.py', str(tmp_path / 'tinny.py')):
    with pytest.raises(config_lib.ConfigError, match="Did you mean 'tiny'"):
      config_lib.load(name)
  for text, words in (
    ('get_config = 1 +', 'SyntaxError'),
    ('x = 1', 'get_config'),
    ('def get_config(): return {}', 'must return a ConfigDict'),
  ):
    (tmp_path / 'own.py').write_text(text)
    with pytest.raises(config_lib.ConfigError, match=words):
      config_lib.load(str(tmp_path / 'own.py'))


def test_paths_lose_their_tilde_and_stores_must_exist(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'tokens').mkdir()
  config = tiny.get_config()
  for name in (
    'text.store',
    'lm.checkpoint',
    'lm.second.checkpoint',
    'initialise.release',
  ):
    config_lib.override(config, name, '~/tokens')
  config_lib.resolve_paths(config)
  assert config.text.store == config.lm.checkpoint == f'{tmp_path}/tokens'
  assert config.lm.second.checkpoint == f'{tmp_path}/tokens'
  assert config.initialise.release == f'{tmp_path}/tokens'
  config_lib.override(config, 'text.store', '~/token')
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.resolve_paths(config)
  assert f"Did you mean '{tmp_path}/tokens'?" in str(error.value)


@pytest.mark.parametrize(
  'name, address',
  (
    ('lm.tokenizer', 'gs://bucket/store'),
    ('initialise.release', 'gs://bucket/store'),
    ('text.store', 'http://bucket/store'),
    ('activations.store', 'http://bucket/store'),
  ),
)
def test_a_field_that_holds_a_path_refuses_an_address(name, address):
  config = tiny.get_config()
  config_lib.override(config, name, address)
  with pytest.raises(config_lib.ConfigError, match=address) as error:
    config_lib.resolve_paths(config)
  assert name in str(error.value)


def test_a_checkpoint_may_be_in_a_bucket():
  config = tiny.get_config()
  config.lm.checkpoint = 'gs://bucket/gemma'
  config_lib.resolve_paths(config)
  assert config.lm.checkpoint == 'gs://bucket/gemma'


@pytest.mark.parametrize(
  'change, words',
  [
    ({'collection.sites': ('resid_pots',)}, "Did you mean 'resid_post'"),
    ({'collection.architectures': ('jumpreluu',)}, "Did you mean 'jumprelu'"),
    ({'collection.penalty': 'l1'}, 'trained by target_l0 or l0'),
    ({'collection.type': 'crosscode'}, "Did you mean 'crosscoder'"),
    ({'collection.type': 'transcoder'}, 'reads mlp_in or mlp_in_ungained'),
    ({'collection.skip': True}, 'copy its input'),
    (
      {'collection.type': 'crosscoder', 'collection.widths': (511,)},
      'divisible by their number',
    ),
    (
      {
        'collection.architectures': ('matryoshka_topk',),
        'sae.matryoshka': (0.5, 0.25, 1.0),
      },
      'must rise to 1',
    ),
    (
      {
        'collection.architectures': ('matryoshka_topk',),
        'sae.matryoshka': (0.0001, 1.0),
      },
      'first prefix',
    ),
    (
      {
        'collection.architectures': ('topk',),
        'objective.frequency': 1.0,
      },
      'act on trained thresholds',
    ),
    (
      {
        'collection.architectures': ('topk',),
        'collection.sparsity': (8.5,),
      },
      'a whole number of latents; found 8.5',
    ),
    ({'sae.initial_threshold': 0.0}, 'logarithm'),
    ({'collection.layers': (30,)}, 'has layers 0 to 25'),
    ({'collection.layers': (1, 1)}, 'without repeats'),
    ({'collection.sparsity': (600.0,)}, 'met by 512'),
    ({'collection.sparsity': (8.0, 8.0000001)}, 'too close to be told apart'),
    ({'train.warm_up': 10**6}, 'the run has 800'),
    ({'train.batch': 100}, "train.batch .* mesh's data axis"),
    ({'evaluation.batch': 15}, "evaluation.batch .* mesh's data axis"),
    ({'collection.widths': (513,)}, 'latent axis'),
    ({'collection.seeds': (0, 1, 2)}, 'sae axis'),
    ({'activations.chunk_rows': 10}, 'at least one batch'),
    ({'activations.memory': 'disk'}, 'device'),
    ({'lm.dtype': 'float16'}, "'float32' or 'bfloat16'"),
    ({'text.seq_len': 1}, 'at least 2'),
    ({'text.seq_len': 2}, 'Evaluation needs text.seq_len of at least 3'),
    ({'activations.lm_batch': 2**30}, 'in a forward pass'),
    ({'mesh.sae': -1}, 'At most one axis'),
    ({'mesh.sae': -2}, 'at least -1'),
    ({'train.b2': 1.0}, 'below 1'),
  ],
)
def test_an_impossible_combination_is_a_sentence(change, words):
  config = tiny.get_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(config_lib.ConfigError, match=words):
    config_lib.check(config, MODEL, (8, 8, 2))


def test_the_default_fits():
  config_lib.check(tiny.get_config(), MODEL, (1, 1, 1))
  assert len(specs.members(tiny.get_config())) >= 24


def test_all_that_is_wrong_is_named_at_once():
  config = tiny.get_config()
  config.update_from_flattened_dict(
    {
      'train.batch': 0,
      'collection.sites': ('resid_pots',),
      'text.seq_len': 2,
      'mesh.sae': -2,
    }
  )
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.check(config)
  message = str(error.value)
  assert message.startswith('The config has 3 problems:')
  for words in ('train.batch must', "'resid_post'", 'mesh.sae'):
    assert words in message
  config.train.batch = 256
  with pytest.raises(config_lib.ConfigError, match='Evaluation needs'):
    config_lib.check(config)


def test_a_site_may_name_its_own_layer():
  config = tiny.get_config('layers=1,2;sites=resid_post,mlp_out/3;widths=64')
  config.collection.sparsity = (8.0,)
  assert [str(m.sites[0]) for m in specs.members(config)] == [
    'resid_post/1',
    'resid_post/2',
    'mlp_out/3',
  ]
  config_lib.check(config)
  config_lib.check(config, MODEL)
  for wrong, words in (
    (('mlp_out/26',), 'collection.sites has 26'),
    (('mlp_out/x',), 'collection.sites must be'),
    (('resid_post', 'resid_post/1'), 'are named resid_post/1/'),
  ):
    config.collection.sites = wrong
    with pytest.raises(config_lib.ConfigError, match=words):
      config_lib.check(config, MODEL)
  config = tiny.get_config('type=crosscoder;sites=resid_post/1')
  with pytest.raises(config_lib.ConfigError, match='all of collection.layers'):
    config_lib.check(config)


@pytest.mark.parametrize('section', tiny.get_config().keys())
def test_a_section_that_is_missing_is_a_sentence(section):
  plain = tiny.get_config().to_dict()
  del plain[section]
  with pytest.raises(config_lib.ConfigError, match=f'has no {section}'):
    config_lib.check(ConfigDict(plain))
  plain[section] = None
  with pytest.raises(config_lib.ConfigError, match=section):
    config_lib.check(ConfigDict(plain))


def test_a_config_has_every_field_and_no_other():
  assert set(config_fields.flat(tiny.get_config())) == set(config_fields.FIELDS)
  config = tiny.get_config()
  del config.train['eps']
  config.train.epss = 1.0
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.check(config)
  assert "Did you mean 'train.eps'" in str(error.value)
  assert 'The config has no train.eps' in str(error.value)


# Every wrong value of every field, generated from the config itself.

# 0 is a value of its own here: none, never, at once.
ZERO = {
  'activations.max_norm', 'seed',
  'collection.layers', 'collection.seeds', 'objective.strength',
  'objective.prefactor', 'objective.frequency',
  'objective.frequency_limit', 'objective.pre_act', 'objective.auxk',
  'objective.auxk_latents', 'initialise.layer', 'initialise.whitening',
  'end_to_end.beta',
  'train.warm_up', 'train.decay', 'train.sparsity_warm_up',
  'train.initial_l0', 'train.l0_steps', 'train.threshold_rate', 'train.b1',
  'train.b2', 'train.clip', 'train.theta_decay', 'train.adaptive_rate',
  'train.resample_every', 'train.active_limit', 'evaluation.sequences',
  'mesh.sae', 'mesh.data', 'mesh.latent',
}  # fmt: skip
MINUS_ONE = {'initialise.layer', 'mesh.data', 'mesh.sae', 'mesh.latent'}
ANY_TEXT = {
  'lm.name',
  'lm.checkpoint',
  'lm.second.name',
  'lm.second.checkpoint',
  'lm.tokenizer',
  'text.source',
  'text.column',
  'text.store',
  'activations.store',
  'initialise.release',
  'metrics.wandb_project',
}
UNBOUNDED = {
  'activations.max_norm', 'objective.strength',
  'objective.prefactor', 'objective.p0',
  'objective.tanh_scale', 'objective.frequency', 'objective.pre_act',
  'objective.auxk', 'sae.bandwidth', 'sae.initial_threshold',
  'end_to_end.beta', 'train.learning_rate', 'train.initial_l0',
  'train.threshold_rate', 'train.eps', 'train.clip', 'train.adaptive_rate',
}  # fmt: skip


def wrong_values(name: str, value):
  """Values that the field must refuse, made from one that it has."""
  if isinstance(value, tuple):
    if name != 'collection.nulls':  # no nulls are a value of its own
      yield ()
    yield from (value * 2, value[0], 'x', None)
    yield from ((item,) for item in wrong_values(name, value[0]))
    return
  yield from (None, [], {'a': 1}, (value,))
  if isinstance(value, bool):
    yield from (0, 1, 'true', 2.5)
  elif isinstance(value, str):
    yield from (0, True, 1.5)
    if name not in ANY_TEXT:
      yield from ('', value + 'x', value.upper())
  else:
    yield from ('1', 'many', True, float('nan'), float('inf'), -float('inf'))
    yield -7
    if name not in MINUS_ONE:
      yield -1
    if name not in ZERO:
      yield 0
    if isinstance(value, int):
      yield from (0.5, 2.0, 10**30)
    elif name not in UNBOUNDED:
      yield 10.0**30


@pytest.mark.parametrize('name', config_fields.flat(tiny.get_config()))
def test_every_wrong_value_of_every_field_is_a_sentence(name):
  right = tiny.get_config()
  value = config_fields.flat(right)[name]
  if name == 'collection.sparsity':
    value = value[:1]
  if name == 'collection.nulls':
    value = ('frozen_encoder',)
  section, _, field = name.rpartition('.')
  for wrong in wrong_values(name, value):
    plain = copy.deepcopy(right.to_dict())
    holder = plain
    for part in filter(None, section.split('.')):
      holder = holder[part]
    holder[field] = wrong
    started = time.monotonic()
    with pytest.raises(config_lib.ConfigError) as error:
      config_lib.check(ConfigDict(plain))
      pytest.fail(f'{name} = {wrong!r} was accepted')
    assert name in str(error.value) or f'{section}.' in str(error.value)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--config.train.stepss=3', "Did you mean 'train.steps'"),
    ('--config.train.bacth=3', "Did you mean 'train.batch'"),
    ('--config.train.steps=many', 'whole number'),
    ("--config.collection.architectures=('jumpreluu',)", "'jumprelu'"),
    ('--config=configs/tiny.py:width=1k', "Did you mean 'widths'"),
    ('--config.metrics.every=0', 'metrics.every must be at least 1'),
  ],
)
def test_a_typo_on_the_command_line_is_refused_within_seconds(
  flag, words, tmp_path
):
  started = time.time()
  done = subprocess.run(
    [
      sys.executable,
      str(ROOT / 'launch/train.py'),
      *(['--config=tiny'] if not flag.startswith('--config=') else []),
      flag,
      f'--workdir={tmp_path}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode != 0
  assert words in done.stderr, done.stderr
  assert 'Traceback' not in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert time.time() - started < 3
  assert not list(tmp_path.iterdir())


def test_a_config_is_checked_without_jax():
  code = (
    'import sys; from gemma_scope import config; '
    'config.check(config.load("tiny")); '
    'print([m for m in ("jax", "numpy", "gemma") if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={'PYTHONPATH': str(ROOT)},
  )
  assert done.stdout.strip() == '[]', done
