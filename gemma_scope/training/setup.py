"""From a config to the objects of its run: text, rows and stacks.

Everything here is a pure function of the config and of what lies on disk;
`loop` uses them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import mesh as mesh_lib
from gemma_scope import sae, sites, specs
from gemma_scope.activations import harvest, synthetic
from gemma_scope.activations import store as store_lib
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.sae import architectures
from gemma_scope.text import prepare, token_store, tokenizers
from gemma_scope.training import end_to_end, objectives, stack
from gemma_scope.training import optimizer as optimizer_lib

_FOLDS = math.log(100)  # least change of log(theta) that a run should allow


def special(
  tokenizer: tokenizers.Tokenizer, store: token_store.Tokens
) -> tokenizers.Special:
  """Tokens whose activations no SAE sees (arXiv 2408.05147 sections 3, 4.5)."""
  ids = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
  return tokenizers.Special(ids, store.reply)


def dimensions(config: ConfigDict) -> sites.Dimensions:
  """Dimensions of the language model, or those in a synthetic store."""
  if config.lm.name != synthetic.MODEL:
    return weights.read_config(config.lm.name, config.lm.checkpoint)
  if not config.activations.store:
    raise config_lib.ConfigError(
      f'The model {synthetic.MODEL!r} is an activation store by '
      'launch/synthetic.py; set activations.store to its folder.'
    )
  facts = store_lib.facts(config.activations.store)
  return sites.Uniform(**facts['dimensions'])


def layout(config: ConfigDict, share: float = 1.0) -> harvest.Layout:
  """Sizes of a run's chunks; `share` is the fraction of rows to keep."""
  activations = config.activations
  return harvest.Layout.of(
    chunk_rows=activations.chunk_rows,
    seq_len=config.text.seq_len,
    batch=config.train.batch,
    lm_batch=activations.lm_batch,
    dtype=activations.dtype,
    share=share,
  )


def make_source(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, report):
  """The source of rows, and the facts that must be the same on resuming."""
  if config.activations.store:
    return _open_store(config, specs.site_list(config), report)
  tokenizer, store = prepare.open_text(config, workdir, report)
  rows = prepare.shuffled(store.sequences(config.text.seq_len), config.seed)
  text = harvest.Text(
    functools.partial(prepare.batch, rows), special(tokenizer, store).keep
  )
  source_of = functools.partial(
    _model_source, config, text, layout(config, store.share), mesh, report
  )
  source = source_of(config.lm.name, config.lm.checkpoint)
  facts = {
    'model': config.lm.name,
    'model_dtype': config.lm.dtype,
    'parameters': int(_checksum(source.params)),
    'seed': config.seed,
    'text': store.fingerprint,
  }
  kind = weights.quantisation(config.lm.name, config.lm.checkpoint)
  if kind:
    facts['quantisation'] = kind
  if second := specs.second_model(config):
    second_source = source_of(*second)
    source = harvest.Pair(source, second_source)
    facts['second_model'] = second[0]
    facts['second_parameters'] = int(_checksum(second_source.params))
  return source, facts


def _model_source(
  config: ConfigDict, text, sizes, mesh, report, *model: str
) -> harvest.ModelSource:
  """Rows of the model (name, checkpoint) at the sites of the run."""
  read_sites = [site for site in specs.site_list(config) if not site.second]
  report(f'loading {" from ".join(filter(None, model))}')
  gemma, params = weights.load(
    *model,
    dtype=config.lm.dtype,
    mesh=mesh,
    num_layers=(
      None
      if config.end_to_end.beta
      else 1 + max(site.layer for site in read_sites)
    ),
  )
  return harvest.ModelSource(gemma, params, read_sites, text, sizes, mesh)


def _open_store(config, read, report):
  """Opens the activation store and compares it with the config."""
  store = config.activations.store
  source = store_lib.StoreSource(store, read, config.train.batch)
  stored = {'lm.name': source.facts['model'], 'chunks': source.layout}
  chunks = layout(config, source.layout.share)
  wanted = {'lm.name': config.lm.name, 'chunks': chunks}
  for field, value in wanted.items():
    if stored[field] != value:
      raise config_lib.ConfigError(
        f'The activation store {store!r} has {field} {stored[field]}, and the '
        f'config describes {value}; use the config that it was written with.'
      )
  steps = source.chunks * chunks.batches
  report(
    f'reading {store}: {steps:,} steps of {chunks.batch} rows, '
    f'{config.train.steps / steps:.2f} passes in this run'
  )
  return source, {**source.facts, **source.fingerprint}


@jax.jit
def _checksum(params: lm.Params) -> jax.Array:
  """Checksum of parameters: the sum of their bits, uint32.

  Integers add up to the same in any order, hence on any mesh.
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(params):
    kind = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    total = total * jnp.uint32(31) + jnp.sum(bits, dtype=jnp.uint32)
  return total


def make_stacks(
  config: ConfigDict, model: sites.Dimensions
) -> tuple[tuple[stack.Stack, ...], tuple[tuple[specs.SaeSpec, ...], ...]]:
  """The collection's SAEs, grouped by shape into stacks."""
  train = config.train
  optimizer = optimizer_lib.Optimizer(
    **_fields_of(optimizer_lib.Optimizer, config.train)
  )
  groups = specs.stacks(config, model)
  stacks = []
  for (_, _, d_in, d_out), group in groups.items():
    reads, writes = (
      tuple(
        dict.fromkeys(
          site for member in group for site in getattr(member, field)
        )
      )
      for field in ('sites', 'targets')
    )
    setting = stack.Setting(
      jnp.asarray([member.sparsity for member in group], jnp.float32),
      jnp.full((len(group),), train.learning_rate, jnp.float32),
      jnp.asarray(
        [_index(reads, member.sites, member.layers) for member in group]
      ),
      jnp.asarray(
        [_index(writes, member.targets, member.layers) for member in group]
      ),
      _nulls(group),
    )
    module = make_module(config, group[0], d_in, d_out)
    objective = make_objective(config, group[0])
    seeds = tuple(member.seed for member in group)
    stacks.append(
      stack.Stack(module, objective, reads, writes, setting, seeds, optimizer)
    )
  return tuple(stacks), tuple(map(tuple, groups.values()))


def _nulls(group: Sequence[specs.SaeSpec]) -> jax.Array | None:
  """`stack.Setting.null`; None where the stack has none."""
  if not any(member.null for member in group):
    return None
  return jnp.asarray(
    [('', *specs.NULLS).index(member.null) for member in group]
  )


def _index(sites_of_stack, wanted, layers: int):
  """Place in the stack's list of the site, or of each layer's or model's."""
  index = [sites_of_stack.index(site) for site in wanted]
  return index if layers or len(index) > 1 else index[0]


def _fields_of(cls: type, section: ConfigDict) -> dict[str, Any]:
  """The fields of the dataclass that the config section has."""
  names = {field.name for field in dataclasses.fields(cls)}
  return {name: value for name, value in section.items() if name in names}


def make_module(
  config: ConfigDict, member: specs.SaeSpec, d_in: int, d_out: int
) -> sae.Autoencoder:
  """The module of a member's architecture and shape."""
  architecture = architectures.ARCHITECTURES[member.base]
  reconstructs_input = member.sites == member.targets
  options = _fields_of(architecture, config.sae)
  options['pre_encoder_bias'] &= reconstructs_input
  return architecture(
    d_in=d_in,
    d_out=d_out,
    width=member.width,
    layers=member.layers,
    tied=reconstructs_input,
    skip=config.collection.skip,
    **options,
  )


def make_objective(
  config: ConfigDict, member: specs.SaeSpec
) -> objectives.Objective:
  """The objective of a member's stack."""
  penalty = member.penalty
  if penalty == 'target_l0':
    penalty = architectures.ARCHITECTURES[member.base].meets_l0
  return objectives.Objective(
    penalty=penalty,
    prefixes=specs.prefixes(config, member),
    **config.objective,
  )


def slow_thresholds(config: ConfigDict) -> str | None:
  """A warning where log thresholds cannot move far within the run.

  A step of Adam changes log(theta) by about the learning rate, so that with
  the published 7e-5 a factor of 10 takes 33,000 steps.
  """
  sae, train = config.sae, config.train
  trained = 'jumprelu' in {spec.base for spec in specs.members(config)}
  if not (trained and sae.log_threshold) or config.initialise.release:
    return None
  steps = train.steps - train.decay / 2
  folds = train.learning_rate * train.threshold_rate * steps
  if folds >= _FOLDS:
    return None
  needed = _FOLDS / (train.learning_rate * steps)
  return (
    f'thresholds can change by a factor of at most {math.exp(folds):.3g} in '
    f'{train.steps:,} steps: L0 may stay far from its target. Set '
    f'train.threshold_rate to {math.ceil(needed)} or more, or '
    'sae.log_threshold to False, and sae.initial_threshold near the values '
    'expected.'
  )


def abstract_states(stacks: tuple[stack.Stack, ...], mesh: Mesh):
  """Shapes, dtypes and shardings of the states, to restore a checkpoint."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    jax.eval_shape(
      lambda: tuple(stack_.init(jax.random.key(0)) for stack_ in stacks)
    ),
    tuple(stack_.shardings(mesh) for stack_ in stacks),
  )


def step_of(config, stacks, gemma, mesh):
  """The jitted step: states, batch, normalisation by site, step, parameters of
  the language model (() where none is run) -> states, metrics."""
  shardings = tuple(stack_.shardings(mesh) for stack_ in stacks)
  key, beta = jax.random.key(config.seed), config.end_to_end.beta

  @functools.partial(
    jax.jit,
    donate_argnums=0,
    out_shardings=(shardings, mesh_lib.sharding(mesh)),
  )
  def take_step(states, batch, normalisation, step, lm_params):
    if beta:
      model = end_to_end.Model(gemma, lm_params, normalisation, beta, mesh)
      return end_to_end.step_all(model, stacks, states, batch, step, key)
    rows = {
      site: normalisation[site].apply(x_BD.astype(jnp.float32))
      for site, x_BD in batch.items()
    }
    return stack.step_all(stacks, states, rows, step, key, mesh)

  return take_step
