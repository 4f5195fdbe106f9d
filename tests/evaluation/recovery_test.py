"""Scores against the truth, on SAEs whose scores are known beforehand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gemma_scope import sites
from gemma_scope.activations import synthetic
from gemma_scope.evaluation import controls, recovery

SITE = sites.parse('resid_post/0')
AT = (SITE,)
# As many directions as features: they can be orthogonal, and scores exact.
SETTINGS = synthetic.Settings(
  features=32,
  d_model=32,
  l0=3.0,
  parents=3,
  children=2,
  groups=0,
  max_frequency=0.3,
  noise=0.0,
)
ROWS = 4000


def orthogonal(settings=SETTINGS, seed=0):
  """A truth whose directions are an orthonormal basis at each site."""
  truth = synthetic.make_truth(settings)
  rng = np.random.default_rng(seed)
  directions = {}
  for site, d_GD in truth.directions.items():
    basis, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    directions[site] = np.float32(basis * d_GD.any(1)[:, None])
  return dataclasses.replace(truth, directions=directions)


def data(truth, rows=ROWS):
  f_RG = synthetic.latents(truth.settings, 0, rows)
  x = {s: f_RG @ d + truth.biases[s] for s, d in truth.directions.items()}
  return x, f_RG


def sae_of(W_enc, W_dec, b_D, threshold=0.01):
  """Released parameters that read x - b through W_enc."""
  return {
    'W_enc': np.float32(W_enc),
    'b_enc': np.float32(-b_D @ W_enc),
    'W_dec': np.float32(W_dec),
    'b_dec': np.float32(b_D),
    'threshold': np.full(W_enc.shape[1], threshold, np.float32),
  }


@pytest.fixture(scope='module')
def known():
  truth = orthogonal()
  return truth, *data(truth)


def score(known, params, read=AT, write=AT):
  truth, x, f_RG = known
  result = recovery.recovery(params, truth, x, f_RG, read, write)
  json.dumps(result, allow_nan=False)
  return result


def perfect(truth):
  d_GD = truth.directions[SITE]
  return sae_of(d_GD.T, d_GD, truth.biases[SITE])


def test_the_truth_as_an_sae_is_perfect(known):
  truth, _, f_RG = known
  found = score(known, perfect(truth))
  assert found['mmcs'] == pytest.approx(1, abs=1e-5)
  assert found['mmcs_weighted'] == pytest.approx(1, abs=1e-5)
  assert found['fvu'] < 1e-9
  assert found['l0'] == pytest.approx((f_RG > 0).sum(1).mean())
  for key in ('recovered', 'recovered_distinct', 'parents_found'):
    assert found[key] == 1
  for key in ('dead', 'absorption', 'missed_alone'):
    assert found[key] == 0
  assert found['features'] == 32 and found['pairs'] == 6


def absorbing(truth, share=1.0):
  """Where a child fires its latent writes the parent too, and that is silent.

  `share`: how many of the pairs, in order, are built so.
  """
  d_GD = truth.directions[SITE].astype(np.float64)
  W_enc, W_dec = d_GD.T.copy(), d_GD.copy()
  pairs = [(p, q) for q, p in enumerate(truth.parent_G) if p >= 0]
  for p, q in pairs[: round(share * len(pairs))]:
    W_enc[:, p] -= 100 * d_GD[q]
    W_dec[q] += d_GD[p]
  return sae_of(W_enc, W_dec, truth.biases[SITE])


def test_an_absorbing_sae_absorbs_wholly_or_by_half(known):
  truth, _, _ = known
  found = score(known, absorbing(truth))
  assert found['absorption'] == 1 and found['missed_alone'] == 0
  assert found['parents_found'] == 1 and found['pairs'] == 6
  assert found['recovered'] == pytest.approx(1 - 6 / 32)  # the children
  assert found['mmcs'] == pytest.approx((26 + 6 / np.sqrt(2)) / 32, abs=1e-4)
  # A pair asks for an absorber of its own child.
  half = score(known, absorbing(truth, 0.5))
  assert half['absorption'] == 0.5 and half['parents_found'] == 1


def test_silence_without_an_absorber_is_no_absorption(known):
  truth, _, _ = known
  params = absorbing(truth)
  params['W_dec'] = truth.directions[SITE]  # the children's latents are pure
  found = score(known, params)
  assert found['absorption'] == 0 and found['missed_alone'] == 0


def test_a_parent_that_is_split_is_not_absorbed(known):
  """Two latents of one direction: one for the parent alone, one for pairs."""
  truth, _, _ = known
  d_GD = truth.directions[SITE].astype(np.float64)
  params = absorbing(truth)
  pairs = [(p, q) for q, p in enumerate(truth.parent_G) if p >= 0]
  more_enc = np.stack([d_GD[q] for _, q in pairs], 1)
  more_dec = np.stack([d_GD[p] + 0.1 * d_GD[q] for p, q in pairs])
  both = sae_of(
    np.concatenate([params['W_enc'], more_enc], 1),
    np.concatenate([d_GD, more_dec]),
    truth.biases[SITE],
  )
  found = score(known, both)
  assert found['absorption'] == 0 and found['parents_found'] == 1


def test_an_undetected_parent_says_nothing_of_absorption(known):
  truth, _, _ = known
  params = perfect(truth)
  params['threshold'][:3] = 1e9  # the parents' latents never fire
  found = score(known, params)
  assert found['parents_found'] == 0 and found['pairs'] == 0
  assert found['absorption'] is None and found['missed_alone'] is None
  assert found['dead'] == pytest.approx(3 / 32)
  assert found['recovered'] == pytest.approx(29 / 32)  # a dead latent is none


def test_one_latent_recovers_one_feature():
  """Two features of nearly one direction, and one latent between them."""
  truth = orthogonal(dataclasses.replace(SETTINGS, parents=0))
  d_GD = truth.directions[SITE].copy()
  d_GD[1] = recovery._unit(d_GD[:1] + 0.1 * d_GD[1:2])[0]
  truth = dataclasses.replace(truth, directions={SITE: d_GD})
  params = sae_of(d_GD[1:].T, d_GD[1:], truth.biases[SITE])
  found = score((truth, *data(truth)), params)
  assert found['recovered'] == 1
  assert found['recovered_distinct'] == pytest.approx(31 / 32)
  assert found['absorption'] is None and found['parents_found'] is None


def test_weights_are_frequencies(known):
  """An SAE of the one most frequent feature, the others orthogonal."""
  truth, _, _ = known
  d_GD = truth.directions[SITE][:1]
  found = score(known, sae_of(d_GD.T, d_GD, truth.biases[SITE]))
  assert found['mmcs'] == pytest.approx(1 / 32, abs=1e-5)
  share = truth.frequency_G[0] / truth.frequency_G.sum()
  assert found['mmcs_weighted'] == pytest.approx(share, abs=1e-5)


SEVERAL = {
  'crosscoder': ('resid_post/0,resid_post/1',) * 2,
  'clt': ('mlp_in/0,mlp_in/1', 'mlp_out/0,mlp_out/1'),
}


@pytest.mark.parametrize('kind', SEVERAL)
def test_several_layers_are_one_decoder(kind):
  read, write = (
    tuple(map(sites.parse, text.split(','))) for text in SEVERAL[kind]
  )
  names = tuple(dict.fromkeys(str(site) for site in (*read, *write)))
  truth = orthogonal(dataclasses.replace(SETTINGS, sites=names))
  x, f_RG = data(truth)
  born_late = ~truth.directions[write[0]].any(1)
  assert 0 < born_late.sum() < 32
  shape = (2, 32, 2, 32)
  params = {
    'W_enc': np.zeros((2, 32, 32), np.float32),
    'W_dec': np.zeros(shape, np.float32),
    'b_dec': np.stack([truth.biases[site] for site in write]),
    'threshold': np.full((2, 32), 0.01, np.float32),
  }
  for l in range(2):  # a feature is read where it is born
    mine = born_late == bool(l)
    params['W_enc'][l] = truth.directions[read[l]].T * mine
    for m in range(l, 2):
      params['W_dec'][l, :, m] = truth.directions[write[m]] * mine[:, None]
  bias_LD = np.stack([truth.biases[site] for site in read])
  params['b_enc'] = -np.einsum('ld,ldf->lf', bias_LD, params['W_enc'])
  found = score((truth, x, f_RG), params, read, write)
  assert found['mmcs'] == pytest.approx(1, abs=1e-5) and found['fvu'] < 1e-9
  assert found['recovered_distinct'] == 1 and found['absorption'] == 0
  assert found['l0'] == pytest.approx((f_RG > 0).sum(1).mean())
  assert found['dead'] == 0.5
  # One of two targets alone: a feature of both layers is found by half.
  params['W_dec'][:, :, 0] = 0
  halved = score((truth, x, f_RG), params, read, write)
  expected = np.mean(np.where(born_late, 1, np.sqrt(0.5)))
  assert halved['mmcs'] == pytest.approx(expected, abs=1e-5)


def test_a_transcoder_is_asked_only_for_what_it_can_read():
  names = ('mlp_in/0', 'mlp_in/1', 'mlp_out/1')
  truth = orthogonal(dataclasses.replace(SETTINGS, sites=names))
  read, write = ((sites.parse(n),) for n in names[1:])
  x, f_RG = data(truth)
  params = sae_of(
    truth.directions[read[0]].T,
    truth.directions[write[0]],
    truth.biases[read[0]],
  )
  params['b_dec'] = truth.biases[write[0]]
  found = score((truth, x, f_RG), params, read, write)
  assert found['features'] == truth.directions[read[0]].any(1).sum() < 32
  assert found['mmcs'] == pytest.approx(1, abs=1e-5)
  assert 0 < found['fvu'] < 1  # what layer 0 writes here cannot be read
  early = tuple(map(sites.parse, ('mlp_in/1', 'mlp_out/0')))
  truth = orthogonal(
    dataclasses.replace(SETTINGS, sites=('mlp_in/1', 'mlp_out/0'))
  )
  with pytest.raises(ValueError, match='No true feature is present both'):
    score((truth, *data(truth)), params, early[:1], early[1:])


def gaussian(truth, variance_D, rows=8000):
  rng = np.random.default_rng(1)
  z_RD = rng.standard_normal((rows, 32)) * np.sqrt(variance_D)
  z_RD -= z_RD.mean(0)  # so that sample components are the true ones
  u, _, v = np.linalg.svd(z_RD, full_matrices=False)
  z_RD = u * np.sqrt(rows * variance_D)
  d_GD = truth.directions[SITE]
  return {SITE: np.float32(z_RD @ d_GD + truth.biases[SITE])}


def control(kind, x, read, write, width, l0, type_='sae'):
  """One control, fitted on all rows."""
  wiring = sites.Wiring(type_, read, write)
  shape = controls.Shape(wiring, width)
  (made,) = controls.fit(shape, [l0], x, kinds=(kind,))
  return {name: np.asarray(array) for name, array in made[kind]().items()}


def test_pca_recovers_the_axes_of_an_orthogonal_gaussian(known):
  truth, _, f_RG = known
  x = gaussian(truth, np.linspace(4, 1, 32))
  params = control('pca', x, AT, AT, 64, 5.0)
  f_RG = np.zeros((len(x[SITE]), 32), np.float32)
  found = score((truth, x, f_RG), params)
  assert found['l0'] == pytest.approx(5) and found['dead'] == 0
  assert found['mmcs'] == pytest.approx(1, abs=1e-3)
  assert found['recovered_distinct'] == 1


def test_pca_of_a_transcoder_is_regression_on_components():
  names = ('mlp_in/0', 'mlp_out/0')
  truth = orthogonal(dataclasses.replace(SETTINGS, sites=names))
  read, write = ((sites.parse(n),) for n in names)
  x, f_RG = data(truth)
  params = control('pca', x, read, write, 64, 32.0, 'transcoder')
  found = score((truth, x, f_RG), params, read, write)
  assert found['fvu'] < 1e-6  # linear, and everything is kept


@pytest.mark.parametrize('kind', ['sae', *SEVERAL])
def test_the_random_control_meets_the_l0_and_finds_nothing(kind):
  texts = SEVERAL.get(kind, ('resid_post/0',) * 2)
  read, write = (tuple(map(sites.parse, t.split(','))) for t in texts)
  names = tuple(dict.fromkeys(str(site) for site in (*read, *write)))
  truth = orthogonal(dataclasses.replace(SETTINGS, sites=names))
  x, f_RG = data(truth)
  params = control('random', x, read, write, 128, 3.0, kind)
  found = score((truth, x, f_RG), params, read, write)
  assert found['l0'] == pytest.approx(3, rel=0.01)
  assert found['recovered'] == 0 and found['mmcs'] < 0.7
  assert found['fvu'] < 1  # the gain is the best one


def test_one_layer_has_one_site(known):
  truth, x, f_RG = known
  with pytest.raises(ValueError, match='one site; found 2'):
    recovery.recovery(perfect(truth), truth, x, f_RG, AT * 2, AT)
