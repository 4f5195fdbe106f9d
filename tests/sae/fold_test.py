"""Folding: the same member on raw activations, and back again."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope.sae import fold

L, D, F = 3, 8, 24


def single(d_out=D, skip=False, k=0, seed=0):
  rng = np.random.default_rng(seed)
  W_dec = rng.normal(size=(F, d_out))
  params = {
    'W_enc': rng.normal(size=(D, F)),
    'b_enc': 0.1 * rng.normal(size=F),
    'W_dec': W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
    'b_dec': 0.3 * rng.normal(size=d_out),
    'threshold': rng.uniform(0.05, 0.5, F) * (not k),
  }
  params |= {'W_skip': rng.normal(size=(D, d_out))} if skip else {}
  params |= {'k': np.array(k)} if k else {}
  return {key: array.astype(np.float32) for key, array in params.items()}


def several(d_out=D, skip=False, k=0):
  layers = [single(d_out, skip, k, seed) for seed in range(L)]
  params = {key: np.stack([one[key] for one in layers]) for key in layers[0]}
  later = np.triu(np.ones((L, L), np.float32))[:, None, :, None]
  W_dec = np.random.default_rng(9).normal(size=(L, F, L, d_out)) * later
  W_dec /= np.sqrt((W_dec**2).sum((2, 3), keepdims=True))
  params['W_dec'] = W_dec.astype(np.float32)
  params |= {'k': np.float32(k)} if k else {}
  return params


def scales(*values):
  return [fold.Normalisation(value) for value in values]


def centred(values, width, seed):
  """Normalisations with a centre four times the scale."""
  rng = np.random.default_rng(seed)
  return [
    fold.Normalisation(c, 4 * c * rng.normal(size=width).astype(np.float32))
    for c in values
  ]


def forward(params, x, shift=0.0):
  """f and y_hat in float64, of [B, D] or [B, L, D]."""
  p = {key: array.astype(np.float64) for key, array in params.items()}
  many = p['W_enc'].ndim == 3
  terms = 'bld,ldf->blf' if many else 'bd,df->bf'
  z = np.einsum(terms, x - shift, p['W_enc']) + p['b_enc']
  f = np.maximum(z, 0) * (z > p['threshold'])
  if 'k' in p:
    ranked = np.sort(f.reshape(len(f), -1), 1)[:, -int(p['k'])]
    f = f * (f >= ranked.reshape(-1, *[1] * (f.ndim - 1)))
  terms = 'blf,lfmd->bmd' if many else 'bf,fd->bd'
  y = np.einsum(terms, f, p['W_dec']) + p['b_dec']
  if 'W_skip' in p:
    terms = 'bld,lde->ble' if many else 'bd,de->be'
    y = y + np.einsum(terms, x, p['W_skip'])
  return f, y


CASES = {
  'sae': (single(), [37.0], [37.0], True),
  'tiny scale': (single(), [0.02], [0.02], True),
  'transcoder': (single(6), [5.0], [0.3], False),
  'affine': (single(6, skip=True), [5.0], [0.3], False),
  'topk': (single(k=4), [37.0], [37.0], True),
  'crosscoder': (several(), [2.0, 9.0, 30.0], [2.0, 9.0, 30.0], True),
  'clt': (several(6, skip=True), [4.0, 4.5, 5.0], [0.2, 3.0, 40.0], False),
  'topk clt': (several(6, k=7), [4.0, 4.5, 5.0], [0.2, 3.0, 40.0], False),
  'topk crosscoder': (several(k=7), [2.0, 9.0, 30.0], [2.0, 9.0, 30.0], True),
}


def normalisations(case, with_centres):
  """Of the sites read and written; an SAE writes what it reads."""
  params, A, C, bias = CASES[case]
  if not with_centres:
    return scales(*A), scales(*C)
  read = centred(A, D, 2)
  written = centred(C, params['b_dec'].shape[-1], 3)
  return read, read if bias else written


def stacked(normalisations, many):
  """Scale and centre as arrays that broadcast against rows."""
  scale, centre = (
    np.stack(
      [
        np.asarray(n[i] if n[i] is not None else 0.0, np.float64)
        for n in normalisations
      ]
    )
    for i in (0, 1)
  )
  if not many:
    return scale[0], centre[0]
  return scale[:, None], centre.reshape(len(centre), -1)


@pytest.mark.parametrize('with_centres', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_fold_gives_the_same_member_on_raw_activations(case, with_centres):
  params, A, C, bias = CASES[case]
  many = params['W_enc'].ndim == 3
  read, written = normalisations(case, with_centres)
  (A1, m), (C1, n) = stacked(read, many), stacked(written, many)
  shape = (500, L, D) if many else (500, D)
  x = np.random.default_rng(1).normal(size=shape)  # as training sees it
  shift = params['b_dec'].astype(np.float64) if bias else 0.0
  f, y_hat = forward(params, x, shift)
  folded = fold.fold(params, read, written, pre_encoder_bias=bias)
  g, raw = forward(folded, A1 * x + m)
  assert (f > 0).mean() > 0.05
  np.testing.assert_array_equal(g > 0, f > 0)
  np.testing.assert_allclose((raw - n) / C1, y_hat, atol=4e-5)
  unit = C1 if not (many and 'k' in params) else np.exp(np.log(C).mean())
  np.testing.assert_allclose(g / unit, f, atol=1e-5)
  assert all(array.dtype == np.float32 for array in folded.values())
  if A == C and not many:  # Gemma Scope's fold
    for key in ('W_enc', 'W_dec'):
      np.testing.assert_array_equal(folded[key], params[key])
  if not many:
    np.testing.assert_array_equal(folded['W_dec'], params['W_dec'])


@pytest.mark.parametrize('with_centres', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_unfold_is_the_inverse(case, with_centres):
  params, _, _, bias = CASES[case]
  read, written = normalisations(case, with_centres)
  folded = fold.fold(params, read, written, pre_encoder_bias=bias)
  back = fold.unfold(folded, read, written, pre_encoder_bias=bias)
  assert set(back) == set(params)
  for key, array in params.items():
    assert back[key].dtype == np.float32
    tolerance = 1e-5 if with_centres else 2e-6  # centres are 4 scales long
    np.testing.assert_allclose(back[key], array, rtol=3e-7, atol=tolerance)
    if key not in ('b_enc', 'b_dec'):
      # What was zero stays zero: nothing begins to write to earlier layers.
      np.testing.assert_array_equal(back[key][array == 0], 0)


def test_apply_and_undo_are_inverse():
  x = np.random.default_rng(0).normal(size=(7, D)).astype(np.float32)
  for n in (*scales(3.0), *centred([3.0], D, 1)):
    np.testing.assert_allclose(n.undo(n.apply(x)), x, atol=1e-5)
  np.testing.assert_array_equal(fold.Normalisation(3.0).apply(x), x / 3.0)


def test_fold_refuses_a_centre_that_does_not_fit():
  read = [fold.Normalisation(1.0, np.zeros(D + 1))]
  with pytest.raises(ValueError, match=f'{D} finite values'):
    fold.fold(single(), read, scales(1.0), pre_encoder_bias=True)


def test_scales_of_one_change_only_the_bias_of_the_encoder():
  params = several(skip=True)
  folded = fold.fold(
    params, scales(*[1] * L), scales(*[1] * L), pre_encoder_bias=False
  )
  for key, array in params.items():
    np.testing.assert_array_equal(folded[key], array)


@pytest.mark.parametrize('scale', [0.0, -1.0, float('nan'), float('inf')])
def test_fold_refuses_a_scale_that_is_none(scale):
  with pytest.raises(ValueError, match='above 0'):
    fold.fold(single(), scales(scale), scales(1.0), pre_encoder_bias=True)
  with pytest.raises(ValueError, match='3 scales are needed'):
    fold.unfold(
      several(), scales(1.0), scales(*[1.0] * 3), pre_encoder_bias=True
    )


@pytest.mark.parametrize('params', [single(), several(6, skip=True)])
def test_fold_decoder_norm_is_exact_and_gives_unit_decoders(params):
  params = dict(params)
  shape = params['b_enc'].shape
  stretch = np.geomspace(1e-30, 1e3, params['b_enc'].size).reshape(shape)
  stretch = stretch.astype(np.float32)
  many = len(shape) == 2
  params['W_dec'] = params['W_dec'] * (
    stretch[..., None, None] if many else stretch[:, None]
  )
  for key in ('W_enc', 'b_enc', 'threshold'):
    params[key] = params[key] / (
      stretch[..., None, :] if key == 'W_enc' else stretch
    )
  unit = fold.fold_decoder_norm(params)
  square = (unit['W_dec'] ** 2).sum((2, 3) if many else 1)
  np.testing.assert_allclose(square, 1, rtol=1e-6)
  x = np.random.default_rng(1).normal(size=(200, *[L] * many, D))
  before, after = forward(params, x)[1], forward(unit, x)[1]
  np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('params', [single(), several()])
def test_fold_decoder_norm_silences_a_latent_that_writes_nothing(params):
  params = {key: array.copy() for key, array in params.items()}
  many = params['b_enc'].ndim == 2
  silent = (2, 3) if many else 3
  params['W_dec'][silent] = 0
  unit = fold.fold_decoder_norm(params)
  x = np.random.default_rng(1).normal(size=(200, *[L] * many, D))
  before, after = forward(params, x), forward(unit, x)
  row = (slice(None), *silent) if many else (slice(None), silent)
  assert before[0][row].any() and not after[0][row].any()
  np.testing.assert_allclose(after[1], before[1], atol=1e-5)
  square = (unit['W_dec'] ** 2).sum((2, 3) if many else 1)
  np.testing.assert_allclose(square, 1, rtol=1e-6)
  if many:  # no earlier layer was written to
    assert not any(unit['W_dec'][m, :, :m].any() for m in range(L))


def test_latents_that_are_ranked_keep_their_norms():
  with pytest.raises(ValueError, match='TopK'):
    fold.fold_decoder_norm(single(k=3))


@pytest.mark.parametrize('with_centres', [False, True])
def test_two_models_side_by_side_have_a_normalisation_each(with_centres):
  rng = np.random.default_rng(4)
  params = {
    'W_enc': rng.normal(size=(2 * D, F)),
    'b_enc': 0.1 * rng.normal(size=F),
    'W_dec': rng.normal(size=(F, 2 * D)),
    'b_dec': 0.3 * rng.normal(size=2 * D),
    'threshold': rng.uniform(0.05, 0.5, F),
  }
  params = {key: array.astype(np.float32) for key, array in params.items()}
  of_models = centred([3.0, 7.0], D, 5) if with_centres else scales(3.0, 7.0)
  moved, both = fold.side_by_side(params, of_models)
  raw = fold.fold(moved, [both], [both], pre_encoder_bias=True)
  x = 4 * rng.normal(size=(20, 2 * D))
  halves = np.split(x, 2, 1)
  normal = np.concatenate(
    [n.apply(half) for n, half in zip(of_models, halves, strict=True)], 1
  )
  f, y = forward(params, normal, params['b_dec'])
  f_raw, y_raw = forward(raw, x)
  unit = np.sqrt(3.0 * 7.0)
  np.testing.assert_allclose(f_raw, unit * f, rtol=1e-4, atol=1e-4)
  undone = np.concatenate(
    [
      n.undo(half) for n, half in zip(of_models, np.split(y, 2, 1), strict=True)
    ],
    1,
  )
  np.testing.assert_allclose(y_raw, undone, rtol=1e-4, atol=1e-3)
