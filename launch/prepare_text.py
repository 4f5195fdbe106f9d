"""Tokenises a text once into a token store; run again to find it done.

  .venv/bin/python launch/prepare_text.py --source=python --out=runs/tokens
  ... --source='files:corpus/**/*.jsonl.gz' --tokenizer=tokenizer_gemma2.model
  ... --source='arrayrecord:corpus/*.arrayrecord' --limit_tokens=1000000
  ... --source=tfds:wiki40b/en:train          (a local copy in $TFDS_DATA_DIR)

The store is what `--config.text.store` names. Without --tokenizer it is that
of the embedded model.
"""

from __future__ import annotations

import sys

from absl import app, flags

from gemma_scope.language_model import weights
from gemma_scope.text import prepare, sources, tokenizers

EMBEDDED = weights.TINY / 'tokenizer.model'

SOURCE = flags.DEFINE_string('source', None, ', '.join(sources.KINDS))
TOKENIZER = flags.DEFINE_string(
  'tokenizer', str(EMBEDDED), 'SentencePiece model.'
)
OUT = flags.DEFINE_string('out', None, 'Folder of the store.')
LIMIT = flags.DEFINE_integer('limit_tokens', None, 'Stop after this many.')
flags.mark_flags_as_required(['source', 'out'])


def main(arguments: list[str]) -> None:
  if arguments[1:]:
    raise app.UsageError(f'What is {arguments[1]!r}? Quote globs in a shell.')
  done = []

  def progress(at: prepare.Progress) -> None:
    done.append(at)
    print(at, file=sys.stderr, flush=True)

  try:
    store = prepare.prepare(
      SOURCE.value,
      tokenizers.Tokenizer(TOKENIZER.value),
      OUT.value,
      progress=progress,
      limit_tokens=LIMIT.value,
    )
  except (ValueError, OSError) as error:
    sys.exit(str(error))
  except KeyboardInterrupt:
    sys.exit(f'Interrupted; {OUT.value} was not written.')
  counts = ', '.join(f'{k} {v:,}' for k, v in store.manifest['tokens'].items())
  state = 'written' if done else 'was already done'
  print(f'{OUT.value} {state}: {counts} tokens.')


if __name__ == '__main__':
  app.run(main)
