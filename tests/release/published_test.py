"""Opening of SAEs: cards without parameters, names, paths that are misspelt."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_scope import release
from gemma_scope.release import npz
from gemma_scope.release.formats import (
  export,
  gemma_scope_2,
  published,
  saelens,
  tensors,
)
from tests.helpers import peer_formats, releases

FIXTURES = pathlib.Path(__file__).parent / 'format_fixtures'


def sae_folder(name: str) -> pathlib.Path:
  """The folder of a fixture."""
  return next((FIXTURES / name).rglob('expected.npz')).parent


def a_release(root: pathlib.Path) -> pathlib.Path:
  params, card = peer_formats.make_member('jumprelu')
  more = card | {'name': 'other', 'sites': ['mlp_out/3']}
  more['targets'] = more['sites']
  releases.save(root, [(params, card, {'l0': 5.0}), (params, more)])
  return root


@pytest.mark.parametrize(
  'name', ['saelens_topk', 'sparsify_skip', 'dictionary_BatchTopKSAE', 'ours']
)
def test_a_card_is_read_without_parameters(name, tmp_path, monkeypatch):
  path = a_release(tmp_path / 'out') if name == 'ours' else sae_folder(name)

  def refuse(*unused, **also):
    raise AssertionError('parameters were read')

  with monkeypatch.context() as patch:
    patch.setattr(tensors, 'read', refuse)
    patch.setattr(npz, 'read', refuse)
    saes = published.open_all(str(path))
    sizes = [sae.nbytes for sae in saes]
  for sae, size in zip(saes, sizes, strict=True):
    params = sae.load()
    shapes = {key: array.shape for key, array in params.items()}
    assert shapes['W_enc'] == (sae.card['d_in'], sae.card['width'])
    assert shapes['b_dec'] == (sae.card['d_out'],)
    assert ('W_skip' in params) is sae.card.get('affine', False)
    assert 0 <= size - sum(a.nbytes for a in params.values()) <= 4  # k


def test_equal_names_are_told_apart_by_their_releases(tmp_path):
  first, second = (a_release(tmp_path / name / 'release') for name in 'ab')
  saes = published.open_all(f'{first},{second}')
  assert sorted(sae.name for sae in saes) == [
    'a/release/jumprelu',
    'a/release/other',
    'b/release/jumprelu',
    'b/release/other',
  ]
  (one, *_) = published.open_all(str(first))
  assert one.name == one.card['name']
  (alone,) = published.open_all(f'{first}/{one.path}')
  assert (alone.path, alone.metrics) == (one.path, one.metrics)
  with pytest.raises(release.ReleaseError, match='given twice'):
    published.open_all(f'{first},{first}')


def test_a_misspelt_folder_gets_a_suggestion(tmp_path, monkeypatch):
  a_release(tmp_path / 'runs' / 'tiny' / 'release')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  for path, near in {
    'runs/tiny/relase': 'runs/tiny/release',
    'runs/tini/release': 'runs/tiny/release',
    'rnus/tiny/release': 'runs/tiny/release',
    f'{tmp_path}/runs/tiny/relase': f'{tmp_path}/runs/tiny/release',
  }.items():
    with pytest.raises(release.ReleaseError) as refusal:
      published.open_all(path)
    expected = f"There is no folder '{path}'. Did you mean '{near}'?"
    assert str(refusal.value) == expected
  with pytest.raises(release.ReleaseError, match='^There is no folder'):
    published.open_all('runs/other/x')
  with pytest.raises(release.ReleaseError, match='is a file; give the folder'):
    published.open_all('runs/tiny/release/README.md')
  assert len(published.open_all('~/runs/tiny/release')) == 2


def test_a_file_of_an_sae_stands_for_its_folder(tmp_path):
  path = 'gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71'
  folder, params = peer_formats.gemma_scope_1_folder(tmp_path, path)
  sae = published.open_sae(f'{folder}/params.npz')
  assert sae.card['sites'] == ['resid_post/20'] and sae.name == path
  peer_formats.same(sae.load(), params)
  for name in ('cfg.json', 'sae_weights.safetensors'):
    sae = published.open_sae(str(sae_folder('saelens_topk') / name))
    assert sae.card['architecture'] == 'topk'


def test_a_file_without_a_card_is_what_its_user_says(tmp_path):
  folder, params = peer_formats.gemma_scope_1_folder(tmp_path, 'mine')
  with pytest.raises(release.ReleaseError, match='--site=resid_post/20'):
    published.open_sae(folder)
  about = {'sites': ['resid_post/2'], 'targets': ['resid_post/2']}
  about['model'] = 'gemma3-1b'
  sae = published.open_sae(folder, about=about)
  peer_formats.same(sae.load(), params)
  assert sae.card['type'] == 'sae' and sae.card['model'] == 'gemma3-1b'
  about |= {'sites': ['mlp_in/2'], 'targets': ['mlp_out/2']}
  assert published.open_sae(folder, about=about).wiring.type == 'transcoder'


def test_the_folder_of_one_sae_is_listed(tmp_path):
  path = 'gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71'
  folder, _ = peer_formats.gemma_scope_1_folder(tmp_path, path)
  assert published.listed(folder) == [published.Entry('.', '20', '16k', '71')]


def test_nothing_published_has_folders_of_this_machine(tmp_path):
  params, card = peer_formats.make_member('jumprelu')
  card['text'] = {'source': 'files:/home/me/texts/*.txt', 'sha256': 'ab'}
  card |= {'initialised_from': '/home/me/saes,google/x', 'name': '/home/me/sae'}
  releases.save(tmp_path / 'out', [(params, card, {'l0': 5.0})])
  (sae,) = release.load_all(tmp_path / 'out')
  assert sae.card['text']['source'].startswith('files:*.txt (path sha256 ')
  assert sae.card['initialised_from'].endswith(',google/x')
  # A release of version 0.3 has the paths, and what is made of it has not.
  config = tmp_path / 'out' / sae.path / 'config.json'
  alone = tmp_path / 'alone'
  alone.mkdir()
  (alone / 'config.json').write_text(json.dumps(card))
  (alone / 'params.npz').write_bytes(
    (config.parent / 'params.npz').read_bytes()
  )
  source = published.open_sae(str(alone)).card['text']['source']
  assert source == sae.card['text']['source']
  export.write(tmp_path / 'gs2', [sae], 'gemma_scope_2')
  for path in (*(tmp_path / 'out').rglob('*'), *(tmp_path / 'gs2').rglob('*')):
    assert path.is_dir() or b'/home/me' not in path.read_bytes(), path


# Fields of other tools' configs.


def config_of(tmp_path, name: str, change):
  """A fixture's folder with another config."""
  source, target = sae_folder(name), tmp_path / sae_folder(name).name
  target.mkdir()
  for path in source.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  for path in target.glob('c*.json'):  # cfg.json, config.json
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
  return str(target)


@pytest.mark.parametrize(
  'name, change, words',
  [
    (
      'saelens_topk',
      {'architecture': 'batchtopk', 'topk_threshold_lr': 0.01},
      "architecture 'batchtopk'",
    ),
    ('saelens_topk', {'twist': 1}, "the field 'twist', which SAELens"),
    ('saelens_v3_topk', {'activation_fn_str': 'tanh-relu'}, "'tanh-relu'"),
    (
      'saelens_v3_topk',
      {'activation_fn_kwargs': {'k': 5, 'postact': 'id'}},
      'only k can be read',
    ),
    ('saelens_v5_jumprelu', {'activation_fn_str': 'topk'}, "'topk'"),
    ('saelens_v3_topk', {'hook_head_index': 2}, 'one attention head'),
    ('saelens_v3_topk', {'finetuning_scaling_factor': True}, 'finetuning'),
    (
      'saelens_v3_topk',
      {'normalize_activations': 'constant_norm_rescale'},
      'no affine map',
    ),
    ('saelens_v3_topk', {'normalize_activations': True}, 'neither in it'),
    ('saelens_v3_topk', {'apply_b_dec_to_input': 'yes'}, 'apply_b_dec'),
    ('saelens_v3_topk', {'reshape_activations': 'hook_z'}, 'reshape'),
    ('saelens_v3_topk', {'d_sae': 31}, "d_sae = '31'"),
    ('sparsify_sae', {'signed': True}, 'signed latents'),
    ('sparsify_sae', {'activation': 'groupmax'}, 'only topk'),
    ('sparsify_sae', {'twist': 1}, "the field 'twist', which sparsify"),
    ('sparsify_sae', {'num_latents': 31}, '31 of'),
    ('sparsify_sae', {'transcode': 'no'}, "transcode = 'no'"),
  ],
)
def test_a_field_is_used_or_refused_by_name(name, change, words, tmp_path):
  folder = config_of(tmp_path, name, lambda config: config.update(change))
  with pytest.raises(release.ReleaseError, match=words) as refusal:
    published.open_sae(folder)
  text = str(refusal.value)
  assert text.endswith('.') and '\n' not in text and 'cfg.json' in text


@pytest.mark.parametrize(
  'change, words',
  [
    ({'twist': 1}, "the field 'twist', which dictionary_learning"),
    ({'dict_class': 'AutoEncoderNew'}, "dict_class 'AutoEncoderNew'"),
    ({'submodule_name': 'x'}, "submodule 'x'"),
  ],
)
def test_a_field_of_a_trainer_is_used_or_refused(change, words, tmp_path):
  name = 'dictionary_BatchTopKSAE'
  folder = config_of(tmp_path, name, lambda c: c['trainer'].update(change))
  with pytest.raises(release.ReleaseError, match=words):
    published.open_sae(folder)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'twist': 1}, "the field 'twist', which Gemma Scope 2"),
    ({'width': 31}, "width = '31'"),
    ({'width': '16k'}, "width = '16k'"),
    ({'affine_connection': True}, "affine_connection = 'True'"),
    ({'affine_connection': 'no'}, "affine_connection = 'no'"),
    ({'l0': 'medium'}, "l0 = 'medium'"),
    ({'architecture': 'topk'}, "'topk'"),
    ({'type': 'sae_2'}, "'sae_2'"),
    ({'model_name': 'llama'}, 'no Gemma'),
    ({'hf_hook_point_out': 'model.embed'}, "'model.embed'"),
  ],
)
def test_a_field_of_gemma_scope_2_is_used_or_refused(change, words, tmp_path):
  params, card = peer_formats.make_member('jumprelu')
  folder = tmp_path / 'sae'
  gemma_scope_2.write(folder, params, card | {'model': 'gemma3-1b'}, 20.0)
  assert published.open_sae(str(folder)).card['sparsity']['value'] == 20.0
  config = json.loads((folder / 'config.json').read_text())
  for field in ('width', 'affine_connection', 'l0'):  # may be left out
    tensors.write_json(
      folder / 'config.json', {k: v for k, v in config.items() if k != field}
    )
    published.open_sae(str(folder))
  tensors.write_json(folder / 'config.json', config | change)
  with pytest.raises(release.ReleaseError, match=words) as refusal:
    published.open_sae(str(folder))
  assert str(refusal.value).endswith('.') and '\n' not in str(refusal.value)


def test_an_early_topk_has_its_k_in_the_config_alone(tmp_path):
  name = 'dictionary_AutoEncoderTopK'
  folder = pathlib.Path(config_of(tmp_path, name, lambda config: None))
  weights = load_file(folder / 'ae.safetensors')
  k = weights.pop('k')
  save_file(weights, folder / 'ae.safetensors')
  assert published.load(str(folder))[0]['k'] == k
  save_file(weights | {'k': np.array(k + 1)}, folder / 'ae.safetensors')
  with pytest.raises(release.ReleaseError, match='k = '):
    published.load(str(folder))


def test_a_scale_that_is_not_one_is_refused(tmp_path):
  name = 'saelens_v2_standard'
  folder = pathlib.Path(config_of(tmp_path, name, lambda config: None))
  weights = load_file(folder / saelens.WEIGHTS)
  published.load(str(folder))
  scaled = {'scaling_factor': 2 * weights['scaling_factor']}
  save_file(weights | scaled, folder / saelens.WEIGHTS)
  with pytest.raises(release.ReleaseError, match='scaling_factor'):
    published.load(str(folder))


def test_widths_that_are_no_power_of_two_have_names_of_their_own(tmp_path):
  params, card = peer_formats.make_member('jumprelu')

  def of_width(width):
    shapes = {'b_enc': width, 'threshold': width}
    made = {k: np.zeros(n, np.float32) for k, n in shapes.items()}
    made['W_enc'] = np.zeros((card['d_in'], width), np.float32)
    made['W_dec'] = made['W_enc'].T.copy()
    made['b_dec'] = params['b_dec']
    return made, card | {'width': width, 'name': str(width)}, {'l0': 3.0}

  releases.save(tmp_path / 'out', [of_width(1024), of_width(1536)])
  paths = [sae.path for sae in release.load_all(tmp_path / 'out')]
  start = 'resid_post/layer_3/width_'
  assert paths == [f'{start}{n}/average_l0_3' for n in ('1k', '1536')]
  # A folder that version 0.3 named by thousands is read.
  above = tmp_path / 'old' / 'resid_post' / 'layer_3' / 'width_1k'
  above.mkdir(parents=True)
  (tmp_path / 'out' / paths[1]).rename(above / 'average_l0_3')
  assert release.load(above / 'average_l0_3')[1]['width'] == 1536
