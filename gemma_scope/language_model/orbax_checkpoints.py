"""Checkpoints written by Orbax: parameters by name, straight into sharding.

Layouts are Gemma's own release (flat keys such as
`transformer/layer_0/attn/q_einsum` above the leaves), the same with layers of a
kind stacked, and a nested tree. All names and shapes are checked before a byte
is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

_STACKED = r'stacked_layers/attention_type_(\d+)/(.*)'


class CheckpointNotFound(ValueError):
  """A checkpoint is missing or another than was asked for; says which."""


def check(shapes: dict[str, tuple], needed: dict, folder) -> None:
  """Names and shapes of a checkpoint against those of the model."""
  for key, target in needed.items():
    if key not in shapes:
      raise CheckpointNotFound(
        f'The checkpoint {str(folder)!r} has no parameter {key!r}: is it '
        'another model?'
      )
    if tuple(shapes[key]) != target.shape:
      raise CheckpointNotFound(
        f'{key!r} in the checkpoint {str(folder)!r} has shape '
        f'{tuple(shapes[key])}, and the model wants {target.shape}.'
      )


def _canonical(key: str) -> str:
  """A key of either Orbax layout, or of the model's tree -> one spelling."""
  key = re.sub(r'^(params/)?(transformer/)?', '', key)
  return re.sub(r'(/mlp2?/(?:linear|gating_einsum))/w$', r'\1', key)


def read(folder, needed: dict) -> dict:
  """The parameters, each in its dtype and sharding.

  Args:
    folder: a local or remote path.
    needed: by their path with slashes, with dtype and sharding.

  Raises:
    CheckpointNotFound: the folder holds no checkpoint, or another model's.
  """
  from orbax import checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = _orbax_metadata(checkpointer, folder)
    stored = _stored(metadata.tree)
    entries = {
      key: stored[_canonical(key)]
      for key in needed
      if _canonical(key) in stored
    }
    check({key: entry.shape for key, entry in entries.items()}, needed, folder)

    def restored(items: dict) -> dict:
      item = traverse_util.unflatten_dict(items)
      tree = checkpointer.restore(
        metadata.folder,
        args=ocp.args.PyTreeRestore(
          item=item,
          restore_args=ocp.checkpoint_utils.construct_restore_args(item),
          partial_restore=True,
        ),
      )
      return traverse_util.flatten_dict(tree)

    alone = {key: e.key for key, e in entries.items() if e.row is None}
    arrays = restored({alone[key]: needed[key] for key in alone})
    flat = {key: arrays[alone[key]] for key in alone}
    stacks: dict[tuple, list[str]] = {}
    for key in entries.keys() - alone.keys():
      stacks.setdefault(entries[key].key, []).append(key)
    for stack, keys in stacks.items():  # one at a time: only it is held twice
      target = needed[keys[0]]
      spec = jax.ShapeDtypeStruct(
        (entries[keys[0]].rows, *target.shape),
        target.dtype,
        sharding=_with_rows(target.sharding),
      )
      array = restored({stack: spec})[stack]
      for key in keys:
        row = array[entries[key].row]
        flat[key] = jax.device_put(row, needed[key].sharding)
  return {key: flat[key] for key in needed}


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where an array is in a checkpoint; of a stack of layers, one row."""

  key: tuple
  shape: tuple[int, ...]
  row: int | None = None
  rows: int = 0


def _stored(tree: dict) -> dict[str, _Entry]:
  """Arrays by their canonical path; of stacks of layers, each row.

  Some of Google's checkpoints keep layers of a kind together: with P kinds,
  row n of stacked_layers/attention_type_t is layer P n + t.
  """
  entries = {
    _canonical('/'.join(map(str, key))): _Entry(key, tuple(leaf.shape))
    for key, leaf in traverse_util.flatten_dict(tree).items()
  }
  stacks = {
    name: match
    for name in entries
    if (match := re.fullmatch(_STACKED, name)) and entries[name].shape
  }
  period = 1 + max((int(match[1]) for match in stacks.values()), default=0)
  for name, match in stacks.items():
    entry = entries.pop(name)
    rows, *shape = entry.shape
    for row in range(rows):
      layer = f'layer_{row * period + int(match[1])}/{match[2]}'
      entries[layer] = _Entry(entry.key, tuple(shape), row, rows)
  return entries


def _with_rows(sharding):
  """The sharding of a stack whose rows have `sharding`."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


@dataclasses.dataclass(frozen=True)
class _Metadata:
  folder: object
  tree: dict


def _orbax_metadata(checkpointer, folder) -> _Metadata:
  """The tree of names and shapes; a step folder keeps it in `default`."""
  read: Callable = checkpointer.metadata
  for candidate in (folder, folder / 'default'):
    try:
      metadata = read(candidate).item_metadata
    except Exception as error:  # orbax and tensorstore raise many kinds
      reason = str(error).splitlines()[0] if str(error) else repr(error)
      continue
    if metadata is not None:
      return _Metadata(candidate, metadata.tree)
    reason = 'it has no _METADATA'
  raise CheckpointNotFound(
    f'{str(folder)!r} does not hold an Orbax checkpoint of Gemma ({reason}).'
  )
