"""train(config, workdir): one pass of Gemma, a whole collection of SAEs.

The run's folder holds config.json, metrics.jsonl, checkpoints/, tokens/ (unless
the config names a store). The same call on the same folder continues, and ends
bit for bit where an uninterrupted run would have ended: the batch of a step is
a function of the config and the step, and all else is in the checkpoint.
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
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import config as config_lib
from gemma_scope import files, release, sites, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import chunks as chunks_lib
from gemma_scope.runtime import changes, checkpoints, cluster, metrics, progress
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import lease as lease_lib
from gemma_scope.sae import fold
from gemma_scope.training import end_to_end, initialise, setup, stack, trained

# What may differ when a run is continued: nothing that a parameter depends on.
_MAY_CHANGE = (
    'checkpoint', 'metrics', 'evaluation', 'activations.memory',
    'activations.ahead', 'mesh', 'lm.checkpoint', 'lm.tokenizer', 'text.store',
    'train.active_limit',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
  """Where a run stands: `done` at its last step, else stopped on request."""

  done: bool
  step: int
  normalisation: dict[sites.Site, fold.Normalisation]
  stacks: tuple[stack.Stack, ...]
  states: tuple[stack.State, ...]
  facts: dict[str, Any]  # on the text and the model

  def saes(self, config: ConfigDict) -> list[release.Released]:
    """The trained SAEs, see `trained.saes`."""
    return trained.saes(
      config,
      self.stacks,
      self.states,
      self.normalisation,
      self.step,
      self.facts,
    )


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
) -> Result:
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
  return Result(
      loop.step == config.train.steps, loop.step, loop.normalisation, stacks,
      loop.states, facts,
  )  # fmt: skip


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
    # An argument of the step, which would hold it as constants otherwise.
    beta = config.end_to_end.beta
    gemma, lm_params = (
      (feed.source.gemma, feed.source.params) if beta else (None, ())
    )
    step = step_of(config, stacks, gemma, mesh)
    self._take_step = lambda *arguments: step(*arguments, lm_params)

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
      self._set_normalisation(_normalisation(restored.meta))
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
      saved, pending = self.step, None
      try:
        while self.step < steps and not interrupt.at_step(self.step):
          batch = self._feed.at(self.step, interrupt.check)
          if not self.normalisation:
            self._begin_at_normalisation()
          self.states, values = self._take_step(
            self.states, batch, self._placed, self._put(np.int32(self.step))
          )
          # Metrics of step i are read after step i + 1 was dispatched.
          self._log(pending)
          self.step += 1
          every = self._config.metrics.every
          logged = self.step % every == 0 or self.step == steps
          pending = (self.step, values) if logged else None
          if self.step % self._config.checkpoint.every == 0:
            saved = self._save()
      except interrupt_lib.Interrupted:  # while a chunk was made
        pass
      self._log(pending)
      if saved != self.step:
        self._save()
      self._saves.wait()
    if self.step < steps:
      self._report(f'stopped and saved at step {self.step} of {steps}')

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
    self._writer = self._progress = None
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
    peak = progress.matmul_peak() * jax.device_count()
    self._progress = progress.Progress(
      t.steps,
      t.batch,
      first_step=self.step,
      ideal_s=self._flops() / peak,
    )
    try:
      yield
    finally:
      self._writer.close()
      self._progress.close()

  def _save(self) -> int:
    self._lease.check()
    meta = {
      **_describe(self.normalisation),
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

  def _flops(self) -> int:
    """Dense FLOPs of a step of all members."""
    rows = self._config.train.batch
    return sum(s.module.flops(rows) * len(s.seeds) for s in self._stacks)


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


def _describe(normalisation) -> dict[str, Any]:
  """What a checkpoint keeps of it; what is not used is not mentioned."""
  meta = {'scales': {}, 'centres': {}, 'norm_bounds': {}}
  for site, n in normalisation.items():
    meta['scales'][str(site)] = n.scale
    if n.centre is not None:
      meta['centres'][str(site)] = np.asarray(n.centre).tolist()
    if n.norm_bound is not None:
      meta['norm_bounds'][str(site)] = n.norm_bound
  return {key: value for key, value in meta.items() if value or key == 'scales'}


def _normalisation(
  meta: dict[str, Any],
) -> dict[sites.Site, fold.Normalisation]:
  """The inverse of `_describe`."""
  centres, bounds = meta.get('centres', {}), meta.get('norm_bounds', {})
  return {
    sites.parse(name): fold.Normalisation(
      scale,
      np.asarray(centres[name], np.float32) if name in centres else None,
      bounds.get(name),
    )
    for name, scale in meta['scales'].items()
  }


def load(config: ConfigDict, workdir: str | pathlib.Path) -> Result:
  """The newest checkpoint of a run, without its language model or text.

  Raises:
    CheckpointError: there is none.
  """
  model = setup.dimensions(config)
  mesh = mesh_lib.make(config.mesh)
  stacks, _ = setup.make_stacks(config, model)
  folder = pathlib.Path(workdir) / 'checkpoints'
  with checkpoints.Checkpoints(folder) as saves:
    restored = saves.restore(setup.abstract_states(stacks, mesh))
  if restored is None:
    raise checkpoints.CheckpointError(f'There is no checkpoint in {folder}.')
  return Result(
      restored.step == config.train.steps, restored.step,
      _normalisation(restored.meta), stacks, restored.state,
      restored.meta['facts'],
  )  # fmt: skip
