"""SAEs in the forms of others: read, written, held to what the peers compute.

The fixtures are written by tests/format_fixtures/make.py; where another Python
has the peers, GEMMA_SCOPE_PEER_PYTHON names it and all is done again, live.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_scope import release, sae, sites
from gemma_scope.release.formats import gemma_scope_2, published, saelens
from tests.helpers.peer_formats import (
  D,
  for_saelens,
  gemma_scope_1_folder,
  make_member,
  rows,
  same,
)

FIXTURES = pathlib.Path(__file__).parent / 'format_fixtures'
PEER = os.environ.get('GEMMA_SCOPE_PEER_PYTHON', '')


def fixtures(root: pathlib.Path = FIXTURES) -> list[pathlib.Path]:
  return sorted(path.parent for path in root.rglob('expected.npz'))


def difference(folder: pathlib.Path, params) -> float:
  """Largest difference of latents and reconstruction, over the largest."""
  with np.load(folder / 'expected.npz') as file:
    x, f, y = (file[key] for key in 'xfy')
  found_f = np.asarray(sae.encode(params, x))
  found_y = np.asarray(sae.decode(params, found_f, x))
  assert 0 < (f > 0).mean() < 0.9
  np.testing.assert_array_equal(found_f > 0, f > 0)
  return max(
    np.abs(found_f - f).max() / np.abs(f).max(),
    np.abs(found_y - y).max() / np.abs(y).max(),
  )


def name_of(folder: pathlib.Path) -> str:
  return folder.relative_to(FIXTURES).parts[0]


@pytest.mark.parametrize('folder', fixtures(), ids=name_of)
def test_what_peers_wrote_acts_as_they_do(folder):
  params, card = published.load(str(folder))
  assert difference(folder, params) < 1e-5
  place = sites.wiring_of(card)
  assert place.sites[0].layer == 3
  if 'transcoder' in str(folder) or 'skip' in str(folder):
    assert place.type == 'transcoder' and place.sites != place.targets
  else:
    assert place.type == 'sae'


@pytest.mark.skipif(
  not PEER, reason='GEMMA_SCOPE_PEER_PYTHON names no Python with the peers'
)
def test_peers_live(tmp_path):
  make = str(FIXTURES / 'make.py')
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  run = lambda *more: subprocess.run(
    [PEER, make, *map(str, more)], check=True, env=environment
  )
  theirs = tmp_path / 'theirs'
  theirs.mkdir()
  run(theirs)
  for folder in fixtures(theirs):
    found = difference(folder, published.load(str(folder))[0])
    print(f'read   {folder.relative_to(theirs).parts[0]:36s} {found:.1e}')
    assert found < 1e-5
  ours = []
  for kind in KINDS:
    if 'several' in kind:
      continue
    params, card = for_saelens(kind)
    folder = tmp_path / kind.replace(' ', '_')
    saelens.write(folder, params, card)
    np.savez(folder / 'x.npz', x=2 * rows(len(ours), 64, D))
    ours.append((kind, folder, params, card))
  run('--apply', *(folder for _, folder, *_ in ours))
  for kind, folder, params, card in ours:
    found = difference(folder, params)
    print(f'wrote  {kind:36s} {found:.1e}')
    assert found < 1e-5
    loaded = json.loads((folder / 'loaded.json').read_text())
    metadata = loaded['metadata']
    assert metadata['model_name'] == 'gemma-3-1b-pt'
    if card['type'] == 'transcoder':
      assert metadata['hook_name'] == 'blocks.3.ln2.hook_normalized'
      assert metadata['hook_name_out'] == 'blocks.3.hook_mlp_out'
      continue
    assert metadata['hook_name'] == 'blocks.3.hook_resid_post'
    evals = loaded['evals']  # its run_evals, to the end
    l0 = evals['sparsity']['l0']
    assert (
      l0 == params['k'] if kind == 'topk' else 0 < l0 < params['b_enc'].size
    )
    assert evals['model_performance_preservation']['ce_loss_with_sae'] > 0


# Ours, in every form.


KINDS = ['jumprelu', 'topk', 'transcoder', 'skip', 'several', 'several skip']


@pytest.mark.parametrize('kind', KINDS)
def test_gemma_scope_2_round_trip_is_exact(kind, tmp_path):
  params, card = make_member(kind)
  folder = tmp_path / 'clt' / 'width_32_l0_big'
  if kind == 'topk':
    with pytest.raises(ValueError, match='has thresholds alone'):
      gemma_scope_2.write(folder, params, card, 10.0)
    assert not folder.exists()
    return
  gemma_scope_2.write(folder, params, card, 10.0)
  found, of = published.load(str(folder))
  same(params, found)
  kept = ('type', 'sites', 'targets', 'd_in', 'd_out', 'width', 'model')
  assert {k: of[k] for k in kept} == {k: card[k] for k in kept}
  assert of['sparsity'] == {'kind': 'target_l0', 'value': 10.0}
  if 'skip' in kind:  # as published: x @ it, with no transpose
    file = 'params_layer_0' if 'several' in kind else 'params'
    stored = load_file(folder / f'{file}.safetensors')
    wanted = params['W_skip'][0] if 'several' in kind else params['W_skip']
    np.testing.assert_array_equal(stored['affine_skip_connection'], wanted)


@pytest.mark.parametrize('kind', KINDS)
def test_saelens_round_trip_is_exact(kind, tmp_path):
  params, card = for_saelens(kind)
  if 'several' in kind:
    with pytest.raises(ValueError, match='single layers alone'):
      saelens.write(tmp_path / 'out', params, card)
    return
  saelens.write(tmp_path / 'out', params, card)
  found, of = published.load(str(tmp_path / 'out'))
  same(params, found)
  assert (of['sites'], of['targets']) == (card['sites'], card['targets'])
  # SAELens takes a config without a version for an old one, and drops these.
  metadata = json.loads((tmp_path / 'out/cfg.json').read_text())['metadata']
  assert metadata['sae_lens_version'] == saelens.VERSION
  assert metadata['model_name'] == 'gemma-3-1b-pt'


def test_latents_of_several_layers_never_write_to_earlier_ones(tmp_path):
  """What the files hold there means nothing, and is not read."""
  params, card = make_member('several')
  gemma_scope_2.write(tmp_path / 'clt', params, card, None)
  file = tmp_path / 'clt' / 'params_layer_2.safetensors'
  stored = load_file(file)
  stored['w_dec'][:, :2] = 7
  save_file(stored, file)
  same(params, published.load(str(tmp_path / 'clt'))[0])


# Gemma Scope 1, by its paths.


@pytest.mark.parametrize(
  'path, type_, site, target, model',
  [
    ('gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71', 'sae',
     'resid_post/20', 'resid_post/20', 'gemma2-2b'),
    ('gemma-scope-2b-pt-mlp/layer_0/width_65k/average_l0_72', 'sae',
     'mlp_out/0', 'mlp_out/0', 'gemma2-2b'),
    ('gemma-scope-9b-pt-att/layer_41/width_131k/canonical', 'sae',
     'attn_out/41', 'attn_out/41', 'gemma2-9b'),
    ('gemma-scope-2b-pt-transcoders/layer_4/width_16k/average_l0_88',
     'transcoder', 'mlp_in_ungained/4', 'mlp_out/4', 'gemma2-2b'),
    ('gemma-scope-9b-it-res/layer_9/width_16k/average_l0_88', 'sae',
     'resid_post/9', 'resid_post/9', 'gemma2-9b-it'),
  ],
)  # fmt: skip
@pytest.mark.parametrize('lower', [False, True])
def test_gemma_scope_1_says_all_in_its_path(
  path, type_, site, target, model, lower, tmp_path
):
  folder, params = gemma_scope_1_folder(tmp_path, path, lower)
  found, card = published.load(folder)
  same(params, found)
  assert (card['type'], card['model']) == (type_, model)
  assert (card['sites'], card['targets']) == ([site], [target])
  assert published.listed(str(tmp_path))[0].path == path


def test_an_sae_of_the_embedding_reads_the_scaled_one(tmp_path):
  """Trained on the embedding e, it acts on e sqrt(d) as it did on e."""
  path = 'gemma-scope-2b-pt-res/embedding/width_4k/average_l0_44'
  folder, params = gemma_scope_1_folder(tmp_path, path)
  found, card = published.load(folder)
  assert card['sites'] == ['resid_pre/0']
  x = rows(0, 16, D)
  f = sae.encode(params, x)
  scaled = np.float32(D**0.5)
  np.testing.assert_allclose(sae.encode(found, scaled * x), f, rtol=1e-5)
  np.testing.assert_allclose(
    sae.decode(found, f), scaled * sae.decode(params, f), rtol=1e-5, atol=1e-5
  )


def test_a_path_that_does_not_say_what_it_is_of(tmp_path):
  folder, _ = gemma_scope_1_folder(tmp_path, 'download/layer_20')
  with pytest.raises(release.ReleaseError, match='keep the published folders'):
    published.load(folder)


# Ladders of google/gemma-scope-2b-pt-res, and which is called canonical.
LADDERS = {
  'layer_12/width_16k': ([22, 41, 82, 176, 445], 82),
  'layer_12/width_65k': ([21, 38, 72, 141, 297], 72),
  'layer_12/width_262k': ([11, 21, 36, 67, 121, 243], 121),
  'layer_12/width_524k': ([22, 29, 46, 65, 115, 227], 115),
  'layer_12/width_1m': ([19, 26, 58, 73, 107, 207], 107),
  'layer_20/width_16k': ([22, 38, 71, 139, 294], 71),
  'layer_20/width_65k': ([20, 34, 61, 114, 221], 114),
  'layer_5/width_1m': ([9, 13, 21, 36, 63, 114], 114),
  'layer_19/width_1m': ([16, 18, 29, 50, 88, 157], 88),
}


@pytest.mark.parametrize('folder', LADDERS)
def test_canonical_is_the_one_nearest_100(folder, tmp_path):
  ladder, wanted = LADDERS[folder]
  paths = [f'{folder}/average_l0_{l0}' for l0 in ladder]
  assert published.canonical(paths) == f'{folder}/average_l0_{wanted}'
  root = tmp_path / 'gemma-scope-2b-pt-res'
  for path in paths:
    gemma_scope_1_folder(root, path)
  _, card = published.load(str(root / folder / 'canonical'))
  assert card['sparsity']['value'] == wanted


def test_canonical_of_what_has_no_l0():
  with pytest.raises(ValueError, match='no canonical'):
    published.canonical(['resid_post/layer_1_width_16k_l0_medium'])


def test_a_list_has_a_line_an_sae(tmp_path):
  params, card = make_member('jumprelu')
  for name in (
    'resid_post/layer_7_width_16k_l0_medium',
    'clt/width_262k_l0_big',
  ):
    gemma_scope_2.write(tmp_path / name, params, card, 60)
  gemma_scope_1_folder(tmp_path, 'layer_20/width_1m/average_l0_7')
  lines = published.table(published.listed(str(tmp_path))).splitlines()
  assert [line.split() for line in lines] == [
    ['layer', 'width', 'L0', 'path'],
    ['20', '1m', '7', 'layer_20/width_1m/average_l0_7'],
    ['262k', 'big', 'clt/width_262k_l0_big'],
    ['7', '16k', 'medium', 'resid_post/layer_7_width_16k_l0_medium'],
  ]
  (tmp_path / 'none').mkdir()
  with pytest.raises(release.ReleaseError, match='holds no SAE'):
    published.listed(str(tmp_path / 'none'))


# What is not as it should be.


def _edited(tmp_path, change):
  params, card = make_member('jumprelu')
  saelens.write(tmp_path / 'out', params, card)
  config = json.loads((tmp_path / 'out/cfg.json').read_text())
  stored = load_file(tmp_path / 'out/sae_weights.safetensors')
  change(config, stored)
  (tmp_path / 'out/cfg.json').write_text(json.dumps(config))
  stored = {k: np.ascontiguousarray(v) for k, v in stored.items()}
  save_file(stored, tmp_path / 'out/sae_weights.safetensors')
  return str(tmp_path / 'out')


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda c, w: c.update(architecture='abstopk'), 'of architecture'),
    (lambda c, w: c.update(normalize_activations='layer_norm'), 'no affine'),
    (
      lambda c, w: c.update(normalize_activations='expected_average_only_in'),
      'neither in it',
    ),
    (lambda c, w: c['metadata'].update(hook_name='blocks.3.x'), 'no site'),
    (lambda c, w: w.pop('b_dec'), 'lacks b_dec'),
    (
      lambda c, w: w.update(more=w['b_dec']),
      'no parameter that this reader knows',
    ),
    (lambda c, w: w.update(W_dec=w['W_dec'].T), 'transposed'),
    (
      lambda c, w: w.update(W_enc=w['W_enc'][:-1]),
      "has d_in 11, and cfg.json says d_in = '12'",
    ),
    (lambda c, w: w.update(b_enc=w['b_enc'].astype(np.int32)), 'in I32'),
    (lambda c, w: w.update(b_enc=w['b_enc'] * np.nan), 'not finite'),
  ],
)
def test_what_does_not_fit_is_one_sentence(change, words, tmp_path):
  folder = _edited(tmp_path, change)
  with pytest.raises(release.ReleaseError, match=words) as refusal:
    published.load(folder)
  assert '\n' not in str(refusal.value)


def test_a_scale_of_the_activations_is_folded_in(tmp_path):
  scale = 0.37
  params, _ = make_member('jumprelu')
  folder = _edited(
    tmp_path,
    lambda c, w: c.update(
      normalize_activations='expected_average_only_in',
      norm_scaling_factor=scale,
    ),
  )
  found, _ = published.load(folder)
  x = rows(0, 32, D)
  f = sae.encode(params, np.float32(scale) * x)
  np.testing.assert_allclose(sae.encode(found, x), f, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    sae.decode(found, f), sae.decode(params, f) / scale, rtol=1e-4, atol=1e-5
  )


def test_a_pickle_is_not_read(tmp_path):
  (tmp_path / 'ae.pt').write_bytes(b'cos\nsystem\n(S"touch x"\ntR.')
  with pytest.raises(release.ReleaseError, match='is a pickle'):
    published.load(str(tmp_path))
  assert [p.name for p in tmp_path.iterdir()] == ['ae.pt']
