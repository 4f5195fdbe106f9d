"""Labels: rules found and scored exactly, a model asked through a server."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import types

import numpy as np
import pytest

from gemma_scope.language_model import weights
from gemma_scope.microscope.autointerp import (
  examples,
  label_store,
  labels,
  llm,
)
from gemma_scope.text import tokenizers

KEY = 'not-a-real-key-1234'
N, T, W, TOP, Q, R, M = 120, 40, 32, 12, 10, 4, 24


def pieces(ids):
  return [f'▁w{i}' for i in ids]


def an_index(f_NTF, tokens_NT):
  """The fields that examples read, by brute force."""
  keep_NT = np.ones((N, T), bool)
  keep_NT[:, 0] = False
  f_NTF = f_NTF * keep_NT[..., None]
  F, rng = f_NTF.shape[-1], np.random.default_rng(0)

  def empty(*shape):
    values = np.zeros((F, *shape), np.float32)
    places = np.full((2, F, *shape), -1, np.int32)
    return values, places, np.zeros((F, *shape, W), np.float32)

  def around(f_NT, n, t):
    padded = np.pad(f_NT[n], (W // 2, W))
    return padded[t : t + W]

  top, top_at, window_top = empty(TOP)
  sample, sample_at, window_sample = empty(Q, R)
  silent_FM = np.full((F, M), -1, np.int32)
  for f in range(F):
    f_NT = f_NTF[..., f]
    best_N = np.argsort(-f_NT.max(1), kind='stable')[:TOP]
    for e, n in enumerate(best_N):
      t = f_NT[n].argmax()
      if f_NT[n, t] > 0:
        top[f, e], top_at[:, f, e] = f_NT[n, t], (n, t)
        window_top[f, e] = around(f_NT, n, t)
    tenth_NT = np.ceil(f_NT / max(f_NT.max(), 1e-9) * Q) - 1
    for q in range(Q):
      found = np.argwhere((tenth_NT == q) & (f_NT > 0))
      for r, (n, t) in enumerate(rng.permutation(found)[:R]):
        sample[f, q, r], sample_at[:, f, q, r] = f_NT[n, t], (n, t)
        window_sample[f, q, r] = around(f_NT, n, t)
    never = np.flatnonzero(f_NT.max(1) == 0)[:M]
    silent_FM[f, : len(never)] = never
  return types.SimpleNamespace(
    sequences_NT=tokens_NT,
    keep_NT=keep_NT,
    top_FE=top,
    top_sequence_FE=top_at[0],
    top_position_FE=top_at[1],
    sample_FQR=sample,
    sample_sequence_FQR=sample_at[0],
    sample_position_FQR=sample_at[1],
    silent_FM=silent_FM,
    windows=lambda name, j: dict(top=window_top, sample=window_sample)[name][j],
    positive_FL=None,
  )


@pytest.fixture(scope='module')
def index():
  """Latents: on 5 or 6; after 7; on nothing in common; dead; on 8."""
  rng = np.random.default_rng(1)
  tokens_NT = rng.integers(10, 60, (N, T)).astype(np.int32)
  for n in range(N):
    if n % 2:
      tokens_NT[n, rng.integers(5, 35, 2)] = rng.choice([5, 6], 2)
    if n % 3 == 0:
      tokens_NT[n, rng.integers(5, 30)] = 7
    if n % 2 == 0:
      tokens_NT[n, 3] = 8
  size_NT = rng.uniform(0.1, 1, (N, T)).astype(np.float32)
  after_NT = np.roll(tokens_NT == 7, 1, 1)
  common_NT = (rng.random((N, T)) < 0.05) & (np.arange(N) % 2 == 1)[:, None]
  on = [
    np.isin(tokens_NT, [5, 6]),
    after_NT,
    common_NT,
    0 * after_NT,
    tokens_NT == 8,
  ]
  return an_index(np.stack([size_NT * each for each in on], -1), tokens_NT)


# Examples and rules.


def test_no_sequence_has_windows_in_both_halves(index):
  found = examples.of(index, 0)
  halves = found.firing + found.silent, found.heldout_firing
  assert all(map(len, halves)) and found.heldout_silent
  text = [{e.ids for e in half} for half in halves]
  assert not text[0] & text[1]
  for example in found.firing + found.heldout_firing:
    assert any(example.fires) and len(example.ids) <= W
  for example in found.silent + found.heldout_silent:
    assert not any(example.fires)


def test_windows_show_the_tokens_on_which_the_latent_fires(index):
  for example in examples.of(index, 0).firing:
    for token, fires in zip(example.ids, example.fires, strict=True):
      assert fires == (token in (5, 6))


def test_rules_are_found_and_are_right(index):
  rows = labels.explain(index, range(5), pieces)
  assert rows[0]['ids'] in ([5, 6], [6, 5]) and rows[0]['offset'] == 0
  assert rows[1]['ids'] == [7] and rows[1]['offset'] == -1
  assert rows[4]['label'] == "the token is ' w8'"
  for n in (0, 1, 4):
    assert rows[n]['detection']['value'] == 1 and not rows[n]['low_score']
    assert rows[n]['fuzzing']['value'] == 1
    assert rows[n]['shuffled']['value'] < 0.8
    assert rows[n]['kind'] == 'rule'
  assert rows[2]['low_score'], rows[2]
  assert rows[3]['label'] is None and 'too few' in rows[3]['why']
  assert labels.summary(rows)['labelled'] == 4


def test_the_worst_mistakes_of_a_label_are_kept_and_shown(index):
  rows = labels.explain(index, range(5), pieces)
  assert rows[0]['mistakes'] == {'missed': [], 'false': []}  # it is right
  mistakes, score = rows[2]['mistakes'], rows[2]['detection']
  assert score['value'] < 1 and (mistakes['missed'] or mistakes['false'])
  assert all('<<' in window for window in mistakes['missed'])
  assert not any('<<' in window for window in mistakes['false'])
  label = examples.Rule(0, (5,))
  found = examples.of(index, 0)
  _, said = labels.detection_by_rule(label, found)
  missed = [e for e in found.heldout_firing if 5 not in e.ids]
  worst = max(missed, key=lambda e: max(e.values))
  (first, *_) = labels.mistakes(said, pieces)['missed']
  marked = np.flatnonzero(worst.fires)
  assert first == labels._shown(worst, pieces, marked)
  table = labels.table(rows)
  assert 'missed' in table or 'wrong on' in table


def test_labels_do_not_depend_on_the_half_that_scores_them(index):
  found = examples.of(index, 1)
  without = examples.Examples(found.firing, found.silent, (), ())
  assert examples.rule(found) == examples.rule(without)
  assert examples.rule(examples.Examples((), (), (), ())) is None


def test_balanced_accuracy_and_its_interval():
  found = labels.balanced_accuracy([True] * 30, [False] * 30)
  assert found['value'] == 1 and 0.85 < found['low'] < 1 == found['high']
  assert labels.balanced_accuracy([True], []) is None
  rng, inside = np.random.default_rng(0), 0
  for _ in range(400):
    one = labels.balanced_accuracy(rng.random(20) < 0.8, rng.random(30) < 0.3)
    inside += one['low'] <= 0.75 <= one['high']
  assert inside >= 368  # 95 % of 400, less three standard deviations


def test_labels_are_written_a_line_each(index, tmp_path):
  rows = labels.explain(index, [0, 3], pieces)
  labels.write(tmp_path / 'labels.jsonl', rows)
  lines = (tmp_path / 'labels.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows


def test_the_clearest_labels_are_far_from_those_of_other_features(index):
  rows = {'a': labels.explain(index, [0, 1, 2, 4], pieces), 'b': []}
  (name, first), *more = label_store._clearest(rows)
  assert name == 'a' and len(more) < 2  # two of an SAE
  lead = lambda row: row['detection']['low'] - row['shuffled']['value']
  known = [row for row in rows['a'] if row['shuffled'] and not row['low_score']]
  assert first is max(known, key=lead)
  assert label_store._clearest({'a': labels.explain(index, [3], pieces)}) == []


# A server that answers, and one that does not.


def completion(text):
  return 200, json.dumps({'choices': [{'message': {'content': text}}]}), {}


@contextlib.contextmanager
def server(answers):
  """A stand-in on the loopback; `answers(question, n)` or a list of replies."""
  seen = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      size = int(self.headers['Content-Length'])
      body = json.loads(self.rfile.read(size))
      seen.append((self.path, dict(self.headers), body))
      question = body['messages'][0]['content']
      reply = (
        answers(question)
        if callable(answers)
        else answers[min(len(seen), len(answers)) - 1]
      )
      if reply is None:  # never answers
        stop.wait(5)
        return
      status, text, headers = reply
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.end_headers()
      with contextlib.suppress(OSError):
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *unused):
      pass

  stop = threading.Event()
  httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield f'http://127.0.0.1:{httpd.server_address[1]}/v1', seen
  finally:
    stop.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def endpoint(url, **more):
  return llm.Endpoint('m', url, **{'wait_s': 0.01, 'timeout_s': 2.0, **more})


def test_a_busy_or_broken_server_is_asked_again(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  replies = [
    (429, '', {'Retry-After': '0'}),
    (503, '', {}),
    (200, 'not json', {}),
    (200, '{"choices": []}', {}),
    completion('yes'),
  ]
  with server(replies) as (url, seen):
    assert endpoint(url)('why?') == 'yes'
  assert len(seen) == 5
  path, headers, body = seen[0]
  assert path == '/v1/chat/completions'
  assert headers['Authorization'] == f'Bearer {KEY}'
  assert body['model'] == 'm' and body['temperature'] == 0


def test_a_silent_server_and_a_refusal_are_errors_without_the_key(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  for replies, count in (
    ([None], 2),
    ([(401, KEY, {})], 1),
    ([(200, '[]', {})], 2),
  ):
    with server(replies) as (url, seen):
      asked = endpoint(url, tries=2, timeout_s=0.3)
      with pytest.raises(llm.AskError) as error:
        asked('why?')
      assert len(seen) == count
      assert KEY not in str(error.value) + repr(asked)


def test_a_redirect_does_not_take_the_key_along(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  with server([completion('stolen')]) as (other, taken):
    with server([(302, '', {'Location': other})]) as (url, _):
      with pytest.raises(llm.AskError, match='status 302'):
        endpoint(url, tries=2)('why?')
    assert not taken


def test_a_key_is_not_sent_in_the_clear(monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  with pytest.raises(ValueError, match='not encrypted'):
    llm.Endpoint('m', 'http://example.org/v1')
  with pytest.raises(ValueError, match='not a server URL'):
    llm.Endpoint('m', 'example.org')


def test_answers_are_kept_and_bounded(tmp_path, monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', KEY)
  path = tmp_path / 'answers.jsonl'
  with server(lambda question: completion(question.upper())) as (url, seen):
    kept = llm.Kept(endpoint(url), path, most=2)
    assert [kept(q) for q in ('a', 'b', 'a')] == ['A', 'B', 'A']
    with pytest.raises(llm.AskError, match='limit of 2 questions'):
      kept('c')
    assert len(seen) == 2
    # Killed in the middle of a line.
    path.write_bytes(path.read_bytes()[:-5])
    again = llm.Kept(endpoint(url), path)
    assert [again(q) for q in ('a', 'b')] == ['A', 'B'] and len(seen) == 3
  assert KEY not in path.read_text()


def oracle(question):
  """Labels by the most common marked token; scores by looking for it."""
  if 'JSON list' not in question:
    marked = re.findall(r'<<( w\d+)>>', question)
    return completion(max(sorted(set(marked)), key=marked.count))
  label = re.search(r'label: ( ?w\d+)', question)[1].strip()
  texts = re.findall(r"^\d+\. '(.*)'$", question, re.MULTILINE)
  marked = '<<' in question
  wanted = re.compile(rf'<< {label}>>' if marked else rf' {label}(?!\d)')
  answers = [int(bool(wanted.search(text))) for text in texts]
  return completion(f'Sure: {answers}')


def test_a_model_labels_and_scores(index, monkeypatch, tmp_path):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  with server(oracle) as (url, seen):
    model = llm.Kept(endpoint(url), tmp_path / 'answers.jsonl')
    rows = labels.explain(index, [4, 0, 3], pieces, model)
    asked = len(seen)
    assert labels.explain(index, [4, 0, 3], pieces, model) == rows
    assert len(seen) == asked
  assert 'Authorization' not in seen[0][1]
  assert rows[0]['label'] == 'w8' and rows[0]['kind'] == 'model'
  assert rows[0]['detection']['value'] == 1 and not rows[0]['low_score']
  assert rows[0]['fuzzing']['value'] == 1
  assert rows[0]['shuffled']['value'] < 0.7
  assert rows[0]['question'] and rows[0]['by'] == 'm'
  assert rows[2]['label'] is None


def test_answers_that_are_no_list_are_counted_not_guessed(index):
  class Mute:
    name = 'mute'

    def __call__(self, question):
      return 'a token' if 'JSON list' not in question else 'I cannot [1, x].'

  (row,) = labels.explain(index, [4], pieces, Mute())
  assert row['detection'] is None and row['low_score']
  assert row['shuffled'] is None  # there is no other label


def test_the_embedded_gemma_answers():
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny', ''))
  model = llm.LocalGemma('tiny', *weights.load('tiny'), tokenizer, max_tokens=4)
  answer = model('What is this?')
  assert isinstance(answer, str) and model('What is this?') == answer
  assert '<end_of_turn>' not in answer
