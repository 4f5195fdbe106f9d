"""Files of a Hugging Face repository: listed, fetched, uploaded.

Only names in the repository's own list are fetched, and only plain ones.
Downloads stay in huggingface_hub's cache (HF_HOME) and resume where they were
cut off. HF_TOKEN is read by huggingface_hub alone and never shown. All files of
an SAE are of one commit.
"""

from __future__ import annotations

import pathlib
import re
import time
from collections.abc import Callable, Sequence

from gemma_scope import files

_PLAIN = re.compile(r'[\w][\w.+=-]{0,200}', re.ASCII)
_TRIES = 3
# What to do about an error that another try does not mend, by its class.
_FINAL = {
  'GatedRepoError': (
    'its owner asks for consent; open its page on https://huggingface.co, '
    'accept the terms, then log in with `hf auth login` or set HF_TOKEN'
  ),
  'RepositoryNotFoundError': (
    'there is no such repository, or it is private; check the name and log in '
    'with `hf auth login` or set HF_TOKEN'
  ),
  'RevisionNotFoundError': 'it has no such branch, tag or commit',
  'EntryNotFoundError': 'it has no such file at this revision',
  'OfflineModeIsEnabled': (
    'HF_HUB_OFFLINE is set; unset it, or give the path of a downloaded folder'
  ),
  'HFValidationError': 'the name is not owner/name',
}
_ADVICE = 'check the network, then run the same command again'
_WANTED = re.compile(
  r'(params|params_layer_\d{1,3}|sae_weights|sae|ae)\.(npz|safetensors)'
  r'|(config|cfg|metrics|activation_scaler)\.json'
)


def names(path: str, revision: str = '') -> list[str]:
  """Names of the files below `owner/name[/path]`, without that path.

  Raises:
    files.Refused: no such repository, or no network.
  """
  repository, inside = _parts(path)
  start = f'{inside}/' if inside else ''
  return [
    name.removeprefix(start)
    for name in _list(repository, revision)[0]
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
    files.Refused: it is not there, or cannot be fetched.
  """
  repository, inside = _parts(path)
  all_names, commit = _list(repository, revision)
  names = [name for name in all_names if _is_plain(name)]
  folders = {name.rpartition('/')[0] for name in names}
  parent, _, last_part = inside.rpartition('/')
  if last_part == 'canonical' and inside not in folders:
    inside = canonical(
      sorted(folder for folder in folders if folder.startswith(f'{parent}/'))
    )
  names_wanted = [
    name
    for name in names
    if name.rpartition('/')[0] == inside
    and _WANTED.fullmatch(name.split('/')[-1])
  ]
  if not names_wanted:
    similar = sorted(
      folder for folder in folders if folder.startswith(inside.split('/')[0])
    )[:5]
    raise files.Refused(
      f'{repository} has no SAE in {files.show(inside)}'
      f'{"; it has " + ", ".join(similar) if similar else ""}.'
    )
  # The config of a run of sparsify, above its SAEs, names the model.
  run_config = f'{inside.rpartition("/")[0]}/config.json'.lstrip('/')
  if f'{inside}/sae.safetensors' in names_wanted and run_config in names:
    names_wanted.append(run_config)
  fetched = [
    _retried(
      repository, _client().hf_hub_download, repository, name, revision=commit
    )
    for name in names_wanted
  ]
  return pathlib.Path(fetched[0]).parent, f'{repository}/{inside}'


def file(address: str) -> pathlib.Path:
  """Fetches one file, `hf://owner/name/path` with or without `?revision=`.

  Raises:
    files.Refused: it is no such address, or cannot be fetched.
  """
  path, _, query = address.removeprefix('hf://').partition('?')
  revision = query.removeprefix('revision=')
  if query and (not query.startswith('revision=') or not _is_plain(revision)):
    raise files.Refused(f'{files.show(address)} is no address of a file.')
  repository, inside = _parts(path)
  all_names, commit = _list(repository, revision)
  if inside not in all_names:
    raise files.Refused(f'{repository} has no file {files.show(inside)}.')
  fetch = _client().hf_hub_download
  return pathlib.Path(
    _retried(repository, fetch, repository, inside, revision=commit)
  )


def push(
  folder: pathlib.Path,
  repository: str,
  really: bool,
  report: Callable[[str], None],
) -> None:
  """Uploads a folder's files, a commit for each folder in it, its card last.

  Files that the repository has already are not uploaded again, so that the
  same call continues one that was cut off.

  Args:
    folder: a release, or what `export.write` wrote.
    repository: `owner/name`; made, private, where it is not there.
    really: if False, only reports what would be uploaded.
    report: takes a line of text.

  Raises:
    files.Refused: no such folder or name, a link in it, or no network.
  """
  _, inside = _parts(repository)
  if inside:
    raise files.Refused(f'{files.show(repository)} is not owner/name.')
  if not folder.is_dir():
    raise files.Refused(f'There is no folder {files.show(folder)}.')
  names = []
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not _is_plain(name):
      raise files.Refused(
        f'{files.show(path)} is a link or has a name that the hub refuses.'
      )
    if path.is_file():
      names.append(name)
  folders = sorted({name.rpartition('/')[0] for name in names}, reverse=True)
  if really:
    create = _client().HfApi().create_repo
    _retried(repository, create, repository, private=True, exist_ok=True)
  for folder_name in folders:  # '' comes last
    in_folder = [
      name for name in names if name.rpartition('/')[0] == folder_name
    ]
    size = sum((folder / name).stat().st_size for name in in_folder)
    action = 'uploaded' if really else 'would upload'
    if really:
      _retried(
        repository,
        _client().HfApi().upload_folder,
        repo_id=repository,
        folder_path=folder / folder_name,
        path_in_repo=folder_name or None,
        allow_patterns=[name.rpartition('/')[2] for name in in_folder],
        commit_message=f'Add {folder_name or "the card"}',
      )
    report(
      f'{action} {folder_name or "."}: {len(in_folder)} files, {size:,} bytes'
    )


def _parts(path: str) -> tuple[str, str]:
  """'owner/name/a/b' -> 'owner/name', 'a/b'."""
  names = path.rstrip('/').split('/')
  if len(names) < 2 or not all(map(_PLAIN.fullmatch, names)):
    raise files.Refused(
      f'There is no folder {files.show(path)}, and a path on the hub looks '
      'like OWNER/NAME/FOLDER.'
    )
  return '/'.join(names[:2]), '/'.join(names[2:])


def _is_plain(name: str) -> bool:
  return all(_PLAIN.fullmatch(part) for part in name.split('/'))


def _list(repository: str, revision: str) -> tuple[list[str], str]:
  """Names of a repository's files, and the commit that has them."""
  info = _retried(
    repository,
    _client().HfApi().repo_info,
    repository,
    revision=revision or None,
  )
  return sorted(file.rfilename for file in info.siblings), info.sha


def _client():
  try:
    import huggingface_hub
  except ImportError:
    raise files.Refused(
      'Fetching from the hub needs huggingface_hub: pip install '
      'huggingface_hub, or download the folder and give its path.'
    ) from None
  return huggingface_hub


def _retried(repository: str, function, *arguments, **named):
  """Tries a call three times; then raises `files.Refused` with advice."""
  for tries_left in reversed(range(_TRIES)):
    try:
      return function(*arguments, **named)
    except files.Refused:
      raise
    except Exception as error:  # of any of the libraries below huggingface_hub
      advice = _FINAL.get(type(error).__name__)
      if advice or not tries_left:
        raise files.Refused(
          f'{repository} could not be fetched ({type(error).__name__}): '
          f'{advice or _ADVICE}.'
        ) from None
      time.sleep(2.0 ** (_TRIES - tries_left))
