"""launch/microscope.py's commands, one after the other on a small run."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import json
import re
import shutil

import numpy as np
import pytest

from configs import tiny
from gemma_scope import files
from gemma_scope import sae as sae_lib
from gemma_scope.language_model import generate, splice
from gemma_scope.microscope import commands, graphs, session
from gemma_scope.microscope.circuits import (
  budget,
  card_plan,
  card_results,
  causal_card,
  effects,
  graph_files,
  intervene,
)
from gemma_scope.runtime import interrupt
from launch import microscope
from tests.helpers import (
  browser,
  devices,
  peer_formats,
  random_saes,
  releases,
)


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with devices.only(1):
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run's folder: config, text, a release of random SAEs; built."""
  folder = tmp_path_factory.mktemp('run')
  corpus = folder / 'corpus'
  corpus.mkdir()
  for i in range(60):
    lines = [f'def f{i}(self, x):', '  return x.', 'import os', ''] * (
      3 + i % 5
    )
    (corpus / f'{i:02}.txt').write_text('\n'.join(lines))
  config = tiny.get_config()
  config.text.source, config.text.seq_len = f'files:{corpus}/*.txt', 24
  (folder / 'config.json').write_text(config.to_json_best_effort())
  members = []
  for seed, width in ((0, 40), (1, 60)):
    params, card = random_saes.member(seed, 'resid_post/1', width)
    card = releases.card('resid_post/1', seed=seed) | card
    members.append((params, card, None))
  releases.save(folder / 'release', members)
  session.Session(folder, report=lambda _: None).build(
    40, 8, lambda: None, label=False
  )
  return folder


@pytest.fixture
def said():
  return []


def run(name, workdir, said, given='', out=None, **options):
  opened = session.Session(workdir, out, paths=given, report=said.append)
  options = commands.Options(**{'sequences': 40, 'batch': 8} | options)
  commands.run(name, opened, options)
  return opened


def test_build_stops_and_goes_on(workdir, said, tmp_path):
  polls = iter([None] * 3)

  def stop():
    if next(polls, 'stop'):
      raise interrupt.Interrupted

  out = tmp_path / 'm'
  opened = session.Session(workdir, out, report=said.append)
  with pytest.raises(interrupt.Interrupted):
    opened.build(40, 8, stop)
  assert (out / 'partial.npz').exists() and not (out / 'pages').exists()
  run('build', workdir, said, out=out)
  assert not (out / 'partial.npz').exists()
  assert said[-1].startswith('microscope  file:///')
  assert (out / 'pages' / 'index.html').exists()
  run('build', workdir, said, out=out)
  assert said[-2].endswith('is already built') and said[-1].startswith(
    'microscope'
  )


def test_what_is_built_is_what_is_shown(workdir, said, tmp_path):
  """Of other SAEs, of retrained ones, of pages that were not written."""
  both = f'{workdir}/release'
  one = next((workdir / 'release').rglob('width_40/*'))
  run('build', workdir, said, given=str(one), out=tmp_path / 'm')
  for command in ('serve', 'pages', 'explain'):
    with pytest.raises(ValueError, match='was built for'):
      run(command, workdir, said, given=both, out=tmp_path / 'm', sae=SAE)
  opened = run('pages', workdir, said, out=tmp_path / 'm')
  assert len(opened.saes) == 1  # those that it is built of, without --release
  # Killed while the pages were written: built again.
  kept = tmp_path / 'm' / 'members.json'
  text = kept.read_text()
  kept.unlink()
  run('build', workdir, said, given=str(one), out=tmp_path / 'm')
  assert not said[-2].endswith('is already built') and kept.read_text() == text
  # The same place, other parameters.
  moved = tmp_path / 'run'
  shutil.copytree(workdir, moved)
  params, card = random_saes.member(7, 'resid_post/1', 40)
  card = releases.card('resid_post/1', seed=0) | card
  shutil.rmtree(moved / 'release')
  releases.save(moved / 'release', [(params, card, None)])
  with pytest.raises(ValueError, match='have changed since'):
    run('why', moved, said, sae=SAE, text=TEXT)
  run('build', moved, said)
  assert run('pages', moved, said).find(SAE)


def test_two_releases_of_the_same_names(workdir, said, tmp_path):
  shutil.copytree(workdir / 'release', tmp_path / 'other' / 'release')
  both = f'{workdir}/release,{tmp_path}/other/release'
  opened = run('build', workdir, said, given=both, out=tmp_path / 'm')
  names = [one.name for one in opened.saes]
  assert len(set(names)) == 4
  assert len(list((tmp_path / 'm' / 'indexes').rglob('index.json'))) == 4
  with pytest.raises(ValueError, match='the same SAE twice'):
    run('build', workdir, said, given=f'{workdir}/release,{workdir}/release')


def test_an_index_is_read_and_hashed_once(workdir, said, tmp_path, monkeypatch):
  """As `why` asks for them: by subject, by label and by `together`."""
  saes = []
  for layer in (0, 1):
    for seed in (0, 1):
      params, card = random_saes.member(seed, f'mlp_in/{layer}', 16)
      wiring = {'type': 'transcoder', 'targets': [f'mlp_out/{layer}']}
      card = releases.card(f'mlp_in/{layer}', seed=seed) | card | wiring
      saes.append((params, card, None))
  releases.save(tmp_path / 'release', saes)
  given, out = str(tmp_path / 'release'), tmp_path / 'm'
  session.Session(workdir, out, paths=given, report=said.append).build(
    8, 8, lambda: None, label=False
  )
  hashed = []
  sha256 = files.sha256
  monkeypatch.setattr(
    files, 'sha256', lambda path: (hashed.append(path), sha256(path))[1]
  )
  opened = session.Session(workdir, out, paths=given, report=said.append)
  chosen = graphs._together(opened, opened.saes[0])
  assert len(opened.saes) == 4 and len(chosen) == 2
  for sae in [*opened.saes, *chosen]:
    opened.named(sae)
    opened.subject(sae)
  read = [path for path in hashed if path.name == 'arrays.safetensors']
  assert len(read) == len(set(read)) == 4


SAE = 'width_40'
TEXT = 'the cat sat on'


def test_a_text_is_read_as_named_features(workdir, said):
  """`Session.read` agrees with encode on the model's own activation."""
  opened = run('build', workdir, said)
  sae = opened.find(SAE)
  rows = opened.read(sae, TEXT, most=3)
  ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(TEXT)]
  assert [token for token, _ in rows] == [
    piece.replace('▁', ' ') for piece in opened.tokenizer.pieces(ids)
  ]
  assert rows[0][1] == []  # BOS
  gemma, lm_params = opened.model
  site = sae.wiring.sites[0]
  x_BTD = splice.taps(gemma, lm_params, np.array([ids] * 8), (site,))[site]
  f_TF = np.asarray(sae_lib.encode(sae.load(), x_BTD))[0]
  name, max_F = opened.named(sae), opened.index(sae).max_F
  for (_, firings), f_F in zip(rows[1:], f_TF[1:], strict=True):
    share_F = f_F / np.maximum(max_F, 1e-12)
    order = np.argsort(-share_F)[: len(firings)]
    assert len(firings) == min(3, (f_F > 0).sum())
    assert [one.feature for one in firings] == order.tolist()
    np.testing.assert_allclose(
      [one.value for one in firings], f_F[order], rtol=1e-4
    )
    np.testing.assert_allclose(
      [one.share for one in firings], share_F[order], rtol=1e-4
    )
    assert all(one.label == name(one.feature) for one in firings)


def test_saes_of_another_model_are_noted(workdir, said, tmp_path):
  params, card = random_saes.member(7, 'resid_post/1', 40)
  card = releases.card('resid_post/1') | card | {'model': 'gemma2-2b'}
  releases.save(tmp_path / 'other', [(params, card, None)])
  for paths in (str(tmp_path / 'other'), str(workdir / 'release')):
    opened = session.Session(workdir, paths=paths, report=said.append)
    assert opened.saes
  assert said == ['note: SAEs of gemma2-2b run on tiny']


def test_why_refuses_a_long_text_before_a_pass(workdir, said, monkeypatch):
  monkeypatch.setattr(budget, 'BUDGET', 1)
  with pytest.raises(ValueError, match='can be traced over at most'):
    run('why', workdir, said, sae=SAE, text=TEXT)
  assert not said


def test_why(workdir, said):
  run('why', workdir, said, sae=SAE, text=TEXT, logit='self,def')
  assert "'self' - 'def'" in said[0]
  assert 'gradient against exact' in said[1]
  kept = json.loads((workdir / 'microscope' / 'why.json').read_text())
  assert kept['text'] == TEXT and kept['verdict']


def test_steer(workdir, said):
  opened = run('build', workdir, said)
  index = opened.index(opened.find(SAE))
  latent = int(np.argmax(index.fired_F))
  run(
    'steer',
    workdir,
    said,
    sae=SAE,
    text=TEXT,
    tokens=6,
    logit='self',
    change=(f'{latent}:add:2',),
  )
  default, _, steered, _ = said[2:6]
  assert default.startswith('default: perplexity') and 'KL' in steered
  assert said[-1].count('\n') == len(effects.STRENGTHS)
  several = {'tokens': 6, 'change': (f'{latent}', '3')}
  run('steer', workdir, said, sae=SAE, text=TEXT, **several)
  assert 'steered' in said[-2]


def test_effects_stop_go_on_and_reach_the_pages(workdir, said, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run')
  folder, few = tmp_path / 'run', {'sae': SAE, 'contexts': 2, 'scored': 1}
  opened = session.Session(folder, report=said.append)
  sae = opened.find(SAE)
  subject, index = opened.subject(sae), opened.index(sae)
  path, settings = opened.effects_path(sae), card_plan.Settings(2, 1)
  polls = iter([None] * 5)

  def stop():
    if next(polls, 'stop'):
      raise interrupt.Interrupted

  watch = card_results.Watch(stop, said.append)
  with pytest.raises(interrupt.Interrupted):
    card_results.measure(subject, index, path, settings, watch)
  partial = np.load(f'{path}.npz')
  assert 0 < partial['done'] < np.isfinite(partial['kl']).sum()
  assert 'controls' in said[0] and 'about' in said[0]
  run('effects', folder, said, **few)
  whole = np.load(f'{path}.npz')
  there = np.isfinite(partial['kl'])
  np.testing.assert_array_equal(partial['kl'][there], whole['kl'][there])
  again = causal_card.Measured(subject.width, settings)
  for _ in causal_card.measure(
    subject, card_plan.Plan(subject, index, settings), again
  ):
    pass
  for name, array in again.arrays.items():
    np.testing.assert_array_equal(array, whole[name])
  # The pages have them, and the list can be filtered by them.
  cards = opened.indexed(sae).effects
  assert 'features tested' in ''.join(said)
  i = opened.saes.index(sae)
  listed = browser.data(folder / 'microscope' / 'pages', f'm{i}/list')
  assert [v is not None for v in listed['verdict']] == [
    j in cards['cards'] for j in range(subject.width)
  ]
  said.clear()
  run('effects', folder, said, json=True, **few)  # nothing is measured again
  (line,) = said
  assert json.loads(line)['effects'][sae.name] == cards['summary']


def test_steering_several_prompts_gives_a_table(workdir, said, tmp_path):
  opened = run('build', workdir, said)
  index = opened.index(opened.find(SAE))
  latent = int(np.argmax(index.fired_F))
  prompts = tmp_path / 'prompts.csv'
  prompts.write_text('text\nthe cat\n"import os, sys"\n')
  given = {
    'sae': SAE,
    'prompts': str(prompts),
    'change': (f'{latent}:add',),
    'tokens': 4,
  }
  said.clear()
  run('steer', workdir, said, **given)
  kept = json.loads((workdir / 'microscope' / 'steer.json').read_text())
  table = (workdir / 'microscope' / 'steer.csv').read_text().splitlines()
  strengths = [row['strength'] for row in kept['summary']]
  assert len(table) == 1 + len(strengths) and 'concept' in said[0]
  first, *_, last = kept['summary']
  assert first['strength'] == 0 and first['kl'] == pytest.approx(0, abs=1e-5)
  assert last['kl'] > 0.01  # the strongest change changes something
  replies = [r for r in kept['replies'] if not r['control']]
  assert {r['prompt'] for r in replies} == {'the cat', 'import os, sys'}
  # A reply is that of the prompt alone, whoever shares its batch.
  alone = effects.steer(
    opened.subject(opened.find(SAE)),
    [opened.tokenizer.bos_id, *opened.tokenizer.encode('the cat')],
    [intervene.Change(latent, 'add', 1.0)],
    generate.Sampling(
      4,
      temperature=0.5,
      stop=[opened.tokenizer.eos_id],
      forbid=[opened.tokenizer.bos_id],
    ),
  )
  mine = next(
    r for r in replies if r['prompt'] == 'the cat' and r['strength'] == 1
  )
  assert mine['ids'] == alone['steered']['ids']
  said.clear()
  run('steer', workdir, said, json=True, **given)
  assert json.loads(*said)['summary'] == kept['summary']


def test_transcoders_give_graph_files_and_heads(workdir, said, tmp_path):
  saes = []
  for layer in (1, 3):
    params, card = random_saes.member(layer, f'mlp_in/{layer}', 40)
    wiring = {'type': 'transcoder', 'targets': [f'mlp_out/{layer}']}
    card = releases.card(f'mlp_in/{layer}', seed=layer) | card | wiring
    params['W_dec'] /= 100
    saes.append((params, card, None))
  releases.save(tmp_path / 'release', saes)
  given, out = str(tmp_path / 'release'), tmp_path / 'm'
  session.Session(workdir, out, paths=given, report=said.append).build(
    8, 8, lambda: None, label=False
  )
  with pytest.raises(ValueError, match='must be LAYER.HEAD'):
    run('why', workdir, said, given, out, sae='layer_1', text=TEXT, head='1:2')
  said.clear()
  run(
    'why', workdir, said, given, out, sae='layer_1', text=TEXT, head='2.1:4:1'
  )
  assert any('largest of' in line and '(query | key)' in line for line in said)
  read = graph_files.read(out / 'graph_neuronpedia.json')
  own = json.loads((out / 'graph.json').read_text())
  assert len(read['edges']) <= len(own['edges']) == len(own['heads'])
  head = json.loads((out / 'head.json').read_text())
  assert np.sum(head['terms']) == pytest.approx(head['score'], rel=1e-3)
  # Supernodes: no feature of these random transcoders fires on the text.
  said.clear()
  run(
    'why', workdir, said, given, out, sae='layer_1', text=TEXT,
    supernodes='similar',
  )  # fmt: skip
  own = json.loads((out / 'graph.json').read_text())
  assert own['supernodes'] == own['similar'] == []
  assert any('no supernodes' in line for line in said)
  own['supernodes'] = [{'name': 'mine', 'nodes': []}]
  (tmp_path / 'saved.json').write_text(json.dumps(own))
  for path, words in (
    (tmp_path / 'saved.json', 'no supernode with a feature of this graph'),
    (out / 'why.json', 'must be similar, or a graph.json'),
  ):
    with pytest.raises(ValueError, match=words):
      run(
        'why', workdir, said, given, out, sae='layer_1', text=TEXT,
        supernodes=str(path),
      )  # fmt: skip
  np.save(tmp_path / 'v.npy', np.ones(128, np.float32))
  said.clear()
  target = f'resid_post/2:{tmp_path}/v.npy'
  run('why', workdir, said, given, out, sae='layer_1', text=TEXT, target=target)
  assert 'circuit-tracer scores' in ''.join(said)
  assert json.loads((out / 'graph.json').read_text())['shuffled'] == []
  said.clear()
  for target in ('feature:3/99', 'feature:9/1', 'resid_post/2:none.npy', 'x'):
    with pytest.raises(ValueError, match='--target='):
      asked = {'sae': 'layer_1', 'text': TEXT, 'target': target}
      run('why', workdir, said, given, out, **asked)
  assert not said  # before anything is computed
  with pytest.raises(ValueError, match='needs transcoders'):
    run('why', workdir, said, sae=SAE, text=TEXT, head='2.1:4:1')


def test_labels_reach_the_pages(workdir, said):
  opened = run('explain', workdir, said, sae=SAE, features='5')
  member = opened.find(SAE)
  labels = opened.labels(member)
  assert 0 < len(labels) <= 5
  again = run('explain', workdir, said, sae=SAE, features='3,4,')
  assert set(again.labels(member)) >= set(labels)  # added to, not replaced
  labels = again.labels(member)
  text = next(iter(labels.values()))['text']
  name = again.named(member)
  for feature, label in labels.items():  # by what predicts where it fires
    assert (name(feature) == label['text']) == (not label['low'])
  i = opened.saes.index(member)
  listed = browser.data(workdir / 'microscope' / 'pages', f'm{i}/list')
  assert text in listed['label']


def test_probe(workdir, said, tmp_path):
  rng, lines = np.random.default_rng(0), []
  for n in range(40):
    words = rng.choice(['self', 'return', 'import', 'None'], 4)
    lines.append(
      {
        'text': ' '.join(words) + (' class' if n % 2 else ' 17'),
        'label': bool(n % 2),
      }
    )
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  run('probe', workdir, said, sae=SAE, prompts=str(path))
  assert 'balanced accuracy' in said[0]
  kept = json.loads((workdir / 'microscope' / 'probe.json').read_text())
  assert kept['test'] and kept['probes']


def test_export(workdir, said):
  run('explain', workdir, said, sae=SAE, features='5')
  said.clear()
  run('export', workdir, said, title='mine')
  assert len(said) == 2 and 'features' in said[0]
  folder = workdir / 'microscope' / 'neuronpedia'
  assert len(list(folder.rglob('source.jsonl.gz'))) == 2
  (labelled,) = folder.rglob('explanations/*.jsonl.gz')  # of one SAE alone
  with gzip.open(labelled, 'rt') as file:
    line = json.loads(file.readline())
  assert line['description'] and line['notes'].endswith('by rule')


def test_serve_serves_the_built_pages(workdir, said, monkeypatch):
  """What uvicorn gets: this machine's loopback, and nothing in a log."""
  uvicorn = pytest.importorskip('uvicorn', reason='uvicorn is not installed')
  given = {}
  monkeypatch.setattr(
    uvicorn, 'run', lambda app, **more: given.update(more, app=app)
  )
  run('serve', workdir, said, port=8000)
  assert given['host'] == '127.0.0.1' and given['access_log'] is False
  assert said[0].startswith('live  http://127.0.0.1:8000/?token=')
  run('serve', workdir, said, port=8000)
  assert said[0] != said[2]  # another token


def test_what_is_missing_is_said(workdir, said, tmp_path):
  cases = [
    ('why', {'sae': SAE}, '--text is required'),
    ('why', {'sae': 'width', 'text': 'a'}, 'but matches 2'),
    ('why', {'sae': 'nothing', 'text': 'a'}, 'but matches 0'),
    ('why', {'sae': SAE, 'text': 'a', 'logit': 'two tokens'}, 'not one'),
    ('steer', {'sae': SAE, 'text': 'a'}, '--change is required'),
    (
      'steer',
      {'sae': SAE, 'text': 'a', 'change': ('x:add',)},
      'must be LATENT',
    ),
    ('steer', {'sae': SAE, 'text': 'a', 'change': ('3:x',)}, 'no change'),
    ('probe', {'sae': SAE}, '--prompts is required'),
    ('explain', {'sae': SAE, 'features': 'x'}, '--features must be all'),
    ('explain', {'sae': SAE, 'features': '99,'}, 'there is no latent 99'),
    (
      'explain',
      {'sae': SAE, 'endpoint': 'http://127.0.0.1:1'},
      '--labeller is',
    ),
    ('explain', {'sae': SAE, 'labeller': 'x'}, 'unless --endpoint'),
    ('boil', {}, "Unknown command 'boil'"),
  ]
  for name, options, expected in cases:
    with pytest.raises(ValueError, match=expected):
      run(name, workdir, said, **options)
  with devices.only(2):
    with pytest.raises(ValueError, match='over the 2 devices'):
      run('build', workdir, said, batch=31)
  with pytest.raises(ValueError, match='run build first'):
    run('serve', workdir, said, out=tmp_path / 'empty')
  with pytest.raises(ValueError, match='has no config.json'):
    run('build', tmp_path, said, given=str(workdir / 'release'))


def test_every_option_is_a_flag_of_the_commands_that_read_it():
  """launch/microscope.py and `commands` agree on names and defaults."""
  assert list(microscope.COMMANDS) == list(commands.COMMANDS)
  defaults = {flag.name: flag.default for flag in microscope.OPTIONS}
  defaults['change'] = tuple(defaults['change'])
  assert defaults == {
    field.name: field.default for field in dataclasses.fields(commands.Options)
  }
  for name, command in commands.COMMANDS.items():
    _, given = microscope.COMMANDS[name]
    source = inspect.getsource(command)
    asked = set(re.findall(r'options\.(\w+)', source))
    assert asked <= set(given), name


def test_parameters_without_a_card_are_at_the_site_that_is_said(tmp_path):
  folder, params = peer_formats.gemma_scope_1_folder(tmp_path, 'mine')
  config = tiny.get_config()
  opened = session.Session(tmp_path, None, config, folder, site='resid_post/1')
  (sae,) = opened.saes
  assert sae.card['sites'] == ['resid_post/1'] and sae.card['model'] == 'tiny'
  # Indexes, pages and scores have these names: no folder of this machine.
  assert sae.name == 'mine'
  assert sae.card['name'].startswith('mine (path sha256 ')
  peer_formats.same(sae.load(), params)
  # What was indexed with a site is opened without one.
  opened.out.mkdir()
  kept = opened.out / 'members.json'
  kept.write_text(json.dumps({'saes': [folder], 'site': 'mlp_out/2'}))
  (sae,) = session.Session(tmp_path, None, config).saes
  assert sae.card['sites'] == ['mlp_out/2']
  kept.write_text('{"saes": ')
  with pytest.raises(ValueError, match="members.json' is damaged"):
    session.Session(tmp_path, None, config)
