"""Tokenises a text once, into a token store that training reads.

  gemma-scope prepare-text --source=python --out=runs/tokens
  ... --source=prose                          (English, from documentation)
  ... --source='files:corpus/**/*.jsonl.gz' --tokenizer=tokenizer_gemma2.model
  ... --source='arrayrecord:corpus/*.arrayrecord' --limit_tokens=1000000
  ... --source=hf:roneneldan/TinyStories:train --limit_tokens=10000000
  ... --source='files:dump/*.parquet' --column=content --lm=gemma3-270m
  ... --source=tfds:wiki40b/en:train          (a local copy in $TFDS_DATA_DIR)

--config.text.store=runs/tokens then uses the store. The same command again
finds the store complete and does nothing.
"""

from __future__ import annotations

import sys

from gemma_scope import command_line
from gemma_scope.text import sources

FLAGS = command_line.Flags(
  __doc__,
  command_line.text(
    'source',
    None,
    f'The documents: {", ".join(sources.KINDS)}.',
    required=True,
  ),
  command_line.text(
    'column',
    '',
    'Column of the text, in .jsonl, .parquet and data sets; without it, '
    '"text" or the only column of text.',
  ),
  command_line.text(
    'lm',
    None,
    'Language model that will read the store, such as gemma3-270m. Its '
    "tokenizer is used; without it, the embedded model's.",
  ),
  command_line.path(
    'checkpoint',
    'Checkpoint of the language model, as lm.checkpoint.',
    address=True,
  ),
  command_line.path(
    'tokenizer', "SentencePiece model; without it, the language model's own."
  ),
  command_line.folder(
    'out', 'Folder of the token store to write.', required=True
  ),
  command_line.whole(
    'limit_tokens', None, 'Stop after this number of tokens.', low=1
  ),
  name='prepare-text',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope.language_model import weights
    from gemma_scope.runtime import remote
    from gemma_scope.text import prepare, token_store, tokenizers

    try:
      name, checkpoint = parsed.lm or 'tiny', parsed.checkpoint or ''
      tokenizer = tokenizers.Tokenizer(
        parsed.tokenizer or weights.tokenizer(name, checkpoint)
      )
      if parsed.lm:
        prepare.check_tokenizer(tokenizer, name, checkpoint)
      with remote.place(parsed.out) as out:
        remote.fetch(out)
        exists = (out / token_store.MANIFEST).exists()
        store = prepare.prepare(
          parsed.source,
          tokenizer,
          out,
          column=parsed.column,
          progress=lambda state: print(state, file=sys.stderr, flush=True),
          limit_tokens=parsed.limit_tokens,
        )
    except KeyboardInterrupt:
      sys.exit(f'Interrupted; {parsed.out} was not written.')
    counts = ', '.join(
      f'{split} {count:,}' for split, count in store.manifest['tokens'].items()
    )
    state = 'was already done' if exists else 'written'
    print(f'{parsed.out} {state}: {counts} tokens.')
    if store.note:
      print(store.note)


if __name__ == '__main__':
  main()
