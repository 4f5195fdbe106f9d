"""train(config, workdir): trains a collection of SAEs in one pass of the model.

The run's folder has config.json, metrics.jsonl, checkpoints/ and, unless the
config names a store, tokens/. The same call on the same folder continues the
run, bitwise as without interruption: a batch is a function of the config and
the step, and the rest is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import config as config_lib
from gemma_scope import files, sites, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.runtime import (
  changes,
  checkpoints,
  cluster,
  metrics,
  opened,
  remote,
)
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease as lease_lib
from gemma_scope.runtime import progress as progress_lib
from gemma_scope.sae import fold
from gemma_scope.training import (
  auto_mesh,
  closing,
  end_to_end,
  initialise,
  setup,
  stack,
  trained,
  two_models,
)

_PATIENCE = 100  # steps in a row without a finite gradient

# Fields that may change when a run is continued: no parameter depends on them.
_MAY_CHANGE = tuple(
  """checkpoint metrics evaluation activations.memory activations.ahead
  mesh lm.checkpoint lm.tokenizer text.store train.active_limit""".split()
)


def check_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses a config that cannot run, or differs from the folder's own."""
  config_lib.check(config)
  path = workdir / 'config.json'
  if path.exists():
    saved = json.loads(config_lib.read(path).to_json())
    changes.refuse_changes(saved, json.loads(config.to_json()), _MAY_CHANGE)
  model, mesh = setup.dimensions(config), auto_mesh.make(config)
  config_lib.check(config, model, mesh.devices.shape)
  two_models.check(config)
  if not path.exists():
    # Raises where the release to start from is missing or does not fit.
    initialise.plan(config, specs.stacks(config, model).values())


def keep_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Writes config.json of a new run, once `check_config` has passed it."""
  with cluster.first_goes_ahead():  # other processes compare theirs with it
    remote.fetch(path := workdir / 'config.json')
    check_config(config, workdir)
    if not path.exists():
      files.write_json(path, json.loads(config.to_json()), indent=2)


def train(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  lease: lease_lib.Lease,
  interrupt: interrupt_lib.Interrupt,
  report: Callable[[str], None] = print,
) -> trained.Result:
  """Trains the collection, continuing from the last checkpoint if any.

  Args:
    config: complete, see configs/tiny.py; not changed.
    workdir: the run's folder.
    lease: of the folder; checked before each save.
    interrupt: polled in every phase; on request the run saves and returns.
    report: called with one line per phase.

  Raises:
    ConfigError, ChangedError, CheckpointNotFound, ...: one sentence each.
  """
  workdir = pathlib.Path(workdir)
  model, mesh = setup.dimensions(config), auto_mesh.make(config, report=report)
  config_lib.check(config, model, mesh.devices.shape)
  stacks, groups = setup.make_stacks(config, model)
  if warning := setup.slow_thresholds(config):
    report(warning)
  source, facts = setup.make_source(config, workdir, mesh, report)
  a = config.activations
  chunks = chunks_lib.Chunks(
    source, config.seed, mesh, a.memory, a.ahead, a.max_norm
  )
  if config.end_to_end.beta:
    feed = end_to_end.Feed(chunks, config.end_to_end.sequences, mesh)
  else:
    feed = chunks_lib.Feed(chunks, config.train.steps)
  with opened.saves(workdir, config.checkpoint.keep) as saves:
    loop = _Loop(
      config, workdir, mesh, feed, stacks, groups, saves, lease, report, facts
    )
    loop.start()
    loop.run(interrupt)
  return trained.Result(
    loop.done, loop.step, loop.normalisation, stacks, loop.states, facts
  )


class NotFiniteError(RuntimeError):
  """Too many steps in a row had no finite gradient."""


@dataclasses.dataclass
class _Loop:
  """The training loop and its state between steps.

  Attributes:
    closed: False while the closing phase is incomplete.
    skipped: consecutive steps without a finite gradient, by stack.
    placed: `normalisation` on the devices.
    doing: what the progress line says while a step takes long.
  """

  config: ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  feed: chunks_lib.Feed | end_to_end.Feed
  stacks: tuple[stack.Stack, ...]
  groups: tuple[tuple[specs.SaeSpec, ...], ...]
  saves: checkpoints.Checkpoints
  lease: lease_lib.Lease
  report: Callable[[str], None]
  facts: dict[str, Any]
  step: int = 0
  states: tuple[stack.State, ...] = ()
  normalisation: dict[sites.Site, fold.Normalisation] = dataclasses.field(
    default_factory=dict
  )
  placed: dict[sites.Site, fold.Normalisation] = dataclasses.field(
    default_factory=dict
  )
  closed: bool = True
  skipped: list[jax.Array] = dataclasses.field(default_factory=list)
  doing: str = 'starting'
  writer: metrics.Writer | None = None
  progress: progress_lib.Progress | None = None

  @functools.cached_property
  def take_step(self):
    """(states, batch, normalisation, step) -> (states, metrics), jitted."""
    # The language model is an argument: a closure would hold it as constants.
    gemma, lm_params = None, ()
    if self.config.end_to_end.beta:
      gemma, lm_params = self.feed.source.gemma, self.feed.source.params
    step = setup.step_of(self.config, self.stacks, gemma, self.mesh)
    return lambda *arguments: step(*arguments, lm_params)

  @property
  def done(self) -> bool:
    """Whether the last step and the closing phase are complete."""
    return self.step == self.config.train.steps and self.closed

  def start(self) -> None:
    """Restores the newest valid checkpoint, or initialises at step 0."""
    restored = self.saves.restore(setup.abstract_states(self.stacks, self.mesh))
    if restored is None:
      key = jax.random.key(self.config.seed)
      self.states = stack.init_all(self.stacks, key, self.mesh)
    else:
      changes.refuse_changes(
        restored.meta['facts'], self.facts, what='text or model'
      )
      self.step, self.states = restored.step, restored.state
      self._set_normalisation(trained.read_normalisation(restored.meta))
      self.feed.chunks.norm_bounds = {
        site: n.norm_bound
        for site, n in self.normalisation.items()
        if n.norm_bound is not None
      }
      self.feed.left_out |= restored.meta['left_out']
      self.report(f'continuing at step {self.step}')
      saved_devices = restored.meta.get('devices')
      if saved_devices and (
        differing := changes.fingerprint_difference(
          saved_devices, self._devices()
        )
      ):
        self.report(
          f'other devices than before ({"; ".join(differing)}): sums have '
          'another order, so the result is the same up to rounding, not bitwise'
        )

  def run(self, interrupt: interrupt_lib.Interrupt) -> None:
    """Runs to the last step or until interrupted, and saves."""
    steps = self.config.train.steps
    if self.step == steps:
      return
    with self._reporting():
      saved, pending, first = self.step, None, True
      try:
        while self.step < steps and not interrupt.at_step(self.step):
          batch = self.feed.at(self.step, interrupt.check)
          if not self.normalisation:
            self._begin_at_normalisation()
          self.doing = 'compiling the training step' if first else ''
          self.states, values = self.take_step(
            self.states, batch, self.placed, self._put(np.int32(self.step))
          )
          first = False
          self.skipped = [metrics['steps_skipped'] for metrics in values]
          # Metrics of step i are read after step i + 1 was dispatched.
          self._log(pending)
          self.step += 1
          interval = self.config.metrics.every
          logged = self.step % interval == 0 or self.step == steps
          pending = (self.step, values) if logged else None
          if self.step % _PATIENCE == 0:
            self._check_finite()
          if self.step == steps:
            self._close(interrupt.check)
          if self.step % self.config.checkpoint.every == 0:
            self._log(pending)  # kept with the checkpoint
            saved, pending = self._save(), None
      except interrupt_lib.Interrupted:  # while a chunk was made, or in closing
        pass
      self._log(pending)
      if saved != self.step and self.closed:
        self._save()
      self.saves.wait()
    if not self.closed:
      self.report('stopped in the closing phase; the next start repeats it')
      return
    if self.step < steps:
      self.report(f'stopped and saved at step {self.step} of {steps}')

  def _close(self, poll: Callable[[], None]) -> None:
    """Runs the closing phase, if the config enables it."""
    t = self.config.train
    if not (t.meet_l0 or t.refit_decoders):
      return
    self.closed, self.doing = False, 'closing phase'
    batches = closing.Batches(
      self.feed, self.step - 1, t.closing_batches, self.placed, poll
    )
    self.states = closing.close(
      t, self.stacks, self.states, batches, self.mesh, self.report
    )
    self.closed = True

  def _check_finite(self) -> bool:
    """Whether each SAE had a finite gradient in the last two steps.

    Raises:
      NotFiniteError: one has had none for `_PATIENCE` steps.
    """
    skipped = [int(n) for n_S in jax.device_get(self.skipped) for n in n_S]
    names = [member.name for group in self.groups for member in group]
    counts = zip(names, skipped, strict=False)
    failing = [name for name, steps in counts if steps >= _PATIENCE]
    if failing:
      subject = (
        f' and {len(failing) - 1} more SAEs have' if failing[1:] else ' has'
      )
      raise NotFiniteError(
        f'{failing[0]}{subject} had no finite gradient for {_PATIENCE} steps '
        f'(until step {self.step}). The last good checkpoint is kept; start '
        'another run with a lower train.learning_rate, or with train.clip.'
      )
    return max(skipped, default=0) < 2

  def _set_normalisation(self, normalisation) -> None:
    self.normalisation = normalisation
    self.placed = {  # on the devices, as the step needs it
      site: jax.tree.map(
        lambda value: self._put(np.asarray(value, np.float32)),
        n if self.config.end_to_end.beta else n._replace(norm_bound=None),
      )
      for site, n in normalisation.items()
    }

  def _begin_at_normalisation(self) -> None:
    """Measures it, and loads the release to start from, if there is one."""
    a = self.config.activations
    self._set_normalisation(self.feed.normalisation(a.centre, a.scale))
    if a.max_norm:
      count = self.feed.left_out.get('outliers', 0)
      self.report(
        f'leaving out rows of norm above {a.max_norm:g} medians'
        + f': {count:,} in the first chunk' * bool(count)
      )
    if power := self.config.initialise.whitening:
      of_site = lambda site: self.feed.covariance(site, self.placed[site])
      self.states = initialise.whiten(power, self.stacks, self.states, of_site)
    plan = initialise.plan(self.config, self.groups)
    if plan is not None:
      self.states = initialise.start(
        plan, self.stacks, self.groups, self.states, self.normalisation
      )

  @contextlib.contextmanager
  def _reporting(self):
    """Opens the metrics writer and the progress line on the first process."""
    if jax.process_index():
      yield
      return
    m, t = self.config.metrics, self.config.train
    self.writer = metrics.Writer(
      self.workdir,
      tensorboard=m.tensorboard,
      wandb={'project': m.wandb_project} if m.wandb_project else None,
      resume_step=self.step,
    )
    self.progress = progress_lib.Progress(
      t.steps,
      t.batch,
      first_step=self.step,
      status=lambda: self.feed.status or self.doing,
    )
    try:
      yield
    finally:
      self.writer.close()
      self.progress.close()

  def _save(self) -> int:
    """Saves the states, unless they may have diverged."""
    if not self._check_finite():
      self.report(
        f'no checkpoint at step {self.step}: the last gradients are not finite'
      )
      return self.step
    self.lease.check()
    meta = {
      **trained.describe_normalisation(self.normalisation),
      'facts': self.facts,
      'left_out': dict(self.feed.left_out),
      'devices': self._devices(),
      'version': gemma_scope.__version__,
    }
    self.saves.save(self.step, self.states, meta)
    if self.writer is not None:
      self.writer.flush()
    return self.step

  def _put(self, value: np.generic) -> jax.Array:
    return mesh_lib.put(value, mesh_lib.sharding(self.mesh))

  def _devices(self) -> dict[str, Any]:
    """Devices and mesh, which determine the order of sums."""
    return {
      'kind': jax.devices()[0].device_kind,
      'processes': jax.process_count(),
      'mesh': dict(self.mesh.shape),
    }

  def _log(self, pending) -> None:
    """Writes one line of metrics and refreshes the progress line."""
    if pending is None or self.writer is None:
      return
    step, values = pending
    host_values = jax.device_get(values)
    means = {
      name: float(
        np.mean(np.concatenate([metrics[name] for metrics in host_values]))
      )
      for name in host_values[0]
    }
    scalars = {f'mean/{name}': value for name, value in means.items()}
    for group, stack_values in zip(self.groups, host_values, strict=True):
      for name, value_S in stack_values.items():
        for member, value in zip(group, value_S, strict=True):
          scalars[f'{member.name}/{name}'] = float(value)
    scalars['rows_not_finite'] = self.feed.left_out['not_finite']
    if self.config.activations.max_norm:
      scalars['rows_outliers'] = self.feed.left_out['outliers']
    scalars['tokens'] = step * self.config.train.batch
    self.writer.write_scalars(step, scalars)
    self.progress.update(
      step,
      {
        'loss': means['loss'],
        'L0': means['l0'],
        'FVU': means['fvu'],
        'dead': f'{means["dead"]:.1%}',
      },
    )
