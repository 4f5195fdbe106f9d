"""Arguments and checks: what cannot run is refused in a sentence."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import pytest

import gemma_scope
from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope import specs
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
    ('layer=12', "'layers'"),
    ('widths=17k', 'power of two'),
    ('layers=a', 'does not parse'),
    ('layers', 'field=value'),
  ],
)
def test_a_wrong_argument_is_a_sentence(argument, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    tiny.get_config(argument)


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
        'collection.architectures': ('topk',),
        'objective.frequency': 1.0,
      },
      'act on trained thresholds',
    ),
    ({'collection.layers': (30,)}, 'has layers 0 to 25'),
    ({'collection.layers': (1, 1)}, 'without repeats'),
    ({'collection.sparsity': (600.0,)}, 'cannot be met by 512'),
    ({'train.warm_up': 10**6}, 'the run has 800'),
    ({'train.batch': 100}, "mesh's data axis"),
    ({'collection.widths': (513,)}, 'latent axis'),
    ({'collection.seeds': (0, 1, 2)}, 'sae axis'),
    ({'activations.chunk_rows': 10}, 'at least one batch'),
    ({'activations.memory': 'disk'}, 'device'),
    ({'lm.dtype': 'float16'}, 'float32 or bfloat16'),
    ({'text.seq_len': 1}, 'at least 2'),
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


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--config.train.stepss=3', 'steps'),
    ('--config.train.steps=many', 'steps'),
    ("--config.collection.architectures=('jumpreluu',)", 'jumprelu'),
    ('--config=configs/tiny.py:layer=3', 'layers'),
  ],
)
def test_a_typo_on_the_command_line_is_refused_within_seconds(
  flag, words, tmp_path
):
  started = time.time()
  done = subprocess.run(
      [
          sys.executable, str(ROOT / 'launch/train.py'),
          '--config=configs/tiny.py', flag, f'--workdir={tmp_path}',
      ],
      cwd=ROOT, capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)},
  )  # fmt: skip
  assert done.returncode != 0
  assert words in done.stderr, done.stderr
  assert 'import jax' not in done.stderr
  assert time.time() - started < 10  # 3 s on a machine that is not busy
  assert not list(tmp_path.iterdir())
