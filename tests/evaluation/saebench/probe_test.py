"""Probes on planted concepts, labels of code, and what is taken out."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from gemma_scope import sae, sites
from gemma_scope.evaluation import controls
from gemma_scope.evaluation.saebench import (
  absorption,
  probe,
  probe_inputs,
  probe_report,
  python_labels,
  scr_tpp,
)
from gemma_scope.language_model import weights
from gemma_scope.text import sources, tokenizers
from tests.helpers import releases

CODE = '''@d
class A(B):
  """doc é"""
  def f(self, x=1):
    # ü
    return g("é", x, f"a{x}b", k=2)
'''


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.Tokenizer(weights.tokenizer('tiny', ''))


# Labels of code.


def test_each_character_has_the_labels_that_python_gives_it():
  labels = python_labels.of_characters(CODE)

  def text(name):
    return ''.join(c for c, on in zip(CODE, labels[name], strict=True) if on)

  assert text('keyword') == 'classdefreturn'
  assert text('name') == 'dABfselfxgxk'
  assert text('string') == '"""doc é""""é"f"a{x}b"'
  assert text('comment') == '# ü'
  assert text('number') == '12'
  assert text('docstring') == '"""doc é"""'
  assert text('def_name') == 'Af'
  assert text('in_def') == 'return g("é", x, f"a{x}b", k=2)'
  assert text('call_argument') == '"é"xf"a{x}b"k=2'
  assert text('indent') == ' ' * 12


def test_a_character_has_one_class():
  for document in itertools.islice(sources.documents('python', 'eval'), 8):
    found = python_labels.of_characters(document.text)
    assert sum(found[c] for c in python_labels.CLASSES).max() <= 1


def test_pieces_are_the_text_again_and_follow_each_other(tokenizer):
  some = itertools.islice(sources.documents('python', 'eval'), 8)
  texts = [document.text for document in some]
  texts += ['a😀b\n\tü ▁ <0x41>', ' ' * 70 + 'x', CODE]
  for text in texts:
    pieces = tokenizer.pieces(tokenizer.encode(text))
    spans = python_labels.spans(pieces, text)
    assert spans[0, 0] == 0 and spans[-1, 1] == len(text)
    assert (spans[:, 1] > spans[:, 0]).all()
    # Parts of one character share it; else a piece starts where one ended.
    gap = spans[1:, 0] - spans[:-1, 1]
    assert set(np.unique(gap)) <= {0, -1}
    for (start, end), piece in zip(spans, pieces, strict=True):
      if not piece.startswith('<0x'):
        assert text[start:end].replace(' ', '▁') == piece


def test_pieces_of_another_text_are_refused(tokenizer):
  pieces = tokenizer.pieces(tokenizer.encode('a = 1'))
  with pytest.raises(ValueError, match='joined pieces differ'):
    python_labels.spans(pieces, 'a = 2')
  with pytest.raises(ValueError, match='cannot parse'):
    python_labels.of_characters('def (:')


# Probes.


def some_rows(seed=0, groups=40, size=20, d=8, f=12):
  rng = np.random.default_rng(seed)
  group_B = np.repeat(np.arange(groups), size)
  x_BD = rng.normal(size=(groups * size, d))
  f_BF = np.maximum(rng.normal(size=(groups * size, f)), 0)
  c_BF = np.maximum(rng.normal(size=(groups * size, f)), 0)
  return probe.Rows(x_BD, f_BF, c_BF, probe.split(group_B), group_B)


def test_logistic_is_at_the_minimum_of_its_loss():
  rng = np.random.default_rng(1)
  x_BD = rng.normal(size=(300, 4)) * [1, 10, 0.1, 1] + 5
  y_B = x_BD[:, 0] + rng.normal(size=300) > 6
  found = probe.logistic(x_BD, y_B)
  mean_D, scale_D = x_BD.mean(0), x_BD.std(0)
  weight_B = np.where(y_B, 0.5 / y_B.mean(), 0.5 / (1 - y_B.mean()))

  def loss(w_D, b):
    margin_B = np.where(y_B, 1, -1) * (((x_BD - mean_D) / scale_D) @ w_D + b)
    return weight_B @ np.logaddexp(0, -margin_B) + w_D @ w_D / 2

  w_D, b = found.w_D * scale_D, found.b + mean_D @ found.w_D
  least = loss(w_D, b)
  for i in range(4):
    for step in (-1e-2, 1e-2):
      assert loss(w_D + step * np.eye(4)[i], b) > least
  assert loss(w_D, b + 1e-2) > least < loss(w_D, b - 1e-2)


def test_auc_counts_pairs():
  rng = np.random.default_rng(2)
  score_B, y_B = rng.integers(0, 9, 60), rng.random(60) < 0.3
  pairs = score_B[y_B][:, None] - score_B[~y_B]
  expected = np.mean((pairs > 0) + 0.5 * (pairs == 0))
  found = probe.scores(score_B, y_B, np.arange(60))
  assert found['auc']['value'] == pytest.approx(expected)


def test_intervals_hold_the_truth_where_rows_of_a_group_are_alike():
  rng, inside = np.random.default_rng(3), 0
  for _ in range(200):
    common = np.repeat(rng.normal(size=30), 10)
    y_B = rng.random(300) < 0.5
    found = probe.scores(
      common + rng.normal(size=300), y_B, np.repeat(np.arange(30), 10)
    )['auc']
    inside += found['low'] <= 0.5 <= found['high']
  assert 178 <= inside <= 199  # 95 % of 200, with four standard deviations


def test_a_planted_latent_is_found_and_no_control_passes():
  given = some_rows()
  y_B = given.f_BF[:, 7] > 0
  found = probe.run(given, y_B, ks=(1, 3))
  one = probe.best(found, 'latents', 1)
  assert one['latents'] == [7] and one['auc']['low'] > 0.99
  for on in ('random_sae', 'shuffled_labels', 'coordinates', 'pca'):
    assert probe.best(found, on, 1)['auc']['value'] < 0.65, on
  said = probe_report.conclusion(found)
  assert said in probe_report.report(found) and said.startswith(
    'The latent (AUC 1.000)'
  )
  (beaten,) = re.findall(r'better than ([^;]*)', said)
  for rival in (
    'as many coordinates',
    'as many components',
    'dense',
    'difference of means',
  ):
    assert rival in beaten


def test_where_there_is_no_concept_no_interval_is_above_chance():
  y_B = np.random.default_rng(4).random(800) < 0.4
  found = probe.run(some_rows(), y_B, ks=(1, 3))
  for one in found['probes']:
    assert one['auc']['low'] < 0.5, one
  assert 'do not detect the concept' in probe_report.report(found)


def test_a_dense_probe_that_is_better_is_said_to_be():
  """The concept is a direction of x that a latent follows only in part."""
  rng, given = np.random.default_rng(5), some_rows(f=300)
  y_B = given.x_BD[:, 0] + given.x_BD[:, 1] > 0
  f_BF = given.f_BF.copy()
  f_BF[:, 3] = np.maximum(y_B + rng.normal(size=len(y_B)), 0) / 2
  found = probe.run(dataclasses.replace(given, f_BF=f_BF), y_B, ks=(1,))
  said = probe_report.conclusion(found)
  (better,) = re.findall(r'worse than ([^;]*)', said)
  assert 'a dense probe' in better and 'difference of means' in better


def test_shuffles_keep_groups_whole_where_labels_are_by_group():
  rng = np.random.default_rng(10)
  group_B = np.repeat(np.arange(12), rng.integers(3, 20, 12))
  label_G = rng.random(12) < 0.5
  orders = [probe._shuffled(label_G[group_B], group_B, rng) for _ in range(20)]
  for y_B in orders:
    by_group = [set(y_B[group_B == g]) for g in range(12)]
    assert all(len(labels) == 1 for labels in by_group)
    assert sum(labels == {True} for labels in by_group) == label_G.sum()
  assert len({tuple(y_B) for y_B in orders}) > 10
  mixed_B = rng.random(len(group_B)) < 0.5  # labels of tokens, say
  assert probe._shuffled(mixed_B, group_B, rng).sum() == mixed_B.sum()


def test_rows_of_a_group_are_not_in_train_and_test():
  given = some_rows()
  with pytest.raises(ValueError, match='split by group'):
    probe.Rows(
      given.x_BD, given.f_BF, None, ~given.test_B, np.zeros_like(given.group_B)
    )
  with pytest.raises(ValueError, match='same number of rows'):
    probe.Rows(given.x_BD[1:], given.f_BF, None, given.test_B, given.group_B)


# Taken out.


def random_sae(d=6, f=10, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    'W_enc': draw(d, f),
    'b_enc': draw(f),
    'W_dec': draw(f, d),
    'b_dec': draw(d),
    'threshold': np.zeros(f, np.float32),
  }


@pytest.mark.parametrize('k', [None, 3])
def test_removed_latents_write_nothing_and_the_others_as_before(k):
  params = random_sae() | ({} if k is None else {'k': np.float32(k)})
  x_BD = np.random.default_rng(5).normal(size=(20, 6)).astype(np.float32)
  f_BF = np.array(sae.encode(params, x_BD))
  gone = [1, 4, 8]
  without_BF = f_BF.copy()
  without_BF[:, gone] = 0
  changed = scr_tpp.remove(params, gone)
  made = sae.decode(changed, sae.encode(changed, x_BD))
  np.testing.assert_allclose(made, sae.decode(params, without_BF), atol=1e-5)
  edited = scr_tpp.edit(params, gone)(x_BD[None])[0]
  difference = sae.decode(params, f_BF) - sae.decode(params, without_BF)
  np.testing.assert_allclose(edited, x_BD - difference, atol=1e-5)
  np.testing.assert_array_equal(scr_tpp.edit(params, [])(x_BD), x_BD)
  with pytest.raises(ValueError, match='no latent 10'):
    scr_tpp.remove(params, [10])


def test_latents_of_several_layers_are_counted_layer_by_layer():
  params = {'b_enc': np.zeros((2, 3)), 'W_dec': np.ones((2, 3, 2, 4))}
  gone = scr_tpp.remove(params, [4])['W_dec']
  assert gone[1, 1].sum() == 0 and gone.sum() == params['W_dec'].sum() - 8


def planted(seed=0, count=4000):
  """x = t u + (2 s - 1) v + noise; latents: t, s, not s, and noise."""
  rng = np.random.default_rng(seed)
  t_B, s_B = rng.random(count) < 0.5, rng.random(count) < 0.5
  x_BD = 0.4 * rng.normal(size=(count, 6))
  x_BD[:, 0] += t_B
  x_BD[:, 1] += 2.0 * s_B - 1
  f_BF = np.maximum(rng.normal(size=(count, 7)), 0)
  f_BF[:, :3] = np.stack([t_B, s_B, ~s_B], 1)
  W_dec = np.insert(np.eye(6), 2, [0, -1, 0, 0, 0, 0], 0)
  group_B = np.arange(count)
  found = probe.Rows(x_BD, f_BF, None, probe.split(group_B), group_B)
  return found, {'W_dec': W_dec}, t_B, s_B


def test_scr_takes_the_spurious_latents_out():
  given, params, t_B, s_B = planted()
  found = scr_tpp.scr(given, params, t_B, s_B, counts=(2,))
  assert found['biased'] < found['unbiased'] - 0.05
  own, random = found['removed']
  assert sorted(own['features']) == [1, 2]
  assert own['score'] > 0.5 and random['score'] < own['score'] - 0.3
  with pytest.raises(ValueError, match='four combinations'):
    scr_tpp.scr(given, params, t_B, t_B)


def test_tpp_is_high_for_latents_of_the_class_alone():
  given, params, t_B, s_B = planted()
  labels = {'t': t_B, 's': s_B}
  own, random = scr_tpp.tpp(given, params, labels, counts=(1,))['removed']
  assert own['score'] > 0.2 and abs(own['unintended']) < 0.05
  assert random['score'] < own['score']


def test_absorption_is_the_share_that_another_latent_took():
  rng = np.random.default_rng(6)
  count, group_B = 3000, np.arange(3000)
  y_B = rng.random(count) < 0.5
  special_B = y_B & (rng.random(count) < 0.04)
  x_BD = 0.05 * rng.normal(size=(count, 5))
  x_BD[:, 0] += y_B
  x_BD[:, 1] += special_B
  own_BF = np.stack([y_B, special_B], 1).astype(float)
  taken_BF = np.stack([y_B & ~special_B, special_B], 1).astype(float)
  given = lambda f: probe.Rows(x_BD, f, None, probe.split(group_B), group_B)
  # The special latent writes its own direction, or the concept's as well.
  apart = {'W_dec': np.eye(5)[:2]}
  both = {'W_dec': np.eye(5)[:2] + [[0] * 5, [1, 0, 0, 0, 0]]}
  none = absorption.of_concept(given(own_BF), apart, y_B)
  some = absorption.of_concept(given(taken_BF), both, y_B)
  assert none['main'] == some['main'] == [0]
  assert none['full']['value'] == 0 and none['fraction']['value'] < 0.02
  expected = (
    special_B[given(own_BF).test_B].sum() / y_B[given(own_BF).test_B].sum()
  )
  assert some['full']['value'] == pytest.approx(expected, abs=0.01)
  # All of the concept on these rows is the absorber's, and nothing elsewhere.
  assert some['fraction']['value'] == pytest.approx(expected, abs=0.01)
  assert some['absorbers'][0][0] == 1
  noise_B = rng.random(count) < 0.5
  assert absorption.of_concept(given(own_BF), apart, noise_B)['full'] is None


def absorbed_by_definition(x_D, f_F, W_dec, w_D, main):
  """SAEBench 0.6.0's rules for one row, step by step: fraction and full."""
  w_D = w_D / np.linalg.norm(w_D)
  norms = [np.linalg.norm(row) for row in W_dec]
  cosines = [row @ w_D / norm for row, norm in zip(W_dec, norms, strict=True)]
  # Of decoders of norm 1, as SAEBench has them: the norm is in the activation.
  p = [f * n * c for f, n, c in zip(f_F, norms, cosines, strict=True)]
  own = sum(p[i] for i in main)
  projection = x_D @ w_D
  others = [i for i in range(len(p)) if i not in main and cosines[i] >= 0.1]
  absorbed = sum(sorted((p[i] for i in others if p[i] > 0), reverse=True)[:3])
  if own >= projection or absorbed / projection < 0.4:
    fraction = 0.0
  elif own <= 0:
    fraction = 1.0
  else:
    absorbed = min(absorbed, projection - own)
    fraction = absorbed / (absorbed + own)
  top = int(np.argmax(p))
  full = all(f_F[i] < 1e-8 for i in main) and cosines[top] >= 0.025
  return fraction, full and projection >= 0 and p[top] / projection >= 0.4


def test_absorption_follows_its_definition_row_by_row():
  rng = np.random.default_rng(9)
  W_dec = rng.normal(size=(9, 4)) * rng.uniform(0.5, 2, (9, 1))
  f_BF = rng.exponential(size=(600, 9)) * (rng.random((600, 9)) < 0.4)
  x_BD = f_BF @ W_dec + 0.3 * rng.normal(size=(600, 4)) + 0.2
  w_D, main = rng.normal(size=4), np.array([2, 5])
  got = absorption.of_rows(x_BD, f_BF, W_dec, w_D, main)
  want = [
    absorbed_by_definition(x_D, f_F, W_dec, w_D, main)
    for x_D, f_F in zip(x_BD, f_BF, strict=True)
  ]
  np.testing.assert_allclose(got.fraction_B, [one[0] for one in want])
  np.testing.assert_array_equal(got.full_B, [one[1] for one in want])
  between = (got.fraction_B > 0) & (got.fraction_B < 1)
  assert between.any() and got.full_B.any() and (got.fraction_B == 0).any()


@pytest.mark.parametrize('seed', range(3))
def test_a_random_sae_absorbs_less_than_one_with_planted_absorbers(seed):
  rng = np.random.default_rng(seed)
  count, d = 4000, 128
  y_B = rng.random(count) < 0.5
  # Each too rare to be taken for a latent of the concept itself.
  special_BC = y_B[:, None] & (rng.integers(0, 50, (count, 1)) == np.arange(30))
  basis_DD = np.linalg.qr(rng.normal(size=(d, d)))[0]
  x_BD = 0.1 * rng.normal(size=(count, d)) + y_B[:, None] * basis_DD[0]
  x_BD += 2 * special_BC @ basis_DD[1:31]
  # Each special latent writes the concept's direction, whose own is silent.
  own_B = y_B & ~special_BC.any(1)
  planted_BF = np.concatenate([own_B[:, None], special_BC], 1).astype(float)
  planted = np.concatenate([basis_DD[:1], 2 * basis_DD[1:31] + basis_DD[0]])
  W_FD = rng.normal(size=(256, d))
  W_FD /= np.linalg.norm(W_FD, axis=1, keepdims=True)
  z_BF = (x_BD - x_BD.mean(0)) @ W_FD.T
  z_BF *= z_BF > np.quantile(z_BF, 1 - 8 / 256)  # L0 8
  made_BD = z_BF @ W_FD
  z_BF *= np.sum((x_BD - x_BD.mean(0)) * made_BD) / np.sum(made_BD**2)
  group_B = np.arange(count)
  absorbed = {}
  for name, f_BF, W_dec in (
    ('planted', planted_BF, planted),
    ('random', z_BF, W_FD),
  ):
    given = probe.Rows(x_BD, f_BF, None, probe.split(group_B), group_B)
    absorbed[name] = absorption.of_concept(given, {'W_dec': W_dec}, y_B)
  value = lambda name, score: absorbed[name][score]['value']
  share = special_BC.any(1)[y_B & probe.split(group_B)].mean()
  assert value('planted', 'fraction') == pytest.approx(share, abs=0.05)
  assert value('planted', 'full') == pytest.approx(share, abs=0.05)
  assert value('random', 'fraction') < value('planted', 'fraction') / 2
  assert value('random', 'full') < value('planted', 'full') / 2


# Prompts.


def test_prompts_of_a_file(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  lines = [{'text': f'{i % 7}', 'label': i % 2 == 0} for i in range(30)]
  path.write_text('\n'.join(map(json.dumps, lines)))
  found = probe_inputs.read_prompts(path)
  assert not set(found.group_N[found.test_N]) & set(
    found.group_N[~found.test_N]
  )
  for wrong in (
    '{"text": 1, "label": 1}',
    '{',
    '{"text": "a", "label": 7}',
    '{"text": "a", "label": 1, "split": "x"}',
  ):
    path.write_text(wrong)
    with pytest.raises(ValueError, match='line 1 is not'):
      probe_inputs.read_prompts(path)


def test_prompts_of_a_csv_file_are_those_of_jsonl(tmp_path):
  """Commas, quotes and line breaks inside a text; splits and groups."""
  prompts = [
    {'text': 'one, "two"', 'label': True, 'split': 'train', 'group': 'a'},
    {'text': 'two\nlines', 'label': False, 'split': 'test', 'group': 'b'},
  ]
  lines = tmp_path / 'prompts.jsonl'
  lines.write_text('\n'.join(map(json.dumps, prompts)))
  table = tmp_path / 'prompts.csv'
  with open(table, 'w', newline='') as file:
    writer = csv.DictWriter(file, ['text', 'label', 'split', 'group'])
    writer.writeheader()
    writer.writerows(prompts)
  one, other = map(probe_inputs.read_prompts, (lines, table))
  assert one.texts == other.texts
  for name in ('label_N', 'test_N', 'group_N'):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
  for wrong in ('text,label\na,maybe', 'words,label\na,1', 'text\na'):
    table.write_text(wrong)
    with pytest.raises(ValueError, match='line 2 is not'):
      probe_inputs.read_prompts(table)
  table.write_text('label,text\n1,one, and what a comma would cut off\n')
  for read in (probe_inputs.read_prompts, probe_inputs.read_texts):
    with pytest.raises(ValueError, match='line 2 has more columns'):
      read(table)


def test_prompts_with_a_def_are_told_apart(tokenizer, tmp_path):
  model = weights.load('tiny')
  rng = np.random.default_rng(7)
  texts = [f'{w} x{i}' for i in range(40) for w in ('def', 'import')]
  prompts = probe_inputs.Prompts(
    texts,
    np.array([t.startswith('def') for t in texts]),
    np.arange(80) >= 50,
    np.arange(80) // 2,
  )
  params = random_sae(128, 32)
  params['W_enc'] = rng.normal(size=(128, 32)).astype(np.float32) / 30
  card = {
    'type': 'sae',
    'sites': ['resid_post/1'],
    'targets': ['resid_post/1'],
    'name': 'a',
  }
  (one,) = releases.saes([(params, card)])
  for pooling in probe_inputs.POOLINGS:
    given = probe_inputs.of_prompts(model, one, prompts, tokenizer, pooling)
    assert given.x_BD.shape == (80, 128) and given.f_BF.shape == (80, 32)
    found = probe.run(given, prompts.label_N, ks=(1,))
    assert probe.best(found, 'activations')['auc']['value'] > 0.95, pooling
  with pytest.raises(ValueError, match='must be one of last, mean, max'):
    probe_inputs.of_prompts(model, one, prompts, tokenizer, 'sum')


def test_a_control_is_fitted_on_a_bounded_number_of_rows(monkeypatch):
  """However long the text: rows over all of it, and the L0 of the SAE."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  site = sites.parse('resid_post/0')
  wiring = sites.Wiring('sae', (site,), (site,))
  params = {
    'W_enc': draw(8, 64),
    'b_enc': np.full(64, -3, np.float32),
    'W_dec': draw(64, 8),
    'b_dec': np.zeros(8, np.float32),
    'threshold': np.zeros(64, np.float32),
  }
  x_by_site = {site: draw(40, 60, 8)}
  keep_NT = rng.random((40, 60)) < 0.9
  fitted, fit = [], controls.fit

  def counted(shape, l0, rows, **options):
    fitted.append(len(rows[site]))
    return fit(shape, l0, rows, **options)

  monkeypatch.setattr(controls, 'fit', counted)
  monkeypatch.setattr(probe_inputs, '_ROWS', 256)
  every_BD = x_by_site[site][keep_NT]
  wanted = controls.mean_l0(params, every_BD)
  for values, most in ((2**26, len(every_BD)), (64 * 500, 500), (1, 256)):
    monkeypatch.setattr(probe_inputs, '_CONTROL_VALUES', values)
    made = probe_inputs.control(x_by_site, keep_NT, wiring, params)
    assert fitted[-1] == most
    assert controls.mean_l0(made, every_BD) == pytest.approx(wanted, rel=0.15)


def test_pooled_latents_are_those_of_all_tokens_and_few_at_a_time(monkeypatch):
  """Prompts longer and shorter than a chunk: the same as pooling them all."""
  rng = np.random.default_rng(0)
  D, F = 8, 16
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {
    'W_enc': draw(D, F),
    'b_enc': draw(F),
    'W_dec': draw(F, D),
    'b_dec': draw(D),
    'threshold': np.zeros(F, np.float32),
  }
  prompt_B = np.repeat(np.arange(6), [3, 9, 1, 4, 40, 2])
  x_BD = draw(len(prompt_B), D)
  every_BF = probe_inputs.latents(params, x_BD)
  monkeypatch.setattr(probe_inputs, '_ROWS', 16)
  sizes, encode = [], probe_inputs.latents

  def counted(params, x_BD):
    sizes.append(len(x_BD))
    return encode(params, x_BD)

  monkeypatch.setattr(probe_inputs, 'latents', counted)
  for name, pool in probe_inputs.POOLINGS.items():
    pooled = probe_inputs.pooled_latents(params, x_BD, prompt_B, name)
    wanted = [pool(every_BF[prompt_B == i]) for i in range(6)]
    np.testing.assert_allclose(pooled, wanted, rtol=1e-5, atol=1e-6)
  assert max(sizes) == 40 and sorted(sizes)[-3] <= 16  # one long prompt alone
