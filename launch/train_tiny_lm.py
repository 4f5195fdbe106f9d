"""Trains the embedded language model: a small Gemma on Python's own library.

  .venv/bin/python launch/train_tiny_lm.py --out=runs/tiny_lm --steps=2000

Text: the sources, docstrings and language reference of the running Python
(`python` in gemma_scope/text.py), 2 % of its modules held out. Prints and
writes the held-out loss beside a unigram and the best interpolated bigram
model of the same tokens. Run again to continue a stopped run. `--out` gets
config.json, model.safetensors (bfloat16) and tokenizer.model; copied to
gemma_scope/tiny they are the embedded model.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.runtime import checkpoints
from gemma_scope.text import prepare, sources, token_store, tokenizers

OUT = flags.DEFINE_string('out', 'runs/tiny_lm', 'Folder for the model.')
STEPS = flags.DEFINE_integer('steps', 2000, 'Training steps.')
BATCH = flags.DEFINE_integer('batch', 32, 'Sequences a step.')
SEQ_LEN = flags.DEFINE_integer('seq_len', 128, 'Tokens a sequence, with BOS.')
RATE = flags.DEFINE_float('learning_rate', 4e-3, 'Peak learning rate (AdamW).')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of parameters and order.')

# Gemma 3's block (qk-norm, no soft-caps) at 1.5 M parameters.
CONFIG = lm.Config(
    name='tiny', vocab_size=4096, d_model=128, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=32, d_ff=512, window=64, pattern='LG',
    qk_norm=True,
)  # fmt: skip


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


def main(_):
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  tokenizer_path = out / 'tokenizer.model'
  if not tokenizer_path.exists():
    tokenizers.train_tokenizer(
      sources.documents('python', 'train'), tokenizer_path, CONFIG.vocab_size
    )
  tokenizer = tokenizers.Tokenizer(tokenizer_path)
  prepare.prepare('python', tokenizer, out / 'tokens')
  store = token_store.Tokens(out / 'tokens')
  rows = prepare.shuffled(store.sequences(SEQ_LEN.value, 'train'), SEED.value)
  heldout = store.sequences(SEQ_LEN.value, 'eval')
  heldout_NT = np.stack(
    [heldout[i] for i in range(min(len(heldout), 512) // 16 * 16)]
  )
  train = np.fromfile(store.path('train'), store.manifest['dtype'])
  unigram, bigram = bigram_losses(train, heldout_NT[:, 1:], CONFIG.vocab_size)
  print(f'held-out nats a token: unigram {unigram:.3f}, bigram {bigram:.3f}')

  gemma = lm.Gemma(CONFIG)
  params = gemma.init(jax.random.key(SEED.value))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, RATE.value, min(100, STEPS.value // 10), STEPS.value
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=0.05),
  )
  state = optimizer.init(params)
  loss_of = functools.partial(mean_loss, gemma)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, tokens_BT):
    loss, gradient = jax.value_and_grad(loss_of)(params, tokens_BT)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss

  evaluate = jax.jit(loss_of)

  def heldout_loss(params) -> float:
    return float(
      np.mean([evaluate(params, part) for part in np.split(heldout_NT, 16)])
    )

  saves = checkpoints.Checkpoints(out / 'checkpoints', keep=1)
  first = 0
  if restored := saves.restore((params, state)):
    first, (params, state) = restored.step, restored.state
  start, per_step = time.time(), BATCH.value * SEQ_LEN.value
  for i in range(first, STEPS.value):
    batch_BT = prepare.batch(rows, i * BATCH.value, BATCH.value)
    params, state, loss = step(params, state, batch_BT)
    if i % 50 == 49 or i + 1 == STEPS.value:
      rate = (i + 1 - first) / (time.time() - start)
      print(
        f'step {i + 1}/{STEPS.value}  loss {float(loss):.3f}  '
        f'{rate * per_step:,.0f} tokens/s  '
        f'ETA {(STEPS.value - i - 1) / rate / 60:.1f} min'
        + (f'  held-out {heldout_loss(params):.3f}' if i % 500 == 499 else ''),
        flush=True,
      )
    if i % 500 == 499:
      saves.save(i + 1, (params, state), {})
  saves.close()
  params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  score = {
    'heldout_loss': round(heldout_loss(rounded), 4),
    'unigram_loss': round(unigram, 4),
    'bigram_loss': round(bigram, 4),
    'heldout_tokens': int(heldout_NT[:, 1:].size),
    'trained_tokens': STEPS.value * per_step,
    'steps': STEPS.value,
    'python': '.'.join(map(str, sys.version_info[:3])),
    'text': store.fingerprint,
  }
  weights.save_safetensors(out, CONFIG, params, {'made': score})
  print(json.dumps(score, indent=2))
  shutil.rmtree(out / 'tokens')


if __name__ == '__main__':
  app.run(main)
