"""Training that starts from a release: the same function, prefixes, layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from gemma_scope import config as config_lib
from gemma_scope import mesh as mesh_lib
from gemma_scope import release, sae, specs
from gemma_scope.release.formats import gemma_scope_2, saelens
from gemma_scope.sae import fold
from gemma_scope.training import initialise, setup, stack
from gemma_scope.training import trained as trained_lib
from tests.helpers import releases

D = 128  # of the tiny model


def trained(width: int, seed: int, d_in=D) -> dict[str, np.ndarray]:
  """A JumpReLU SAE on raw activations of norm about 10."""
  rng = np.random.default_rng(seed)
  W_dec = rng.normal(size=(width, d_in)).astype(np.float32)
  W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
  draw = lambda n, s: (s * rng.normal(size=n)).astype(np.float32)  # noqa: E731
  return {
    'W_enc': W_dec.T + draw((d_in, width), 0.01),
    'b_enc': draw(width, 0.3),
    'W_dec': W_dec,
    'b_dec': draw(d_in, 0.5),
    'threshold': np.abs(draw(width, 1.0)) + 0.5,
  }


def card(name, site, width, l0, kind='sae', target=None, architecture=None):
  return {
    'name': name,
    'type': kind,
    'sites': [site],
    'targets': [target or site],
    'model': 'tiny',
    'architecture': architecture or 'jumprelu',
    'd_in': D,
    'd_out': D,
    'width': width,
    'sparsity': {'kind': 'target_l0', 'value': l0},
    'seed': 0,
    'steps': 1,
    'tokens': 1,
  }


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """SAEs of three layers, two widths and two sparsities."""
  path = tmp_path_factory.mktemp('release') / 'release'
  members = []
  for layer in range(3):
    for width in (64, 128):
      for l0 in (8.0, 32.0):
        name = f'resid_post/{layer}/{width}/{l0}'
        params = trained(width, hash((layer, width, l0)) % 1000)
        site = f'resid_post/{layer}'
        members.append((params, card(name, site, width, l0), None))
  releases.save(path, members)
  return path


def begin(folder, argument, **changes):
  """Config, stacks, groups, states at random, and states begun."""
  config = tiny.get_config(argument)
  config.initialise.release = str(folder)
  config.update_from_flattened_dict(changes)
  stacks, groups = setup.make_stacks(config, setup.dimensions(config))
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 2}, jax.devices()[:2])
  states = stack.init_all(stacks, jax.random.key(0), mesh)
  normalisation = {
    site: fold.Normalisation(
      5.0 + site.layer,
      np.random.default_rng(site.layer).normal(size=D).astype(np.float32),
    )
    for site in specs.site_list(config)
  }
  chosen = initialise.plan(config, groups)
  begun = initialise.start(chosen, stacks, groups, states, normalisation)
  return config, stacks, groups, states, begun, normalisation, chosen


@pytest.mark.parametrize(
  'architecture', ['jumprelu', 'gated', 'matryoshka_jumprelu']
)
def test_a_member_starts_as_the_function_that_was_released(
  architecture, folder
):
  config, stacks, groups, _, begun, normalisation, chosen = begin(
    folder,
    f'layers=1;sites=resid_post;widths=128;sparsity=8,40;'
    f'architectures={architecture}',
  )
  out = trained_lib.saes(
    config, stacks, begun, normalisation, 0, {'text': {'source': 'python'}}
  )
  x = 10 / D**0.5 * np.random.default_rng(0).normal(size=(50, D))
  for i, one in enumerate(out):
    params = one.load()
    (source,) = chosen[0][i]
    assert source.card['sparsity']['value'] == (8.0, 32.0)[i]
    assert source.card['width'] == 128
    expected = source.load()
    f, wanted = sae.encode(params, x), sae.encode(expected, x)
    np.testing.assert_allclose(f, wanted, rtol=1e-3, atol=1e-3)
    assert np.count_nonzero(wanted)
    np.testing.assert_allclose(
      sae.decode(params, f), sae.decode(expected, wanted), rtol=1e-3, atol=1e-3
    )
  spec = begun[0].params['W_enc'].sharding.spec
  assert spec[-2] == 'latent'


@pytest.mark.parametrize('unit_decoder', [True, False])
def test_decoders_of_any_norm_start_as_the_same_function(
  unit_decoder, tmp_path
):
  """As in files of SAELens or sparsify; W_dec is cut to norm 1 by a step."""
  params = trained(64, 5)
  norms = np.linspace(0.3, 3, 64).astype(np.float32)
  params['W_dec'] *= norms[:, None]
  params['W_dec'][7] = 0
  releases.save(
    tmp_path / 'release',
    [(params, card('any', 'resid_post/1', 64, 8.0), None)],
  )
  _, (one,), _, _, (state,), normalisation, _ = begin(
    tmp_path / 'release',
    'layers=1;sites=resid_post;widths=64;sparsity=8',
    **{'train.learning_rate': 0.0, 'sae.unit_decoder': unit_decoder},
  )
  (normal,) = normalisation.values()
  x_BD = 10 / D**0.5 * np.random.default_rng(0).normal(size=(50, D))
  x_NBD = jnp.asarray(normal.apply(x_BD)[None], jnp.float32)

  @jax.jit
  def y_hat(state):
    state, _ = one.step(state, x_NBD, x_NBD, jnp.int32(0), jax.random.key(0))
    begun = {name: p[0] for name, p in state.params.items()}
    return one.module.apply({'params': begun}, x_NBD[0])

  found = normal.undo(y_hat(state))
  wanted = sae.decode(params, sae.encode(params, x_BD))
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_narrower_member_takes_the_first_latents(folder):
  _, stacks, _, _, begun, _, chosen = begin(
    folder, 'layers=1;sites=resid_post;widths=32;sparsity=8'
  )
  ((source,),) = chosen[0]
  assert source.card['width'] == 64  # the nearest that has enough
  np.testing.assert_allclose(
    begun[0].params['W_dec'][0], source.load()['W_dec'][:32], rtol=1e-6
  )


def test_a_wider_member_begins_the_rest_at_random(folder):
  _, _, _, states, begun, _, chosen = begin(
    folder, 'layers=1;sites=resid_post;widths=256;sparsity=8'
  )
  ((source,),) = chosen[0]
  assert source.card['width'] == 128
  for name in ('W_dec', 'W_enc', 'log_threshold'):
    old = np.asarray(states[0].params[name][0])
    new = np.asarray(begun[0].params[name][0])
    np.testing.assert_array_equal(new[128:], old[128:])
    assert not np.any(new[:128] == old[:128])


def test_published_ones_of_any_format_serve_as_well(folder, tmp_path):
  """One in SAELens' form, another in Gemma Scope 2's: the same function."""
  ours = [m for m in release.load_all(folder) if m.card['width'] == 64]
  paths = []
  for layer, write in ((1, saelens.write), (2, gemma_scope_2.write)):
    source = next(
      m
      for m in ours
      if m.card['sites'] == [f'resid_post/{layer}']
      and m.card['sparsity']['value'] == 8
    )
    more = (8.0,) if write is gemma_scope_2.write else ()
    found = {**source.card, 'model': 'gemma3-1b'}
    write(tmp_path / str(layer), source.load(), found, *more)
    paths.append(str(tmp_path / str(layer)))
  argument = 'layers=1,2;sites=resid_post;widths=64;sparsity=8'
  *_, begun, _, _ = begin(','.join(paths), argument)
  *_, wanted, _, _ = begin(folder, argument)
  for a, b in zip(jax.tree.leaves(begun), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(a, b)


def test_another_layer_may_be_named(folder):
  *_, chosen = begin(
    folder,
    'layers=2,3;sites=resid_post;widths=64;sparsity=8',
    **{'initialise.layer': 1},
  )
  layers = {source.card['sites'][0] for group in chosen for (source,) in group}
  assert layers == {'resid_post/1'}


@pytest.mark.parametrize(
  'argument, words',
  [
    ('layers=3;sites=resid_post', 'has none; it has sae resid_post/0'),
    ('layers=1;sites=mlp_out', 'needs a sae of mlp_out/1 to start from'),
    (
      'layers=0,1;sites=resid_post;type=crosscoder;widths=512',
      'at least 256 latents to start from; found 128',
    ),
  ],
)
def test_what_the_release_lacks_is_a_sentence(argument, words, folder):
  with pytest.raises(config_lib.ConfigError, match=words):
    begin(folder, argument + ';sparsity=8' + ';widths=512')


def test_a_feature_of_several_layers_becomes_one_latent_of_the_first():
  """Two layers, known counterparts: latent 0 and 1 of each read e0 and e1."""
  eye = np.eye(4, dtype=np.float32)

  def part(rows):
    return {
      'W_enc': eye[rows].T,
      'b_enc': np.arange(4, dtype=np.float32) / 10,
      'W_dec': eye[rows],
      'b_dec': np.full(4, 0.1, np.float32),
      'threshold': np.full(4, 0.2, np.float32),
    }

  # The second layer's SAE has e1 first, then e3, e0, e2.
  found = initialise.crosswise([part([0, 1, 2, 3]), part([1, 3, 0, 2])], 2)
  np.testing.assert_array_equal(found['W_enc'][0].T, eye[[0, 1]])
  # e0 and e1 are taken by layer 0: layer 1's own are e3 and e2.
  np.testing.assert_array_equal(found['W_enc'][1].T, eye[[3, 2]])
  np.testing.assert_allclose(found['b_enc'][1], [0.1, 0.3])
  np.testing.assert_array_equal(found['W_dec'][0, :, 0], eye[[0, 1]])
  np.testing.assert_array_equal(found['W_dec'][0, :, 1], eye[[0, 1]])
  assert not np.any(found['W_dec'][1, :, 0])
  np.testing.assert_array_equal(found['W_dec'][1, :, 1], eye[[3, 2]])


def test_a_crosscoder_starts_from_single_layers_better_than_at_random(folder):
  """On the layers' own sums of directions: the error, beside the control."""
  config, stacks, groups, states, begun, normalisation, _ = begin(
    folder,
    'layers=0,1,2;sites=resid_post;type=crosscoder;widths=96;sparsity=8',
  )
  module = stacks[0].module
  rng, parts = np.random.default_rng(0), release.load_all(folder)
  rows = []
  for layer in range(3):
    (params,) = [
      m.load() for m in parts if m.card['name'] == f'resid_post/{layer}/64/8.0'
    ]
    on = rng.random((200, 32)) < 0.1
    rows.append(3 * on @ params['W_dec'][:32] + params['b_dec'])
  rows = [n.apply(x) for n, x in zip(normalisation.values(), rows, strict=True)]
  x = np.stack(rows, 1).astype(np.float32)
  errors = []
  for state in (begun[0], states[0]):
    own = {name: np.asarray(p)[0] for name, p in state.params.items()}
    y_hat = jax.jit(module.apply)({'params': own}, x)
    errors.append(float(np.mean(np.sum((x - y_hat) ** 2, (1, 2)))))
  assert errors[0] < 0.7 * errors[1], errors
  norms = sae.decoder_norm(begun[0].params['W_dec'][0])
  np.testing.assert_allclose(norms, 1, rtol=1e-5)
  earlier = np.tril(np.ones((3, 3)), -1).astype(bool)
  assert not np.any(np.asarray(begun[0].params['W_dec'][0])[earlier])


def test_whitening_turns_latents_towards_the_rows():
  config = tiny.get_config('layers=1,2;sites=resid_post;widths=128;sparsity=8')
  stacks, _ = setup.make_stacks(config, setup.dimensions(config))
  mesh = mesh_lib.make({'sae': 1, 'data': 1, 'latent': 2}, jax.devices()[:2])
  states = stack.init_all(stacks, jax.random.key(0), mesh)
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
  spread = {1: 1.0 / (1 + np.arange(D)) ** 2, 2: np.ones(D)}  # of each layer
  covariance = lambda site: basis * spread[site.layer] @ basis.T
  (old,), (half,), (whole,), (none,) = (
    states,
    *(initialise.whiten(p, stacks, states, covariance) for p in (0.5, 1, 0)),
  )
  for name in ('W_enc', 'W_dec'):
    np.testing.assert_allclose(none.params[name], old.params[name], atol=1e-5)
    # A site whose rows have no direction of their own is left as it is.
    np.testing.assert_allclose(
      whole.params[name][1], old.params[name][1], atol=1e-5
    )
    assert whole.params[name].sharding == old.params[name].sharding
  read = lambda state: np.asarray(state.params['W_enc'][0])
  for state in (half, whole):
    W_enc, W_dec = read(state), np.asarray(state.params['W_dec'][0])
    np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.sum(W_enc * W_dec, 1), 1, rtol=1e-4)

  def alike(W_enc):
    """Mean absolute correlation of two latents' pre-activations."""
    S = W_enc @ covariance(stacks[0].sites[0]) @ W_enc.T
    correlation = S / np.sqrt(np.outer(np.diag(S), np.diag(S)))
    return np.abs(correlation[~np.eye(len(S), dtype=bool)]).mean()

  random, halfway, independent = map(alike, map(read, (old, half, whole)))
  assert independent < 0.1 < halfway < 0.6 * random, (random, halfway)
