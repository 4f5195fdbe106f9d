"""Transcoders, crosscoders and CLTs in a release: exact, or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_scope import release, sites
from gemma_scope.release import frontier, paths, table
from gemma_scope.release.formats import export
from tests.helpers import releases

D, OUT, F = 8, 6, 12


def params_of(card, skip=False, k=0, seed=0):
  """Random parameters of the shapes that a card asks for."""
  rng = np.random.default_rng(seed)
  layers = len(card['sites'])
  lead = (layers,) * (card['type'] in ('crosscoder', 'clt'))
  width = card['width'] // layers
  shapes = {
    'W_enc': (*lead, card['d_in'], width),
    'b_enc': (*lead, width),
    'W_dec': (*lead, width, *lead, card['d_out']),
    'b_dec': (*lead, card['d_out']),
    'threshold': (*lead, width),
  }
  if skip:
    shapes['W_skip'] = (*lead, card['d_in'], card['d_out'])
  params = {
    key: rng.uniform(0.1, 1, shape).astype(np.float32)
    for key, shape in shapes.items()
  }
  if lead:
    later = np.triu(np.ones((layers, layers), np.float32))
    params['W_dec'] *= later[:, None, :, None]
  if k:
    params['k'] = np.float32(k)
  return params


def card_of(kind, reads, writes=None, layers=(2,), d_out=D, **more):
  at = {'sites': reads, 'targets': writes or reads}
  return {
    'name': f'{kind}/{reads}/{layers}/{more}',
    'type': kind,
    **{key: [f'{site}/{n}' for n in layers] for key, site in at.items()},
    'model': 'tiny',
    'architecture': 'jumprelu',
    'd_in': D,
    'd_out': d_out,
    'width': F * len(layers),
    'sparsity': {'kind': 'target_l0', 'value': 5.0},
    'seed': 0,
    **more,
  }


TRANSCODER = card_of('transcoder', 'mlp_in', 'mlp_out', d_out=OUT)
CROSSCODER = card_of('crosscoder', 'resid_post', layers=(1, 3, 4))
CLT = card_of('clt', 'mlp_in', 'mlp_out', layers=tuple(range(6)), d_out=OUT)
CASES = {
  'sae/topk': (
    card_of('sae', 'resid_post', architecture='topk', k=5),
    {'k': 5},
    'resid_post/layer_2/width_12/average_l0_5',
  ),
  'transcoder': (TRANSCODER, {}, 'transcoder/layer_2/width_12/average_l0_5'),
  'affine': (
    TRANSCODER,
    {'skip': True},
    'transcoder/layer_2/width_12/average_l0_5_affine',
  ),
  'crosscoder': (
    CROSSCODER,
    {},
    'crosscoder/layer_1_3_4/width_36/average_l0_5',
  ),
  'clt': (
    CLT,
    {'skip': True, 'k': 7},
    'clt/layer_0_to_5/width_72/average_l0_5_affine',
  ),
}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
  monkeypatch.setattr(frontier, 'frontier', lambda path, rows: path.touch())


@pytest.mark.parametrize('case', CASES)
def test_round_trip_is_exact(tmp_path, case):
  card, more, path = CASES[case]
  params = params_of(card, **more)
  metrics = {'l0': 5.2, 'fvu': 0.3, 'by_target': [{'fvu': 0.3}]}
  releases.save(tmp_path / 'out', [(params, card, metrics)])
  (found,) = release.load_all(tmp_path / 'out')
  affine = {'affine': True} if 'skip' in more else {}
  assert (found.path, found.metrics) == (path, metrics)
  assert found.card == card | affine
  loaded, same = release.load(found.folder)
  assert same == found.card and list(loaded) == list(params)
  for key, array in params.items():
    np.testing.assert_array_equal(loaded[key], array, strict=True)
  assert release.verify(tmp_path / 'out')
  again, _ = release.load(found.folder / 'params.npz')
  np.testing.assert_array_equal(again['W_dec'], params['W_dec'])
  # What others read it with; and with no card beside it.
  with np.load(found.folder / 'params.npz', allow_pickle=False) as plain:
    assert plain['W_dec'].shape == params['W_dec'].shape
  (tmp_path / 'bare').mkdir()
  (found.folder / 'params.npz').rename(tmp_path / 'bare' / 'params.npz')
  loaded, sizes = release.load(tmp_path / 'bare')
  assert sizes.pop('affine', False) is ('W_skip' in params)
  assert sizes == {key: card[key] for key in ('d_in', 'd_out', 'width')}
  np.testing.assert_array_equal(loaded['W_dec'], params['W_dec'])


def test_one_release_holds_all_types(tmp_path):
  members = [
    (params_of(card, **more), card | {'name': case}, {'l0': 5.2, 'fvu': 0.3})
    for case, (card, more, _) in CASES.items()
  ]
  releases.save(tmp_path / 'out', members)
  found = release.load_all(tmp_path / 'out')
  assert [member.card['name'] for member in found] == list(CASES)
  # Two architectures among them: every path says which.
  assert all(
    member.path == f'{CASES[name][2]}_{CASES[name][0]["architecture"]}'
    for member in found
    for name in [member.card['name']]
  )
  rows = [(member.card, member.metrics) for member in found]
  lines = table.table(rows, columns=300).split('\n')
  assert lines[0].split()[:6] == (
    'type site writes layer width architecture'.split()
  )
  assert lines[4].split()[:7] == (
    'transcoder mlp_in mlp_out 2 12 jumprelu, affine'.split()
  )
  assert lines[6].split()[:5] == ['clt', 'mlp_in', 'mlp_out', '0-5', '72']
  text = (tmp_path / 'out' / 'README.md').read_text()
  for words in (
    '2 transcoders (jumprelu; jumprelu, affine)',
    '1 weakly causal crosscoder (jumprelu)',
    'Sparse autoencoders and transcoders for tiny',
    '`W_dec` [L, F, L, d_out]',
    'W_skip',
    'k largest latents',
  ):
    assert words in text, words
  entries = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
  assert entries['members'][4]['targets'] == CLT['targets']


def writes_back(params, card):
  params['W_dec'][2, 0, 1, 0] = 1e-30


@pytest.mark.parametrize(
  'card, change, words',
  [
    (CROSSCODER, writes_back, 'write to an earlier'),
    (CROSSCODER, lambda p, c: p.update(W_enc=p['W_enc'][0]), 'expected'),
    (
      CROSSCODER,
      lambda p, c: p.update(W_dec=np.swapaxes(p['W_dec'], 1, 2)),
      r'has W_dec \(3, 3, 12, 8\); expected \(3, 12, 3, 8\)',
    ),
    (
      CROSSCODER,
      lambda p, c: p.update({k: v[:2] for k, v in p.items()}),
      'L = 3 and F = 12',
    ),
    (
      CROSSCODER,
      lambda p, c: c.update(width=37),
      'no multiple of its 3 layers',
    ),
    (CROSSCODER, lambda p, c: c.update(type='sae'), 'reads one site'),
    (CROSSCODER, lambda p, c: c.update(type='wide'), 'There is no type'),
    (CROSSCODER, lambda p, c: c.pop('type'), 'There is no type'),
    (CROSSCODER, lambda p, c: c['sites'].reverse(), 'by layer'),
    (CROSSCODER, lambda p, c: c['targets'].pop(), 'writes the same'),
    (CROSSCODER, lambda p, c: c.update(sites=[]), 'found none'),
    (CROSSCODER, lambda p, c: c.update(sites='resid_post/1'), 'must be a list'),
    (
      CROSSCODER,
      lambda p, c: c.update(sites=['resid_post/1'] * 9999),
      'must be',
    ),
    (CROSSCODER, lambda p, c: c.update(sites=[{}]), 'is no site'),
    (CROSSCODER, lambda p, c: c.update(sites=['resid_post/01']), 'is no site'),
    (CROSSCODER, lambda p, c: c.update(sites=['resid_post/٢']), 'is no site'),
    (CROSSCODER, lambda p, c: c.update(sites=['secrets/1']), 'no site kind'),
    (CROSSCODER, lambda p, c: c.update(d_out=9), 'writes what it reads'),
    (TRANSCODER, lambda p, c: c.update(targets=c['sites']), 'another kind'),
    (
      TRANSCODER,
      lambda p, c: c.update(targets=['mlp_out/3']),
      'in each layer; found mlp_in/2 and mlp_out/3',
    ),
    (TRANSCODER, lambda p, c: c.update(affine=True), 'has no W_skip'),
    (TRANSCODER, lambda p, c: c.update(affine=1), 'expected true or false'),
    (
      TRANSCODER,
      lambda p, c: p.update(W_skip=np.zeros((OUT, D), np.float32)),
      r'W_skip \(6, 8\), transposed',
    ),
    (TRANSCODER, lambda p, c: p.update(k=np.float32(0)), 'from 1 to 12'),
    (TRANSCODER, lambda p, c: p.update(k=np.float32(2.5)), 'k = 2.5'),
    (TRANSCODER, lambda p, c: p.update(k=np.float32(13)), 'from 1 to 12'),
    (
      TRANSCODER,
      lambda p, c: p.update(k=np.ones(1, np.float32)),
      r'k \(1,\); expected \(\)',
    ),
    (
      TRANSCODER,
      lambda p, c: (p.update(k=np.float32(3)), c.update(k=4)),
      'its card says',
    ),
  ],
)
def test_unfit_members_are_neither_written_nor_read(
  tmp_path, card, change, words
):
  folder = tmp_path / 'bare'
  folder.mkdir()
  params, card = params_of(card), json.loads(json.dumps(card))
  change(params, card)
  with pytest.raises(release.ReleaseError, match=words):
    releases.save(tmp_path / 'out', [(params, card, None)])
  assert not (tmp_path / 'out').exists()
  card.update({'affine': True} if 'W_skip' in params else {})
  np.savez(folder / 'params.npz', **params)
  (folder / 'config.json').write_text(json.dumps(card))
  with pytest.raises(release.ReleaseError, match=words) as caught:
    release.load(folder)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def test_without_a_card_shapes_must_still_agree(tmp_path):
  cases = (
    ('b_enc', lambda x: x[0]),
    ('b_dec', lambda x: x[0]),
    ('W_dec', lambda x: x[:, :, :2]),
    ('W_enc', lambda x: x[None]),
    ('threshold', lambda x: x[:2]),
    ('W_dec', lambda x: x[::-1]),  # to earlier layers alone
  )
  for i, (key, change) in enumerate(cases):
    folder = tmp_path / str(i)
    folder.mkdir()
    params = params_of(CROSSCODER)
    np.savez(
      folder / 'params.npz', **params | {key: change(params[key]).copy()}
    )
    with pytest.raises(release.ReleaseError, match=key):
      release.load(folder)


def test_a_members_folder_says_what_it_is(tmp_path):
  """Whole files in another's folder, with no manifest to tell."""
  card, more, path = CASES['affine']
  for i, other in enumerate(
    (
      path.removesuffix('_affine'),
      path.replace('transcoder', 'clt'),
      path.replace('layer_2', 'layer_2_3'),
      path.replace('layer_2', 'layer_2_to_9'),
      path.replace('transcoder', 'mlp_in'),
    )
  ):
    releases.save(tmp_path / str(i), [(params_of(card, **more), card, None)])
    (found,) = release.load_all(tmp_path / str(i))
    (tmp_path / str(i) / 'manifest.json').unlink()
    folder = tmp_path / str(i) / other
    folder.parent.mkdir(parents=True, exist_ok=True)
    found.folder.rename(folder)
    with pytest.raises(release.ReleaseError, match='its folder is'):
      release.load(folder)


def test_a_path_is_one_that_can_be_read_back():
  for row in ({'architecture': 'top k'}, {'architecture': 'affine'}):
    rows = [(CROSSCODER | {'architecture': 'relu'}, {'l0': 3.0})]
    with pytest.raises(ValueError, match='cannot name a folder'):
      paths.paths([*rows, (CROSSCODER | row, {'l0': 3.0})])
  asked = [('l0', 6e-5), ('target_l0', 50.0), ('quadratic_frequency', 0.1)]
  for kind, value in asked:
    sparsity = {'kind': kind, 'value': value}
    cards_ = [
      TRANSCODER | {'sparsity': sparsity, 'architecture': name, 'affine': skip}
      for name in ('topk', 'matryoshka_batch_topk')
      for skip in (True, False)
    ]
    found = paths.paths([(card, None) for card in cards_])
    assert len(set(found)) == 4
    for path, card in zip(found, cards_, strict=True):
      match = paths.MEMBER.fullmatch(path)
      assert match['folder'] == paths.folder(card)
      assert bool(match['affine']) is card['affine']


def test_layers_are_named_shortly():
  def named(*layers):
    at = [f'resid_post/{n}' for n in layers]
    place = sites.wiring_of({'type': 'crosscoder', 'sites': at, 'targets': at})
    return place.layers(), place.layers('_', '_to_'), str(place)

  assert named(7, 13, 17, 22)[:2] == ('7,13,17,22', '7_13_17_22')
  assert named(0, 1, 2)[:2] == ('0,1,2', '0_1_2')
  assert named(0, 1, 2, 3)[:2] == ('0-3', '0_to_3')
  assert named(*range(26))[:2] == ('0-25', '0_to_25')
  assert named(0, 1)[2] == 'crosscoder resid_post/0,1'
  assert table.architecture({'architecture': 'relu', 'affine': True}) == (
    'relu, affine'
  )


def test_a_crosscoder_of_two_models_is_one_sae_of_rows_side_by_side(tmp_path):
  both = ['resid_post/2', 'second:resid_post/2']
  card = releases.card(
      type='crosscoder', sites=both, targets=both, d_in=16, d_out=16,
      width=25, second_model='tiny-it',
  )  # fmt: skip
  params = releases.params_of(d_in=16, width=25)
  releases.save(tmp_path / 'out', [(params, card, {'l0': 5.2})])
  (found,) = release.load_all(tmp_path / 'out')
  assert found.path == 'crosscoder/layer_2/width_25/average_l0_5'
  assert found.card == card and found.wiring.pair
  assert str(found.wiring) == 'crosscoder resid_post/2 of two models'
  np.testing.assert_array_equal(found.load()['W_dec'], params['W_dec'])
  readme = (tmp_path / 'out' / 'README.md').read_text()
  assert '1 model-diffing crosscoder (jumprelu)' in readme
  assert 'Second language model: tiny-it' in readme
  with pytest.raises(ValueError, match='gemma-scope diffing'):
    found.wiring.check_one_model(found.name)
  for layout in export.LAYOUTS:
    with pytest.raises(release.ReleaseError, match='of two models'):
      export.write(tmp_path / layout, [found], layout)


@pytest.mark.parametrize(
  'change',
  [
    {'sites': ['second:resid_post/2', 'resid_post/2']},
    {'sites': ['resid_post/2', 'second:resid_post/3']},
    {'sites': ['resid_post/2', 'second:mlp_out/2']},
    {'sites': ['second:resid_post/2']},
    {'targets': ['resid_post/2']},
    {'type': 'sae'},
  ],
)
def test_other_sites_of_two_models_are_refused(change):
  both = ['resid_post/2', 'second:resid_post/2']
  card = {'type': 'crosscoder', 'sites': both, 'targets': both} | change
  with pytest.raises(ValueError, match='one site of both'):
    sites.wiring_of(card)
