"""The pages: what they hold, and what a real browser makes of them."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma_scope import release
from gemma_scope.evaluation import estimates
from gemma_scope.language_model import weights
from gemma_scope.microscope.circuits import card_statistics, supernodes
from gemma_scope.microscope.dashboard import pages
from gemma_scope.microscope.index import build, logit_lens, store
from tests.helpers import random_saes
from tests.helpers.browser import audit, chromium, data

HOSTILE = [
  '<script>window.hit=1</script>',
  '</script><img src=x onerror=hit()>',
  '"><svg onload=hit()>',
  '\u2028',
  '\u202eevil',
  '\ud800',
  '<0xE2>',
  '\u2581a',
  '\x00',
  '{{7*7}}',
  "');hit();('",
]


def pieces(ids):
  """Every fifth token's text means harm."""
  return [
    HOSTILE[i // 5 % len(HOSTILE)] if i % 5 == 0 else f'\u2581w{i}' for i in ids
  ]


def effects(index):
  """Causal cards: every second feature that fires has an effect."""
  part = {
    'contexts': 4,
    'kl': [0.2, 0.1, 0.3],
    'loss': [0.1, None, None],
    'times_shuffled': [3.0, 2.0, 4.0],
    'times_random': [9.0, 4.0, 20.0],
    'p': 0.01,
    'lens_z': 2.5,
    'tokens': [[15, 4], [16, 2]],
  }
  names = card_statistics.VERDICTS
  card = {'p': 0.01, 'q': 0.02, 'lens_p': 0.01, 'lens_q': 0.02}
  cards = {
    int(j): card | {'ablate': part, 'add': None, 'verdict': names[2 * (j % 2)]}
    for j in np.flatnonzero(index.fired_F)
  }
  counts = dict.fromkeys(names, 1)
  summary = {'alpha': 0.05, 'tested': len(cards), 'verdicts': counts}
  return {'summary': summary, 'cards': cards}


@pytest.fixture(scope='module')
def entries():
  model = weights.load('tiny')
  rng = np.random.default_rng(0)
  sequences_NT = rng.integers(10, 4000, (12, 20)).astype(np.int32)
  sequences_NT[:, 0] = 2
  documents_NT = np.arange(12)[:, None] + np.zeros((12, 20), np.int32)
  about = {'name': '<b>corpus</b>', 'sha256': '0' * 64, 'split': 'train'}
  text = build.Text(
    sequences_NT, sequences_NT != 2, documents_NT.astype(np.int32), about
  )
  members = [random_saes.member(s, 'resid_post/1', 80) for s in (0, 1)]
  members[0][0]['b_enc'][-1] = -1e6  # a latent that never fires
  label = {'text': HOSTILE[0], 'by': 'rule', 'score': 0.9, 'control': 0.5}
  label['low'] = False
  figure = lambda v: {'value': v, 'low': v, 'high': v}
  metrics = {
    'l0': figure(9.0),
    'fvu': figure(0.2),
    'delta_loss': figure(0.1),
    'control': {'fvu': figure(0.5), 'delta_loss': figure(0.4)},
  }
  saes = [
    release.Released(card, lambda p=params: p, metrics, name=f'resid_post/{i}')
    for i, (params, card) in enumerate(members)
  ]
  indexes = build.build(*model, saes, text, build.How(12))
  return [
    store.Indexed(sae, index, {3: label}, effects(index))
    for sae, index in zip(saes, indexes, strict=True)
  ]


@pytest.fixture(scope='module')
def folder(entries, tmp_path_factory):
  out = tmp_path_factory.mktemp('pages') / 'out'
  pages.write(
    out, entries, pieces, title='<i>Title</i>', quantisation='GGUF <b>Q4</b>'
  )
  return out


def examples(record):
  """(sequence, position, activations around it) of each example."""
  at = np.reshape(record['at'], (-1, 2)).tolist()
  shares = np.frombuffer(base64.b64decode(record['values']), '<f2')
  windows = shares.reshape(len(at), -1).astype(float) * record['max']
  return [(n, t, window) for (n, t), window in zip(at, windows, strict=True)]


def test_a_features_record_is_its_index(folder, entries):
  one = entries[0].index
  j = int(np.argmax(one.fired_F))
  record = data(folder, f'm0/c{j // pages.CHUNK}')[j % pages.CHUNK]
  assert record['fired'] == one.fired_F[j]
  assert record['low'] < record['density'] < record['high']
  assert record['histogram'] == one.histogram_FH[j].tolist()
  shown = examples(record)
  assert len(shown) == record['top'] + sum(record['tenths'])
  for e, (n, t, values) in enumerate(shown[: record['top']]):
    assert (n, t) == (one.top_sequence_FE[j, e], one.top_position_FE[j, e])
    assert values[len(values) // 2] == pytest.approx(one.top_FE[j, e], rel=1e-2)
    assert record['documents'][e] == n  # in this text, one a sequence
  first = record['top']
  for q, count in zip(reversed(range(10)), record['tenths'], strict=True):
    for _, _, values in shown[first : first + count]:
      share = values[len(values) // 2] / record['max']
      assert q / 10 - 1e-2 <= share <= (q + 1) / 10 + 1e-2
    first += count
  listed = data(folder, 'm0/list')
  assert len(listed['density']) == 80 and listed['label'][3] == HOSTILE[0]
  assert listed['word'][j] == pages.words(one, j)
  text = data(folder, 't0')
  assert text == one.sequences_NT.tolist()
  assert {i for row in text for i in row} <= set(
    map(int, data(folder, 'vocabulary'))
  )


def test_features_to_begin_with_have_the_best_labels(entries, tmp_path):
  density_F = entries[0].index.density_F
  rare_F = (density_F > 0) & (density_F <= estimates.DENSE)
  alive = np.flatnonzero(rare_F)[:4].tolist()
  label = {'text': 'x', 'by': 'rule', 'low': False, 'control': 0.5}
  scores = dict(zip(alive, (0.6, 0.9, 0.8, 0.7), strict=True))
  labels = {j: label | {'score': score} for j, score in scores.items()}
  labels[alive[1]] |= {'low': True}  # not shown to be better than chance
  one = dataclasses.replace(entries[0], labels=labels)
  pages.write(tmp_path / 'out', iter([one]), pieces)
  start = data(tmp_path / 'out', 'collection')['start']
  assert [s['feature'] for s in start] == [alive[2], alive[3], alive[0]]
  assert 'right on 80%' in start[0]['why'] and start[0]['member'] == 0


def test_matches_are_the_nearest_decoders(folder, entries):
  decoders = [logit_lens.decoders(e.sae.load()) for e in entries]
  unit = [
    W_FD / np.linalg.norm(W_FD, axis=1, keepdims=True) for W_FD in decoders
  ]
  cosine = unit[0] @ unit[1].T
  found = data(folder, 'm0/to1')
  best = np.argmax(cosine, 1)
  assert [row[0] for row in found['match']] == best.tolist()
  np.testing.assert_allclose(
    [row[0] for row in found['cosine']], cosine.max(1), rtol=1e-3
  )


def test_equal_indexes_give_equal_bytes(folder, entries, tmp_path):
  pages.write(
    tmp_path / 'again',
    entries,
    pieces,
    title='<i>Title</i>',
    quantisation='GGUF <b>Q4</b>',
  )
  for path in folder.rglob('*'):
    if path.is_file():
      other = tmp_path / 'again' / path.relative_to(folder)
      assert other.read_bytes() == path.read_bytes()


def test_a_folder_that_holds_other_things_is_left_alone(entries, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes').write_text('keep')
  with pytest.raises(ValueError, match='not a folder of pages'):
    pages.write(tmp_path / 'mine', entries, pieces)
  assert (tmp_path / 'mine' / 'notes').read_text() == 'keep'


# In Chromium.


@pytest.fixture(scope='module')
def page(folder):
  yield from chromium((folder / 'index.html').as_uri())


def go(page, route):
  page.evaluate(f"location.hash = '{route}'")
  page.wait_for_timeout(50)
  page.wait_for_selector('main h1')


def test_searching_opening_hovering_and_keys(page, entries, folder):
  go(page, '#/')
  assert page.text_content('h1') == '<i>Title</i>'
  assert 'quantised: GGUF <b>Q4</b>' in page.text_content('main')
  assert page.locator('circle.dot').count() == 4
  go(page, '#/s/0')
  page.wait_for_selector('input[type=search]')
  fired = int(np.argmax(entries[0].index.top_FE[:, 0]))
  word = next(
    w
    for w in pages.words(entries[0].index, fired)
    if pieces([w])[0] not in HOSTILE
  )
  page.get_by_label('include dead and dense').check()
  page.fill('input[type=search]', pieces([word])[0].replace('\u2581', ' '))
  links = page.locator('tbody a').all_text_contents()
  assert f'#{fired}' in links and len(links) < 80
  page.fill('input[type=search]', str(fired))
  page.keyboard.press('Enter')
  page.wait_for_selector('.tokens')
  assert page.url.endswith(f'#/s/0/f/{fired}')
  peak = page.locator('.token.peak').first
  peak.hover()
  assert page.locator('.tip').is_visible()
  record = data(folder, f'm0/c{fired // pages.CHUNK}')[fired % pages.CHUNK]
  _, _, values = examples(record)[0]
  said = float(page.text_content('.tip').rpartition('  ')[2])
  assert said == pytest.approx(values[len(values) // 2], rel=5e-3)
  assert json.loads(page.text_content('.tip').rpartition('  ')[0]) is not None
  page.keyboard.press('j')
  page.wait_for_timeout(100)
  assert page.url.endswith(f'#/s/0/f/{min(fired + 1, 79)}')
  page.keyboard.press('Escape')
  page.wait_for_timeout(100)
  assert page.url.endswith('#/s/0')
  page.keyboard.press('/')
  assert page.evaluate('document.activeElement.type') == 'search'


def test_the_is_one_question_with_and_without_its_space(page, entries):
  """Matches are marked; an exact piece is asked for by its own box."""
  go(page, '#/s/0')
  page.get_by_label('include dead and dense').check()
  fired = int(np.argmax(entries[0].index.top_FE[:, 0]))
  word = next(
    w
    for w in pages.words(entries[0].index, fired)
    if pieces([w])[0] not in HOSTILE
  )
  bare = pieces([word])[0].replace('\u2581', '')

  def found(query, exact=False):
    page.fill('input[type=search]', query)
    page.get_by_label('exact piece').set_checked(exact)
    return page.locator('tbody td:first-child a').all_text_contents()

  assert f'#{fired}' in found(bare) and found(bare) == found(' ' + bare)
  assert bare in page.locator('mark').all_text_contents()
  assert found(' ' + bare, exact=True) and not found(bare, exact=True)
  page.get_by_label('exact piece').uncheck()


def test_lists_sort_keep_their_place_and_the_theme_is_kept(page, entries):
  go(page, '#/s/0')
  page.fill('input[type=search]', '')
  page.get_by_label('include dead and dense').check()
  page.get_by_role('button', name='feature').click()
  numbers = [
    int(t[1:])
    for t in page.locator('tbody td:first-child a').all_text_contents()
  ]
  assert numbers == sorted(numbers) and len(numbers) == 80
  page.evaluate('scrollTo(0, 700)')
  page.locator('tbody td:first-child a').nth(40).click()
  page.wait_for_selector('.tokens, .warn')
  page.go_back()
  page.wait_for_selector('tbody td:first-child a')
  page.wait_for_function('scrollY > 600')
  before = page.evaluate('document.documentElement.dataset.theme')
  page.keyboard.press('t')
  page.reload()
  page.wait_for_selector('main h1')
  assert page.evaluate('document.documentElement.dataset.theme') != before
  page.keyboard.press('t')


def test_effects_are_shown_and_filter_the_list(page, entries):
  alive = np.flatnonzero(entries[0].index.fired_F)
  go(page, '#/s/0')
  page.fill('input[type=search]', '')
  page.get_by_label('include dead and dense').check()
  page.get_by_label('Effect', exact=True).select_option('some')
  shown = page.locator('tbody td:first-child a').all_text_contents()
  odd = [int(j) for j in alive if j % 2]
  assert sorted(int(t[1:]) for t in shown) == odd
  page.get_by_label('Effect', exact=True).select_option('')
  go(page, f'#/s/0/f/{odd[0]}')
  page.wait_for_selector('#effect')
  assert 'It moves what its logit lens says' in page.text_content('#effect')
  assert 'w16' in page.text_content('main')  # a token that it lowers
  even = next(int(j) for j in alive if j % 2 == 0)
  go(page, f'#/s/0/f/{even}')
  page.wait_for_selector('#effect.warn')


def test_pieces_keep_their_case_and_bytes_are_decoded(page):
  go(page, '#/s/0/f/3')
  shown = page.evaluate(
    "decoded(['<0xE2>', '<0x82>', '<0xAC>', 'The', '<0xE2>', '<0x41>'])"
  )
  assert shown == ['\u20ac', '', '', 'The', '<0xE2>', '<0x41>']
  transforms = page.evaluate(
    "[...document.querySelectorAll('*')]"
    '.map((e) => getComputedStyle(e).textTransform)'
  )
  assert set(transforms) == {'none'}
  assert 'null' not in page.text_content('main').split()


def test_plots_and_tables_are_saved(page, entries):
  go(page, '#/s/0')
  page.fill('input[type=search]', '')
  with page.expect_download() as started:
    page.get_by_role('button', name='Save SVG').first.click()
  svg = ElementTree.fromstring(started.value.path().read_text())
  circles = svg.findall('.//{http://www.w3.org/2000/svg}circle')
  assert len(circles) == int((entries[0].index.fired_F > 0).sum())
  assert all(c.get('fill') and not c.get('class') for c in circles)
  with page.expect_download() as started:
    page.get_by_role('button', name='Save CSV').first.click()
  with open(started.value.path(), newline='') as file:
    header, *lines = csv.reader(file)
  shown = page.locator('tbody td:first-child a').all_text_contents()
  assert header[0] == 'feature' and 'density' in header
  assert [f'#{line[0]}' for line in lines] == shown
  cells = page.evaluate("[csvCell('=1+1'), csvCell(-2), csvCell('a\"b')]")
  assert cells == ['"\'=1+1"', '"-2"', '"a""b"']


def test_a_saved_graph_is_opened_and_grouped(page, tmp_path):
  """Without a server: effects are predicted, and what is grouped is saved."""
  feature = {'kind': 'feature', 'member': 0, 'position': 1, 'exact': 0.2,
             'p': 0.5, 'label': HOSTILE[0]}  # fmt: skip
  graph = {
    'nodes': [
      feature | {'feature': 3, 'layer': 0, 'value': 2.0, 'influence': 0.5},
      feature | {'feature': 5, 'layer': 1, 'value': 4.0, 'influence': 0.3},
      {'kind': 'logit', 'value': 5.0},
    ],
    'edges': [[0, 1, 3.0], [0, 2, 1.0], [1, 2, 3.0]],
    'ends': {'embedding': 1.0}, 'verdict': 'None.', 'similar': [[0, 1]],
    'agreement': {'spearman': 1.0, 'slope': 1.0}, 'supernodes': [],
    'scores': {'replacement': 0.5, 'completeness': 0.5},
    'pieces': ['<bos>', '\u2581a'], 'logit': ['x'], 'text': HOSTILE[1],
    'saes': ['resid_post/0'],
  }  # fmt: skip
  path = tmp_path / 'graph.json'
  path.write_text(json.dumps(graph))
  go(page, '#/graph')
  page.set_input_files('input[type=file]', path)
  page.wait_for_selector('#saved circle.dot')
  page.locator('#saved circle.dot').first.click()
  alone = supernodes.predicted(graph, [0])
  assert f'1 chosen: predicted {alone:g}' in page.text_content('#saved')
  page.get_by_role('button', name='Group similar').click()
  row = page.locator('#saved tr:has(button:text("ungroup")) td.number')
  together = supernodes.predicted(graph, [0, 1])
  assert row.nth(2).text_content() == f'{together:g}' != f'{alone:g}'
  assert page.get_by_role('button', name='ablate').count() == 0
  with page.expect_download() as started:
    page.get_by_role('button', name='Save graph').click()
  saved = json.loads(started.value.path().read_text())
  assert saved['supernodes'] == [{'name': HOSTILE[0], 'nodes': [0, 1]}]
  assert saved['edges'] == graph['edges'] and 'members' not in saved
  assert not audit(page)
  for wrong in ('no JSON', '{"nodes": []}', json.dumps(graph | {'nodes': [1]})):
    path.write_text(wrong)
    page.set_input_files('input[type=file]', [])
    page.set_input_files('input[type=file]', path)
    page.wait_for_selector('#saved .warn:has-text("no graph.json")')
  assert page.evaluate('window.hit') is None


def test_dead_features_say_so(page, entries):
  dead = len(entries[0].index.fired_F) - 1
  assert entries[0].index.fired_F[dead] == 0
  go(page, f'#/s/0/f/{dead}')
  page.wait_for_selector('.warn:has-text("dead")')
  titles = page.locator('main h2').all_text_contents()
  assert not any('Largest activations' in title for title in titles)


def test_help_explains_the_terms(page):
  go(page, '#/')
  page.keyboard.press('?')
  assert 'Jaccard' in page.text_content('dialog')
  page.keyboard.press('Escape')
  assert not page.evaluate("document.querySelector('dialog').open")


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_accessibility(page, theme):
  for route in ('#/', '#/s/0', '#/s/0/f/3', '#/c/0/1'):
    go(page, route)
    page.evaluate(f"paint('{theme}')")
    page.wait_for_timeout(200)
    assert not audit(page), route


def test_comparing_two(page):
  go(page, '#/c/0/1')
  page.wait_for_selector('h1:has-text("Compare")')
  assert 'nearest decoder' in page.text_content('main')


def test_what_is_not_there_is_said(page):
  for route in ('#/s/9', '#/s/0/f/99999'):
    go(page, route)
    page.wait_for_selector('h1:has-text("Page not found")')


def test_text_is_shown_and_never_run(page):
  """Every page: no element that the scripts did not make, no network."""
  for route in ('#/', '#/s/0', '#/s/0/f/3', '#/s/0/f/5', '#/c/0/1'):
    go(page, route)
    page.wait_for_timeout(150)
    assert page.evaluate('window.hit') is None
    for tag in ('img', 'iframe', 'b', 'i', 'object', 'embed'):
      assert page.locator(tag).count() == 0, (route, tag)
    inline = page.evaluate(
      "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes])"
      ".filter((a) => a.name.startsWith('on')).length"
    )
    assert inline == 0
    scripts = page.evaluate(
      '[...document.scripts].every((s) => s.src.startsWith("file:"))'
    )
    assert scripts
  go(page, '#/s/0/f/3')
  page.wait_for_selector(f'h1:has-text("{HOSTILE[0]}")')
  assert all(url.startswith('file:') for url in page.asked)
  assert not page.said, page.said
  # The policy, were something to slip through.
  page.evaluate(
    "document.head.append(Object.assign(document.createElement('script'),"
    "{textContent: 'window.hit = 1'}))"
  )
  assert page.evaluate('window.hit') is None


def test_a_phone_scrolls_one_way(page):
  page.set_viewport_size({'width': 390, 'height': 844})
  for route in ('#/', '#/s/0', '#/s/0/f/3'):
    go(page, route)
    wide = page.evaluate('document.documentElement.scrollWidth')
    assert wide <= 390, route
  page.set_viewport_size({'width': 1200, 'height': 900})
