"""A run on Gemma 4's new sites: train, evaluate, release, microscope."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from gemma_scope import config as config_lib
from gemma_scope import pipeline, release
from gemma_scope.evaluation import batches
from gemma_scope.language_model import weights
from gemma_scope.microscope import session
from gemma_scope.release.formats import export
from tests.helpers import random_models, runs

pytestmark = random_models.needs_gemma4
# Per-layer inputs, shared keys and experts in one model, with the tokenizer of
# the embedded one.
MODEL = dataclasses.replace(
  random_models.GEMMA4_E,
  name='small4',
  vocab_size=4096,
  experts=8,
  top_experts=3,
  expert_d_ff=12,
  num_layers=3,
  kv_shared=0,
  shared_d_ff=0,
)
SITES = ('ple_out/1', 'experts_out/1', 'router_logits/0', 'attn_out/2')


def config_of(folder, **changes):
  _, params = random_models.model(MODEL)
  checkpoint = folder / 'checkpoint'
  if not checkpoint.exists():
    arrays = jax.tree.map(np.asarray, params)
    weights.save_safetensors(checkpoint, MODEL, arrays, {})
  changes = {
    'lm.name': MODEL.name,
    'lm.checkpoint': str(checkpoint),
    'collection.layers': (1,),
    'collection.sites': SITES,
    'mesh.data': 4,
    'mesh.latent': 2,
    'train.steps': 10,
    # What other runs show costs half a minute to compile for four shapes.
    'objective.auxk': 0.0,
    'train.resample_every': 0,
    'train.active_limit': 0,
    'activations.centre': 'none',
    'activations.scale': 'rms',
    'activations.max_norm': 0.0,
    **changes,
  }
  return runs.small(folder, **changes)


def test_a_run_on_the_new_sites(tmp_path, monkeypatch):
  # Controls of small SAEs need no more.
  monkeypatch.setattr(batches, '_SAMPLE_TOKENS', 1024)
  config, run = config_of(tmp_path), tmp_path / 'run'
  assert pipeline.run(config, run, lambda line: None)
  cards = {}
  for sae in session.Session(run, report=lambda _: None).saes:
    cards[sae.card['sites'][0]] = sae.card
    assert sae.metrics['l0']['value'] > 0
  assert set(cards) == set(SITES)
  widths = {site: card['d_in'] for site, card in cards.items()}
  assert widths == {
    'ple_out/1': 16,
    'experts_out/1': 16,
    'router_logits/0': 8,
    'attn_out/2': 4 * 16,
  }
  assert 'experts_out' in (run / 'release' / 'README.md').read_text()
  scope = session.Session(run, report=lambda _: None)
  scope.build(16, 8, lambda: None, label=False)
  for sae in scope.saes:
    assert scope.index(sae).density_F.sum() > 0
  with pytest.raises(release.ReleaseError, match='no name'):
    export.write(tmp_path / 'saelens', scope.saes, 'saelens')
  export.write(tmp_path / 'gemma_scope_2', scope.saes, 'gemma_scope_2')
  hooks = {
    json.loads(path.read_text())['hf_hook_point_in']
    for path in (tmp_path / 'gemma_scope_2').rglob('config.json')
  }
  assert 'model.layers.1.post_per_layer_input_norm.output' in hooks
  assert 'model.layers.0.router.proj.output' in hooks


def test_what_the_model_lacks_is_refused_before_the_run(tmp_path):
  config = config_of(tmp_path, **{'collection.sites': ('ple_out/1',)})
  dense = random_models.GEMMA4_DENSE
  with pytest.raises(config_lib.ConfigError, match='without per-layer inputs'):
    config_lib.check(config, dense)
  config = config_of(
    tmp_path,
    **{
      'collection.layers': (1, 2),
      'collection.sites': ('attn_out',),
      'collection.type': 'crosscoder',
      'collection.architectures': ('jumprelu',),
    },
  )
  with pytest.raises(config_lib.ConfigError, match='attn_out of .* 32 and 64'):
    config_lib.check(config, MODEL)
