"""The metrics of a run, by step: metrics.jsonl, TensorBoard, wandb.

For a run in a bucket, lines are written locally and uploaded in the background:
new lines every minute as metrics.parts/<n>.jsonl, and the whole file at each
save and at the end. Lines that are lost when a process is killed are later than
the last save, and the continued run writes them again.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from gemma_scope import files
from gemma_scope.runtime import objects, remote

_log = logging.getLogger(__name__)
_PARTS = 'metrics.parts/'
_PART_S = 60.0  # between two parts


def _needed(module: str, field: str, install: str) -> Any:
  try:
    return __import__(module)
  except ImportError as error:
    raise RuntimeError(
      f'{field} is on and {module} is not installed; run'
      f' pip install {install}, or turn it off.'
    ) from error


class Writer:
  """Writes scalars by step to `workdir`/metrics.jsonl, TensorBoard and wandb.

  Each call writes a line {"step": 10, "time": 1.7e9, "loss": 0.5}. The time is
  in seconds since 1970; a value that is not finite becomes null. Use it in one
  process of a cluster.

  Args:
    workdir: the run's folder.
    tensorboard: also to `workdir`/tensorboard (tensorboardX).
    wandb: arguments of wandb.init, or None.
    resume_step: the step that the run continues from. Lines of later steps are
      dropped, because the run will write them again; None keeps all. An
      incomplete last line is always dropped.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    tensorboard: bool = False,
    wandb: Mapping[str, Any] | None = None,
    *,
    resume_step: int | None = None,
  ):
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / 'metrics.jsonl'
    self._board = self._run = None
    if tensorboard:
      module = _needed('tensorboardX', 'metrics.tensorboard', 'tensorboardX')
      self._board = module.SummaryWriter(
        logdir=str(folder / 'tensorboard'),
        purge_step=None if resume_step is None else resume_step + 1,
      )
    if wandb is not None:
      module = _needed('wandb', 'metrics.wandb', "'gemma_scope[wandb]'")
      self._run = module.init(**{'dir': folder, 'resume': 'allow', **wandb})
    self._store = remote.objects(folder)
    self._pool = self._store and concurrent.futures.ThreadPoolExecutor(1)
    self._lines: list[str] = []  # not uploaded yet
    self._parts, self._uploaded = 0, time.monotonic()
    self._repair(resume_step)
    self._file = self._path.open('a', encoding='utf-8')

  def _repair(self, resume_step: int | None):
    """Rewrites the file without incomplete lines and lines of later steps."""
    if not self._path.exists():
      return
    text = self._path.read_bytes()
    valid_lines = []
    for line in text.splitlines(keepends=True):
      try:
        step = json.loads(line)['step']
      except (ValueError, TypeError, KeyError):
        continue
      if line.endswith(b'\n') and (resume_step is None or step <= resume_step):
        valid_lines.append(line)
    if b''.join(valid_lines) == text:
      return
    files.write_bytes(self._path, b''.join(valid_lines))

  def write_scalars(self, step: int, scalars: Mapping[str, Any]):
    """Writes one line; TensorBoard groups names by the part before `/`."""
    values = {name: float(value) for name, value in scalars.items()}
    line = {'step': int(step), 'time': round(time.time(), 3)} | {
      name: value if math.isfinite(value) else None
      for name, value in values.items()
    }
    # One write per line, so that only the last line can be incomplete.
    text = json.dumps(line, allow_nan=False) + '\n'
    with files.named(self._path):
      self._file.write(text)
      self._file.flush()
    if self._store is not None:
      self._lines.append(text)
      if time.monotonic() - self._uploaded > _PART_S:
        self._upload_part()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
    if self._run is not None:
      self._run.log(values, step=step)

  def flush(self):
    """Writes what TensorBoard still holds; the JSONL is always written."""
    if self._board is not None:
      self._board.flush()
    if self._store is not None:
      self._lines = []
      self._uploaded = time.monotonic()
      self._pool.submit(self._logged, self._upload_all)

  def close(self):
    """Closes the files and the wandb run."""
    with files.named(self._path):
      self._file.close()
    if self._board is not None:
      self._board.close()
    self.flush_last()
    if self._run is not None:
      self._run.finish()

  def flush_last(self):
    """Uploads everything and waits for it."""
    if self._store is not None:
      self._pool.submit(self._logged, self._upload_all)
      self._pool.shutdown()

  def _upload_part(self):
    name, data = f'{_PARTS}{self._parts:06d}.jsonl', ''.join(self._lines)
    self._parts, self._lines = self._parts + 1, []
    self._uploaded = time.monotonic()
    self._pool.submit(
      self._logged, lambda: self._store.write(name, data.encode())
    )

  def _upload_all(self):
    remote.publish(self._path)
    for path in sorted(self._path.parent.glob('tensorboard/*')):
      remote.publish(path)
    self._store.delete_below(_PARTS)

  def _logged(self, upload):
    try:
      upload()
    except (
      objects.BucketError
    ) as error:  # training goes on; the next one may do
      _log.warning('Metrics were not uploaded: %s', error)

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind, error, trace):
    try:
      self.close()
    except OSError:
      if error is None:  # else the first error is the one to report
        raise
