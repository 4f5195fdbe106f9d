"""Checkpoints: orbax behind one thin module, each leaf with its checksum.

One save, of any pytree of arrays:

  leaves by name, such as 'params.W_enc'
    -> the free space is checked
    -> CRC32 of every leaf's bytes, in threads     (before the copy returns)
    -> Orbax copies from device to host             (`save` returns)
    -> Orbax writes <step>.orbax-checkpoint-tmp     (in the background)
         state/  a flat dict {name: array}
         meta/   JSON: shapes, dtypes, CRCs, the caller's dict, its own CRC
    -> renamed to <step>                            (the commit)
  Then the oldest steps beyond `keep` are renamed to <step>.todelete and
  deleted.

Orbax alone restores a flipped bit without an error (its data have no checksum)
and casts a wrong dtype without an error; the checks here refuse both. Steps are
always listed from the disk, because a list in memory keeps a step whose commit
failed in the background.

A checkpoint is read by this project only; a release is for others.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gemma_scope.runtime import checksums

_log = logging.getLogger(__name__)

_FORMAT = 1  # of the JSON beside the leaves, on a disk or in a bucket
_SLACK = 16 << 20  # bytes of indices and metadata, generously
_STUMBLE = re.compile('Input/output error|Stale file|[Tt]imed out')
_STEP = re.compile(r'0|[1-9][0-9]*')
_LEFTOVER = re.compile(r'\d+(\.orbax-checkpoint-tmp.*|\.todelete)')


class CheckpointError(RuntimeError):
  """One sentence: which checkpoint, what is wrong, what to do."""


class _Damaged(Exception):
  """This step cannot be trusted; an older one may be."""


class Restored(NamedTuple):
  """What `restore` found: the step, the tree, the caller's dict."""

  step: int
  state: Any
  meta: dict[str, Any]


def _sentence(error: BaseException) -> str:
  text = str(error).partition(' See full TensorStore')[0]
  return ' '.join(text.split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quietly():
  """Keeps the coroutines of a failed Orbax restore from printing.

  Each holds an error of a page, which Python would print when it is deleted.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
  try:
    yield
  finally:
    sys.unraisablehook = hook


def _some(items: list[str], comma: str = ', ') -> str:
  suffix = f' and {len(items) - 3} more' if len(items) > 3 else ''
  return comma.join(items[:3]) + suffix


class Checkpoints:
  """The checkpoints of one run, in `folder`, the newest `keep` of them.

  Every process of a cluster makes the same calls. Only `save` cleans up
  leftovers (its first call), so that an evaluation may read the folder of a
  run that is still training.

  Raises CheckpointError, one sentence.
  """

  def __init__(self, folder, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f'checkpoint.keep is at least 1; found {keep}.')
    self._folder = epath.Path(folder)
    self._local = '://' not in os.fspath(self._folder)
    if self._local:
      self._folder = epath.Path(os.path.abspath(self._folder))
    self._keep = keep
    self._cleaned = False
    self._pending: tuple[int, int] | None = None  # step, bytes it needs
    # AsyncCheckpointer, not CheckpointManager: the manager lists steps from
    # memory, deletes old ones in place and owns a preemption handler.
    # A thread that waits for a folder which cannot be made waits for minutes.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    items = ocp.CompositeOptions(async_options=options)
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler('state', 'meta', composite_options=items),
      async_options=options,
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, error, trace):
    try:
      self.close()
    except CheckpointError as failed:
      if error is None:
        raise
      _log.error('%s', failed)  # the first error is the one to report

  def close(self):
    """Waits for the save in flight; raises its error."""
    try:
      self.wait()
    finally:
      # What it raises is the error of a save, which was raised before.
      with contextlib.suppress(Exception):
        self._orbax.close()

  def steps(self) -> list[int]:
    """The committed steps on the disk, oldest first."""
    if not self._folder.exists():
      return []
    paths = [p for p in self._folder.iterdir() if _STEP.fullmatch(p.name)]
    if not self._local:  # object stores have no rename: a file is the commit
      paths = [path for path in paths if (path / 'commit_success.txt').exists()]
    return sorted(int(path.name) for path in paths)

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts to save `state` and `meta` as `step`; returns once copied.

    The device arrays may be donated as soon as this returns. A save still in
    flight is waited for, and its error raised here. A step that is already
    on the disk stays as it is.

    Args:
      step: a number of whole steps; it names the folder.
      state: any pytree of arrays, sharded in any way.
      meta: a JSON dict (config, fingerprints, scales).
    """
    self.wait()
    leaves, _ = checksums.named(state)
    self._prepare()
    if step in self.steps():
      return
    needed = sum(map(checksums.num_bytes, leaves.values())) * 21 // 20 + _SLACK
    free_bytes = checksums.from_all(self._free())  # all must decide alike
    if self._local and min(free_bytes) < needed:
      raise CheckpointError(self._full(step, needed, min(free_bytes)))
    sealed = self._sealed(step, leaves, checksums.of(leaves), meta)
    self._pending = step, needed
    try:
      self._orbax.save(
        self._folder / str(step),
        args=ocp.args.Composite(
          # Orbax refuses arrays of no elements; they hold nothing.
          state=ocp.args.PyTreeSave(
            {k: v for k, v in leaves.items() if checksums.num_bytes(v)}
          ),
          meta=ocp.args.JsonSave(sealed),
        ),
      )
    except Exception as error:
      raise self._failed(error) from error

  def _sealed(self, step: int, leaves, sums, meta: Mapping) -> dict[str, Any]:
    """The JSON saved beside the leaves, with a CRC32 of its own."""
    body = {
      'format': _FORMAT,
      'step': step,
      'leaves': checksums.described(leaves, sums),
      'meta': dict(meta),
    }
    try:
      return checksums.seal(body)
    except (TypeError, ValueError) as error:
      raise CheckpointError(
        f'The dict saved beside a checkpoint must be JSON: {error}.'
      ) from error

  def wait(self) -> None:
    """Waits until the save in flight is committed; raises its error."""
    if self._pending is None:
      return
    try:
      self._orbax.wait_until_finished()
      # A thread that Orbax cancels ends the save without an error.
      if jax.process_index() == 0 and not self._exists(self._pending[0]):
        raise RuntimeError('Orbax reported no error and wrote no step')
    except Exception as error:
      raise self._failed(error) from error
    self._pending = None
    if jax.process_index() == 0:
      for step in self.steps()[: -self._keep]:
        # Renamed first: a step half deleted must not look like a step.
        renamed = self._folder / f'{step}.todelete'
        try:
          (self._folder / str(step)).rename(renamed)
          renamed.rmtree()
        except OSError as error:
          _log.warning('Step %d could not be deleted: %s.', step, error)

  def _prepare(self):
    """Makes the folder and removes what a killed run of ours left in it."""
    if self._cleaned:
      return
    problem = None
    if jax.process_index() == 0:
      try:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
          if _LEFTOVER.fullmatch(path.name):
            path.rmtree()
      except OSError as error:
        problem = f'{self._folder} cannot hold checkpoints: {error}.'
    if problem := checksums.from_all(problem)[0]:
      raise CheckpointError(problem)
    self._cleaned = True

  def _free(self) -> int | None:
    return shutil.disk_usage(self._folder).free if self._local else None

  def _full(self, step: int, needed: int, free: int) -> str:
    return (
      f'Step {step} needs {needed:,} bytes in {self._folder} and {free:,} are'
      ' free; make room or lower checkpoint.keep. Earlier steps are intact.'
    )

  def _failed(self, error: Exception) -> CheckpointError:
    """The sentence for a failed save; its half-written folder is removed."""
    (step, needed), self._pending = self._pending, None
    free = self._free()
    full = any(
      getattr(cause, 'errno', None) in (errno.ENOSPC, errno.EDQUOT)
      or re.search(r'ENOSPC|No space left|[Qq]uota', str(cause))
      for cause in (error, error.__cause__, error.__context__)
    )
    for thread in threading.enumerate():  # its threads may still be writing
      if type(thread).__module__.startswith('orbax.'):
        threading.Thread.join(thread, 60.0)
    if jax.process_index() == 0 and self._local:
      for pause_s in (0, 0.1, 0.4):  # Orbax may still be making folders
        time.sleep(pause_s)
        for path in self._folder.glob(f'{step}.orbax-checkpoint-tmp*'):
          shutil.rmtree(path, ignore_errors=True)
    if self._local and (full or free < needed):
      return CheckpointError(self._full(step, needed, free))
    return CheckpointError(
      f'Step {step} could not be saved in {self._folder}:'
      f' {_sentence(error)}. Earlier steps are intact.'
    )

  def restore(self, abstract_state: Any) -> Restored | None:
    """The newest step that passes every check; None when there is no step.

    A damaged step is refused by a logged warning naming it and the leaf, and
    the step before is tried; once one is good, the damaged folders are
    renamed to <step>.damaged. A structure, shape or dtype other than
    `abstract_state`'s is an error, for that is a changed config.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings, or of
        arrays; a leaf without a sharding goes to this process's first device.
    """
    abstract_leaves, structure = checksums.named(abstract_state)

    def load(step):
      body = self._body(step)
      if differ := checksums.differences(body['leaves'], abstract_leaves):
        raise CheckpointError(
          f'Step {step} in {self._folder} was saved by another config:'
          f' {_some(differ, "; ")}. Use the config it was saved with, or'
          ' another folder.'
        )
      return self._leaves(step, body, abstract_leaves), body['meta']

    newest = self._newest(load)
    if newest is None:
      return None
    step, (leaves, meta) = newest
    state = jax.tree_util.tree_unflatten(
      structure, [leaves[name] for name in abstract_leaves]
    )
    return Restored(step, state, meta)

  def _newest(self, load: Callable[[int], Any]):
    """(step, load(step)) of the newest step that is not damaged."""
    self.wait()
    damaged = []
    for step in reversed(checksums.from_all(self.steps())[0]):
      for _ in range(2):
        value, problem = None, None
        try:
          value = load(step)
        except _Damaged as error:
          problem = str(error)
        # One process's damage is everyone's: all must take the same step.
        problem = next(filter(None, checksums.from_all(problem)), None)
        if problem is None:
          for damaged_step in damaged:
            self._set_aside(damaged_step)
          return step, value
        if not _STUMBLE.search(problem):
          break
      value = None  # before the next step needs the memory
      if not self._exists(step):
        continue  # pruned by the run that owns the folder, while we read
      _log.warning('Step %d in %s is damaged: %s.', step, self._folder, problem)
      damaged.append(step)
    if damaged:
      raise CheckpointError(
        f'Every checkpoint in {self._folder} is damaged (steps'
        f' {", ".join(map(str, sorted(damaged)))}; the warnings say where);'
        ' restore the folder from a copy, or move it away to start anew.'
      )
    return None

  def _exists(self, step: int) -> bool:
    return (self._folder / str(step)).exists()

  def _set_aside(self, step: int):
    if jax.process_index() == 0:
      path, number = self._folder / f'{step}.damaged', 2
      while path.exists():
        path, number = self._folder / f'{step}.damaged-{number}', number + 1
      (self._folder / str(step)).rename(path)
    checksums.from_all(None)

  def _body(self, step: int) -> dict[str, Any]:
    """The metadata of a step, once its own checksum is right."""
    try:
      sealed = self._orbax.restore(
        self._folder / str(step),
        args=ocp.args.Composite(meta=ocp.args.JsonRestore()),
      )
      body = checksums.unseal(sealed['meta'])
    except Exception as error:
      raise _Damaged(
        f'its metadata cannot be read ({_sentence(error)})'
      ) from error
    return self._of_this_version(step, body)

  def _of_this_version(self, step: int, body: dict) -> dict:
    if body['step'] != step:
      raise _Damaged(f'its metadata belongs to step {body["step"]}')
    if body['format'] != _FORMAT:
      raise CheckpointError(
        f'Step {step} in {self._folder} has format {body["format"]}, and'
        f' this version reads {_FORMAT}.'
      )
    return body

  def _leaves(self, step: int, body: Mapping, wanted: Mapping) -> dict:
    """The arrays of a step, once all their checksums are right."""
    targets = checksums.targets(wanted)
    nonempty = {k: t for k, t in targets.items() if checksums.num_bytes(t)}
    with _quietly():
      problem = ''
      try:
        leaves = self._read(step, nonempty)
      except Exception as error:  # orbax and tensorstore have many kinds
        unreadable = _some(self._unreadable(step, nonempty)) or 'it'
        problem = f'orbax cannot read {unreadable} ({_sentence(error)})'
      if problem:
        gc.collect()
        raise _Damaged(problem)
    for name in targets.keys() - nonempty.keys():
      empty = np.zeros(targets[name].shape, targets[name].dtype)
      leaves[name] = jax.device_put(empty, targets[name].sharding)
    sums = {name: body['leaves'][name]['crc32'] for name in targets}
    if changed := checksums.wrong(leaves, sums):
      raise _Damaged(f'the bytes of {_some(changed)} are not those saved')
    return leaves

  def _read(self, step: int, targets: dict) -> dict[str, jax.Array]:
    state = ocp.args.PyTreeRestore(
      targets,
      restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=True,  # `_unreadable` asks for one leaf of many
    )
    restored = self._orbax.restore(
      self._folder / str(step), args=ocp.args.Composite(state=state)
    )
    return dict(restored['state'])

  def _unreadable(self, step: int, targets: Mapping) -> list[str]:
    """After a failed restore: the leaves that cannot be read on their own."""
    unreadable = []
    if jax.process_count() == 1:  # elsewhere one process would wait for all
      for name, target in targets.items():
        try:
          self._read(step, {name: target})
        except Exception:
          unreadable.append(name)
    return unreadable
