"""Published SAEs on a language model: the command that prints their table."""

from __future__ import annotations

import json

import pytest

import launch
from gemma_scope.release.formats import gemma_scope_2
from launch import evaluate as command
from tests.helpers import random_saes
from tests.helpers.runs import small


def published(folder):
  """Two SAEs in the layout of google/gemma-scope-2-270m-pt."""
  paths = []
  for seed, layer in enumerate((1, 2)):
    params, card = random_saes.member(seed, f'resid_post/{layer}', 64)
    path = folder / 'resid_post' / f'layer_{layer}_width_64_l0_small'
    gemma_scope_2.write(path, params, card | {'model': 'gemma3-270m'}, 10.0)
    paths.append(str(path))
  return paths


def test_published_saes_are_evaluated_and_the_table_printed(tmp_path, capsys):
  config = small(tmp_path)
  paths = published(tmp_path / 'gemma-scope-2-tiny')
  out = tmp_path / 'results' / 'scores.json'
  launch.main(
    [
      'evaluate',
      '--config=tiny',
      f'--config.text.source={config.text.source}',
      '--config.text.seq_len=33',
      '--config.evaluation.sequences=8',
      '--config.evaluation.batch=8',
      f'--release={",".join(paths)}',
      f'--workdir={tmp_path / "run"}',
      f'--out={out}',
    ]
  )
  members = json.loads(out.read_text())['members']
  assert len(members) == 2
  for metrics in members.values():
    assert set(metrics['controls']) == {'random', 'least_squares', 'pca'}
    assert metrics['outliers']['rule'] == '4 medians'  # the card has no rule
    for key in ('fvu', 'fvu_inliers', 'fvu_rest', 'delta_loss', 'kl'):
      assert metrics[key]['value'] is not None
  printed = capsys.readouterr().out
  head = printed[printed.index('site') :].splitlines()[0]
  order = [head.index(word) for word in ('delta loss', 'KL', 'FVU')]
  assert order == sorted(order)
  assert 'fewer than 20' in printed  # a single held-out document


def test_the_language_model_alone_is_enough_of_a_config(tmp_path):
  given = command.FLAGS.parse(
    '--lm=gemma3-270m --sequences=5 --workdir=a --release=b --out=c'.split()
  )
  with given as flags:
    config = command._default(flags)
  assert config.lm.name == 'gemma3-270m' and config.text.source == 'prose'
  assert config.evaluation.sequences == 5
  with pytest.raises(SystemExit, match='one of --config and --lm'):
    launch.main(['evaluate', '--workdir=a', '--release=b', '--out=c'])
  folders = [f'--{name}={tmp_path / name}' for name in ('workdir', 'out')]
  with pytest.raises(SystemExit, match='no folder .*relase'):
    launch.main(
      ['evaluate', '--lm=tiny', f'--release={tmp_path / "relase"}', *folders]
    )
