"""train(config, workdir): one pass of Gemma, a whole collection of SAEs.

The run's folder holds config.json, metrics.jsonl, checkpoints/, tokens/ (unless
the config names a store). The same call on the same folder continues, and ends
bit for bit where an uninterrupted run would have ended: the batch of a step is
a function of the config and the step, and all else is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import config as config_lib
from gemma_scope import files, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.runtime import changes, checkpoints, cluster, metrics, progress
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease as lease_lib
from gemma_scope.training import (
  closing,
  end_to_end,
  initialise,
  objectives,
  setup,
  stack,
  trained,
)

_PATIENCE = 100  # steps in a row without a finite gradient

# What may differ when a run is continued: nothing that a parameter depends on.
_MAY_CHANGE = (
    'checkpoint', 'metrics', 'evaluation', 'activations.memory',
    'activations.ahead', 'mesh', 'lm.checkpoint', 'lm.tokenizer', 'text.store',
    'train.active_limit',
)  # fmt: skip


def check_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses a config that cannot run here, or that is not this folder's."""
  config_lib.check(config)
  path = workdir / 'config.json'
  if path.exists():
    was = json.loads(config_lib.read(path).to_json())
    changes.refuse_changes(was, json.loads(config.to_json()), _MAY_CHANGE)
  model, mesh = setup.dimensions(config), mesh_lib.make(config.mesh)
  config_lib.check(config, model, mesh.devices.shape)
  if not path.exists():
    # The release that the run would start from exists and fits.
    initialise.plan(config, specs.stacks(config, model).values())


def keep_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Writes config.json of a new run, once `check_config` has passed it."""
  with cluster.first_goes_ahead():  # the others are compared with its config
    check_config(config, workdir)
    path = workdir / 'config.json'
    if not path.exists():
      files.write_json(path, json.loads(config.to_json()), indent=2)


def train(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  lease: lease_lib.Lease,
  interrupt: interrupt_lib.Interrupt,
  report: Callable[[str], None] = print,
) -> trained.Result:
  """Trains the collection, from the last checkpoint if there is one.

  Args:
    config: complete, see configs/tiny.py; not changed.
    workdir: the run's folder.
    lease: of the folder; checked before each save.
    interrupt: polled in every phase; on request the run is saved and returns.
    report: takes a line on each phase.

  Raises:
    ConfigError, ChangedError, CheckpointNotFound, ...: one sentence each.
  """
  workdir = pathlib.Path(workdir)
  model = setup.dimensions(config)
  mesh = mesh_lib.make(config.mesh)
  config_lib.check(config, model, mesh.devices.shape)
  stacks, groups = setup.make_stacks(config, model)
  source, facts = setup.make_source(config, workdir, mesh, report)
  a = config.activations
  chunks = chunks_lib.Chunks(
    source, config.seed, mesh, a.memory, a.ahead, a.max_norm
  )
  if config.end_to_end.beta:
    feed = end_to_end.Feed(chunks, config.end_to_end.sequences, mesh)
  else:
    feed = chunks_lib.Feed(chunks, config.train.steps)
  with checkpoints.Checkpoints(
    workdir / 'checkpoints', keep=config.checkpoint.keep
  ) as saves:
    loop = _Loop(
      config, workdir, mesh, feed, stacks, groups, saves, lease, report
    )
    loop.start(facts)
    loop.run(interrupt)
  return trained.Result(
      loop.done, loop.step, loop.normalisation, stacks, loop.states, facts,
  )  # fmt: skip


class NotFiniteError(RuntimeError):
  """A run went on without a finite gradient for too long."""


class _Loop:
  """The training loop and what it holds between steps."""

  def __init__(
    self, config, workdir, mesh, feed, stacks, groups, saves, lease, report
  ):
    self._config = config
    self._workdir = workdir
    self._mesh = mesh
    self._feed = feed
    self._stacks = stacks
    self._groups = groups
    self._saves = saves
    self._lease = lease
    self._report = report
    self._writer = self._progress = None
    self._doing = 'starting'  # what the progress line says while it waits
    self._closed = True  # no closing phase was left halfway
    self._skipped = ()  # steps in a row without a finite gradient, by stack
    # An argument of the step, which would hold it as constants otherwise.
    beta = config.end_to_end.beta
    gemma, lm_params = (
      (feed.source.gemma, feed.source.params) if beta else (None, ())
    )
    step = step_of(config, stacks, gemma, mesh)
    self._take_step = lambda *arguments: step(*arguments, lm_params)

  @property
  def done(self) -> bool:
    """Whether the last step is taken, and the closing phase over."""
    return self.step == self._config.train.steps and self._closed

  def start(self, facts: dict[str, Any]) -> None:
    """Restores the newest good checkpoint, or initialises at step 0."""
    self._facts = facts
    restored = self._saves.restore(
      setup.abstract_states(self._stacks, self._mesh)
    )
    if restored is None:
      key = jax.random.key(self._config.seed)
      self.step, self.normalisation = 0, {}
      self.states = stack.init_all(self._stacks, key, self._mesh)
    else:
      changes.refuse_changes(
        restored.meta['facts'], facts, what='text or model'
      )
      self.step, self.states = restored.step, restored.state
      self._set_normalisation(trained.read_normalisation(restored.meta))
      self._feed.norm_bounds = {
        site: n.norm_bound
        for site, n in self.normalisation.items()
        if n.norm_bound is not None
      }
      self._feed.left_out |= restored.meta['left_out']
      self._report(f'continuing at step {self.step}')
      was = restored.meta.get('devices')
      if was and (
        found := changes.fingerprint_difference(was, self._devices())
      ):
        self._report(
          f'other devices than before ({"; ".join(found)}): sums are taken in '
          'another order, so the end is the same up to rounding, not bitwise'
        )

  def run(self, interrupt: interrupt_lib.Interrupt) -> None:
    """Steps until the last one, or until interrupted; saved either way."""
    steps = self._config.train.steps
    if self.step == steps:
      return
    with self._reporting():
      saved, pending, first = self.step, None, True
      try:
        while self.step < steps and not interrupt.at_step(self.step):
          batch = self._feed.at(self.step, interrupt.check)
          if not self.normalisation:
            self._begin_at_normalisation()
          self._doing = 'compiling the training step' if first else ''
          self.states, values = self._take_step(
            self.states, batch, self._placed, self._put(np.int32(self.step))
          )
          first = False
          self._skipped = [v['steps_skipped'] for v in values]
          # Metrics of step i are read after step i + 1 was dispatched.
          self._log(pending)
          self.step += 1
          every = self._config.metrics.every
          logged = self.step % every == 0 or self.step == steps
          pending = (self.step, values) if logged else None
          if self.step % _PATIENCE == 0:
            self._check_finite()
          if self.step == steps:
            self._close(interrupt.check)
          if self.step % self._config.checkpoint.every == 0:
            saved = self._save()
      except interrupt_lib.Interrupted:  # while a chunk was made, or in closing
        pass
      self._log(pending)
      if saved != self.step and self._closed:
        self._save()
      self._saves.wait()
    if not self._closed:
      self._report(
        'stopped in the closing phase, which the next start does again'
      )
      return
    if self.step < steps:
      self._report(f'stopped and saved at step {self.step} of {steps}')

  def _close(self, poll: Callable[[], None]) -> None:
    """The closing phase, where the config asks for one."""
    t = self._config.train
    if not (t.meet_l0 or t.refit_decoders):
      return
    self._closed, self._doing = False, 'closing phase'
    batches = closing.Batches(
      self._feed, self.step - 1, t.closing_batches, self._placed, poll
    )
    states = []
    for one, state in zip(self._stacks, self.states, strict=True):
      if t.meet_l0 and one.objective.penalty in objectives.TARGETS:
        self._report(f'thresholds of {len(one.seeds)} SAEs meet their L0')
        state = closing.meet_l0(one, state, batches(), self._mesh)
      if t.refit_decoders:
        self._report(f'decoders of {len(one.seeds)} SAEs by least squares')
        state = closing.refit_decoders(one, state, batches, self._mesh)
      states.append(state)
    self.states, self._closed = tuple(states), True

  def _check_finite(self) -> bool:
    """Whether of every SAE one of the last two gradients was finite.

    Raises:
      NotFiniteError: one has had none for `_PATIENCE` steps.
    """
    skipped = [int(n) for n_S in jax.device_get(self._skipped) for n in n_S]
    names = [member.name for group in self._groups for member in group]
    lost = [
      name for name, n in zip(names, skipped, strict=False) if n >= _PATIENCE
    ]
    if lost:
      more = f' and {len(lost) - 1} more SAEs have' if lost[1:] else ' has'
      raise NotFiniteError(
        f'{lost[0]}{more} had no finite gradient for {_PATIENCE} steps (until '
        f'step {self.step}). The last good checkpoint is kept; start another '
        'run with a lower train.learning_rate, or with train.clip.'
      )
    return max(skipped, default=0) < 2

  def _set_normalisation(self, normalisation) -> None:
    self.normalisation = normalisation
    self._placed = {  # what the step needs of it, on the devices
      site: jax.tree.map(
        lambda value: self._put(np.asarray(value, np.float32)),
        n if self._config.end_to_end.beta else n._replace(norm_bound=None),
      )
      for site, n in normalisation.items()
    }

  def _begin_at_normalisation(self) -> None:
    """Measures it; starts from a release where the config names one."""
    a = self._config.activations
    self._set_normalisation(self._feed.normalisation(a.centre, a.scale))
    if a.max_norm:
      count = self._feed.left_out.get('outliers', 0)
      self._report(
        f'leaving out rows of norm above {a.max_norm:g} medians'
        + f': {count:,} in the first chunk' * bool(count)
      )
    chosen = initialise.plan(self._config, self._groups)
    if chosen is not None:
      self.states = initialise.start(
        chosen, self._stacks, self._groups, self.states, self.normalisation
      )

  @contextlib.contextmanager
  def _reporting(self):
    """The writer of metrics and the progress line, on the first process."""
    if jax.process_index():
      yield
      return
    m, t = self._config.metrics, self._config.train
    self._writer = metrics.Writer(
      self._workdir,
      tensorboard=m.tensorboard,
      wandb={'project': m.wandb_project} if m.wandb_project else None,
      resume_step=self.step,
    )
    self._progress = progress.Progress(
      t.steps,
      t.batch,
      first_step=self.step,
      status=lambda: self._feed.status or self._doing,
    )
    try:
      yield
    finally:
      self._writer.close()
      self._progress.close()

  def _save(self) -> int:
    """Saves the states, but for those that may have no way back."""
    if not self._check_finite():
      self._report(
        f'no checkpoint at step {self.step}: the last gradients are not finite'
      )
      return self.step
    self._lease.check()
    meta = {
      **trained.describe_normalisation(self.normalisation),
      'facts': self._facts,
      'left_out': dict(self._feed.left_out),
      'devices': self._devices(),
      'version': gemma_scope.__version__,
    }
    self._saves.save(self.step, self.states, meta)
    return self.step

  def _put(self, value: np.generic) -> jax.Array:
    return mesh_lib.put(value, mesh_lib.sharding(self._mesh))

  def _devices(self) -> dict[str, Any]:
    """What the order of a sum depends on."""
    return {
      'kind': jax.devices()[0].device_kind,
      'processes': jax.process_count(),
      'mesh': dict(self._mesh.shape),
    }

  def _log(self, pending) -> None:
    """Writes one line of metrics and refreshes the progress line."""
    if pending is None or self._writer is None:
      return
    step, values = pending
    host = jax.device_get(values)
    means = {
      name: float(np.mean(np.concatenate([v[name] for v in host])))
      for name in host[0]
    }
    scalars = {f'mean/{name}': value for name, value in means.items()}
    for group, stack_values in zip(self._groups, host, strict=True):
      for name, value_S in stack_values.items():
        for member, value in zip(group, value_S, strict=True):
          scalars[f'{member.name}/{name}'] = float(value)
    scalars['rows_not_finite'] = self._feed.left_out['not_finite']
    if self._config.activations.max_norm:
      scalars['rows_outliers'] = self._feed.left_out['outliers']
    scalars['tokens'] = step * self._config.train.batch
    self._writer.write_scalars(step, scalars)
    self._progress.update(
      step,
      {
        'loss': means['loss'],
        'L0': means['l0'],
        'FVU': means['fvu'],
        'dead': f'{means["dead"]:.1%}',
      },
    )


def step_of(config, stacks, gemma, mesh):
  """The jitted step: states, batch, normalisation by site, step, parameters of
  the language model (() where none is run) -> states, metrics."""
  shardings = tuple(s.shardings(mesh) for s in stacks)
  key, beta = jax.random.key(config.seed), config.end_to_end.beta

  @functools.partial(
    jax.jit,
    donate_argnums=0,
    out_shardings=(shardings, mesh_lib.sharding(mesh)),
  )
  def take_step(states, batch, normalisation, step, lm_params):
    if beta:
      return end_to_end.step_all(
          stacks, states, gemma, lm_params, batch, normalisation, step,
          key, beta, mesh,
      )  # fmt: skip
    rows = {
      site: normalisation[site].apply(x_BD.astype(jnp.float32))
      for site, x_BD in batch.items()
    }
    return stack.step_all(stacks, states, rows, step, key, mesh)

  return take_step
