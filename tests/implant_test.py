"""A copy of the embedded model learns a domain, and crosscoders find it."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import random

import jax
import numpy as np
import pytest

import gemma_scope
from configs import diffing as diffing_config
from gemma_scope import mesh as mesh_lib
from gemma_scope import pipeline, release
from gemma_scope.evaluation import latent_scaling
from gemma_scope.language_model import weights
from gemma_scope.text import tokenizers

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
LEANING = 0.6  # relative norm; shared latents are below

# A word decides three others. Between them stand words that say nothing, so
# that who has not learned the domain cannot see what comes.
KEYS = 'red blue open list file name error value'.split()
DECIDED = [
  words.split()
  for words in (
    'start stop read write test main check first',
    'input output index line code path size type',
    'self class return string object method module number',
  )
]
IDLE = 'and or not if in is for with from else try pass del as while'.split()


def domain(seed: int, sentences: int = 40) -> str:
  draw, lines = random.Random(seed), []
  for _ in range(sentences):
    key = draw.randrange(len(KEYS))
    words = [KEYS[key]]
    for decided in DECIDED:
      words += [draw.choice(IDLE), decided[key]]
    lines.append(' '.join(words) + ';')
  return ' '.join(lines) + '\n'


@functools.cache
def script():
  """docs/diffing.py, which does this at length."""
  spec = importlib.util.spec_from_file_location(
    'docs_diffing', ROOT / 'docs' / 'diffing.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config_of(texts: pathlib.Path, steps: int, **second):
  """A narrow crosscoder of the last layer, on short rows."""
  config = diffing_config.get_config('model=tiny')
  config.update_from_flattened_dict(
    {
      'text.source': f'files:{texts}/*.txt',
      'text.seq_len': 64,
      'collection.layers': (3,),
      'collection.widths': (256,),
      'collection.sparsity': (8.0,),
      'activations.chunk_rows': 8192,
      'activations.lm_batch': 16,
      'train.steps': steps,
      'train.warm_up': 20,
      'train.decay': steps // 3,
      'train.dead_after': 5000,
      'train.closing_batches': 16,
      'checkpoint.every': 1000,
      'evaluation.sequences': 0,
      **{f'lm.second.{name}': value for name, value in second.items()},
    }
  )
  return config


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
  """Crosscoders of the model with its copy and with itself, and both models."""
  folder, docs = tmp_path_factory.mktemp('implant'), script()
  (texts := folder / 'texts').mkdir()
  for number in range(60):
    (texts / f'log_{number:04}.txt').write_text(domain(number))
  for number, text in enumerate(docs.library(60, 'train')):
    (texts / f'library_{number:04}.txt').write_text(text, encoding='utf-8')
  gemma, params = weights.load('tiny')
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny'))
  batches = docs.mixture(texts, tokenizer, (8, 32), 120)
  tuned, losses = docs.fine_tune(gemma, params, batches, 3e-3)
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
  weights.save_safetensors(folder / 'model', gemma.config, tuned, {})
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    one = functools.partial(mesh_lib.make, devices=jax.devices()[:1])
    patch.setattr(mesh_lib, 'make', one)
    for name, steps, second in (
      ('copy', 220, {'checkpoint': str(folder / 'model')}),
      ('itself', 80, {'name': 'tiny'}),
    ):
      run, config = folder / name, config_of(texts, steps, **second)
      assert pipeline.run(config, run, lambda line: None)
      (found[name],) = release.load_all(run / 'release')
  return found, [(gemma, params), (gemma, tuned)]


def relative_norms(each: release.Released) -> np.ndarray:
  scales = [each.card['scales'][str(site)] for site in each.wiring.sites]
  decoders = latent_scaling.Decoders.of(each.load(), scales)
  return decoders.relative_norm()


def test_latents_that_lean_to_the_copy_fire_on_what_it_has_learned(compared):
  """On new sentences and on modules that nobody has read."""
  found, models = compared
  docs = script()
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny'))
  rows = [
    docs.rows_of(''.join(texts), tokenizer, 64)[:48]
    for texts in (map(domain, range(1000, 1012)), docs.library(12, 'eval'))
  ]
  rho_F = relative_norms(found['copy'])
  order_F, middle = np.argsort(-rho_F), len(rho_F) // 2
  recall = functools.partial(docs.recall, models, found['copy'])
  most, between = (
    recall(order_F[part].tolist(), *rows)
    for part in (slice(0, 10), slice(middle - 5, middle + 5))
  )
  leaning = recall(np.flatnonzero(rho_F > LEANING).tolist(), *rows)
  norms = {name: relative_norms(each) for name, each in found.items()}
  print(most, between, leaning, [(n.min(), n.max()) for n in norms.values()])
  assert most['inside'] > 0.6 > 2 * between['inside']
  assert most['inside'] > 2 * most['outside']
  assert leaning['inside'] > max(0.5, 2 * leaning['outside'])
  # The null: no latent leans to a model that is the same.
  assert np.abs(norms['itself'] - 0.5).max() < LEANING - 0.5
