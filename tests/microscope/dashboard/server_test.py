"""The live view: who is let in, what is answered, what a browser shows."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest

from gemma_scope.language_model import generate, weights
from gemma_scope.microscope.circuits import (
  attribution,
  effects,
  readout,
  supernodes,
)
from gemma_scope.microscope.dashboard import api, pages
from gemma_scope.microscope.dashboard import server as server_lib
from gemma_scope.microscope.index import build, store
from gemma_scope.text import tokenizers
from tests.helpers import browser, random_saes, releases, replacement

uvicorn = pytest.importorskip('uvicorn', reason='uvicorn is not installed')
TEXT, TOKEN = 'def read(self, path):\n  return "<script>" + path.', 'a' * 32


def transcoder(layer: int):
  params, card = random_saes.member(layer, f'mlp_in/{layer}')
  params['W_dec'] = params['W_dec'] / 128
  return params, card | {
    'type': 'transcoder',
    'targets': [f'mlp_out/{layer}'],
    'name': f'transcoder_{layer}',
  }


@pytest.fixture(scope='module')
def asked():
  """Questions about two SAEs and two transcoders; these; the tokenizer."""
  model = replacement.tiny()
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny', ''))
  rng = np.random.default_rng(0)
  sequences_NT = rng.integers(10, 4000, (12, 20)).astype(np.int32)
  sequences_NT[0, 1:] = tokenizer.encode(TEXT * 2)[:19]
  sequences_NT[:, 0] = 2
  documents_NT = np.arange(12, dtype=np.int32)[:, None] + np.zeros(20, np.int32)
  about = {'name': 'test', 'sha256': '0' * 64, 'split': 'train'}
  text = build.Text(sequences_NT, sequences_NT != 2, documents_NT, about)
  members = [random_saes.member(s, 'resid_post/1') for s in (0, 1)]
  members += [transcoder(layer) for layer in (0, 2)]
  saes = releases.saes(members)
  indexes = build.build(*model, saes, text, build.How(12))
  indexed = list(map(store.Indexed, saes, indexes))
  questions = api.Questions(model, tokenizer, indexed)
  questions.warm_lengths = ()
  yield questions, indexed, tokenizer
  questions.close()


@pytest.fixture(scope='module')
def server(asked, tmp_path_factory):
  found, indexed, tokenizer = asked
  folder = tmp_path_factory.mktemp('live')
  (folder / 'secret.txt').write_text('secret')
  pages.write(folder / 'pages', indexed, tokenizer.pieces)
  (folder / 'pages' / 'link').symlink_to(folder / 'secret.txt')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  one = uvicorn.Server(
    uvicorn.Config(
      server_lib.app(found, folder / 'pages', TOKEN),
      host='127.0.0.1',
      port=port,
      log_level='warning',
    )
  )
  thread = threading.Thread(target=one.run)
  thread.start()
  while not one.started:
    time.sleep(0.01)
  yield port
  one.should_exit = True
  thread.join(10)


def request(port, path='/', method='GET', body=None, cookie=TOKEN, **headers):
  """Status, headers, body; the path goes out as it is."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
  headers = {key.replace('_', '-'): value for key, value in headers.items()}
  if cookie:
    headers['Cookie'] = f'microscope_{port}={cookie}'
  connection.request(method, path, body, headers)
  reply = connection.getresponse()
  return reply.status, dict(reply.getheaders()), reply.read()


def answer(port, name, **question):
  status, _, body = request(
    port, f'/api/{name}', 'POST', json.dumps(question).encode()
  )
  return status, json.loads(body)


# Who is let in.


def test_only_with_the_token(server):
  for cookie in (None, '', 'b' * 32, TOKEN[:-1], 'é'):
    encoded = cookie and cookie.encode('latin-1').decode('latin-1')
    for method, path in (('GET', '/'), ('POST', '/api/read')):
      assert request(server, path, method, cookie=encoded)[0] == 403
  assert request(server, '/?token=wrong', cookie=None)[0] == 403
  status, headers, _ = request(server, f'/?token={TOKEN}', cookie=None)
  assert status == 303 and headers['location'] == '/'
  kept = headers['set-cookie'].lower()
  assert 'httponly' in kept and 'samesite=strict' in kept
  status, headers, body = request(server)
  assert status == 200 and b'Microscope' in body
  assert "default-src 'none'" in headers['content-security-policy']
  assert headers['x-content-type-options'] == 'nosniff'
  assert TOKEN.encode() not in body


@pytest.mark.parametrize('host', ['evil.example', '169.254.1.1', '0.0.0.0', ''])
def test_only_for_this_host(server, host):
  status, _, body = request(server, Host=host)
  assert status in (400, 403) and b'Microscope' not in body


@pytest.mark.parametrize(
  'origin', ['http://evil.example', 'null', 'http://127.0.0.1:1']
)
def test_only_from_its_own_pages(server, origin):
  for method, path in (('GET', '/'), ('POST', '/api/read')):
    status, _, _ = request(server, path, method, b'{}', Origin=origin)
    assert status == 403


@pytest.mark.parametrize(
  'path',
  [
    '/../secret.txt',
    '/data/../../secret.txt',
    '/%2e%2e/secret.txt',
    '/..%2fsecret.txt',
    '//etc/passwd',
    '/data//etc/passwd',
    '/etc/passwd',
    '/..\\secret.txt',
    '/link',
    '/data/%00',
    '/assets/../../secret.txt',
  ],
)
def test_nothing_outside_the_pages(server, path):
  status, _, body = request(server, path)
  assert status in (400, 404, 405) and b'secret' not in body
  assert b'root:' not in body


def test_only_questions_are_posted(server):
  for method in ('POST', 'PUT', 'DELETE', 'PATCH'):
    assert request(server, '/index.html', method)[0] == 405
  assert request(server, '/api/read')[0] in (404, 405)
  assert answer(server, 'shutdown')[0] == 404


@pytest.mark.parametrize(
  ('body', 'status', 'said'),
  [
    (b'not json', 400, ''),
    (b'[1]', 400, 'a JSON object'),
    (b'[' * 100_000, 400, ''),
    (b'{"text": "a", "member": 9}', 400, '"member" must be a whole number'),
    (b'{"text": "a", "member": true}', 400, '"member" must be a whole number'),
    (b'{"member": 0}', 400, 'must have a "text"'),
    (b'{"text": "", "member": 0}', 400, 'The text has 0 tokens'),
    (b'{"text": "' + b'a b ' * 9000 + b'", "member": 0}', 400, 'give 1 to 4,'),
    (b'{"text": "' + b'a' * 2**20 + b'", "member": 0}', 413, 'too long'),
  ],
)
def test_bad_questions_get_a_sentence(server, body, status, said):
  got, _, reply = request(server, '/api/read', 'POST', body)
  assert got == status and said in json.loads(reply)['error']


# What is answered.


def test_warming_up_compiles_what_is_asked_later(asked, server):
  """Before the questions below, which find their programs compiled."""
  questions, _, tokenizer = asked
  tokens = len(readout.with_bos(tokenizer, TEXT))
  length = effects.padded_length(tokens)
  assert length / 2 < tokens < length
  programs = (
    attribution._slopes,
    effects._effects,
    effects._last,
    effects._predict,
    generate._sample,
  )
  for program in programs:
    program.clear_cache()
  questions.warm_lengths = (length,)
  try:
    while True:
      status, state = answer(server, 'warm', member=1)
      assert status == 200
      if state['done'] == state['total'] > 1:
        break
      time.sleep(0.2)
  finally:
    questions.warm_lengths = ()
  sizes = [program._cache_size() for program in programs]
  assert min(sizes) > 0
  change = {'feature': 3, 'kind': 'ablate', 'strength': 1}
  asked_later = {'member': 1, 'changes': [change], 'change': change}
  for text in (TEXT, TEXT[:-1]):
    for name in ('read', 'change', 'why'):
      assert answer(server, name, text=text, **asked_later)[0] == 200
    for tokens in (3, 40):
      fields = asked_later | {'tokens': tokens}
      assert answer(server, 'steer', text=text, **fields)[0] == 200
  assert [program._cache_size() for program in programs] == sizes


def test_a_reading(server, asked):
  status, found = answer(server, 'read', member=0, text=TEXT)
  tokenizer = asked[2]
  assert status == 200 and found['ids'][0] == tokenizer.bos_id
  assert found['pieces'] == tokenizer.pieces(found['ids'])
  assert found['latents'][0] == [] and not found['counts'][0]
  assert found['outliers'] == [False] * len(found['ids'])
  row = next(row for row in found['latents'] if row)
  assert row == sorted(row, key=lambda pair: -pair[1])
  assert len(found['next']) == len(found['ids']) == len(found['loss'])
  assert all(len(after) == 5 for after in found['next'])


def a_feature(server):
  _, found = answer(server, 'read', member=0, text=TEXT)
  return next(row for row in reversed(found['latents']) if row)[0][0]


def test_changes_and_doses(server):
  change = {'feature': a_feature(server), 'kind': 'ablate', 'strength': 1}
  question = {'member': 0, 'text': TEXT, 'logit': ['self', 7]}
  status, found = answer(server, 'change', **question, changes=[change])
  assert status == 200 and found['mean']['kl'] > 0
  assert len(found['kl']) == len(found['pieces']) == len(found['delta_loss'])
  status, nothing = answer(server, 'change', **question, changes=[])
  assert status == 200 and abs(nothing['mean']['kl']) < 1e-5
  status, found = answer(
    server, 'dose', **question, change=change | {'kind': 'add'}
  )
  kl = {point['strength']: point['kl'] for point in found['curve']}
  assert abs(kl[0]) < 1e-5 < kl[1] < kl[4]
  status, found = answer(server, 'dose', **question)
  assert status == 400 and 'A change must have' in found['error']
  for logit in ([10**12, None], [5000, None], [5, -7]):
    status, found = answer(
      server, 'change', **question | {'logit': logit}, changes=[]
    )
    assert status == 400 and 'There is no token' in found['error']
  question['logit'] = ['several tokens here', None]
  status, found = answer(server, 'change', **question, changes=[])
  assert status == 400 and 'is not one token' in found['error']


def test_steering_is_of_a_seed(server):
  change = {'feature': a_feature(server), 'kind': 'add', 'strength': 3}
  question = {
    'member': 0,
    'text': TEXT,
    'tokens': 8,
    'temperature': 1.0,
    'seed': 4,
  }
  _, one = answer(server, 'steer', **question, changes=[change])
  _, two = answer(server, 'steer', **question, changes=[change])
  _, none = answer(server, 'steer', **question, changes=[])
  assert one == two and one['default']['ids'] == none['default']['ids']
  assert none['steered']['ids'] == none['default']['ids']
  assert one['steered']['kl'] > 0


def test_pieces_are_completed(server, asked):
  _, found = answer(server, 'complete', text=' ret')
  assert '\u2581return' in found['pieces'] and len(found['pieces']) <= 12
  assert all(p.startswith('\u2581ret') for p in found['pieces'])
  assert answer(server, 'complete', text='')[1] == {'pieces': []}


def test_equal_tokens_are_refused(server):
  for name in ('why', 'change'):
    status, found = answer(
      server, name, member=0, text=TEXT, logit=['self', 'self'], changes=[]
    )
    assert status == 400 and 'the same' in found['error']


def test_ids_from_outside_are_not_taken(server):
  status, found = answer(server, 'read', member=0, ids=[10**9])
  assert status == 400 and 'must have a "text"' in found['error']


def an_ablation(server, graph):
  """Of the first two features of a graph, at once."""
  nodes = [n for n in graph['nodes'] if n['kind'] == 'feature'][:2]
  keys = ('member', 'feature', 'position')
  question = {'member': 2, 'text': TEXT, 'logit': [7, 9]}
  asked = [[node[key] for key in keys] for node in nodes]
  status, found = answer(server, 'ablate', **question, nodes=asked)
  assert status == 200
  for wrong in ([], [[0, 1]], [[2, 0, 1]], [[0, 10**6, 1]], [[0, 0, 999]]):
    status, refused = answer(server, 'ablate', **question, nodes=wrong)
    assert status == 400 and 'ode' in refused['error']
  return found


def test_causes(server):
  status, found = answer(server, 'why', member=0, text=TEXT)
  assert status == 200 and found['verdict'] and len(found['logit']) == 2
  status, found = answer(server, 'graph', member=2, text=TEXT, logit=[7, 9])
  assert status == 200 and found['members'] == [2, 3]
  assert found['nodes'][-1]['kind'] == 'logit'
  ablated = an_ablation(server, found)
  assert ablated['exact'] != 0 and len(ablated['controls']) == 8
  status, found = answer(server, 'graph', member=0, text=TEXT)
  assert status == 400 and 'transcoders or CLTs' in found['error']


def test_a_transcoders_fellows_are_those_most_like_it(asked):
  saes = asked[1]
  assert readout.together(saes, 2) == [2, 3]
  assert readout.together(saes, 0) == [0]
  twice = [*saes, saes[3]]
  assert readout.together(twice, 2) == [2, 3]
  assert saes[3].sae.wiring.sites[0].layer == 2


# In Chromium.


@pytest.fixture(scope='module')
def page(server):
  yield from browser.chromium(f'http://127.0.0.1:{server}/?token={TOKEN}')


def test_a_reader_steers_and_asks_why(page):
  page.evaluate("location.hash = '#/live/0'")
  page.wait_for_selector('textarea')
  page.fill('textarea', TEXT)
  page.get_by_role('button', name='Read', exact=True).click()
  page.wait_for_selector('#text .token:nth-child(12)')
  assert '<script>' in page.text_content('#text')
  assert page.locator('#text script').count() == 0
  page.locator('#text .token').nth(8).hover()
  page.wait_for_selector('#token tr')
  row = page.locator('#token tr').first
  row.hover()  # and back: the tokens on which this latent fires
  lit = page.evaluate(
    "[...document.querySelectorAll('#text .token')]"
    '.filter((t) => t.style.backgroundColor).length'
  )
  assert lit >= 1
  row.get_by_role('button', name='change').click()
  page.get_by_role('button', name='Steer').click()
  page.wait_for_selector('#result >> text=Steered, same seed', timeout=60_000)
  page.get_by_role('button', name='dose').click()
  page.wait_for_selector('#result circle', timeout=60_000)
  page.get_by_role('button', name='Effects').click()
  page.wait_for_selector('#result >> text=Over the text', timeout=60_000)
  page.get_by_role('button', name='Why').click()
  page.wait_for_selector('#verdict', timeout=60_000)
  page.get_by_label('a', exact=True).fill('several tokens here')
  page.get_by_role('button', name='Why').click()
  page.wait_for_selector('#cause >> text=is not one token')
  assert page.evaluate('window.hit') is None
  wrong = [said for said in page.said if '400' not in said]
  assert not wrong, wrong  # Chromium says so of an answer that refuses


def test_a_click_pins_a_token(page):
  """Another token that is pointed at does not take its place."""
  page.evaluate("location.hash = '#/live/0'")
  page.wait_for_selector('#text .token:nth-child(9)')
  page.locator('#text .token').nth(8).click()
  pinned = page.text_content('#token h2')
  assert 'pinned' in pinned
  page.locator('#text .token').nth(4).hover()
  assert page.text_content('#token h2') == pinned
  page.locator('#token tr').first.hover()  # it can be reached
  assert page.text_content('#token h2') == pinned
  page.locator('#text .token').nth(8).click()
  page.locator('#text .token').nth(4).hover()
  assert 'pinned' not in page.text_content('#token h2')
  assert not browser.audit(page)


def test_a_server_that_has_ended_is_named(page):
  page.route('**/api/*', lambda route: route.abort())
  page.get_by_role('button', name='Read', exact=True).click()
  page.wait_for_selector('.warn:has-text("The server has ended")')
  page.unroute('**/api/*')
  page.said.clear()


def test_a_bad_address_spoils_nothing(page):
  for route in ('#/live/0/f/99999', '#/live/0/f/x'):
    page.evaluate(f"location.hash = '{route}'")
    page.wait_for_selector('h1:has-text("Page not found")')
    page.evaluate("location.hash = '#/live/0'")
    page.wait_for_selector('textarea')


def test_the_last_question_is_the_one_shown(page):
  page.evaluate("location.hash = '#/live/0'")
  page.wait_for_selector('#text .token:nth-child(3)')
  page.fill('textarea', 'import os ' * 200)
  page.get_by_role('button', name='Read', exact=True).click()
  page.fill('textarea', 'self')
  page.get_by_role('button', name='Read', exact=True).click()
  page.wait_for_selector('#text:has-text("self")')
  page.wait_for_timeout(1500)
  assert 'import' not in page.text_content('#text')


def test_a_graph_is_drawn_and_its_features_are_grouped(page):
  page.evaluate("location.hash = '#/live/2'")
  page.wait_for_selector('h1:has-text("transcoder")')
  page.get_by_role('button', name='Graph').click()
  page.wait_for_selector('#cause svg circle.dot', timeout=60_000)
  boxes = page.locator('#cause input[type=checkbox]')
  boxes.nth(0).check()
  boxes.nth(1).check()
  page.wait_for_selector('#cause :text("2 chosen: predicted")')
  page.get_by_role('button', name='Ablate chosen').click()
  page.wait_for_selector('#cause [role=status]:has-text("exact")')
  page.get_by_label('name', exact=True).fill('two')
  page.get_by_role('button', name='Group chosen').click()
  page.get_by_role('button', name='ablate', exact=True).click()
  mine = '#cause tr:has(td:text-is("two")) td'
  page.wait_for_selector(mine + ':nth-child(6):not(:has-text("\u2013"))')
  files = []
  for name in ('Save graph', 'Save for Neuronpedia'):
    with page.expect_download() as started:
      page.get_by_role('button', name=name).click()
    files.append(json.loads(started.value.path().read_text()))
  (group,) = files[0]['supernodes']
  assert group['name'] == 'two' and group['exact'] != 0
  row = page.locator(mine + '.number')
  shown = [float(text) for text in row.all_text_contents()]
  want = supernodes.predicted(files[0], group['nodes'])
  assert shown[2:4] == pytest.approx([want, group['exact']], rel=1e-2)
  ((name, *ids),) = files[1]['qParams']['supernodes']
  known = {node['node_id'] for node in files[1]['nodes']}
  assert name == 'two' and len(ids) == 2 and set(ids) <= known
  assert not browser.audit(page)
