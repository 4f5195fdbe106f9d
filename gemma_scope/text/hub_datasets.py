"""Documents of Hugging Face data sets, by the library `datasets`.

  hf:NAME[/CONFIG][@REVISION]:SPLIT[:COLUMN]

NAME is OWNER/NAME of the hub, a folder that `save_to_disk` wrote, or a local
folder of data files (./FOLDER or an absolute path). With a CONFIG the hub's
name has three parts, OWNER/NAME/CONFIG. SPLIT may be a slice: train[:10%].

Data sets of the hub are streamed, so that nothing but the rows that are read
is downloaded; slices, local folders and HF_HUB_OFFLINE=1 read the library's
cache. Without @REVISION the hub's newest commit is taken, and its hash kept in
the manifest: later runs read that commit.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from gemma_scope.text import corpus, text_files

_FORM = 'NAME[/CONFIG][@REVISION]:SPLIT[:COLUMN]'
_SPEC = re.compile(
  r'(?P<name>[^:@]+)(?:@(?P<revision>[\w./-]+))?'
  r':(?P<split>\w[\w.-]*(?:\[[^\]]*\])?)(?::(?P<column>[^:]+))?'
)


@dataclasses.dataclass(frozen=True)
class Spec:
  """What follows 'hf:'. `config`, `revision` and `column` may be ''."""

  name: str
  config: str
  revision: str
  split: str
  column: str

  @classmethod
  def parse(cls, text: str) -> Spec:
    """ValueError where the text is not of the form."""
    match = _SPEC.fullmatch(text)
    if not match:
      raise ValueError(
        f'hf:{text} is not of the form hf:{_FORM}, such as '
        'hf:wikimedia/wikipedia/20231101.en:train.'
      )
    name, config = match['name'], ''
    if not _is_local(name):
      name, config = _hub_name(text, name)
    revision, column = match['revision'] or '', match['column'] or ''
    return cls(name, config, revision, match['split'], column)

  @property
  def is_local(self) -> bool:
    return _is_local(self.name)

  @property
  def is_sliced(self) -> bool:
    return self.split.endswith(']')


def _is_local(name: str) -> bool:
  return name.startswith(('./', '../', '/', '~'))


def _hub_name(text: str, name: str) -> tuple[str, str]:
  """OWNER/NAME and CONFIG of a name with one to three parts."""
  name_parts = name.split('/')
  if len(name_parts) > 3 or not all(
    re.fullmatch(r'[\w.-]+', part) for part in name_parts
  ):
    raise ValueError(
      f'hf:{text}: {name!r} names no data set; expected OWNER/NAME, '
      'OWNER/NAME/CONFIG, or a local folder (./FOLDER).'
    )
  return '/'.join(name_parts[:2]), ''.join(name_parts[2:])


def pinned(text: str) -> str | None:
  """The commit that a spec means: given, or the hub's newest.

  None for local folders, which have no commits.

  Raises:
    ValueError: the hub does not answer, or knows no such data set.
  """
  spec = Spec.parse(text)
  if spec.is_local:
    return None
  if re.fullmatch('[0-9a-f]{40}', spec.revision):
    return spec.revision
  return _newest(spec)


@functools.cache
def _newest(spec: Spec) -> str:
  _library()
  import huggingface_hub

  try:
    info = huggingface_hub.HfApi().dataset_info(
      spec.name, revision=spec.revision or None, timeout=30
    )
  except Exception as error:  # of several HTTP libraries
    reason = str(error).strip().split('\n')[0]
    raise ValueError(
      f'The newest commit of {spec.name!r} could not be read from the hub '
      f'({type(error).__name__}: {reason}). Check the name and the network (a '
      'private or gated data set needs `hf auth login`), or name a commit that '
      f'lies in the cache: hf:{spec.name}@COMMIT:{spec.split}.'
    ) from error
  return info.sha


def read(
  text: str, column: str = '', commit: str | None = None
) -> Iterator[corpus.Document]:
  """A document for each row, in the data set's order.

  Args:
    text: what follows 'hf:'.
    column: of the text; another than the spec's is refused.
    commit: in place of the revision that the spec means.
  """
  spec = Spec.parse(text)
  if column and spec.column and column != spec.column:
    raise ValueError(
      f'hf:{text} and column={column!r} name different columns; give one.'
    )
  column = column or spec.column
  try:
    rows = _rows(spec, commit)
    names = _columns(spec, rows)
    text_column = text_files.choose_column(names, column, f'hf:{text}')
    name = pathlib.PurePath(spec.name).name if spec.is_local else spec.name
    prefix = '/'.join(filter(None, (name, spec.config, spec.split)))
    for number, row in enumerate(rows.select_columns([text_column])):
      yield corpus.Document(
        f'{prefix}#{number}', corpus.valid(row[text_column] or '')
      )
  except (OSError, RuntimeError, TypeError, KeyError) as error:
    raise _refused(text, error) from error


def _library() -> Any:
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
      'hf: sources need the package datasets: pip install datasets.'
    ) from error
  return datasets


def _rows(spec: Spec, commit: str | None) -> Any:
  """The data set's split: a Dataset, or an IterableDataset."""
  datasets = _library()
  path = pathlib.Path(spec.name).expanduser()
  try:
    if spec.is_local and (path / 'dataset_dict.json').is_file():
      return _split_of(spec, datasets.load_from_disk(str(path)))
    if spec.is_local and (path / 'state.json').is_file():
      return _split_of(
        spec, datasets.DatasetDict(train=datasets.load_from_disk(str(path)))
      )
    if spec.is_local:
      return datasets.load_dataset(str(path), split=spec.split)
    offline = datasets.config.HF_HUB_OFFLINE
    return datasets.load_dataset(
      spec.name,
      spec.config or None,
      split=spec.split,
      revision=commit or spec.revision or None,
      streaming=not (offline or spec.is_sliced),
    )
  except ValueError as error:  # also of its subclasses in `datasets`
    raise _refused(f'{spec.name}:{spec.split}', error) from error


def _split_of(spec: Spec, splits: Any) -> Any:
  """A split of a saved DatasetDict, also as a slice."""
  split_name = spec.split.partition('[')[0]
  if split_name not in splits:
    raise ValueError(f'no split {split_name!r}; there are {", ".join(splits)}')
  if not spec.is_sliced:
    return splits[split_name]
  from datasets import ReadInstruction

  rows = splits[split_name]
  instruction = ReadInstruction.from_spec(spec.split)
  [selection] = instruction.to_absolute({split_name: len(rows)})
  return rows.select(range(selection.from_ or 0, selection.to or len(rows)))


def _columns(spec: Spec, rows: Any) -> dict[str, bool]:
  """Name -> whether it holds text; a stream may only know after a row."""
  features = rows.features
  if features is None:
    first = next(iter(rows.take(1)), {})
    return {name: isinstance(value, str) for name, value in first.items()}
  return {
    name: getattr(feature, 'dtype', None) in ('string', 'large_string')
    for name, feature in features.items()
  }


def _refused(text: str, error: Exception) -> ValueError:
  reason = str(error).strip().split('\n')[0] or type(error).__name__
  return ValueError(
    f'hf:{text} cannot be read: {reason.rstrip(".")}. Check name, config and '
    'split at https://huggingface.co/datasets, and the network connection.'
  )
