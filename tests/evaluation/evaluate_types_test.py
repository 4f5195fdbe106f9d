"""Transcoders, crosscoders and CLTs against plain loops, and what must hold."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope import mesh, sites
from gemma_scope.evaluation import batches, evaluate, passes
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.sae import released
from tests.helpers import forward, releases

LAYERS, D, F = 3, 16, 10
CONFIG = lm.Config(
  name='random',
  vocab_size=40,
  d_model=D,
  num_layers=LAYERS,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  d_ff=24,
  window=4,
  pattern='LG',
  final_softcap=30.0,
)
BATCH, TOKENS = 4, 9


@pytest.fixture(scope='module')
def model():
  gemma = lm.Gemma(CONFIG)
  params = gemma.init(jax.random.key(0))
  params['embedder']['input_embedding'] *= 3
  for layer in range(LAYERS):  # gains other than one
    norm = params[f'layer_{layer}']['pre_ffw_norm']
    norm['scale'] = jnp.linspace(-0.5, 0.5, D) * (1 + layer)
  return gemma, params


def text():
  tokens_NT = np.random.default_rng(0).integers(3, 40, (6, TOKENS))
  tokens_NT[:, 0] = 2
  tokens_NT[1::3, 5] = 1
  tokens_NT[2::3, -3:] = 0
  return tokens_NT.astype(np.int32)


def keep(tokens_NT):
  return ~np.isin(tokens_NT, (0, 1, 2))


def card_of(kind, reads, writes, layers):
  at = {'sites': reads, 'targets': writes}
  at = {key: [f'{site}/{n}' for n in layers] for key, site in at.items()}
  return {'type': kind, 'name': f'{kind} {reads} {layers}', **at}


def random_params(layers, skip=False, k=0, seed=0):
  """`layers` 0: without an axis of layers."""
  rng = np.random.default_rng(seed)
  lead = (layers,) * bool(layers)
  params = {
    'W_enc': rng.normal(size=(*lead, D, F)) * 0.3,
    'b_enc': rng.normal(size=(*lead, F)) * 0.1,
    'W_dec': rng.normal(size=(*lead, F, *lead, D)) * 0.2,
    'b_dec': rng.normal(size=(*lead, D)) * 0.1,
    'threshold': np.full((*lead, F), 0.1 if k else 0.5),
  }
  params['b_enc'][..., 0] = -1e6  # latents that never fire
  if layers:
    later = np.triu(np.ones((layers, layers)))
    params['W_dec'] *= later[:, None, :, None]
  if skip:
    params['W_skip'] = rng.normal(size=(*lead, D, D)) * 0.1
  if k:
    params['k'] = np.array(k)
  return {key: array.astype(np.float32) for key, array in params.items()}


@pytest.fixture(scope='module')
def members():
  across = tuple(range(LAYERS))
  return [
    (
      random_params(0, skip=True),
      card_of('transcoder', 'mlp_in', 'mlp_out', (1,)),
    ),
    (
      random_params(0, k=2, seed=1),
      card_of('transcoder', 'mlp_in_ungained', 'mlp_out', (1,)),
    ),
    (
      random_params(2, k=4, seed=2),
      card_of('crosscoder', 'resid_post', 'resid_post', (0, 2)),
    ),
    (
      random_params(LAYERS, skip=True, seed=3),
      card_of('clt', 'mlp_in', 'mlp_out', across),
    ),
  ]


@pytest.fixture(scope='module')
def found(model, members):
  return measure(model, members)


def measure(model, members, counts=None):
  given = batches.Text(text(), counts or keep, BATCH)
  return evaluate.evaluate(*model, releases.saes(members), given)


READ = 'mlp_in/0', 'mlp_in/1', 'mlp_in/2', 'mlp_in_ungained/1'
WRITTEN = 'mlp_out/0', 'mlp_out/1', 'mlp_out/2', 'resid_post/0', 'resid_post/2'


def plain_pass(gemma, params, target=None, y_NTD=None):
  """A pass with `y_NTD` at `target`: one program for all sites."""
  edits = {
    site: forward.instead(
      np.zeros((*text().shape, D), np.float32)
      if site != target
      else y_NTD.astype(np.float32),
      site == target,
    )
    for site in map(sites.parse, WRITTEN)
  }
  taps = tuple(map(sites.parse, (*READ, *WRITTEN)))
  return forward.forward(gemma, params, text(), taps, edits)


class Reference:
  """Loops over tokens, layers and targets; splices by plain forward passes."""

  def __init__(self, model, member):
    (gemma, params), (arrays, card), tokens_NT = model, member, text()
    place = sites.wiring_of(card)
    out = plain_pass(gemma, params)
    taps = {s: np.asarray(x, np.float64) for s, x in out.taps.items()}
    keep_NT = keep(tokens_NT)
    p = {key: value.astype(np.float64) for key, value in arrays.items()}
    if not place.several:  # as one layer of several
      p['W_dec'] = p['W_dec'][:, None]
      p = {k: v if k == 'k' else v[None] for k, v in p.items()}
    layers = range(len(place.sites))
    y_hat = {t: taps[t].copy() for t in place.targets}
    self.fired = np.zeros(p['b_enc'].shape)
    for n, t in np.argwhere(keep_NT):
      f = np.zeros(p['b_enc'].shape)
      for l, site in enumerate(place.sites):
        z_F = taps[site][n, t] @ p['W_enc'][l] + p['b_enc'][l]
        f[l] = np.where(z_F > p['threshold'][l], np.maximum(z_F, 0), 0)
      if 'k' in p:
        f[f < np.sort(f.reshape(-1))[-int(p['k'])]] = 0
      self.fired += f > 0
      for m, target in enumerate(place.targets):
        y = p['b_dec'][m] + sum(f[l] @ p['W_dec'][l][:, m] for l in layers)
        if 'W_skip' in p:
          y = y + taps[place.sites[m]][n, t] @ p['W_skip'][m]
        y_hat[target][n, t] = y
    self.l0 = self.fired.sum() / keep_NT.sum()
    self.frequency = self.fired.reshape(-1) / keep_NT.sum()

    counts_NT = keep_NT[:, 1:] & keep_NT[:, :-1]
    losses = lambda logits_NTV: np.asarray(
      forward.losses(logits_NTV, tokens_NT), np.float64
    )
    clean = losses(out.logits_BTV)

    def delta(target, y_NTD):
      spliced = plain_pass(gemma, params, target, y_NTD).logits_BTV
      return (losses(spliced) - clean)[counts_NT].mean()

    self.fvu, self.flat, self.delta, self.ablated = [], [], [], []
    for target in place.targets:
      y_RD = taps[target][keep_NT]
      error = ((y_RD - y_hat[target][keep_NT]) ** 2).sum()
      self.fvu.append(error / ((y_RD - y_RD.mean(0)) ** 2).sum())
      flat_RD = y_RD - y_RD.mean()
      self.flat.append(error / (flat_RD**2).sum())
      self.delta.append(delta(target, y_hat[target]))
      zero = np.where(keep_NT[..., None], 0, taps[target])
      self.ablated.append(delta(target, zero))


@pytest.mark.parametrize('which', range(4))
def test_equals_plain_loops(model, members, found, which):
  want, got = Reference(model, members[which]), found[members[which][1]['name']]
  value = lambda key: got[key]['value']
  assert value('l0') == pytest.approx(want.l0, rel=1e-6)
  assert 0.5 < want.l0 < 0.9 * want.fired.size
  if 'k' in members[which][0]:
    assert want.l0 <= members[which][0]['k']
  assert value('fvu') == pytest.approx(np.mean(want.fvu), rel=1e-4)
  assert value('fvu_elementwise') == pytest.approx(np.mean(want.flat), rel=1e-4)
  assert value('delta_loss') == pytest.approx(np.mean(want.delta), abs=3e-5)
  assert max(map(abs, want.delta)) > 1e-3
  lost = np.mean(want.ablated)
  share = (lost - np.mean(want.delta)) / lost
  assert value('loss_recovered_zero') == pytest.approx(share, rel=5e-3)
  assert got['dead'] == np.mean(want.frequency == 0) > 0
  assert got['dense'] == np.mean(want.frequency > 0.1)
  histogram = got['frequency_histogram']
  assert histogram['never'] + sum(histogram['counts']) == want.fired.size
  targets = members[which][1]['targets']
  if len(targets) == 1:
    assert 'by_target' not in got
  else:
    assert [each['target'] for each in got['by_target']] == targets
    for m, each in enumerate(got['by_target']):
      assert each['fvu']['value'] == pytest.approx(want.fvu[m], rel=1e-4)
      assert each['delta_loss']['value'] == pytest.approx(
        want.delta[m], abs=3e-5
      )
    assert len(got['control']['by_target']) == len(targets)
  assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_controls_have_the_l0_and_beat_nothing(found):
  for metrics in found.values():
    for kind, control in metrics['controls'].items():
      ratio = control['l0']['value'] / metrics['l0']['value']
      assert 0.9 < ratio < 1.1, kind
      for each in [control, *control.get('by_target', [])]:
        assert each['fvu']['value'] < 1.001  # the best gain of each target
        assert each['fvu']['low'] < each['fvu']['value'] < each['fvu']['high']


def test_one_pass_for_all_equals_one_for_each(model, members, found):
  alone = measure(model, members[2:3])
  assert alone == {name: found[name] for name in alone}


def diagonal(model, layers, gained=True):
  """Each layer's gain, as [L, D, D]: mlp_in of mlp_in_ungained."""
  norms = [model[1][f'layer_{n}']['pre_ffw_norm'] for n in layers]
  gains = [1 + np.asarray(norm['scale']) * gained for norm in norms]
  return np.stack([np.diag(gain) for gain in gains]).astype(np.float32)


def perfect(matrices, by_skip):
  """x -> x @ matrices[l] at each layer l, by a skip or by latents."""
  layers = len(matrices)
  eye = np.eye(D, dtype=np.float32)
  W_dec = np.zeros((layers, 2 * D, layers, D), np.float32)
  for l, matrix in enumerate(matrices):
    W_dec[l, :, l] = 0 if by_skip else np.concatenate([matrix, -matrix])
  params = {
    'W_enc': np.tile(np.concatenate([eye, -eye], 1), (layers, 1, 1)),
    'b_enc': np.zeros((layers, 2 * D), np.float32),
    'W_dec': W_dec,
    'b_dec': np.zeros((layers, D), np.float32),
    'threshold': np.zeros((layers, 2 * D), np.float32),
  }
  return params | ({'W_skip': matrices} if by_skip else {})


def test_what_is_perfect_loses_nothing(model):
  kinds = 'mlp_in_ungained', 'mlp_in'
  across, first = tuple(range(LAYERS)), (1,)
  clt = perfect(diagonal(model, across), False)
  half = dict(clt, W_dec=clt['W_dec'].copy())
  half['W_dec'][0, :, 2] = 0.5  # writes to layer 2 what should not be there
  one = {
    key: (v[0][:, 0] if key == 'W_dec' else v[0])
    for key, v in perfect(diagonal(model, first), False).items()
  }
  skip = {
    key: (v[0][:, 0] if key == 'W_dec' else v[0])
    for key, v in perfect(diagonal(model, first), True).items()
  }
  same = perfect(diagonal(model, (0, 2), gained=False), False)
  cards = [
    card_of('transcoder', *kinds, first),
    card_of('transcoder', *kinds, first) | {'name': 'affine'},
    card_of('clt', *kinds, across),
    card_of('clt', *kinds, across) | {'name': 'half'},
    card_of('crosscoder', 'resid_post', 'resid_post', (0, 2)),
  ]
  arrays = [one, skip, clt, half, same]
  found = measure(model, list(zip(arrays, cards, strict=True)))
  for card in cards:
    metrics = found[card['name']]
    if card['name'] == 'half':
      last = metrics['by_target'][2]
      assert last['fvu']['value'] > 1e-2 < abs(last['delta_loss']['value'])
      assert metrics['fvu']['value'] == pytest.approx(
        last['fvu']['value'] / LAYERS
      )
      perfect_ones = metrics['by_target'][:2]
    else:
      perfect_ones = [metrics, *metrics.get('by_target', [])]
    for each in perfect_ones:
      assert each['fvu']['value'] < 1e-9
      assert abs(each['delta_loss']['value']) < 1e-5


@pytest.mark.parametrize('which', range(4))
def test_sharded_equals_one_device(model, members, which):
  gemma, params = model
  arrays, card = members[which]
  place = sites.wiring_of(card)
  at = tuple(sorted({*place.sites, *place.targets}))
  tokens_BT = jnp.asarray(text()[:4])
  keep_BT = jnp.asarray(keep(text()[:4]))
  taps = splice.taps(gemma, params, tokens_BT, at)

  def found(devices, put):
    x = tuple(put(taps[site]) for site in place.sites)
    y = tuple(put(taps[site]) for site in place.targets)
    y = None if place.sites == place.targets else y
    on = released.put(arrays, devices)
    weight_MD = np.ones((len(place.targets), D), np.float32)
    return passes.reconstruct(on, x, y, put(keep_BT), weight_MD, devices)

  devices = mesh.make({'sae': 1, 'data': 4, 'latent': 2})
  split = jax.sharding.NamedSharding(
    devices, jax.sharding.PartitionSpec('data')
  )
  want = found(None, lambda x: x)
  got = found(devices, lambda x: jax.device_put(x, split))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_counts_is_said_by_keep(model, members):
  """As after a chat's user turn: the tokens of the second half alone."""
  late = lambda tokens: keep(tokens) & (np.arange(TOKENS) >= 5)
  got = measure(model, members[:1], late)[members[0][1]['name']]
  assert got['tokens'] == late(text()).sum()
  assert got['by_position']['position'][0] >= 5
  for wrong in (lambda t: keep(t)[:, 1:], lambda t: keep(t).astype(int)):
    with pytest.raises(ValueError, match=r'expected bool \[6, 9\]'):
      measure(model, members, wrong)


def test_what_does_not_fit_is_a_sentence(model, members):
  params, card = members[3]

  def refused(match, card=card, **changes):
    with pytest.raises(ValueError, match=match):
      measure(model, [({**params, **changes}, card)])

  refused(r'has W_dec .* L = 3 and F = 10', W_dec=params['W_dec'][:, :, :2])
  refused('another kind', card={**card, 'sites': card['targets']})
  refused('must be a list of sites', card={**card, 'sites': None})
  refused('There is no type', card={**card, 'type': None})
  refused(
    'as in random at crosscoder resid_post/0,1',
    card=card_of('crosscoder', 'resid_post', 'resid_post', (0, 1)),
  )
