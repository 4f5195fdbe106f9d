"""The index, held to loops over every activation; and what is made of it."""

from __future__ import annotations

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_scope import files, sae, sites
from gemma_scope import mesh as mesh_lib
from gemma_scope.language_model import splice, weights
from gemma_scope.microscope.dashboard import neuronpedia
from gemma_scope.microscope.index import build, logit_lens, statistics, store
from gemma_scope.text import prepare, sequences, tokenizers
from tests.helpers import releases
from tests.helpers.random_saes import D, F, N, T, member

FIELDS = [name for name in store._FIELDS]


MEMBERS = [
  member(0, 'resid_post/1'),
  member(1, 'attn_out/2', k=3),
  member(2, 'resid_post/0', 16, layers=2),
]
SAES = releases.saes(MEMBERS)


@pytest.fixture(scope='module')
def model():
  return weights.load('tiny')


@pytest.fixture(scope='module')
def text():
  rng = np.random.default_rng(0)
  sequences_NT = rng.integers(10, 4000, (N, T)).astype(np.int32)
  sequences_NT[:, 0] = 2
  keep_NT = sequences_NT != 2
  documents_NT = np.cumsum(rng.random(N * T) < 0.1).reshape(N, T)
  about = {'name': 'test', 'sha256': '0' * 64, 'split': 'train'}
  return build.Text(sequences_NT, keep_NT, documents_NT.astype(np.int32), about)


@pytest.fixture(scope='module')
def built(model, text):
  return list(build.build(*model, SAES, text, build.How(8)))


def activations(model, text, params, card):
  """f [N, T, F] of every token, at once."""
  at = tuple(map(sites.parse, card['sites']))
  taps = splice.taps(*model, text.sequences_NT, at)
  x = [np.asarray(taps[site]) for site in at]
  x = np.stack(x, -2) if len(at) > 1 else x[0]
  with jax.default_matmul_precision('highest'):
    f = np.asarray(sae.encode(params, x)).reshape(N, T, -1)
  return np.where(text.keep_NT[..., None], f, 0)


def test_equals_loops_over_every_activation(model, text, built):
  for (params, card), found in zip(MEMBERS, built, strict=True):
    f_NTF = activations(model, text, params, card)
    on_NTF = f_NTF > 0
    assert 0.005 < on_NTF.mean() < 0.3
    np.testing.assert_array_equal(found.fired_F, on_NTF.sum((0, 1)))
    np.testing.assert_allclose(found.max_F, f_NTF.max((0, 1)), rtol=1e-5)
    both_FF = np.einsum('ntf,ntg->fg', on_NTF, on_NTF, dtype=int)
    for j in range(f_NTF.shape[-1]):
      values = f_NTF[..., j]
      counts, _ = np.histogram(values[values > 0], statistics.EDGES_H)
      np.testing.assert_array_equal(found.histogram_FH[j], counts)
      # The largest of each document, the largest first.
      best = {}
      for n, t in zip(*np.nonzero(values), strict=True):
        document = text.documents_NT[n, t]
        if document not in best or values[n, t] > values[best[document]]:
          best[document] = n, t
      order = sorted(best.values(), key=lambda at: (-values[at], at))
      there = found.top_sequence_FE[j] >= 0
      at = list(
        zip(
          found.top_sequence_FE[j][there],
          found.top_position_FE[j][there],
          strict=True,
        )
      )
      assert at == order[: statistics.EXAMPLES]
      # Silent where it is said to be.
      for n in found.silent_FM[j]:
        assert n < 0 or not on_NTF[n, :, j].any()
      # Co-firing over all latents.
      either = found.fired_F[j] + found.fired_F - both_FF[j]
      share = both_FF[j] / np.maximum(either, 1)
      share[j] = 0
      wanted = np.sort(share[share > 0])[::-1][: statistics.NEAR]
      has = found.cofiring_FC[j] >= 0
      np.testing.assert_allclose(
        found.cofiring_value_FC[j][has], wanted, rtol=1e-6
      )
      np.testing.assert_allclose(share[found.cofiring_FC[j][has]], wanted)
      # Samples lie in their tenth, and windows show the values there.
      for q in range(statistics.TENTHS):
        low, high = (found.max_F[j] * n / statistics.TENTHS for n in (q, q + 1))
        for r in range(statistics.SAMPLES):
          n, t = (
            found.sample_sequence_FQR[j, q, r],
            found.sample_position_FQR[j, q, r],
          )
          if n < 0:
            continue
          assert values[n, t] == pytest.approx(
            found.sample_FQR[j, q, r], rel=1e-5
          )
          assert low * 0.9999 <= values[n, t] <= high * 1.0001
          window = found.windows('sample', j)[q, r]
          start = t - len(window) // 2
          for w, value in enumerate(window):
            inside = 0 <= start + w < T
            wanted = values[n, start + w] if inside else 0
            assert value == pytest.approx(wanted, rel=1e-3)


def same(a, b, tolerance=0.0):
  for name in FIELDS:
    x, y = getattr(a, name), getattr(b, name)
    if x is None:
      assert y is None
    elif x.dtype.kind == 'f':
      # A float16 may round the other way: its last bit.
      least = 2.0**-10 if tolerance and x.dtype == np.float16 else 0.0
      np.testing.assert_allclose(
        x, y, rtol=max(tolerance, least), atol=tolerance, err_msg=name
      )
    else:
      np.testing.assert_array_equal(x, y, err_msg=name)


def test_batches_and_the_order_of_sequences_change_nothing(model, text, built):
  for one, two in zip(
    built, build.build(*model, SAES, text, build.How(5)), strict=True
  ):
    same(one, two, 1e-5)


def test_devices_change_nothing(text, built):
  mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  model = weights.load('tiny', mesh=mesh)
  for one, two in zip(
    built, build.build(*model, SAES, text, build.How(8, mesh)), strict=True
  ):
    np.testing.assert_array_equal(one.fired_F, two.fired_F)
    np.testing.assert_array_equal(one.top_sequence_FE, two.top_sequence_FE)
    np.testing.assert_allclose(one.max_F, two.max_F, rtol=1e-4)


class Stop(Exception):
  pass


def test_a_stopped_pass_continues_to_the_same(model, text, built, tmp_path):
  state = lambda: build.State(tmp_path / 'partial.npz', text, SAES, every=1)
  calls = []

  def poll():
    calls.append(1)
    if len(calls) == 3:
      raise Stop

  with pytest.raises(Stop):
    list(
      build.build(*model, SAES, text, build.How(8, poll=poll, state=state()))
    )
  assert state().load()[0] == 16
  done = []
  found = build.build(
    *model,
    SAES,
    text,
    build.How(8, progress=lambda n, _: done.append(n), state=state()),
  )
  for one, two in zip(built, found, strict=True):
    same(one, two)
  assert done[0] == 24  # only the last batch was left
  changed = releases.saes(
    (p | {'b_enc': p['b_enc'] + 1}, card) for p, card in MEMBERS
  )
  for saes in (SAES[:1], changed):
    other = build.State(tmp_path / 'partial.npz', text, saes, every=1)
    assert other.load() is None
  (tmp_path / 'partial.npz').write_bytes(b'PK cut')
  assert state().load() is None


def test_written_and_read_back(built, tmp_path):
  for i, one in enumerate(built):
    store.write(tmp_path / str(i), one)
    found = store.read(tmp_path / str(i))
    same(one, found)
    assert found.meta['card'] == one.meta['card']
  file = tmp_path / '0' / 'arrays.safetensors'
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match='not those it was written'):
    store.read(tmp_path / '0')
  file = tmp_path / '1' / 'index.json'
  file.write_text(file.read_text().replace('"tokens": ', '"tokens": 1'))
  with pytest.raises(ValueError, match='index.json does not have its own hash'):
    store.read(tmp_path / '1')
  with pytest.raises(ValueError, match='Cannot read the index'):
    store.read(tmp_path)


def test_activations_beyond_float16_are_kept(model, text, tmp_path):
  """A latent 1e5 times as large, its decoder as much shorter, is the same."""
  params, card = MEMBERS[0]
  large = dict(params)
  for key in ('W_enc', 'b_enc', 'threshold'):
    large[key] = params[key] * np.float32(2**17)
  large['W_dec'] = params['W_dec'] / np.float32(2**17)
  small, found = build.build(
    *model, releases.saes([MEMBERS[0], (large, card)]), text, build.How(8)
  )
  assert found.max_F.max() > 2e6
  for name in ('top', 'sample'):
    for j in range(0, F, 7):
      values = found.windows(name, j)
      assert np.isfinite(values).all()
      np.testing.assert_allclose(
        values, small.windows(name, j) * 2**17, rtol=1e-3
      )
      peak = values[..., values.shape[-1] // 2]
      there = getattr(found, f'{name}_FE' if name == 'top' else 'sample_FQR')[j]
      np.testing.assert_allclose(peak, there, rtol=1e-3)
  assert not found.histogram_FH[:, -1].any()
  count = neuronpedia.write(
    tmp_path / 'out',
    found,
    lambda ids: [f't{i}' for i in ids],
    neuronpedia.Naming('m', 'mine'),
  )
  assert count
  with gzip.open(tmp_path / 'out/activations/batch-0.jsonl.gz', 'rt') as file:
    for line in file:
      values = json.loads(line, parse_constant=pytest.fail)['values']
      assert max(values) > 1e5


def test_an_index_of_version_2_is_read_or_refused(built, tmp_path):
  """Version 0.3.0 kept the activations themselves, in float16."""
  new = ('outlier_sequence_O', 'outlier_position_O', 'outlier_norm_O')
  one = built[0]

  def old(factor):
    path = tmp_path / f'x{factor:g}'
    windows = {
      'window_top_FEW': one.window_top_FEW,
      'window_sample_FQRW': one.window_sample_FQRW,
    }
    for name, share in windows.items():
      most = (one.max_F * factor).reshape(-1, *[1] * (share.ndim - 1))
      with np.errstate(over='ignore'):
        windows[name] = (share * most).astype(np.float16)
    store.write(
      path, dataclasses.replace(one, max_F=one.max_F * factor, **windows)
    )
    arrays = load_file(path / 'arrays.safetensors')
    for name in (*new, 'outlier_fired_F'):
      del arrays[name]
    save_file(arrays, path / 'arrays.safetensors')
    meta = json.loads((path / 'index.json').read_text()) | {'version': 2}
    meta['arrays_sha256'] = files.sha256(path / 'arrays.safetensors')
    del meta['meta_sha256']
    (path / 'index.json').write_text(json.dumps(meta))
    return path

  found = store.read(old(1.0))
  for j in range(F):
    np.testing.assert_allclose(
      found.windows('top', j), one.windows('top', j), rtol=2e-3, atol=1e-3
    )
  assert not found.outlier_fired_F.any()
  with pytest.raises(ValueError, match='too large for float16. Make it again'):
    store.read(old(1e5))


def test_outliers_are_left_out_and_listed(model, text):
  """A bound on the norm: tokens above it count nowhere but in their list."""
  params, card = MEMBERS[0]
  site = sites.parse('resid_post/1')
  x_NTD = splice.taps(*model, text.sequences_NT, (site,))[site]
  norm_NT = np.linalg.norm(np.asarray(x_NTD), axis=-1)
  bound = float(np.quantile(norm_NT[text.keep_NT], 0.9))
  outlier_NT = text.keep_NT & (norm_NT > bound)
  ruled = card | {'outliers': {'norm_bounds': {str(site): bound}}}
  (found,) = build.build(
    *model, releases.saes([(params, ruled)]), text, build.How(5)
  )
  on_NTF = activations(model, text, params, card) > 0
  np.testing.assert_array_equal(found.fired_F, on_NTF[~outlier_NT].sum(0))
  np.testing.assert_array_equal(
    found.outlier_fired_F, on_NTF[outlier_NT].sum(0)
  )
  listed = found.outlier_sequence_O, found.outlier_position_O
  np.testing.assert_array_equal(np.transpose(listed), np.argwhere(outlier_NT))
  np.testing.assert_allclose(found.outlier_norm_O, norm_NT[listed], rtol=1e-5)
  assert found.meta['tokens'] == (text.keep_NT & ~outlier_NT).sum()
  assert found.meta['outliers']['tokens'] == outlier_NT.sum()
  np.testing.assert_array_equal(found.keep_NT, text.keep_NT & ~outlier_NT)
  there = found.top_sequence_FE >= 0
  shown = found.top_sequence_FE[there], found.top_position_FE[there]
  assert not outlier_NT[shown].any()
  (every,) = build.build(
    *model, releases.saes([(params, ruled)]), text, build.How(5, outliers=True)
  )
  np.testing.assert_array_equal(every.fired_F, on_NTF.sum((0, 1)))
  assert every.meta['outliers'] is None


def test_effects_are_those_of_the_models_own_unembedding(model, built):
  """A latent added to a residual stream moves the logits as it is said to.

  The soft-cap is monotone and the denominator of the norm one number a token:
  of a small step along a direction the order of logits' changes is the index's.
  """
  gemma, params = model
  unembed = jax.jit(gemma.unembed)
  for (p, card), found in zip(MEMBERS[:2], built[:2], strict=True):
    rows_FD = logit_lens.directions(params, p, card)
    assert rows_FD.shape == (F, D)
    x_D = np.random.default_rng(5).normal(size=D).astype(np.float32) * 3

    def logits_V(add_D, x_D=x_D):
      return np.asarray(unembed(params, (x_D + add_D)[None, None])[0, 0])

    for j in (0, 7):
      row_D = rows_FD[j]
      change_V = (logits_V(1e-2 * row_D) - logits_V(-1e-2 * row_D)) / 2e-2
      # What the step does to the denominator moves all logits towards 0.
      size2 = float(x_D @ x_D)
      toward, rms = float(x_D @ row_D) / size2, np.sqrt(size2 / D)
      change_V = (change_V + toward * logits_V(0 * row_D)) * rms
      top = found.positive_FL[j]
      values = found.positive_value_FL[j]
      np.testing.assert_allclose(change_V[top], values, rtol=2e-2)
      assert change_V.max() <= values[0] * 1.02


def test_attention_is_carried_through_its_output_and_norm(model):
  """Through W_O, and the gain of the norm after it."""
  gemma, params = model
  p, card = MEMBERS[1]
  site, out = sites.parse('attn_out/2'), sites.parse('attn_raw/2')
  tokens = np.asarray([[2, 50, 60, 70]], np.int32)
  raw = jax.jit(
    lambda add_D: gemma.forward(
      params,
      tokens,
      taps=[out],
      edits={site: lambda x: x + add_D},
      logits=False,
    ).taps[out]
  )
  step = np.asarray(raw(p['W_dec'][3]) - raw(0 * p['W_dec'][3]))
  gain = 1 + np.asarray(params['layer_2']['post_attention_norm']['scale'])
  wanted = step[0, 2] * gain
  found = logit_lens.directions(params, p, card)[3]
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_neighbours_are_the_nearest_decoders(built):
  W = MEMBERS[0][0]['W_dec']
  unit = W / np.linalg.norm(W, axis=1, keepdims=True)
  cosine = unit @ unit.T
  np.fill_diagonal(cosine, -2)
  wanted = np.sort(cosine, 1)[:, ::-1][:, : logit_lens.NEAR]
  np.testing.assert_allclose(built[0].neighbour_value_FC, wanted, atol=1e-5)


def test_documents_are_those_of_the_stream(tmp_path):

  stream = np.asarray([5, 6, 1, 7, 8, 9, 1, 4, 3, 3, 3, 3], np.uint16)
  stream.tofile(tmp_path / 'x')
  rows = sequences.Sequences(str(tmp_path / 'x'), 'uint16', 2, 5, len(stream))
  np.testing.assert_array_equal(
    rows.documents(np.asarray([0, 1, 2]), 1),
    [[0, 0, 0, 0, 1], [1, 1, 1, 1, 2], [2, 2, 2, 2, 2]],
  )


# Columns without a default in Neuronpedia's database, and those that have one
# and are written, by table; `*` marks an array.
TABLES = {
  'release': {
    'name': str, 'description': str, 'descriptionShort': str, 'urls': '*',
    'creatorName': str, 'creatorNameShort': str, 'creatorId': str,
    'createdAt': str, 'visibility': str,
  },
  'model': {
    'id': str, 'displayName': str, 'displayNameShort': str, 'instruct': bool,
    'layers': int, 'neuronsPerLayer': int, 'owner': str, 'creatorId': str,
    'createdAt': str, 'updatedAt': str, 'visibility': str,
  },
  'sourceset': {
    'modelId': str, 'name': str, 'description': str, 'type': str,
    'creatorName': str, 'urls': '*', 'creatorId': str, 'releaseName': str,
    'createdAt': str, 'visibility': str,
  },
  'source': {
    'id': str, 'modelId': str, 'setName': str, 'hasDashboards': bool,
    'creatorId': str, 'createdAt': str, 'visibility': str, 'dataset': str,
    'num_prompts': int, 'num_tokens_in_prompt': int,
  },
  'features/batch-0': {
    'modelId': str, 'layer': str, 'index': str, 'sourceSetName': str,
    'creatorId': str, 'createdAt': str, 'maxActApprox': float,
    'frac_nonzero': float, 'hasVector': bool,
    'freq_hist_data_bar_values': '*', 'freq_hist_data_bar_heights': '*',
    'topkCosSimIndices': '*', 'topkCosSimValues': '*',
    'correlated_features_indices': '*', 'correlated_features_l1': '*',
    'pos_str': '*', 'pos_values': '*', 'neg_str': '*', 'neg_values': '*',
  },
  'activations/batch-0': {
    'id': str, 'modelId': str, 'layer': str, 'index': str, 'creatorId': str,
    'createdAt': str, 'dataIndex': str, 'tokens': '*', 'values': '*',
    'maxValue': float, 'maxValueTokenIndex': int, 'minValue': float,
  },
  'explanations/batch-0': {
    'id': str, 'modelId': str, 'layer': str, 'index': str, 'authorId': str,
    'description': str, 'typeName': type(None),
    'explanationModelName': type(None), 'notes': str,
  },
}  # fmt: skip


def test_neuronpedia_gets_rows_of_its_tables(built, tmp_path):
  naming = neuronpedia.Naming('gemma-x', 'mine', 'us', 4, 512, '2026-01-02')
  labels = {0: {'text': 'a label', 'by': 'rule'}}
  pieces = lambda ids: [f't{i}' for i in ids]
  neuronpedia.write(tmp_path / 'out', built[0], pieces, naming, labels)
  rows = {}
  for table, columns in TABLES.items():
    with gzip.open(tmp_path / 'out' / f'{table}.jsonl.gz', 'rt') as file:
      rows[table] = list(map(json.loads, file))
    for row in rows[table]:
      assert set(row) == set(columns), table
      for name, kind in columns.items():
        assert isinstance(row[name], list if kind == '*' else kind), name
  # References between tables, and unique keys.
  (model,), (release,) = rows['model'], rows['release']
  (source_set,), (source,) = rows['sourceset'], rows['source']
  assert source_set['releaseName'] == release['name']
  assert source['setName'] == source_set['name']
  assert {model['id']} == {row['modelId'] for row in rows['features/batch-0']}
  features = {row['index'] for row in rows['features/batch-0']}
  assert len(features) == len(rows['features/batch-0'])
  examples = rows['activations/batch-0']
  assert len({row['id'] for row in examples}) == len(examples)
  assert {row['index'] for row in examples} <= features
  assert all(row['layer'] == source['id'] for row in examples)
  for row in rows['features/batch-0']:
    assert min(row['correlated_features_indices'], default=0) >= 0


def test_neuronpedia_gets_a_line_a_feature_and_an_example(built, tmp_path):
  pieces = lambda ids: [f't{i}' for i in ids]
  one = built[0]
  naming = neuronpedia.Naming('gemma-2-2b', 'mine', 'us')
  count = neuronpedia.write(tmp_path / 'out', one, pieces, naming)

  def lines(name):
    with gzip.open(tmp_path / 'out' / name, 'rt') as file:
      return [json.loads(line) for line in file]

  features = lines('features/batch-0.jsonl.gz')
  assert count == len(features) == (one.fired_F > 0).sum()
  first = features[0]
  j = int(first['index'])
  l0 = round(one.density_F.sum())
  assert first['layer'] == f'1-mine-res-40-jumprelu-l0-{l0}'
  assert first['modelId'] == 'gemma-2-2b'
  assert first['pos_str'] == pieces(one.positive_FL[j])
  assert sum(first['freq_hist_data_bar_heights']) == one.fired_F[j]
  examples = lines('activations/batch-0.jsonl.gz')
  assert len(examples) == (one.top_sequence_FE >= 0).sum()
  for example in examples:
    assert len(example['tokens']) == len(example['values'])
    assert max(example['values']) == example['maxValue'] > 0
  # A second export replaces the first.
  assert neuronpedia.write(tmp_path / 'out', one, pieces, naming) == count
  with pytest.raises(ValueError, match='may only have a-z'):
    neuronpedia.Naming('m', '../x')


def test_two_saes_of_one_neuronpedia_id_are_refused():
  ids = {'a/1': '1-x-res-1k-jumprelu-l0-9', 'a/2': '1-x-res-1k-jumprelu-l0-8'}
  neuronpedia.check_ids(ids)
  with pytest.raises(ValueError, match='a/1 and a/3 would both be'):
    neuronpedia.check_ids(ids | {'a/3': ids['a/1']})


def test_memory_is_what_is_kept():
  one = statistics.Statistics(64, 100)
  arrays = one.arrays()
  kept = sum(a.nbytes for name, a in arrays.items() if 'pairs' not in name)
  assert statistics.memory(64) == pytest.approx(kept, rel=0.02)


def test_the_corpus_of_an_index_names_no_folder_of_this_machine(tmp_path):
  folder = tmp_path / 'home-of-me'
  folder.mkdir()
  for i in range(300):
    (folder / f'{i}.txt').write_text(f'text number {i}')
  tokenizer = tokenizers.Tokenizer(str(weights.TINY / 'tokenizer.model'))
  token_store = prepare.prepare(
    f'files:{folder}/*.txt', tokenizer, tmp_path / 'store'
  )
  keep = lambda tokens_NT: tokens_NT > 3
  text = build.spread(token_store, 9, 5, keep, tokenizer.eos_id)
  assert text.about['name'].startswith('files:*.txt (')
  assert 'home-of-me' not in str(text.about)
