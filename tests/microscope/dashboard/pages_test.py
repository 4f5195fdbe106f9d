"""The pages: what they hold, and what a real browser makes of them."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from gemma_scope.language_model import weights
from gemma_scope.microscope.dashboard import pages
from gemma_scope.microscope.index import build
from tests.helpers import random_saes
from tests.helpers.browser import chromium, data

HOSTILE = [
  '<script>window.hit=1</script>', '</script><img src=x onerror=hit()>',
  '"><svg onload=hit()>', '\u2028', '\u202eevil', '\ud800', '<0xE2>', '\u2581a',
  '\x00', '{{7*7}}', "');hit();('",
]  # fmt: skip


def pieces(ids):
  """Every fifth token's text means harm."""
  return [
    HOSTILE[i // 5 % len(HOSTILE)] if i % 5 == 0 else f'\u2581w{i}' for i in ids
  ]


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
  found = build.build(*model, members, text, build.How(12))
  label = {'text': HOSTILE[0], 'by': 'rule', 'score': 0.9, 'control': 0.5}
  figure = lambda v: {'value': v, 'low': v, 'high': v}
  metrics = {
    'l0': figure(9.0),
    'fvu': figure(0.2),
    'delta_loss': figure(0.1),
    'control': {'fvu': figure(0.5), 'delta_loss': figure(0.4)},
  }
  return [
    pages.Entry(f'resid_post/{i}', one, metrics, params['W_dec'], {3: label})
    for i, (one, (params, _)) in enumerate(zip(found, members, strict=True))
  ]


@pytest.fixture(scope='module')
def folder(entries, tmp_path_factory):
  out = tmp_path_factory.mktemp('pages') / 'out'
  pages.write(out, entries, pieces, title='<i>Title</i>')
  return out


def test_a_features_record_is_its_index(folder, entries):
  one = entries[0].index
  j = int(np.argmax(one.fired_F))
  record = data(folder, f'm0/c{j // pages.CHUNK}')[j % pages.CHUNK]
  assert record['fired'] == one.fired_F[j]
  assert record['low'] < record['density'] < record['high']
  assert record['histogram'] == one.histogram_FH[j].tolist()
  example = record['top'][0]
  values = (
    np.frombuffer(base64.b64decode(example['values']), '<f2') * one.max_F[j]
  )
  assert len(values) == len(example['ids'])
  assert values[example['peak']] == pytest.approx(
    float(one.top_FE[j, 0]), rel=1e-2
  )
  n, t = one.top_sequence_FE[j, 0], one.top_position_FE[j, 0]
  assert example['ids'][example['peak']] == one.sequences_NT[n, t]
  listed = data(folder, 'm0/list')
  assert len(listed['density']) == 80 and listed['label'][3] == HOSTILE[0]
  used = {i for e in record['top'] for i in e['ids']}
  assert used <= set(map(int, data(folder, 'vocabulary')))


def test_matches_are_the_nearest_decoders(folder, entries):
  unit = [
    e.decoder_FD / np.linalg.norm(e.decoder_FD, axis=1, keepdims=True)
    for e in entries
  ]
  cosine = unit[0] @ unit[1].T
  found = data(folder, 'm0/to1')
  best = np.argmax(cosine, 1)
  assert [row[0] for row in found['match']] == best.tolist()
  np.testing.assert_allclose(
    [row[0] for row in found['cosine']], cosine.max(1), rtol=1e-3
  )


def test_equal_indexes_give_equal_bytes(folder, entries, tmp_path):
  pages.write(tmp_path / 'again', entries, pieces, title='<i>Title</i>')
  for path in folder.rglob('*'):
    if path.is_file():
      other = tmp_path / 'again' / path.relative_to(folder)
      assert other.read_bytes() == path.read_bytes()


def test_a_folder_that_holds_other_things_is_left_alone(entries, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes').write_text('keep')
  with pytest.raises(ValueError, match='holds no pages'):
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
  assert page.locator('circle.dot').count() == 4
  go(page, '#/s/0')
  page.wait_for_selector('input[type=search]')
  fired = int(np.argmax(entries[0].index.top_FE[:, 0]))
  word = next(
    w
    for w in pages.words(entries[0].index, fired)
    if pieces([w])[0] not in HOSTILE
  )
  page.check('input[type=checkbox]')
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
  most = np.frombuffer(base64.b64decode(record['top'][0]['values']), '<f2')
  said = float(page.text_content('.tip').rpartition('  ')[2])
  assert said == pytest.approx(
    float(most[record['top'][0]['peak']] * record['max']), rel=5e-3
  )
  assert json.loads(page.text_content('.tip').rpartition('  ')[0]) is not None
  page.keyboard.press('j')
  page.wait_for_timeout(100)
  assert page.url.endswith(f'#/s/0/f/{min(fired + 1, 79)}')
  page.keyboard.press('Escape')
  page.wait_for_timeout(100)
  assert page.url.endswith('#/s/0')
  page.keyboard.press('/')
  assert page.evaluate('document.activeElement.type') == 'search'


def test_comparing_two(page):
  go(page, '#/c/0/1')
  page.wait_for_selector('h1:has-text("Compare")')
  assert 'nearest decoder' in page.text_content('main')


def test_what_is_not_there_is_said(page):
  for route in ('#/s/9', '#/s/0/f/99999'):
    go(page, route)
    page.wait_for_selector('h1:has-text("Nothing here")')


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
