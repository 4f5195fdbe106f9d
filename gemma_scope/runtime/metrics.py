"""The metrics of a run, by step: metrics.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from gemma_scope import files


def _needed(module: str, field: str, install: str) -> Any:
  try:
    return __import__(module)
  except ImportError as error:
    raise RuntimeError(
      f'{field} is on and {module} is not installed; run'
      f' pip install {install}, or turn it off.'
    ) from error


class Writer:
  """Scalars by step, to `workdir`/metrics.jsonl and where the config says.

  One line for each call: {"step": 10, "time": 1.7e9, "loss": 0.5}, time in
  seconds since 1970, a value that is not finite as null. One process of a
  cluster writes.

  Args:
    workdir: the run's folder.
    tensorboard: also to `workdir`/tensorboard (tensorboardX).
    wandb: arguments of wandb.init, or None.
    resume_step: the step the run goes on from: lines of later steps, which
      the run will make again, are dropped; None keeps all. A line torn by a
      kill is dropped in any case.
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
    self._repair(resume_step)
    self._file = self._path.open('a', encoding='utf-8')

  def _repair(self, resume_step: int | None):
    """Rewrites the file without torn lines and lines of the future."""
    if not self._path.exists():
      return
    text = self._path.read_bytes()
    kept = []
    for line in text.splitlines(keepends=True):
      try:
        step = json.loads(line)['step']
      except (ValueError, TypeError, KeyError):
        continue
      if line.endswith(b'\n') and (resume_step is None or step <= resume_step):
        kept.append(line)
    if b''.join(kept) == text:
      return
    files.write_bytes(self._path, b''.join(kept))

  def write_scalars(self, step: int, scalars: Mapping[str, Any]):
    """Writes one line; what follows a `/` in a name is TensorBoard's group."""
    values = {k: float(v) for k, v in scalars.items()}
    line = {'step': int(step), 'time': round(time.time(), 3)} | {
      k: v if math.isfinite(v) else None for k, v in values.items()
    }
    # One write of a whole line: a kill can tear only the last one.
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
    if self._run is not None:
      self._run.log(values, step=step)

  def flush(self):
    """Writes what TensorBoard still holds; the JSONL is always written."""
    if self._board is not None:
      self._board.flush()

  def close(self):
    """Ends the files and the wandb run."""
    self._file.close()
    if self._board is not None:
      self._board.close()
    if self._run is not None:
      self._run.finish()

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *unused):
    self.close()
