"""Hook names of other tools, and folders of SAEs that have them, of Gemma 4."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_scope import files, release
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import gemma4
from gemma_scope.release.formats import hook_points, model_names, published
from tests.helpers import peer_formats

D, F = peer_formats.D, peer_formats.F


@pytest.mark.parametrize(
  'name, site',
  [
    ('blocks.3.hook_resid_post', 'resid_post/3'),
    ('blocks.3.hook_resid_mid', 'resid_mid/3'),
    ('blocks.3.hook_mlp_out', 'mlp_out/3'),
    ('blocks.3.ln2_post.hook_out', 'mlp_out/3'),
    ('blocks.3.hook_out', 'resid_post/3'),
    ('blocks.3.ln2.hook_out', 'mlp_in/3'),
    ('blocks.3.attn.hook_z', 'attn_out/3'),
    ('blocks.3.post_per_layer_input_norm.hook_out', 'ple_out/3'),
    ('layers.3', 'resid_post/3'),
    ('layers.3.mlp', 'mlp_raw/3'),
    ('language_model.layers.3', 'resid_post/3'),
    ('language_model.layers.3.mlp', 'mlp_raw/3'),
    ('language_model.model.layers.3.mlp', 'mlp_raw/3'),
    ('model.language_model.layers.3', 'resid_post/3'),
    ('model.language_model.layers.3.output', 'resid_post/3'),
    ('model.language_model.layers.3.self_attn.o_proj.input', 'attn_out/3'),
    ('model.language_model.layers.3.post_feedforward_layernorm', 'mlp_out/3'),
    ('layers.3.post_per_layer_input_norm', 'ple_out/3'),
    ('model.layers.3.router.proj', 'router_logits/3'),
    ('model.layers.3.post_feedforward_layernorm_2', 'experts_out/3'),
  ],
)
def test_hook_names_are_sites(name, site):
  assert str(hook_points.parse(name, 'gemma4-e2b')) == site


@pytest.mark.parametrize(
  'name',
  ['blocks.3.hook_pos_embed', 'blocks.3.mlp.hook_post', 'layers.3.router',
   'model.vision_tower.layers.3', 'model.model.model.layers.3', 'layers.x',
   'layers.3.per_layer_input_gate', 'language_model.norm', 'hook_embed', ''],
)  # fmt: skip
def test_other_names_are_refused_by_name(name):
  with pytest.raises(files.Refused, match='no site of Gemma') as refusal:
    hook_points.parse(name, 'gemma4-e2b')
  assert files.show(name) in str(refusal.value)


def test_the_dense_branch_of_a_mixture_is_no_site():
  for model in ('gemma4-26b-a4b', 'google/gemma-4-26B-A4B-it'):
    for name in (
      'layers.3.mlp',
      'blocks.3.mlp.hook_out',
      'layers.3.mlp.output',
    ):
      with pytest.raises(files.Refused, match='mixture of experts'):
        hook_points.parse(name, model)
    assert str(hook_points.parse('layers.3.mlp.input', model)) == 'mlp_in/3'
    assert str(hook_points.parse('layers.3', model)) == 'resid_post/3'


@pytest.mark.parametrize(
  'theirs, ours',
  [
    ('google/gemma-4-E2B', 'gemma4-e2b'),
    ('google/gemma-4-E4B-it', 'gemma4-e4b-it'),
    ('gemma-4-31B', 'gemma4-31b'),
    ('google/gemma-4-26B-A4B-it', 'gemma4-26b-a4b-it'),
    ('gemma-3-1b-pt', 'gemma3-1b'),
    ('gemma-2-2b', 'gemma2-2b'),
    ('gemma3-1b', 'gemma3-1b'),
    ('someone/gemma-4-E2B-tuned', 'someone/gemma-4-E2B-tuned'),
    ('someone/gemma-4-E2B', 'someone/gemma-4-E2B'),
    ('gpt2', 'gpt2'),
    ('', ''),
  ],
)
def test_a_models_name_is_ours(theirs, ours):
  assert model_names.ours(theirs) == ours


def test_names_of_gemma_4_are_those_that_load():
  sizes = [n for n, c in lm.SIZES.items() if isinstance(c, gemma4.Config)]
  assert len(sizes) >= 4
  for name in sizes:
    assert model_names.ours(model_names.to_hugging_face(name)) == name


def params():
  made, _ = peer_formats.make_member('jumprelu')
  return made


def test_a_folder_of_saelens(tmp_path):
  """As SAELens writes one that it trained on transformers' own model."""
  p = params()
  save_file(p, tmp_path / 'sae_weights.safetensors')
  config = {
    'architecture': 'jumprelu', 'd_in': D, 'd_sae': F, 'dtype': 'float32',
    'apply_b_dec_to_input': False, 'normalize_activations': 'none',
  }  # fmt: skip
  for hook, model, site in (
    ('blocks.3.hook_resid_post', 'google/gemma-4-E2B', 'resid_post/3'),
    ('model.language_model.layers.3', 'google/gemma-4-E2B', 'resid_post/3'),
    ('blocks.3.hook_mlp_out', 'google/gemma-4-26B-A4B', 'mlp_out/3'),
  ):
    metadata = {'model_name': model, 'hook_name': hook, 'sae_lens_version': '6'}
    (tmp_path / 'cfg.json').write_text(
      json.dumps(config | {'metadata': metadata})
    )
    found, card = published.load(str(tmp_path))
    assert card['sites'] == card['targets'] == [site]
    assert card['model'] == model_names.of_hugging_face(model)
    assert card['model'] in lm.SIZES
    peer_formats.same(found, p)
  metadata['hook_name'] = 'blocks.3.mlp.hook_out'
  (tmp_path / 'cfg.json').write_text(
    json.dumps(config | {'metadata': metadata})
  )
  with pytest.raises(release.ReleaseError, match='mixture of experts'):
    published.load(str(tmp_path))


def of_sparsify(folder, transcode=False):
  p = params()
  folder.mkdir(parents=True)
  arrays = {
    'encoder.weight': np.ascontiguousarray(p['W_enc'].T),
    'encoder.bias': p['b_enc'], 'W_dec': p['W_dec'], 'b_dec': p['b_dec'],
  }  # fmt: skip
  save_file(arrays, folder / 'sae.safetensors')
  config = {'d_in': D, 'num_latents': F, 'k': 4, 'transcode': transcode}
  (folder / 'cfg.json').write_text(json.dumps(config))
  return str(folder)


def test_a_run_of_sparsify(tmp_path):
  """Modules by their path; the model by the run's own config, where it is."""
  run = tmp_path / 'run'
  residual = of_sparsify(run / 'language_model.layers.3')
  seeded = of_sparsify(run / 'layers.4' / 'seed1')
  mlp = of_sparsify(run / 'language_model.layers.3.mlp', transcode=True)
  assert published.open_sae(residual).card['model'] == ''
  (run / 'config.json').write_text(json.dumps({'model': 'google/gemma-4-E2B'}))
  for folder, sites, targets in (
    (residual, ['resid_post/3'], ['resid_post/3']),
    (seeded, ['resid_post/4'], ['resid_post/4']),
    (mlp, ['mlp_in/3'], ['mlp_raw/3']),
  ):
    card = published.open_sae(folder).card
    assert (card['sites'], card['targets']) == (sites, targets)
    assert card['model'] == 'gemma4-e2b' and card['sparsity']['value'] == 4
  np.testing.assert_array_equal(
    published.load(seeded)[0]['W_dec'], params()['W_dec']
  )
  (run / 'config.json').write_text('{"model": "google/gemma-4-26B-A4B"}')
  with pytest.raises(release.ReleaseError, match='mixture of experts'):
    published.open_sae(mlp)
  other = of_sparsify(run / 'layers.3.router')
  with pytest.raises(release.ReleaseError, match=r"'layers\.3\.router', which"):
    published.open_sae(other)


def test_saes_of_another_model_are_noted():
  note = model_names.note_of_others
  assert note([{'model': 'google/gemma-2-2b'}, {}], 'gemma2-2b') == ''
  others = [{'model': 'gemma2-2b'}, {'model': 'gemma-2-2b'}, {'model': 'tiny'}]
  assert note(others, 'tiny') == 'note: SAEs of gemma2-2b run on tiny'
