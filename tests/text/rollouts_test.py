"""Turns, prompts and rollouts: by ids, a conversation a row, resumed."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import pathlib
import signal

import jax
import numpy as np
import pytest

import gemma_scope
from gemma_scope import files
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import generate, weights
from gemma_scope.text import prepare as prepare_lib
from gemma_scope.text import prompts as prompts_lib
from gemma_scope.text import rollouts, token_store, tokenizers
from tests.helpers import processes

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]
START, END = 106, 107
PROMPTS = [f'What is {i} and {i * i}?' for i in range(11)]
SETTINGS = {'seq_len': 40, 'max_new_tokens': 6, 'batch': 4, 'heldout': 0.3}


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer(weights.TINY / 'tokenizer.model')


def one_layer(name: str, vocab_size: int) -> lm.Gemma:
  return lm.Gemma(
    lm.Config(
      name=name,
      vocab_size=vocab_size,
      d_model=8,
      num_layers=1,
      num_heads=1,
      num_kv_heads=1,
      head_dim=8,
      d_ff=8,
      window=8,
      pattern='L',
    )
  )


@functools.cache
def model():
  gemma = one_layer('chatty', 4100)
  return gemma, gemma.init(jax.random.key(0))


@pytest.fixture
def answers(monkeypatch):
  """Stands in for sampling: a reply that its prompt and stream decide."""
  calls = []

  def reply(prompt, stream, seed, new, end):
    rng = np.random.default_rng([seed, stream, *map(int, prompt)])
    body = rng.integers(200, 4096, rng.integers(0, new)).astype(np.int32)
    return np.append(body, np.int32(end)) if stream % 3 else body

  def stand_in(gemma, params, prompts, sampling, passes):
    calls.append(sampling)
    passes.poll()
    return [
      reply(p, s, sampling.seed, sampling.max_new_tokens, sampling.stop[0])
      for p, s in zip(prompts, sampling.streams, strict=True)
    ]

  monkeypatch.setattr(generate, 'generate', stand_in)
  return calls


def prepare(folder, prompts=PROMPTS, **more):
  facts = more.pop('facts', {})
  calls = {k: more.pop(k) for k in ('progress', 'poll') if k in more}
  return rollouts.prepare_rollouts(
    rollouts.Model(*model(), tokenizer(), facts),
    prompts,
    folder,
    rollouts.Settings(**{**SETTINGS, **more}),
    **calls,
  )


# Turns.


def test_turn_ids_are_read_from_the_vocabulary(tmp_path):
  assert (tokenizer().start_of_turn, tokenizer().end_of_turn) == (START, END)

  # Gemma 3 has one symbol less before them.
  class Other(tokenizers.Tokenizer):
    def id_of(self, piece):
      return super().id_of(piece) - 1

  other = Other(tokenizer().path)
  assert (other.start_of_turn, other.end_of_turn) == (105, 106)
  ids = rollouts.encode(other, 'hi')
  assert ids[0] == 105 and 107 not in ids
  with pytest.raises(ValueError, match="no piece '<start_of_image>'"):
    tokenizer().id_of('<start_of_image>')


def test_turns_are_gemmas():
  enc = lambda s: tokenizer().encode(s).tolist()
  opening = [START, *enc('user\n'), *enc('hi there'), END, *enc('\n')]
  opening += [START, *enc('model\n')]
  assert rollouts.encode(tokenizer(), ' hi there\n').tolist() == opening
  whole = opening + [*enc('yes'), END, *enc('\n')]
  assert rollouts.encode(tokenizer(), 'hi there', 'yes').tolist() == whole
  # As the template's string, where no text holds a marker.
  template = (
    '<start_of_turn>user\nhi there<end_of_turn>\n<start_of_turn>model\n'
    'yes<end_of_turn>\n<start_of_turn>user\nno<end_of_turn>\n'
    '<start_of_turn>model\n'
  )
  assert rollouts.encode(tokenizer(), 'hi there', 'yes', 'no').tolist() == enc(
    template
  )
  assert rollouts.reply_opening(tokenizer()) == (START, *enc('model\n'))
  assert rollouts.encode(tokenizer()).tolist() == []


def renamed(path, start, end):
  """The embedded tokenizer's model, with other pieces for turns."""
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()
  model.ParseFromString(pathlib.Path(tokenizer().path).read_bytes())
  model.pieces[START].piece, model.pieces[END].piece = start, end
  path.write_bytes(model.SerializeToString())
  return tokenizers.Tokenizer(path)


def test_turns_of_gemma_4(tmp_path, answers):
  """Other pieces, the same turns: as the package's own conversations."""
  gemma4 = renamed(tmp_path / '4.model', '<|turn>', '<turn|>')
  assert (gemma4.start_of_turn, gemma4.end_of_turn) == (START, END)
  chat = '<|turn>user\nhi there<turn|>\n<|turn>model\nyes<turn|>\n'
  chat += '<|turn>user\nno<turn|>\n<|turn>model\n'
  ids = rollouts.encode(gemma4, 'hi there', 'yes', 'no')
  np.testing.assert_array_equal(ids, gemma4.encode(chat))
  assert (ids == START).sum() == 4 and (ids == END).sum() == 3
  with contextlib.suppress(ImportError):  # comes with version 4 of gemma
    import dialog

    said = dialog.User('hi there'), dialog.Model('yes'), dialog.User('no')
    assert dialog.Conversation(*said).as_text() == chat
  # Typed by a user they are letters; Gemma 3's are letters anyway.
  for typed in (
    '<turn|>',
    'a<|turn>model',
    '<<|turn>',
    '<end_of_turn>',
    '<eos>',
  ):
    inside = rollouts.encode(gemma4, typed)[3:-6]
    assert gemma4.decode(inside) == typed
    assert not np.isin(inside, [1, START, END]).any()
  store = rollouts.prepare_rollouts(
    rollouts.Model(*model(), gemma4),
    PROMPTS,
    tmp_path / 's',
    rollouts.Settings(**SETTINGS),
  )
  assert store.reply == (START, *gemma4.encode('model\n'))
  assert answers[0].stop == (END, 1)


def test_a_tokenizer_without_turns_is_refused(tmp_path, answers):
  base = renamed(tmp_path / 'base.model', '<unused100>', '<unused101>')
  with pytest.raises(ValueError, match=r'neither <start_of_turn> nor <\|turn>'):
    rollouts.prepare_rollouts(
      rollouts.Model(*model(), base),
      PROMPTS,
      tmp_path / 's',
      rollouts.Settings(**SETTINGS),
    )
  assert not (tmp_path / 's').exists()


def test_markers_in_a_prompt_are_letters():
  markers = ['<start_of_turn>', '<end_of_turn>', '<', 'end_of_turn>', '\n']
  markers += ['<bos>', '<eos>', '<pad>', 'model', ' ', 'a', '<end_of_', 'turn>']
  rng = np.random.default_rng(0)
  for _ in range(300):
    prompt = ''.join(rng.choice(markers, rng.integers(1, 9)))
    ids = rollouts.encode(tokenizer(), prompt)
    inside = ids[3 : len(ids) - 6]
    assert tokenizer().decode(inside) == prompt.strip()
    assert not np.isin(inside, [0, 1, 2, START, END]).any()
    assert np.isin(ids, [START, END]).sum() == 3


def test_special():
  reply = (6, 8)
  rows = np.array(
    [
      [2, 6, 7, 5, 6, 8, 9, 107, 6, 8, 0],
      [2, 6, 7, 5, 6, 9, 8, 107, 1, 8, 0],
      [2, 6, 8, 1, 9, 2, 9, 9, 9, 6, 8],
      [2, 5, 5, 5, 5, 5, 5, 5, 5, 6, 8],
    ]
  )
  want = np.array(
    [
      [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0],
      [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
  )
  special = tokenizers.Special((0, 2, 1), reply)
  np.testing.assert_array_equal(special.keep(rows), want)
  everywhere = tokenizers.Special((0, 2, 1)).keep(rows)
  np.testing.assert_array_equal(everywhere, ~np.isin(rows, [0, 1, 2]))
  assert special.keep(rows[:, :1]).tolist() == [[False]] * 4
  assert special.keep(rows[:0]).shape == (0, 11)


def test_special_leaves_out_every_turn_of_the_user():
  tokens = [[2, 6, 7, 50, 6, 8, 60, 107, 6, 7, 51, 107, 6, 8, 61, 62]]
  want = [[0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]]
  special = tokenizers.Special((0, 2, 1), (6, 8))
  np.testing.assert_array_equal(special.keep(np.array(tokens)), want)


# Prompts.


def test_prompts_of_every_kind(tmp_path):
  records = [
    {'prompt': ' one '},
    {'text': 'two\u2028more'},
    {
      'messages': [
        {'role': 'system', 'content': 's'},
        {'role': 'user', 'content': 'three'},
      ]
    },
    {
      'conversation': [
        {'role': 'user', 'content': 'four'},
        {'role': 'assistant', 'content': 'a'},
      ]
    },
    {'conversation': [{'from': 'human', 'value': 'five'}]},
    {'prompt': {'text': 'six', 'role': 'prompter', 'replies': []}},
    {'text': 'an answer', 'role': 'assistant', 'parent_id': 'x'},
    {'text': 'later', 'role': 'prompter', 'parent_id': 'x'},
    {'text': 'seven', 'role': 'prompter', 'parent_id': None},
    {'prompt': ''},
  ]
  want = ['one', 'two\u2028more', 'three', 'four', 'five', 'six', 'seven']
  data = '\n'.join(map(json.dumps, records)) + '\n\n'
  (tmp_path / 'a.jsonl').write_text(data)
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(data.encode()))
  (tmp_path / 'a.txt').write_bytes('\ufeffone\r\n\n two {\n'.encode())
  assert prompts_lib.read(tmp_path / 'a.jsonl') == want
  assert prompts_lib.read(tmp_path / 'a.jsonl.gz') == want
  assert prompts_lib.read(tmp_path / 'a.txt') == ['one', 'two {']


@pytest.mark.parametrize(
  'line',
  [
    '{"prompt": 3}',
    '[]',
    'no',
    '{}',
    '{"messages": []}',
    '{"messages": [{}]}',
    '{"conversation": [{"role": "user"}]}',
    '[' * 9999,
  ],
)
def test_a_bad_line_is_named(tmp_path, line):
  path = tmp_path / 'p.jsonl'
  path.write_text('{"prompt": "x"}\n' + line + '\n')
  with pytest.raises(
    ValueError, match=r'p\.jsonl, line 2(: expected| is not JSON)'
  ) as error:
    prompts_lib.read(path)
  assert '\n' not in str(error.value)


def test_no_prompts(tmp_path):
  (tmp_path / 'p.csv').write_text('x')
  (tmp_path / 'p.txt').write_text('\n\n')
  (tmp_path / 'p.jsonl.gz').write_bytes(b'not gzip')
  with pytest.raises(ValueError, match=r'must end in \.txt'):
    prompts_lib.read(tmp_path / 'p.csv')
  with pytest.raises(ValueError, match='holds no prompt'):
    prompts_lib.read(tmp_path / 'p.txt')
  with pytest.raises(ValueError, match=r'p\.jsonl\.gz cannot be read'):
    prompts_lib.read(tmp_path / 'p.jsonl.gz')
  with pytest.raises(FileNotFoundError, match='no file of prompts'):
    prompts_lib.read(tmp_path / 'q.txt')


def test_held_out_is_by_prompt():
  many = [f'prompt {i}' for i in range(2000)]
  few = {p for p in many if prompts_lib.held_out(p, 0.1)}
  more = {p for p in many if prompts_lib.held_out(p, 0.2)}
  assert few < more and 140 < len(few) < 260 < len(more)
  assert not any(prompts_lib.held_out(p, 0) for p in many)


# Rollouts.


def test_every_row_is_one_conversation(tmp_path, answers):
  store = prepare(tmp_path / 's', facts={'model': 'm'})
  rows = {'train': [], 'eval': []}
  for i, prompt in enumerate(PROMPTS):
    opening = rollouts.encode(tokenizer(), prompt)
    rng = np.random.default_rng([0, i, 2, *map(int, opening)])
    reply = [*rng.integers(200, 4096, rng.integers(0, 6))]
    if i % 3:
      reply += [END, *tokenizer().encode('\n')]
    row = [2, *opening, *reply]
    split = 'eval' if prompts_lib.held_out(prompt, 0.3) else 'train'
    rows[split].append(row + [0] * (40 - len(row)))
  for split, want in rows.items():
    found = store.sequences(40, split)
    assert [found[i].tolist() for i in range(len(found))] == want
    assert len(want) > 1
  store.verify()
  assert {p.name for p in store.folder.iterdir()} == {
    'manifest.json',
    'train.tokens',
    'eval.tokens',
  }
  assert store.reply == rollouts.reply_opening(tokenizer())
  special = tokenizers.Special((0, 1, 2), store.reply)
  kept = special.keep(np.array(rows['train'] + rows['eval']))
  facts = store.manifest
  assert facts['replies'] == {'tokens': int(kept.sum()), 'ended': 7}
  assert facts['rollouts']['model'] == 'm'
  assert facts['chat'] is True and facts['seq_len'] == 40
  assert store.fingerprint['rollouts'] == facts['rollouts']
  # What sampling was told: the tokenizer's stops, no BOS, no id beyond it.
  assert answers[0].stop == (END, 1)
  assert answers[0].forbid == (2, 4096, 4097, 4098, 4099)
  assert [list(a.streams) for a in answers] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9, 10],
  ]


def test_other_seq_lens_are_refused(tmp_path, answers):
  store = prepare(tmp_path / 's')
  with pytest.raises(ValueError, match='rows of 40 tokens, not 39') as error:
    store.sequences(39)
  assert '\n' not in str(error.value)
  order = prepare_lib.shuffled(store.sequences(40), 0)
  assert order[10**6].shape == (40,)


def test_too_long_prompts_are_left_out_and_counted(tmp_path, answers):
  several = [*PROMPTS[:5], 'long ' * 30, *PROMPTS[5:]]
  store = prepare(tmp_path / 's', several)
  assert store.manifest['rollouts']['too_long'] == 1
  assert sum(store.manifest['documents'].values()) == 11
  assert [i for a in answers for i in a.streams] == [
    0,
    1,
    2,
    3,
    4,
    *range(6, 12),
  ]
  with pytest.raises(ValueError, match='None of the 1 prompts leaves room'):
    prepare(tmp_path / 't', ['long ' * 30])
  assert not (tmp_path / 't').exists()


def test_stopped_and_resumed_is_the_same_store(tmp_path, answers):
  whole = prepare(tmp_path / 'whole')
  for stops in (1, 2, 3):
    folder, left = tmp_path / f'{stops}', [stops]

    def poll(left=left):
      left[0] -= 1
      if left[0] < 0:
        raise InterruptedError

    for _ in range(10):
      try:
        store = prepare(folder, poll=poll)
        break
      except InterruptedError:
        with pytest.raises(FileNotFoundError, match='no token store'):
          token_store.Tokens(folder)
        left[0] = stops
    assert store.manifest == whole.manifest
    for split in ('train', 'eval'):
      assert store.path(split).read_bytes() == whole.path(split).read_bytes()


def test_finished_parts_are_kept_and_damaged_ones_made_anew(tmp_path, answers):
  whole = prepare(tmp_path / 'whole')
  folder, seen = tmp_path / 's', []

  def stop_after_all(done, total):
    seen.append((done, total))
    if seen[-1] == (3, 3):
      raise InterruptedError  # before the token files

  with pytest.raises(InterruptedError):
    prepare(folder, progress=stop_after_all)
  assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
  part = folder / 'parts' / '00000001.tokens'
  data = bytearray(part.read_bytes())
  data[50] ^= 1
  part.write_bytes(data)
  (folder / 'train.tokens').write_bytes(b'cut')  # as a kill would leave it
  answers.clear(), seen.clear()
  store = prepare(folder, progress=lambda *at: seen.append(at))
  assert len(answers) == 1 and seen == [(2, 3), (3, 3)]
  assert store.manifest == whole.manifest
  answers.clear()
  assert prepare(folder).manifest == whole.manifest and not answers


def test_another_preparation_is_refused_by_field(tmp_path, answers):
  def stop():
    raise InterruptedError

  with pytest.raises(InterruptedError):
    prepare(tmp_path / 'begun', poll=stop)
  prepare(tmp_path / 'whole')
  for folder in (tmp_path / 'begun', tmp_path / 'whole'):
    for change, field in (
      ({'seed': 1}, 'rollouts.seed is 0 there and 1 here'),
      ({'seq_len': 41}, 'seq_len is 40'),
      ({'temperature': 0.5}, 'rollouts.temperature'),
      ({'facts': {'model': 'x'}}, 'rollouts.model is None'),
      ({'prompts': PROMPTS[::-1]}, 'source_sha256'),
    ):
      with pytest.raises(ValueError, match=field):
        prepare(folder, **change)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').write_text('x')
  with pytest.raises(ValueError, match='not empty and holds no rollouts'):
    prepare(tmp_path / 'mine')


def test_refusals(tmp_path, answers):
  with pytest.raises(ValueError, match='1 to train on and 0 held out'):
    prepare(tmp_path / 's', ['hello'], heldout=1e-9)
  assert len(prepare(tmp_path / 't', ['hello'], heldout=0).sequences(40)) == 1
  with pytest.raises(ValueError, match='share in 0'):
    prepare(tmp_path / 's', heldout=1.0)
  with pytest.raises(ValueError, match='must be positive'):
    prepare(tmp_path / 's', max_new_tokens=0)
  small = one_layer('small', 99)
  with pytest.raises(ValueError, match='vocabulary of small has 99'):
    rollouts.prepare_rollouts(
      rollouts.Model(small, {}, tokenizer()),
      PROMPTS,
      tmp_path / 's',
      rollouts.Settings(**SETTINGS),
    )
  assert not (tmp_path / 's').exists()


@pytest.mark.parametrize(
  'change',
  [
    {'chat': 1},
    {'seq_len': 39},
    {'reply': []},
    {'reply': [True]},
    {'reply': 'x'},
    {'rollouts': None},
    {'seq_len': None},
  ],
)
def test_hostile_manifests_are_refused(tmp_path, answers, change):

  store = prepare(tmp_path / 's')
  manifest = store.manifest | change
  sealed = manifest | {'manifest_sha256': files.json_sha256(manifest)}
  (store.folder / 'manifest.json').write_text(json.dumps(sealed))
  with pytest.raises(ValueError, match='not the manifest of a token store'):
    token_store.Tokens(store.folder)


def test_sampled_replies_resume_bit_for_bit(tmp_path):
  few = {'max_new_tokens': 4, 'temperature': 2.0, 'seq_len': 36}
  whole = prepare(tmp_path / 'whole', **few)
  calls = []

  def poll():
    calls.append(1)
    if len(calls) == 3:
      raise InterruptedError

  with pytest.raises(InterruptedError):
    prepare(tmp_path / 's', poll=poll, **few)
  assert prepare(tmp_path / 's', **few).manifest == whole.manifest
  rows = whole.sequences(36)
  special = tokenizers.Special((0, 1, 2), whole.reply)
  kept = special.keep(np.stack([rows[i] for i in range(len(rows))])).sum(1)
  assert (kept == 4).all()  # nothing stops this model


# The command, on the embedded model.


def test_command_killed_and_resumed(tmp_path):
  (tmp_path / 'p.txt').write_text('\n'.join(PROMPTS * 9))
  out = tmp_path / 's'
  command = [
    'launch/prepare_rollouts.py',
    f'--prompts={tmp_path / "p.txt"}',
    f'--out={out}',
    '--seq_len=32',
    '--max_new_tokens=5',
    '--batch=3',
    '--heldout=0',
  ]
  killed = processes.Script(tmp_path / '1.log', *command)
  killed.wait_for((out / 'parts/00000001.tokens').exists)
  killed.send(signal.SIGKILL)
  assert killed.end()[0] == -signal.SIGKILL
  kept = [p.read_bytes()[:-32] for p in sorted(out.glob('parts/*.tokens'))]
  assert 2 <= len(kept) < 33
  code, printed = processes.Script(tmp_path / '2.log', *command).end()
  assert code == 0, printed
  assert 's: 99 conversations, 0 held out' in printed
  store = token_store.Tokens(out)
  store.verify()
  assert store.path('train').read_bytes().startswith(b''.join(kept))
  assert len(store.sequences(32)) == 99
