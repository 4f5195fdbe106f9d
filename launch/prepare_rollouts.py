r"""Writes a chat model's answers to prompts into a token store.

  gemma-scope prepare-rollouts --prompts=oasst1.jsonl.gz \
      --model=gemma2-9b --checkpoint=gemma2-9b-it --dtype=bfloat16 \
      --tokenizer=tokenizer_gemma2.model --out=runs/rollouts \
      --seq_len=1024 --max_new_tokens=512

SAEs of an instruction-tuned model train on such text: each row of the store is
one conversation. --config.text.store=runs/rollouts uses it, with
--config.text.seq_len as here. Without --model, --checkpoint and --tokenizer the
embedded model answers (in Python, more or less). With several devices,
parameters and conversations are spread over them. The same command continues
one that was stopped or killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types

from gemma_scope import command_line
from gemma_scope.command_line import number, path, text, whole

FLAGS = command_line.Flags(
  __doc__,
  path(
    'prompts',
    'File of prompts, .txt (one on a line), .jsonl or .jsonl.gz.',
    required=True,
  ),
  command_line.local_folder(
    'out', 'Folder of the token store to write.', required=True
  ),
  text('model', 'tiny', 'Language model, such as gemma2-9b or gemma3-1b.'),
  path(
    'checkpoint',
    'Checkpoint of its instruction-tuned version.',
    default='',
    address=True,
  ),
  path(
    'tokenizer', "SentencePiece model; by default the checkpoint's.", default=''
  ),
  command_line.choice(
    'dtype', 'float32', ('float32', 'bfloat16'), 'Type of the parameters.'
  ),
  whole('seq_len', 1024, 'Length of a conversation, with BOS.', low=2),
  whole('max_new_tokens', 512, 'Maximum length of an answer.', low=1),
  number('temperature', 1.0, 'Sampling temperature; 0 is greedy.', low=0.0),
  whole('top_k', 0, 'Sample from the k likeliest tokens; 0: from all.', low=0),
  whole('seed', 0, 'Seed of the sampling.', low=0),
  whole('batch', 32, 'Conversations generated together.', low=1),
  number(
    'heldout', 0.05, 'Share of the prompts kept for evaluation.', low=0, high=1
  ),
  name='prepare-rollouts',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope.runtime import interrupt as interrupt_lib
    from gemma_scope.runtime import lease

    try:
      with lease.Lease(parsed.out), interrupt_lib.Interrupt() as interrupt:
        store = prepare(parsed, interrupt.check)
    except (interrupt_lib.Interrupted, KeyboardInterrupt):
      sys.exit('stopped; the same command continues')
    facts = store.manifest
    rows, replies = sum(facts['documents'].values()), facts['replies']
    print(
      f'{parsed.out}: {facts["documents"]["train"]:,} conversations, '
      f'{facts["documents"]["eval"]:,} held out; '
      f'{facts["rollouts"]["too_long"]:,} prompts were too long; '
      f'{replies["tokens"] / rows:.1f} tokens an answer, '
      f'{100 * replies["ended"] / rows:.0f} % ended by themselves.'
    )


def prepare(parsed: types.SimpleNamespace, poll):
  """Loads the model and lets it answer; returns the token store."""
  import jax

  from gemma_scope import mesh as mesh_lib
  from gemma_scope.language_model import weights
  from gemma_scope.runtime import checksums
  from gemma_scope.runtime import progress as progress_lib
  from gemma_scope.text import prepare as prepare_lib
  from gemma_scope.text import prompts as prompts_lib
  from gemma_scope.text import rollouts, tokenizers

  prompts = prompts_lib.read(parsed.prompts)
  tokenizer = tokenizers.Tokenizer(
    parsed.tokenizer or weights.tokenizer(parsed.model, parsed.checkpoint)
  )
  prepare_lib.check_tokenizer(tokenizer, parsed.model, parsed.checkpoint)
  mesh = None
  if jax.device_count() > 1:
    mesh = mesh_lib.make({'sae': 1, 'data': -1, 'latent': 1})
    if parsed.batch % jax.device_count():
      raise ValueError(
        f'--batch={parsed.batch} must be a multiple of the '
        f'{jax.device_count()} devices.'
      )
  gemma, params = weights.load(
    parsed.model, parsed.checkpoint, dtype=parsed.dtype, mesh=mesh
  )
  sums = checksums.of(checksums.named(params)[0])
  sums = hashlib.sha256(json.dumps(sums, sort_keys=True).encode())
  line = None

  def progress(done: int, total: int) -> None:
    nonlocal line
    if line is None:
      tokens_per_part = parsed.batch * parsed.max_new_tokens
      line = progress_lib.Progress(
        total, tokens_per_part, first_step=done, label='rollouts'
      )
      return
    line.update(done)

  facts = {
    'model': parsed.model,
    'dtype': parsed.dtype,
    'parameters_sha256': sums.hexdigest(),
  }
  fields = [field.name for field in dataclasses.fields(rollouts.Settings)]
  store = rollouts.prepare_rollouts(
    rollouts.Model(gemma, params, tokenizer, facts),
    prompts,
    parsed.out,
    rollouts.Settings(**{name: getattr(parsed, name) for name in fields}),
    progress,
    poll,
  )
  if line is not None:
    line.close()
  return store


if __name__ == '__main__':
  main()
