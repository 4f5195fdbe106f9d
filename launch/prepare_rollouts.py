"""Lets a Gemma answer prompts: a token store of chats, to train IT SAEs on.

  .venv/bin/python launch/prepare_rollouts.py --prompts=oasst1.jsonl.gz \
      --model=gemma2-9b --checkpoint=gemma2-9b-it --dtype=bfloat16 \
      --tokenizer=tokenizer_gemma2.model --out=runs/rollouts \
      --seq_len=1024 --max_new_tokens=512

Run again to continue after an interrupt or a kill. The store is what
`--config.text.store` names, with `--config.text.seq_len` as here; each of its
rows is one conversation. Without --model, --checkpoint and --tokenizer it is
the embedded model that answers (in Python, more or less). With several devices
the parameters and the batch are spread over them.
"""

from __future__ import annotations

import hashlib
import json
import sys

from absl import app, flags, logging

from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease
from gemma_scope.runtime import progress as progress_lib
from gemma_scope.text import tokenizers

PROMPTS = flags.DEFINE_string('prompts', None, '.txt, .jsonl or .jsonl.gz.')
MODEL = flags.DEFINE_string('model', 'tiny', 'Such as gemma2-9b, gemma3-1b.')
CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'Its IT checkpoint.')
TOKENIZER = flags.DEFINE_string('tokenizer', '', 'SentencePiece model.')
DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of the parameters.'
)
OUT = flags.DEFINE_string('out', None, 'Folder of the store.')
SEQ_LEN = flags.DEFINE_integer('seq_len', 1024, 'Tokens of a row, with BOS.')
NEW = flags.DEFINE_integer('max_new_tokens', 512, 'Of an answer.')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 is greedy.')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample among so many; 0: all.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the sampling.')
BATCH = flags.DEFINE_integer('batch', 32, 'Conversations at once.')
HELDOUT = flags.DEFINE_float('heldout', 0.05, 'Share of prompts for eval.')
flags.mark_flags_as_required(['prompts', 'out'])


def main(arguments: list[str]) -> None:
  if arguments[1:]:
    raise app.UsageError(f'What is {arguments[1]!r}?')
  logging.set_verbosity(logging.WARNING)

  try:
    with lease.Lease(OUT.value), interrupt_lib.Interrupt() as interrupt:
      store = prepare(interrupt.check)
  except (interrupt_lib.Interrupted, KeyboardInterrupt):
    sys.exit('stopped; the same command continues')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(str(error))
  facts = store.manifest
  rows, replies = sum(facts['documents'].values()), facts['replies']
  print(
    f'{OUT.value}: {facts["documents"]["train"]:,} conversations, '
    f'{facts["documents"]["eval"]:,} held out; '
    f'{facts["rollouts"]["too_long"]:,} prompts were too long; '
    f'{replies["tokens"] / rows:.1f} tokens an answer, '
    f'{100 * replies["ended"] / rows:.0f} % ended by themselves.'
  )


def prepare(poll):
  import jax

  from gemma_scope import mesh as mesh_lib
  from gemma_scope.language_model import weights
  from gemma_scope.runtime import checksums
  from gemma_scope.text import prompts as prompts_lib
  from gemma_scope.text import rollouts

  prompts = prompts_lib.read(PROMPTS.value)
  tokenizer = tokenizers.Tokenizer(
    TOKENIZER.value or weights.tokenizer(MODEL.value, CHECKPOINT.value)
  )
  mesh = None
  if jax.device_count() > 1:
    mesh = mesh_lib.make({'sae': 1, 'data': -1, 'latent': 1})
    if BATCH.value % jax.device_count():
      raise ValueError(
        f'--batch={BATCH.value} must be a multiple of the '
        f'{jax.device_count()} devices.'
      )
  gemma, params = weights.load(
    MODEL.value, CHECKPOINT.value, dtype=DTYPE.value, mesh=mesh
  )
  sums = checksums.of(checksums.named(params)[0])
  sums = hashlib.sha256(json.dumps(sums, sort_keys=True).encode())
  line = None

  def progress(done: int, total: int) -> None:
    nonlocal line
    if line is None:
      per_part = BATCH.value * NEW.value
      line = progress_lib.Progress(
        total, per_part, first_step=done, label='rollouts'
      )
      return
    line.update(done)

  store = rollouts.prepare_rollouts(
      gemma, params, tokenizer, prompts, OUT.value, seq_len=SEQ_LEN.value,
      max_new_tokens=NEW.value, temperature=TEMPERATURE.value,
      top_k=TOP_K.value, seed=SEED.value, batch=BATCH.value,
      heldout=HELDOUT.value, progress=progress, poll=poll,
      facts={
          'model': MODEL.value, 'dtype': DTYPE.value,
          'parameters_sha256': sums.hexdigest(),
      },
  )  # fmt: skip
  if line is not None:
    line.close()
  return store


if __name__ == '__main__':
  app.run(main)
