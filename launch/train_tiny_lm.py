"""Trains the embedded language model: a small Gemma on Python's own library.

  .venv/bin/python launch/train_tiny_lm.py --out=runs/tiny_lm --steps=2000

Text: sources, docstrings and language reference of the Python that runs this
(the source `python` of gemma_scope/text/sources.py), 2 % of its modules held
out. Prints and writes the held-out loss beside a unigram and the best
interpolated bigram model of the same tokens. The same command continues a run
that was stopped. --out gets config.json, model.safetensors (bfloat16) and
tokenizer.model; copied to gemma_scope/language_model/tiny they are the embedded
model.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_scope import command_line
from gemma_scope.command_line import whole
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.runtime import checkpoints
from gemma_scope.runtime import progress as progress_lib
from gemma_scope.text import prepare, sources, token_store, tokenizers

FLAGS = command_line.Flags(
  __doc__,
  command_line.local_folder(
    'out', 'Folder of the model.', default='runs/tiny_lm'
  ),
  whole('steps', 2000, 'Training steps.', low=1),
  whole('batch', 32, 'Sequences a step.', low=1),
  whole('seq_len', 128, 'Tokens of a sequence, with BOS.', low=2),
  command_line.number(
    'learning_rate', 4e-3, 'Peak learning rate of AdamW.', low=0.0
  ),
  whole('seed', 0, 'Seed of the parameters and of the order.', low=0),
  name='train-tiny-lm',
)
SAVED_EVERY = 500  # steps

# Gemma 3's block (qk-norm, no soft-caps) at 1.5 M parameters.
CONFIG = lm.Config(
  name='tiny',
  vocab_size=4096,
  d_model=128,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  d_ff=512,
  window=64,
  pattern='LG',
  qk_norm=True,
)


def mean_loss(gemma: lm.Gemma, params, tokens_BT):
  logits_BTV = gemma.forward(params, tokens_BT).logits_BTV
  losses, counts = lm.token_losses(logits_BTV, tokens_BT)
  return jnp.sum(losses * counts) / jnp.sum(counts)


def bigram_losses(train: np.ndarray, heldout_NT: np.ndarray, vocab: int):
  """Held-out nats a token of the unigram and the best interpolated bigram.

  p(b | a) = (count(a, b) + k p(b)) / (count(a) + k), p(b) with add-one; k is
  the best of a grid on the held-out text itself, in the baseline's favour.
  """
  uni = np.bincount(train, minlength=vocab) + 1.0
  uni /= uni.sum()
  pairs = np.bincount(
    train[:-1].astype(np.int64) * vocab + train[1:], minlength=vocab**2
  ).reshape(vocab, vocab)
  before, after = heldout_NT[:, :-1].ravel(), heldout_NT[:, 1:].ravel()
  counts, total = pairs[before, after], pairs.sum(1)[before]
  bigram = min(
    -np.log((counts + k * uni[after]) / (total + k)).mean()
    for k in (1, 3, 10, 30, 100, 300, 1000)
  )
  return float(-np.log(uni[after]).mean()), float(bigram)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    out = pathlib.Path(parsed.out)
    out.mkdir(parents=True, exist_ok=True)
    store = text(out)
    heldout = store.sequences(parsed.seq_len, 'eval')
    heldout_NT = np.stack(
      [heldout[i] for i in range(min(len(heldout), 512) // 16 * 16)]
    )
    train_T = np.fromfile(store.path('train'), store.manifest['dtype'])
    unigram, bigram = bigram_losses(
      train_T, heldout_NT[:, 1:], CONFIG.vocab_size
    )
    print(f'held-out nats a token: unigram {unigram:.3f}, bigram {bigram:.3f}')
    loss_of = jax.jit(functools.partial(mean_loss, lm.Gemma(CONFIG)))

    def heldout_loss(params) -> float:
      parts = np.split(heldout_NT, 16)
      return float(np.mean([loss_of(params, part) for part in parts]))

    params = train(parsed, out, store, heldout_loss)
    params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    score = {
      'heldout_loss': round(heldout_loss(rounded), 4),
      'unigram_loss': round(unigram, 4),
      'bigram_loss': round(bigram, 4),
      'heldout_tokens': int(heldout_NT[:, 1:].size),
      'trained_tokens': parsed.steps * parsed.batch * parsed.seq_len,
      'steps': parsed.steps,
      'python': '.'.join(map(str, sys.version_info[:3])),
      'text': store.fingerprint,
    }
    weights.save_safetensors(out, CONFIG, params, {'made': score})
    print(json.dumps(score, indent=2))
    shutil.rmtree(out / 'tokens')


def text(out: pathlib.Path) -> token_store.Tokens:
  """The library as tokens, by a tokenizer that is trained on it."""
  path = out / 'tokenizer.model'
  if not path.exists():
    tokenizers.train_tokenizer(
      sources.documents('python', 'train'), path, CONFIG.vocab_size
    )
  prepare.prepare('python', tokenizers.Tokenizer(path), out / 'tokens')
  return token_store.Tokens(out / 'tokens')


def train(parsed, out: pathlib.Path, store, heldout_loss):
  """The parameters after all steps, from the last checkpoint on."""
  gemma = lm.Gemma(CONFIG)
  params = gemma.init(jax.random.key(parsed.seed))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, parsed.learning_rate, min(100, parsed.steps // 10), parsed.steps
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=0.05),
  )
  state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, tokens_BT):
    loss, gradient = jax.value_and_grad(functools.partial(mean_loss, gemma))(
      params, tokens_BT
    )
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss

  rows = prepare.shuffled(store.sequences(parsed.seq_len, 'train'), parsed.seed)
  with checkpoints.Checkpoints(out / 'checkpoints', keep=1) as saves:
    first = 0
    if restored := saves.restore((params, state)):
      first, (params, state) = restored.step, restored.state
    with progress_lib.Progress(
      parsed.steps, parsed.batch * parsed.seq_len, first_step=first
    ) as progress:
      for i in range(first, parsed.steps):
        batch_BT = prepare.batch(rows, i * parsed.batch, parsed.batch)
        params, state, loss = step(params, state, batch_BT)
        progress.update(i + 1, lambda loss=loss: {'loss': loss})
        if (i + 1) % SAVED_EVERY == 0:
          saves.save(i + 1, (params, state), {})
          print(f'step {i + 1}: held-out loss {heldout_loss(params):.3f}')
  return params


if __name__ == '__main__':
  main()
