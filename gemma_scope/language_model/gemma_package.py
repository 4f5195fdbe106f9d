"""The `gemma` package, imported when a model is first built.

Importing it costs two seconds and has side effects, which are undone here: it
replaces `nn.Module.param` for every Flax module of the process, and it wants
TensorFlow for the name of one type.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
import types

import flax.linen as nn


@contextlib.contextmanager
def _without_tensorflow():
  """kauldron imports TensorFlow for the name `tf.Tensor` alone: stand in."""
  if 'tensorflow' in sys.modules:
    yield
    return
  stand_in = types.ModuleType('tensorflow')
  stand_in.Tensor = type('Tensor', (), {})
  stand_in.__spec__ = types.SimpleNamespace(
    name='tensorflow', loader=None, origin=None, submodule_search_locations=[]
  )
  sys.modules['tensorflow'] = stand_in
  try:
    yield
  finally:
    del sys.modules['tensorflow']


@contextlib.contextmanager
def _restored(owner, name: str):
  """Puts back an attribute that is replaced inside."""
  original = getattr(owner, name)
  try:
    yield
  finally:
    setattr(owner, name, original)


@functools.cache
def gemma3():
  """`gemma.gm.nn`, with the modules of Gemma 2 and 3."""
  with _without_tensorflow(), _restored(nn.Module, 'param'):
    try:
      from gemma import gm
    except ImportError as error:
      raise ImportError(
        'The language model needs the gemma package, which is not installed: '
        'run launch/setup.sh, or pip install --no-deps -r requirements.txt.'
      ) from error
    _ = gm.nn.Transformer, gm.nn.config.TransformerConfig  # imported lazily
    from kauldron import kd

    _ = kd.nn.Identity
  return gm.nn


@functools.cache
def gemma4():
  """The package's config, blocks and transformer of Gemma 4, as a namespace."""
  gemma3()
  with _without_tensorflow(), _restored(nn.Module, 'param'):
    try:
      from gemma.gm.nn.gemma4 import _config, _modules, _transformer
    except ImportError as error:
      raise ImportError(
        'Gemma 4 needs version 4 of the gemma package, which needs Python 3.12 '
        f'or later; found gemma {importlib.metadata.version("gemma")} on '
        f'Python {sys.version_info.major}.{sys.version_info.minor}.'
      ) from error
  return types.SimpleNamespace(
    config=_config, modules=_modules, transformer=_transformer
  )
