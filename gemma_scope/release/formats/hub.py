"""Files of a Hugging Face repository: listed, chosen, fetched, kept, sent.

Names are looked up in the repository's own list, never built, and only plain
ones are fetched. What was fetched stays in huggingface_hub's cache (HF_HOME);
a cut-off download goes on where it stopped. HF_TOKEN is read by huggingface_hub
alone and never shown.
"""

from __future__ import annotations

import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence

from gemma_scope.release import npz

_PLAIN = re.compile(r'[\w][\w.+=-]{0,200}', re.ASCII)
_TRIES = 3
_WANTED = re.compile(
  r'(params|params_layer_\d{1,3}|sae_weights|sae|ae)\.(npz|safetensors)'
  r'|(config|cfg|metrics|activation_scaler)\.json'
)


def files(path: str, revision: str = '') -> list[str]:
  """Names of the files below `owner/name[/path]`, without that path.

  Raises:
    npz.Refused: no such repository, or no network.
  """
  repository, inside = _parts(path)
  start = f'{inside}/' if inside else ''
  return [
    name.removeprefix(start)
    for name in _list(repository, revision)
    if name.startswith(start)
  ]


def fetch(
  path: str, revision: str, canonical: Callable[[Sequence[str]], str]
) -> tuple[pathlib.Path, str]:
  """One SAE's files -> a folder here, and its path in the repository.

  Args:
    path: `owner/name/path`, whose last part may be `canonical`.
    revision: a branch, a tag or a commit; '' is main.
    canonical: chooses one of several paths.

  Raises:
    npz.Refused: it is not there, or cannot be fetched.
  """
  repository, inside = _parts(path)
  names = [n for n in _list(repository, revision) if _is_plain(n)]
  there = {name.rpartition('/')[0] for name in names}
  above, _, last = inside.rpartition('/')
  if last == 'canonical' and inside not in there:
    inside = canonical(sorted(f for f in there if f.startswith(f'{above}/')))
  wanted = [
    name
    for name in names
    if name.rpartition('/')[0] == inside
    and _WANTED.fullmatch(name.split('/')[-1])
  ]
  if not wanted:
    near = sorted(f for f in there if f.startswith(inside.split('/')[0]))[:5]
    raise npz.Refused(
      f'{repository} has no SAE in {npz.show(inside)}'
      f'{"; it has " + ", ".join(near) if near else ""}.'
    )
  root = _cache() / repository.replace('/', '--')
  for name in wanted:
    _retried(repository, _download, repository, name, revision, root)
  return root / inside, f'{repository}/{inside}'


def push(
  folder: pathlib.Path,
  repository: str,
  really: bool,
  report: Callable[[str], None],
) -> None:
  """Uploads a folder's files, a commit for each folder in it, its card last.

  What the repository has already is not sent again: the same call continues
  one that was cut off. The token is huggingface_hub's own business.

  Args:
    folder: a release, or what `export.write` wrote.
    repository: `owner/name`; made, private, where it is not there.
    really: else only says what would be sent.
    report: takes a line of text.

  Raises:
    npz.Refused: no such folder or name, a link in it, or no network.
  """
  _, inside = _parts(repository)
  if inside:
    raise npz.Refused(f'{npz.show(repository)} is not owner/name.')
  if not folder.is_dir():
    raise npz.Refused(f'{npz.show(folder)} is no folder.')
  names = []
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not _is_plain(name):
      raise npz.Refused(f'{npz.show(path)} is a link or has an odd name.')
    if path.is_file():
      names.append(name)
  parts = sorted({name.rpartition('/')[0] for name in names}, reverse=True)
  if really:
    create = _client().HfApi().create_repo
    _retried(repository, create, repository, private=True, exist_ok=True)
  for part in parts:  # '' comes last
    of_part = [n for n in names if n.rpartition('/')[0] == part]
    size = sum((folder / name).stat().st_size for name in of_part)
    done = 'sent' if really else 'would send'
    if really:
      _retried(
        repository,
        _client().HfApi().upload_folder,
        repo_id=repository,
        folder_path=folder / part,
        path_in_repo=part or None,
        allow_patterns=[name.rpartition('/')[2] for name in of_part],
        commit_message=f'Add {part or "the card"}',
      )
    report(f'{done} {part or "."}: {len(of_part)} files, {size:,} bytes')


def _cache() -> pathlib.Path:
  home = os.environ.get('HF_HOME') or '~/.cache/huggingface'
  return pathlib.Path(home).expanduser() / 'gemma_scope'


def _parts(path: str) -> tuple[str, str]:
  """'owner/name/a/b' -> 'owner/name', 'a/b'."""
  names = path.rstrip('/').split('/')
  if len(names) < 2 or not all(map(_PLAIN.fullmatch, names)):
    raise npz.Refused(
      f'{npz.show(path)} is no folder here, and no repository on the hub: '
      'those are owner/name, and then a path in it.'
    )
  return '/'.join(names[:2]), '/'.join(names[2:])


def _is_plain(name: str) -> bool:
  return all(_PLAIN.fullmatch(part) for part in name.split('/'))


def _list(repository: str, revision: str) -> list[str]:
  def names():
    return (
      _client().HfApi().list_repo_files(repository, revision=revision or None)
    )

  return sorted(_retried(repository, names))


def _download(repository, name, revision, root) -> None:
  _client().hf_hub_download(
    repository, name, revision=revision or None, local_dir=root
  )


def _client():
  try:
    import huggingface_hub
  except ImportError:
    raise npz.Refused(
      'Fetching from the hub needs huggingface_hub: pip install '
      'huggingface_hub, or download the folder and give its path.'
    ) from None
  return huggingface_hub


def _retried(repository: str, function, *arguments, **named):
  """What may fail on the way is tried three times; then one sentence."""
  for left in reversed(range(_TRIES)):
    try:
      return function(*arguments, **named)
    except npz.Refused:
      raise
    except Exception as error:  # of any of the libraries below huggingface_hub
      kind = type(error).__name__
      final = kind in (
        'RepositoryNotFoundError', 'RevisionNotFoundError', 'GatedRepoError',
        'EntryNotFoundError', 'OfflineModeIsEnabled', 'HFValidationError',
      )  # fmt: skip
      if final or not left:
        raise npz.Refused(
          f'{repository} could not be fetched ({kind}); check its name, the '
          'network and, where it asks for one, the login (hf auth login).'
        ) from None
      time.sleep(2.0 ** (_TRIES - left))
