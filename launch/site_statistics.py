r"""Prints what the activations of each site are like, before any training.

  gemma-scope site-statistics --config=gemma3_270m --workdir=runs/gemma3-270m

For each site of the config: the share of the second moment that is the mean,
the dimensions that carry the variance, quantiles of the norm, and the outlier
rows with their tokens and positions. Reads the rows from activations.store
where the config names one, and from the language model otherwise.
"""

from __future__ import annotations

import pathlib

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.config(),
  command_line.local_folder(
    'workdir',
    'Folder that holds the tokenised text, in tokens/; it is made where it '
    'does not exist.',
    required=True,
  ),
  command_line.whole(
    'chunks', 1, 'Chunks of activations.chunk_rows rows to read.', low=1
  ),
  command_line.number(
    'max_norm',
    None,
    'A row is an outlier if its norm is above this many medians; the default '
    "is the config's activations.max_norm, or 10 where that is 0.",
    low=1.0,
  ),
  command_line.new_file('json', 'File to write all figures to, as JSON.'),
  name='site-statistics',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    from gemma_scope import config as config_lib

    config_lib.check(parsed.config)
    from gemma_scope import files
    from gemma_scope.activations import statistics
    from gemma_scope.runtime import cluster
    from gemma_scope.runtime import interrupt as interrupt_lib

    try:
      tables = measure(parsed)
    except interrupt_lib.Interrupted:
      print('stopped; nothing was written')
      return
    if not cluster.first():
      return
    if parsed.json:
      pathlib.Path(parsed.json).parent.mkdir(parents=True, exist_ok=True)
      files.write_json(
        parsed.json, {str(site): table for site, table in tables.items()}
      )
    for site, table in tables.items():
      print(statistics.to_text(str(site), table))


def measure(parsed):
  """The tables by site, the outliers' tokens with their pieces."""
  from gemma_scope import mesh as mesh_lib
  from gemma_scope.activations import statistics
  from gemma_scope.runtime import interrupt as interrupt_lib
  from gemma_scope.runtime import lease
  from gemma_scope.runtime import progress as progress_lib
  from gemma_scope.training import setup

  config, workdir = parsed.config, pathlib.Path(parsed.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  with lease.Lease(workdir), interrupt_lib.Interrupt() as interrupt:
    mesh = mesh_lib.make(config.mesh)
    source, _ = setup.make_source(config, workdir, mesh, print)
    tokenizer, tokens = text_of(config, workdir, source)
    progress = progress_lib.Progress(
      parsed.chunks * source.parts,
      source.layout.rows / source.parts,
      label='statistics',
    )
    tables = statistics.measure(
      source,
      mesh,
      statistics.Request(
        parsed.chunks, parsed.max_norm or config.activations.max_norm or 10.0
      ),
      tokens,
      interrupt.check,
      lambda part, _: progress.update(part),
    )
    progress.close()
  for table in tables.values():
    for row in table.get('outliers', {}).get('tokens', ()):
      row['piece'] = tokenizer.pieces([row['token']])[0]
  return tables


def text_of(config, workdir: pathlib.Path, source):
  """The tokenizer and chunk -> tokens [N, T]; (None, None) without text.

  A store of activations holds no tokens: they are those of the token store
  that it was harvested from, where that is at hand.
  """
  from gemma_scope import files
  from gemma_scope.activations import harvest
  from gemma_scope.text import prepare

  stored = not isinstance(source, harvest.ModelSource)
  folder = config.text.store or workdir / 'tokens'
  in_bucket = bool(files.scheme(folder))
  if stored and not (
    in_bucket or pathlib.Path(folder, 'manifest.json').exists()
  ):
    return None, None
  tokenizer, store = prepare.open_text(config, workdir, print)
  if stored and store.fingerprint != source.facts['text']:
    return None, None
  order = prepare.shuffled(store.sequences(config.text.seq_len), config.seed)
  count = source.layout.sequences
  return tokenizer, lambda chunk: prepare.batch(order, chunk * count, count)


if __name__ == '__main__':
  main()
