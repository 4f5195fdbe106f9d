"""Initialises training from the rows' covariance, or from released SAEs.

In a residual stream, a few directions carry most of the variance. Random
latents all follow these directions: the few that follow them most fire on every
row, and the others never fire. `whiten` rotates random directions u towards the
covariance of the rows,

  W_dec = unit(S^(p/2) u)    W_enc = S^(-p/2) u / (S^(p/2) u . S^(-p/2) u)

with S the covariance of the normalised rows and p = `initialise.whitening`: at
1 all latents read independent directions of whitened rows, at 0 this changes
nothing. (Whitening of the rows themselves, which changes the loss as well:
arXiv 2511.13981.)

With a release, each SAE of the run starts from its nearest SAE: of its own
layer (or the layer that the config names), then by width, then by L0. From a
wider SAE it takes the first latents (a Matryoshka prefix); if the released SAE
is narrower, the remaining latents start at random. The release may be of
another model (PT -> IT): the function of raw activations stays the same,
whatever the scales are.

A crosscoder or CLT starts from one single-layer SAE or transcoder for each
layer, as in Gemma Scope 2. From the first layer to the last, with F latents in
each:

  chosen[l]   the first F latents of layer l's SAE that are not masked
  mask        for each of them, in each later layer m, the latent j whose
              encoder reads most of it: argmax_j W_dec[l][i] . W_enc[m][:, j]
  W_dec[l, l] = W_dec[l][i]      W_dec[l, m] = max(cos, 0) W_dec[m][j]

A feature that several layers share thus becomes one latent of the first of
these layers, which also writes what its later copies wrote (cos is the cosine
of the argmax). The last line is our own; the paper does not give it. The L0 at
the start is above the target; train.initial_l0 and train.l0_steps lower it
gradually.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import release, sites, specs
from gemma_scope.release import table
from gemma_scope.release.formats import published
from gemma_scope.sae import fold
from gemma_scope.training import stack

_LEAST = 1e-4  # smallest eigenvalue of S, in means of all
_BLOCK = 1 << 12  # latents per block of products with a layer's encoders

Covariance = Callable[[sites.Site], np.ndarray]
Plan = list[list[tuple[release.Released, ...]]]


def plan(
  config: ConfigDict, groups: Sequence[Sequence[specs.SaeSpec]]
) -> Plan | None:
  """The released SAEs that each member starts from, chosen by their cards.

  Args:
    config: the run's config. `initialise.release` names releases or SAEs in any
      published format, separated by commas.
    groups: the SAEs of each stack.

  Returns:
    For each SAE of each stack, one released SAE per layer; or None if training
    starts at random.

  Raises:
    ConfigError: the release has no SAE that fits.
    ReleaseError: the path is not a release.
  """
  if not config.initialise.release:
    return None
  offered = published.open_all(config.initialise.release)
  return [[_sources(config, offered, m) for m in group] for group in groups]


def whiten(
  power: float,
  stacks: Sequence[stack.Stack],
  states: Sequence[stack.State],
  covariance: Covariance,
) -> tuple[stack.State, ...]:
  """States with latents that follow the covariance of what they read.

  Args:
    power: p, from 0 to 1.
    stacks: SAEs of one site each.
    states: at random initialisation, W_enc = W_dec.
    covariance: of a site's normalised rows, [D, D].
  """
  begun = []
  for stack_, state in zip(stacks, states, strict=True):
    roots = [_roots(covariance(site), power) for site in stack_.sites]
    root_ND, inverse_ND = (
      jnp.asarray(np.stack(of_sites)) for of_sites in zip(*roots, strict=True)
    )

    def whitened(W_FD, read_index, root=root_ND, inverse=inverse_ND):
      W_dec = jnp.matmul(W_FD, root[read_index], precision='highest')
      W_enc = jnp.matmul(W_FD, inverse[read_index], precision='highest')
      W_dec /= jnp.linalg.norm(W_dec, axis=-1, keepdims=True)
      return W_enc / jnp.sum(W_enc * W_dec, -1, keepdims=True), W_dec

    params_before = state.params
    shardings = params_before['W_enc'].sharding, params_before['W_dec'].sharding
    W_enc, W_dec = jax.jit(jax.vmap(whitened), out_shardings=shardings)(
      params_before['W_dec'], stack_.setting.reads
    )
    params = {**params_before, 'W_enc': W_enc, 'W_dec': W_dec}
    begun.append(state.replace(params=params))
  return tuple(begun)


def _roots(covariance_DD: np.ndarray, power: float):
  """S^(p/2) and S^(-p/2), float32."""
  values_D, vectors_DD = np.linalg.eigh(covariance_DD.astype(np.float64))
  values_D = np.maximum(values_D, _LEAST * max(values_D.mean(), 1e-30))
  return tuple(
    np.float32(vectors_DD * values_D ** (sign * power / 2) @ vectors_DD.T)
    for sign in (1, -1)
  )


def _sources(config, offered, member) -> tuple[release.Released, ...]:
  kind = 'sae' if member.sites == member.targets else 'transcoder'
  nearest = []
  for site in member.sites:
    layer = config.initialise.layer
    site = site if layer < 0 else sites.Site(layer, site.kind)
    fitting = [
      source
      for source in offered
      if source.card['type'] == kind and source.card['sites'] == [str(site)]
    ]
    if not fitting:
      available = sorted(
        {
          f'{source.card["type"]} {source.card["sites"][0]}'
          for source in offered
        }
      )
      raise config_lib.ConfigError(
        f'{member.name} needs a {kind} of {site} to start from, and '
        f'{config.initialise.release!r} has none; it has '
        f'{", ".join(available)}.'
      )
    nearest.append(min(fitting, key=lambda source: _distance(source, member)))
  return tuple(nearest)


def _distance(source: release.Released, member: specs.SaeSpec) -> tuple:
  """Sort key, nearest first: width, architecture, L0, seed, path."""
  card, width = source.card, member.width // max(member.layers, 1)
  l0 = table.value((source.metrics or {}).get('l0'))
  l0 = (
    card.get('sparsity', {}).get('value', member.sparsity) if l0 is None else l0
  )
  return (
    card['width'] < width,  # a wider SAE has all the latents
    abs(math.log(card['width'] / width)),
    card['architecture'] != member.architecture,
    abs(math.log(max(l0, 1e-9) / member.sparsity)),
    card.get('seed', member.seed) != member.seed,
    source.path,
  )


def start(
  chosen: Plan,
  stacks: Sequence[stack.Stack],
  groups: Sequence[Sequence[specs.SaeSpec]],
  states: Sequence[stack.State],
  normalisation: Mapping[sites.Site, fold.Normalisation],
) -> tuple[stack.State, ...]:
  """States with the parameters of the chosen SAEs.

  Args:
    chosen: what `plan` returned.
    stacks, groups: the collection.
    states: at random initialisation.
    normalisation: of each site, in this run.
  """
  begun = []
  for saes, group, state, sources in zip(
    stacks, groups, states, chosen, strict=True
  ):
    members = [
      _member(
        saes.module,
        member,
        [source.load() for source in of_member],
        {name: stacked[i] for name, stacked in state.params.items()},
        normalisation,
      )
      for i, (member, of_member) in enumerate(zip(group, sources, strict=True))
    ]
    params = {
      name: jax.device_put(
        np.stack([member_params[name] for member_params in members]),
        stacked.sharding,
      )
      for name, stacked in state.params.items()
    }
    begun.append(state.replace(params=params))
  return tuple(begun)


def _member(module, member, loaded, random, normalisation):
  """Trainable parameters of one member."""
  per_layer = []
  for params, site, target in zip(
    loaded, member.sites, member.targets, strict=True
  ):
    shapes = params['W_enc'].shape[0], params['W_dec'].shape[1]
    if shapes != (module.d_in, module.d_out):
      raise config_lib.ConfigError(
        f'{member.name} reads {module.d_in} wide activations and writes '
        f'{module.d_out}; the SAE to start from has {shapes}.'
      )
    if 'W_skip' in params and not module.skip:
      raise config_lib.ConfigError(
        f'{member.name} has no affine skip, but the transcoder to start from '
        'has one; set collection.skip.'
      )
    released = {name: p for name, p in params.items() if name != 'k'}
    per_layer.append(
      fold.unfold(
        released,
        [normalisation[site]],
        [normalisation[target]],
        pre_encoder_bias=module.pre_encoder_bias,
      )
    )
  if module.layers:
    params = crosswise(per_layer, module.latent_shape[1])
    return module.trainable(fold.fold_decoder_norm(params))
  (params,) = per_layer
  params = _first(params, module.width)
  if module.unit_decoder:
    # Decoders in files of other tools may have any norm, and the first update
    # would rescale them to 1.
    params = fold.fold_decoder_norm(params)
  params = module.trainable(params)
  return {
    name: _filled(name, value, random[name]) for name, value in params.items()
  }


def _first(params, width: int):
  """The first `width` latents."""
  slices = {
    'W_enc': np.s_[:, :width],
    'b_enc': np.s_[:width],
    'W_dec': np.s_[:width],
    'threshold': np.s_[:width],
  }
  return {name: p[slices.get(name, np.s_[:])] for name, p in params.items()}


def _filled(name: str, value: jax.Array, random: jax.Array) -> np.ndarray:
  """`value`, filled up with random latents to the member's width."""
  if value.shape == random.shape:
    return np.asarray(value)
  axis = 0  # latents' own arrays begin with F
  added = jnp.take(
    random, jnp.arange(value.shape[axis], random.shape[axis]), axis
  )
  return np.concatenate([np.asarray(value), np.asarray(added)], axis)


def crosswise(
  per_layer: Sequence[Mapping[str, np.ndarray]], latents: int
) -> dict[str, np.ndarray]:
  """Combines single-layer SAEs into a crosscoder or CLT (released form).

  Args:
    per_layer: normalised parameters for each layer, with equal d_in and d_out.
    latents: F, the number of latents of each layer.

  Returns:
    W_enc [L, D, F], b_enc [L, F], W_dec [L, F, L, D], b_dec [L, D],
    threshold [L, F] (and W_skip [L, D, D]), decoders of any norm.

  Raises:
    ConfigError: a layer has fewer than F latents.
  """
  layers = len(per_layer)
  for layer, layer_params in enumerate(per_layer):
    if layer_params['b_enc'].size < latents:
      raise config_lib.ConfigError(
        f'Layer {layer} of {layers} needs an SAE of at least {latents} latents '
        f'to start from; found {layer_params["b_enc"].size}.'
      )
  masked = [
    np.zeros(layer_params['b_enc'].size, bool) for layer_params in per_layer
  ]
  chosen = []
  W_dec = np.zeros(
    (layers, latents, layers, per_layer[0]['b_dec'].size), np.float32
  )
  for layer, layer_params in enumerate(per_layer):
    # Latents that an earlier layer's latent already represents come last.
    order = np.argsort(masked[layer], kind='stable')[:latents]
    chosen.append(np.sort(order))
    rows_FD = layer_params['W_dec'][chosen[layer]]
    W_dec[layer, :, layer] = rows_FD
    for later in range(layer + 1, layers):
      counterpart_F, cosine_F = _counterparts(
        rows_FD, per_layer[later]['W_enc']
      )
      masked[later][counterpart_F] = True
      W_dec[layer, :, later] = (
        cosine_F[:, None] * per_layer[later]['W_dec'][counterpart_F]
      )
  layers_chosen = list(zip(per_layer, chosen, strict=True))
  combined = {
    'W_enc': np.stack(
      [layer_params['W_enc'][:, index] for layer_params, index in layers_chosen]
    ),
    'b_enc': np.stack(
      [layer_params['b_enc'][index] for layer_params, index in layers_chosen]
    ),
    'W_dec': W_dec,
    'b_dec': np.stack([layer_params['b_dec'] for layer_params in per_layer]),
    'threshold': np.stack(
      [
        layer_params['threshold'][index]
        for layer_params, index in layers_chosen
      ]
    ),
  }
  if all('W_skip' in layer_params for layer_params in per_layer):
    combined['W_skip'] = np.stack(
      [layer_params['W_skip'] for layer_params in per_layer]
    )
  return combined


def _counterparts(rows_FD, W_enc) -> tuple[np.ndarray, np.ndarray]:
  """For each row, the index of the best matching encoder, and max(cos, 0)."""
  index, products = [], []
  for start in range(0, len(rows_FD), _BLOCK):
    product = rows_FD[start : start + _BLOCK] @ W_enc
    index.append(product.argmax(1))
    products.append(product.max(1))
  index_F, most_F = np.concatenate(index), np.concatenate(products)
  norms_F = np.linalg.norm(W_enc, axis=0)[index_F]
  norms_F *= np.linalg.norm(rows_FD, axis=1)
  return index_F, np.maximum(most_F / np.maximum(norms_F, 1e-12), 0)
