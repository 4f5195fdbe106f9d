"""A config -> the objects of its run: text, rows, stacks; and back to members.

Everything here is a pure function of the config and of what lies on disk;
`train` holds the loop that uses it.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import (
  activation_store,
  activations,
  lm,
  objectives,
  release,
  sae,
  sites,
  stack,
  text,
  weights,
)
from gemma_scope import config as config_lib


def open_text(
  config: ConfigDict, workdir: pathlib.Path, report: Callable[[str], None]
) -> tuple[text.Tokenizer, text.Tokens]:
  """The tokenizer and the token store; makes the store where none is named.

  A run keeps the store it began with, whatever became of its source.
  """
  tokenizer = text.Tokenizer(
    config.lm.tokenizer or weights.TINY / 'tokenizer.model'
  )
  folder = pathlib.Path(config.text.store or workdir / 'tokens')
  if config.text.store or (folder / 'manifest.json').exists():
    store = text.Tokens(folder)
    store.verify()
  else:
    report(f'tokenising {config.text.source}')
    store = text.prepare(config.text.source, tokenizer, folder)
  if store.fingerprint['tokenizer_sha256'] != tokenizer.sha256:
    raise ValueError(
      f'The token store {str(folder)!r} was made with another tokenizer than '
      f'{tokenizer.path!r}; prepare it again or set lm.tokenizer.'
    )
  return tokenizer, store


def special_ids(tokenizer: text.Tokenizer) -> tuple[int, ...]:
  """Tokens whose activations no SAE sees (arXiv 2408.05147 section 3)."""
  return tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id


def make_source(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, report):
  """Where rows come from, and the facts that a resumed run must agree on."""
  c, a = config.collection, config.activations
  at = tuple(
    sites.Site(layer, kind) for layer in sorted(c.layers) for kind in c.sites
  )
  layout = activations.Layout.of(
    chunk_rows=a.chunk_rows,
    seq_len=config.text.seq_len,
    batch=config.train.batch,
    lm_batch=a.lm_batch,
    dtype=a.dtype,
  )
  if a.store:
    return _open_store(config, at, layout, report)
  tokenizer, store = open_text(config, workdir, report)
  report(f'loading {config.lm.name}')
  gemma, params = weights.load(
    config.lm.name,
    config.lm.checkpoint,
    dtype=config.lm.dtype,
    mesh=mesh,
    num_layers=max(c.layers) + 1,
  )
  rows = text.shuffled(store.sequences(config.text.seq_len), config.seed)
  source = activations.ModelSource(
      gemma, params, at, functools.partial(text.batch, rows), layout, mesh,
      special_ids(tokenizer),
  )  # fmt: skip
  facts = {
    'model': config.lm.name,
    'model_dtype': config.lm.dtype,
    'parameters': int(_checksum(params)),
    'seed': config.seed,
    'text': store.fingerprint,
  }
  return source, facts


def _open_store(config, at, layout, report):
  """The config's activation store, if it is what the config describes."""
  store = config.activations.store
  source = activation_store.StoreSource(store, at, config.train.batch)
  found = {'lm.name': source.facts['model'], 'chunks': source.layout}
  wanted = {'lm.name': config.lm.name, 'chunks': layout}
  for field, value in wanted.items():
    if found[field] != value:
      raise config_lib.ConfigError(
        f'The activation store {store!r} has {field} {found[field]}, and the '
        f'config describes {value}; use the config that it was written with.'
      )
  steps = source.chunks * layout.batches
  report(
    f'reading {store}: {steps:,} steps of {layout.batch} rows, '
    f'{config.train.steps / steps:.2f} passes in this run'
  )
  return source, {**source.facts, **source.fingerprint}


@jax.jit
def _checksum(params: lm.Params) -> jax.Array:
  """Tells one set of parameters from another: the sum of their bits, uint32.

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
) -> tuple[tuple[stack.Stack, ...], tuple[tuple[config_lib.Member, ...], ...]]:
  """The collection's members, grouped by shape into stacks."""
  t = config.train
  optimizer = stack.Optimizer(
      b2=t.b2, eps=t.eps, clip=t.clip, warm_up=t.warm_up, decay=t.decay,
      sparsity_warm_up=t.sparsity_warm_up, threshold_rate=t.threshold_rate,
      steps=t.steps, dead_after=t.dead_after,
  )  # fmt: skip
  groups: dict[tuple[int, int], list[config_lib.Member]] = {}
  for member in config_lib.members(config):
    groups.setdefault((member.width, member.site.width(model)), []).append(
      member
    )
  stacks = []
  for (width, d_in), group in groups.items():
    at = tuple(dict.fromkeys(member.site for member in group))
    settings = [
      objectives.sparsity(m.penalty, m.sparsity, t.sparsity_strength)
      for m in group
    ]
    setting = stack.Setting(
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *settings),
      jnp.full((len(group),), t.learning_rate, jnp.float32),
      jnp.asarray([at.index(member.site) for member in group]),
    )
    module = make_module(config, d_in, width)
    seeds = tuple(member.seed for member in group)
    stacks.append(stack.Stack(module, at, setting, seeds, optimizer))
  return tuple(stacks), tuple(map(tuple, groups.values()))


def make_module(config: ConfigDict, d_in: int, width: int) -> sae.Autoencoder:
  """The architecture of the config at one shape."""
  s = config.sae
  shared = dict(
      d_in=d_in, width=width, pre_encoder_bias=s.pre_encoder_bias,
      matmul_dtype=s.matmul_dtype,
  )  # fmt: skip
  if config.collection.architecture == 'relu':
    return sae.ReLU(**shared)
  return sae.JumpReLU(
      **shared, bandwidth=s.bandwidth, initial_threshold=s.initial_threshold,
      log_threshold=s.log_threshold,
  )  # fmt: skip


def abstract_states(stacks: tuple[stack.Stack, ...], mesh: Mesh):
  """Shapes, dtypes and shardings of the states: what a checkpoint must hold."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    jax.eval_shape(lambda: tuple(s.init(jax.random.key(0)) for s in stacks)),
    tuple(s.shardings(mesh) for s in stacks),
  )


def members(
  config: ConfigDict,
  stacks: tuple[stack.Stack, ...],
  states: tuple[stack.State, ...],
  scales: Mapping[sites.Site, float],
  step: int,
  facts: Mapping[str, Any],
) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
  """The trained SAEs as (params, card): folded, they act on raw activations."""
  model = weights.read_config(config.lm.name, config.lm.checkpoint)
  _, groups = make_stacks(config, model)
  out = []
  for trained, state, group in zip(stacks, states, groups, strict=True):
    if jax.process_count() > 1:
      host = multihost_utils.process_allgather(state, tiled=True)
    else:
      host = jax.device_get(state)
    for i, member in enumerate(group):
      params = {
        name: np.asarray(value)
        for name, value in trained.member_params(host, i).items()
      }
      scale = scales[member.site]
      params = release.fold(
        params, scale, pre_encoder_bias=trained.module.pre_encoder_bias
      )
      card = {
        'name': member.name,
        'site': str(member.site),
        'model': config.lm.name,
        'architecture': member.architecture,
        'd_in': trained.module.d_in,
        'd_out': trained.module.d_in,
        'width': member.width,
        'sparsity': {'kind': member.penalty, 'value': member.sparsity},
        'seed': member.seed,
        'scale': scale,
        'steps': step,
        'tokens': step * config.train.batch,
        'text': facts['text'],
        'code': gemma_scope.__version__,
      }
      out.append((params, card))
  return out
