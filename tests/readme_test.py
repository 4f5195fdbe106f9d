"""The README's Python runs as it stands, on a small run of the real model."""

from __future__ import annotations

import importlib
import pathlib
import re
import shlex

import numpy as np
import pytest

import gemma_scope
from configs import gemma3_270m
from gemma_scope import pipeline
from gemma_scope.language_model import packages
from gemma_scope.microscope import session

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language: str) -> list[str]:
  found = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)
  return [text for name, text in found if name == language]


def commands() -> list[str]:
  """Lines of the shell blocks that call one of launch/'s commands."""
  text = ''.join(blocks('')).replace('\\\n', ' ')
  return re.findall(r'^\.venv/bin/python (launch/\w+\.py .*)$', text, re.M)


@pytest.mark.parametrize('line', commands())
def test_the_commands_have_these_flags(line, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  script, *arguments = shlex.split(line, comments=True)
  # Paths are looked at before anything else: those of the examples are here.
  for name in ('tokens', 'gemma2-2b', 'text'):
    (tmp_path / name).mkdir()
  (tmp_path / 'tokenizer_gemma2.model').touch()
  arguments = [one.replace('/data/', f'{tmp_path}/') for one in arguments]
  module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
  if script == 'launch/microscope.py':
    flags = module.flags(arguments.pop(0))
  else:
    flags = module.FLAGS
  with flags.parse(arguments) as given:
    assert given is not None


@pytest.fixture
def run_of_270m(tmp_path, monkeypatch):
  """The demo in small, where the README's first block looks for it."""
  try:
    packages.path('gemma3-270m')
  except packages.PackageNotFound as error:
    pytest.skip(f'the README on Gemma 3 270M: {error}')
  (tmp_path / 'text.txt').write_text('\n\n'.join([README] * 8))
  config = gemma3_270m.get_config('layers=9;widths=256;sparsity=8')
  config.collection.sites = ('resid_post',)
  config.text.source, config.text.seq_len = f'files:{tmp_path}/text.txt', 64
  config.activations.chunk_rows, config.activations.lm_batch = 4096, 16
  config.train.steps, config.train.batch = 40, 256
  config.train.warm_up, config.train.decay = 4, 8
  config.train.closing_batches, config.train.l0_steps = 4, 10
  config.evaluation.sequences, config.evaluation.batch = 8, 8
  monkeypatch.chdir(tmp_path)
  folder = pathlib.Path('runs/gemma3-270m')
  quiet = lambda _: None
  pipeline.run(config, folder, report=quiet)
  session.Session(folder, report=quiet).build(16, 8, lambda: None)


def test_the_python_runs_as_it_stands(run_of_270m, capsys):
  names = {}
  for block in blocks('python'):
    exec(block, names)
  printed = capsys.readouterr().out
  assert "' larger'" in printed and "' than'" in printed
  assert names['latents'].shape[-1] == 256
  # The same numbers both ways: the last block's latents are those printed.
  token, firings = scope_row(names)
  for one in firings:
    np.testing.assert_allclose(
      names['latents'][0, token, one.feature], one.value, rtol=1e-3
    )


def scope_row(names) -> tuple[int, list[session.Firing]]:
  """A token of the README's text on which some latent fires."""
  rows = names['scope'].read(names['sae'], names['text'])
  return next((i, f) for i, (_, f) in enumerate(rows) if f)
