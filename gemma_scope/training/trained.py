"""Results of a run: its state, and its SAEs as released parameters and cards.

What stands in a checkpoint beside the state is written and read here.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import release, sites, specs
from gemma_scope.activations import outliers
from gemma_scope.runtime import checkpoints, opened, remote
from gemma_scope.sae import fold
from gemma_scope.training import auto_mesh, setup, stack


@dataclasses.dataclass(frozen=True)
class Result:
  """State of a run: `done` at its end, or stopped on request before it."""

  done: bool
  step: int
  normalisation: dict[sites.Site, fold.Normalisation]
  stacks: tuple[stack.Stack, ...]
  states: tuple[stack.State, ...]
  facts: dict[str, Any]  # about text and model

  def saes(self, config: ConfigDict) -> list[release.Released]:
    """The trained SAEs, see `saes` below."""
    return saes(
      config,
      self.stacks,
      self.states,
      self.normalisation,
      self.step,
      self.facts,
    )


def describe_normalisation(normalisation) -> dict[str, Any]:
  """Normalisation as JSON, for a checkpoint; unused parts are left out."""
  meta = {'scales': {}, 'centres': {}, 'norm_bounds': {}}
  for site, site_normalisation in normalisation.items():
    meta['scales'][str(site)] = site_normalisation.scale
    if site_normalisation.centre is not None:
      meta['centres'][str(site)] = np.asarray(
        site_normalisation.centre
      ).tolist()
    if site_normalisation.norm_bound is not None:
      meta['norm_bounds'][str(site)] = site_normalisation.norm_bound
  return {key: value for key, value in meta.items() if value or key == 'scales'}


def read_normalisation(
  meta: dict[str, Any],
) -> dict[sites.Site, fold.Normalisation]:
  """The inverse of `describe_normalisation`."""
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
  """Loads the newest checkpoint of a run, without language model and text.

  Raises:
    CheckpointError: there is none.
  """
  model = setup.dimensions(config)
  mesh = auto_mesh.make(config)
  stacks, _ = setup.make_stacks(config, model)
  workdir = pathlib.Path(workdir)
  with opened.saves(workdir) as saves:
    restored = saves.restore(setup.abstract_states(stacks, mesh))
  if restored is None:
    raise checkpoints.CheckpointError(
      f'There is no checkpoint in {remote.shown(workdir / "checkpoints")}.'
    )
  return Result(
    restored.step == config.train.steps,
    restored.step,
    read_normalisation(restored.meta),
    stacks,
    restored.state,
    restored.meta['facts'],
  )


def saes(
  config: ConfigDict,
  stacks: tuple[stack.Stack, ...],
  states: tuple[stack.State, ...],
  normalisation: Mapping[sites.Site, fold.Normalisation],
  step: int,
  facts: Mapping[str, Any],
) -> list[release.Released]:
  """The trained SAEs: folded, they act on raw activations."""
  groups = specs.stacks(config, setup.dimensions(config)).values()
  released_saes = []
  for trained, state, group in zip(stacks, states, groups, strict=True):
    if jax.process_count() > 1:
      host = multihost_utils.process_allgather(state, tiled=True)
    else:
      host = jax.device_get(state)
    module = trained.module
    for i, member in enumerate(group):
      params = {
        name: np.asarray(value)
        for name, value in trained.member_params(host, i).items()
      }
      params = _folded(params, member, normalisation, module)
      if not module.unit_decoder or config.train.refit_decoders:
        params = fold.fold_decoder_norm(params)
      normalisations = {
        site: normalisation[site] for site in (*member.sites, *member.targets)
      }
      card = {
        'name': member.name,
        'type': member.type,
        'sites': [str(site) for site in member.sites],
        'targets': [str(site) for site in member.targets],
        'model': config.lm.name,
        'architecture': member.architecture,
        'd_in': module.d_in,
        'd_out': module.d_out,
        'width': member.width,
        'sparsity': {'kind': member.penalty, 'value': member.sparsity},
        'seed': member.seed,
        'scales': {str(site): n.scale for site, n in normalisations.items()},
        'steps': step,
        'tokens': step * config.train.batch,
        'silent': {
          'share': float(
            np.mean(host.silent_tokens[i] > config.train.dead_after)
          ),
          'tokens': config.train.dead_after,
        },
        'text': facts['text'],
        'code': gemma_scope.__version__,
      }
      for key in ('quantisation', 'second_model'):
        if key in facts:
          card[key] = facts[key]
      if ends := specs.prefixes(config, member):
        card['matryoshka'] = list(ends)
      if member.null:
        card['null'] = member.null
      if module.skip:
        card['affine'] = True
      if config.activations.max_norm:
        card['outliers'] = outliers.describe(
          config.activations.max_norm,
          {site: n.norm_bound for site, n in normalisations.items()},
        )
      if config.initialise.release:
        card['initialised_from'] = config.initialise.release
      released_saes.append(release.in_memory(params, card))
  return released_saes


def _folded(params, member: specs.SaeSpec, normalisation, module):
  """Parameters that take raw rows; those of two models stand side by side."""
  input_normalisations = [normalisation[site] for site in member.sites]
  output_normalisations = [normalisation[site] for site in member.targets]
  if member.pair:
    params, joined = fold.side_by_side(params, input_normalisations)
    input_normalisations = output_normalisations = [joined]
  return fold.fold(
    params,
    input_normalisations,
    output_normalisations,
    pre_encoder_bias=module.pre_encoder_bias,
  )
