"""Controls on rows whose best reconstruction is known."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from gemma_scope import mesh, sae, sites
from gemma_scope.evaluation import controls

D, ROWS, TRAIN = 16, 3000, 2000
WIRINGS = {
  'sae': ('resid_post/1', 'resid_post/1'),
  'transcoder': ('mlp_in/1', 'mlp_out/1'),
  'crosscoder': ('resid_post/0,resid_post/1', 'resid_post/0,resid_post/1'),
  'clt': ('mlp_in/0,mlp_in/1', 'mlp_out/0,mlp_out/1'),
}


def wiring(kind):
  parse = lambda text: tuple(map(sites.parse, text.split(',')))
  return sites.Wiring(kind, *map(parse, WIRINGS[kind]))


def activations(place, seed=0):
  """Rows of heavy tails around a large mean; outputs linear in inputs."""
  rng = np.random.default_rng(seed)
  rows = {}
  for reads, writes in zip(place.sites, place.targets, strict=True):
    scales = np.linspace(3, 0.2, D)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    x = (rng.laplace(size=(ROWS, D)) * scales) @ basis + 5
    rows[reads] = x.astype(np.float32)
    if writes != reads:
      rows[writes] = (x @ rng.normal(size=(D, D)) / 4 + 1).astype(np.float32)
  return rows


def scores(params, rows, place):
  """L0 and the FVU at each target."""
  x = controls.beside(rows, place.sites, place.several)
  y = controls.beside(rows, place.targets, place.several)
  f = np.asarray(sae.encode(params, x))
  error = np.square(y - np.asarray(sae.decode(params, f, x)))
  spread = np.square(y - y.mean(0))
  fvu = error.sum((0, -1)) / spread.sum((0, -1))
  return (f > 0).sum() / len(x), np.atleast_1d(fvu)


def split(rows):
  return (
    {site: x[:TRAIN] for site, x in rows.items()},
    {site: x[TRAIN:] for site, x in rows.items()},
  )


@pytest.mark.parametrize('kind', WIRINGS)
def test_controls_meet_the_l0_and_are_ordered(kind):
  place = wiring(kind)
  train, test = split(activations(place))
  width = 128 if place.several else 64
  made = controls.fit(controls.Shape(place, width), [3.0, 6.0], train)
  for l0, by_kind in zip((3.0, 6.0), made, strict=True):
    assert tuple(by_kind) == controls.KINDS
    params = {name: make() for name, make in by_kind.items()}
    for name, arrays in params.items():
      assert scores(arrays, train, place)[0] == pytest.approx(l0, rel=0.01)
      found, fvu = scores(arrays, test, place)
      assert found == pytest.approx(l0, rel=0.15), name
      assert (fvu < 1.02).all(), name  # the gain of 0 would leave 1
      mean_l0 = controls.mean_l0(
        arrays, controls.beside(test, place.sites, place.several)
      )
      assert mean_l0 == pytest.approx(found)
      if place.several:
        assert not np.asarray(arrays['W_dec'])[1, :, 0].any()
    random, fitted = params['random'], params['least_squares']
    np.testing.assert_array_equal(random['W_enc'], fitted['W_enc'])
    np.testing.assert_array_equal(random['threshold'], fitted['threshold'])
    better = scores(fitted, test, place)[1] < scores(random, test, place)[1]
    assert better.all()


@pytest.mark.parametrize('kind', ['sae', 'crosscoder'])
def test_the_gain_is_the_best_one_at_each_target(kind):
  place = wiring(kind)
  rows = {site: x[:1500] for site, x in activations(place).items()}
  (made,) = controls.fit(
    controls.Shape(place, 64), [4.0], rows, kinds=('random',)
  )
  params = made['random']()
  best = scores(params, rows, place)[1]
  for m in range(len(place.targets)):
    for gain in (0.95, 1.05):
      W_dec = np.array(params['W_dec'])
      if place.several:
        W_dec[:, :, m] *= gain
      else:
        W_dec *= gain
      assert scores({**params, 'W_dec': W_dec}, rows, place)[1][m] > best[m]


def test_least_squares_has_no_better_decoder_where_rows_abound():
  """Of the fitted decoder no small change lowers the error on its rows."""
  place = wiring('sae')
  rows = {site: x[:TRAIN] for site, x in activations(place).items()}
  (made,) = controls.fit(controls.Shape(place, 32), [8.0], rows)
  params = {key: np.array(a) for key, a in made['least_squares']().items()}
  (x,) = rows.values()
  f = np.asarray(sae.encode(params, x), np.float64)
  ones = np.concatenate([f, np.ones((len(f), 1))], 1)
  best, *_ = np.linalg.lstsq(ones, x.astype(np.float64), rcond=None)
  least = np.square(x - ones @ best).sum() / np.square(x - x.mean(0)).sum()
  assert scores(params, rows, place)[1] == pytest.approx(least, rel=0.01)


def test_principal_components_keep_the_largest_scores():
  """No choice of as many scores leaves less error than the threshold's."""
  place = wiring('sae')
  rows = {site: x[:TRAIN] for site, x in activations(place).items()}
  (made,) = controls.fit(controls.Shape(place, 64), [4.0], rows, kinds=('pca',))
  (x,) = rows.values()
  x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
  _, v_DC = np.linalg.eigh(x.T @ x)
  square = np.sort((x @ v_DC) ** 2, axis=None)
  least = square[: -4 * TRAIN].sum() / square.sum()
  l0, fvu = scores(made['pca'](), rows, place)
  assert l0 == pytest.approx(4) and fvu[0] == pytest.approx(least, rel=1e-3)
  by_row = np.sort((x @ v_DC) ** 2, 1)[:, :-4].sum() / square.sum()
  first = np.sum((x @ v_DC[:, :-4]) ** 2) / square.sum()
  assert fvu[0] < by_row < first


def test_more_latents_than_there_are_and_none():
  place = wiring('sae')
  rows = activations(place)
  made = controls.fit(controls.Shape(place, 32), [0.0, 1000.0], rows)
  for kind in controls.KINDS:
    l0, fvu = scores(made[0][kind](), rows, place)
    assert l0 == 0 and fvu[0] == pytest.approx(1, rel=1e-4)
    assert (np.asarray(made[1][kind]()['threshold']) == 0).all()
  assert scores(made[1]['pca'](), rows, place)[1][0] < 1e-6


def test_controls_are_the_same_on_a_mesh():
  place = wiring('crosscoder')
  rows = activations(place)
  devices = mesh.make({'sae': 1, 'data': 4, 'latent': 2})
  shape = controls.Shape(place, 64)
  (want,), (got,) = (
    controls.fit(shape, [4.0], rows, where) for where in (None, devices)
  )
  for kind in controls.KINDS:
    for name, array in want[kind]().items():
      np.testing.assert_allclose(
        jax.device_get(got[kind]()[name]), array, rtol=1e-3, atol=1e-4
      )
