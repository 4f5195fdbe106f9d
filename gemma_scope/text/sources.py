"""Where text comes from: one string names a source, a source is documents.

  python               the running interpreter's library (standard_library)
  prose                English of the installed documentation (prose)
  files:GLOB           .txt, .md, .py, .jsonl, .parquet (text_files)
  hf:NAME[/CONFIG][@REVISION]:SPLIT[:COLUMN]
                       a data set of Hugging Face (hub_datasets)
  tfds:NAME[/CONFIG][:VERSION]:SPLIT
                       a TFDS data set prepared on this disk (records)
  arrayrecord:GLOB     one document a record (records)

Documents come in a fixed order with names that hold no absolute path, so that
the same text has the same fingerprint on every machine. A document belongs to
`train` or `eval` by the hash of its group (its name unless it is derived from
another document, as docstrings are from their module): text is held out by
document, never by window. (A text of too few documents for that is held out by
parts: see prepare.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from gemma_scope.text import (
  corpus,
  hub_datasets,
  prose,
  records,
  standard_library,
  text_files,
)

KINDS = (
  'python',
  'prose',
  'files:GLOB',
  'hf:NAME[/CONFIG][@REVISION]:SPLIT[:COLUMN]',
  'tfds:NAME[/CONFIG][:VERSION]:SPLIT',
  'arrayrecord:GLOB',
)
_WITH_COLUMN: Mapping[str, Callable[..., Iterator[corpus.Document]]] = {
  'files': text_files.read,
  'hf': hub_datasets.read,
  'tfds': records.tfds,
  'arrayrecord': records.arrayrecord,
}
_WHOLE: Mapping[str, Callable[[], Iterator[corpus.Document]]] = {
  'python': standard_library.read,
  'prose': prose.read,
}


def documents(
  source: str,
  split: str | None = None,
  *,
  column: str = '',
  revision: Mapping[str, str] | None = None,
) -> Iterator[corpus.Document]:
  """Documents of a source in their fixed order; empty ones are left out.

  Args:
    source: one of KINDS.
    split: 'train', 'eval' or None, which is both.
    column: of the text, where rows have columns; '' is `text`, or the only
      column of text.
    revision: as `revision` gave it earlier: reads that commit of the hub.

  Raises:
    ValueError: at the call, not at the first document, for an unknown kind.
  """
  if split is not None and split not in corpus.SPLITS:
    raise ValueError(
      f'split is {split!r}; it is one of {", ".join(corpus.SPLITS)}.'
    )
  kind, _, argument = source.partition(':')
  if source in _WHOLE:
    if column:
      raise ValueError(f'{source!r} has no column {column!r}, nor any other.')
    read = _WHOLE[source]()
  elif kind == 'hf' and argument:
    hub_datasets.Spec.parse(argument)
    commit = (revision or {}).get('commit')
    read = hub_datasets.read(argument, column, commit)
  elif kind in _WITH_COLUMN and argument:
    read = _WITH_COLUMN[kind](argument, column)
  else:
    raise ValueError(
      f'{source!r} is no text source; give one of: {", ".join(KINDS)}.'
    )
  return _kept(read, split)


def revision(source: str) -> dict[str, str] | None:
  """What determines a source's text besides its name, for the manifest.

  For `prose` the versions of the packages; for a data set of the hub its
  commit, which is requested from the hub. None if only reading can tell.
  """
  if source == 'prose':
    return prose.versions()
  kind, _, argument = source.partition(':')
  commit = hub_datasets.pinned(argument) if kind == 'hf' else None
  return {'commit': commit} if commit else None


def _kept(
  documents: Iterator[corpus.Document], split: str | None
) -> Iterator[corpus.Document]:
  for document in documents:
    if document.text and split in (None, document.split):
      yield document
