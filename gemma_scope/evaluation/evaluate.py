"""Metrics of SAEs on held-out text: a whole collection in one pass.

  L0          mean number of latents with f > 0, of all layers
  delta loss  loss with y_hat in the place of y - clean loss, nats a token
  KL          of the next token's distribution, clean from spliced, nats
  FVU         sum |y - y_hat|^2 / sum |y - m|^2,  m the mean vector
  recovered   (L_ablated - L_sae) / (L_ablated - L_clean); ablated: y is 0, or m

y is the activation at an SAE's target: the activation that it reads, unless it
is a transcoder. For an SAE with several targets, a figure is the mean over the
targets, each replaced on its own. Two more FVUs show what the first one depends
on: `fvu_inliers` leaves out rows of outlying norm (by the card's rule, or by
one measured here) and takes the mean of the others; `fvu_rest` leaves out the
few dimensions of largest variance.

Figures are over the tokens that count: not BOS, EOS or padding (arXiv
2408.05147, section 4), and not a chat's user turn. At other tokens y is not
replaced: BOS is unlike all others, and replacing it would cost more than all
others together. Tokens that are outliers by the rule of an SAE's card are not
replaced either, by the SAE and by its controls, because it was not trained on
them. A loss counts if the token it is computed at and the token it predicts
both count.

Two passes without logits come first: one over all of the text, for means and
variances, and one over the text that the controls are fitted on. Then, for each
batch of sequences:

  clean pass   -> x and y at every site, the residual stream before each target
  replacements -> y_hat of each SAE and control, and 0 and m at each target:
                  L0, errors, the last residual stream from the target on
  losses       -> of several such streams at once, beside the clean one

Each control goes through the model on every third batch only, so that three
controls cost as much as one; their intervals are wider for it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemma_scope import files, release, sites
from gemma_scope.activations import outliers
from gemma_scope.evaluation import batches as batches_lib
from gemma_scope.evaluation import centres, controls, estimates, passes
from gemma_scope.evaluation.replacements import Replacement, ablation, measure
from gemma_scope.language_model import gemma as lm
from gemma_scope.release import sae_folder
from gemma_scope.sae import released

_SAMPLE_BYTES = 2**31  # activations of the sample in memory at once
_DECODER_BYTES = 2**32  # least-squares decoders of all SAEs together


def evaluate(
  gemma: lm.Gemma,
  params: lm.Params,
  members: Sequence[release.Released],
  text: batches_lib.Text,
  seed: int = 0,
  watch: batches_lib.Watch = batches_lib.Watch(),  # noqa: B008  frozen
) -> dict[str, dict[str, Any]]:
  """Measures every SAE, and three controls beside each.

  Args:
    gemma, params: the language model; sharded parameters are used as they lie.
    members: the SAEs; of a card only `type`, `sites`, `targets` and `outliers`
      are read.
    text: what to evaluate on.
    seed: of the controls.
    watch: progress and interruption.

  Returns:
    name -> metrics, plain numbers for JSON. A figure is {'value', 'low',
    'high', 'tokens'}, with a 95 % interval over `clusters` documents or
    sequences (`clustered_by`): l0, delta_loss, kl, fvu, fvu_inliers, fvu_rest,
    fvu_elementwise (squared error / variance of all elements around one scalar
    mean, the tutorials'), loss_recovered_zero, loss_recovered_mean, kl_score
    (1 - KL / kl_zero, that of the zero ablation), clean_loss, l1, cosine,
    norm_ratio.
    `dead` and `dense` are the shares of latents that fired on none, and on over
    10 %, of `tokens` tokens. `outliers` has the rule and how many rows it left
    out, `largest_dimensions` the dimensions left out of fvu_rest with the share
    of the variance that each carries. `controls` has l0, delta_loss, kl and the
    FVUs of each control, `control` the strongest of each figure. Where several
    layers are written, `by_target` lists the figures of each.

  Raises:
    ValueError: an SAE does not fit the sites that its card names, or the text
      is malformed.
  """
  model = centres.Model(gemma, params, _mesh_of(params), watch)
  saes = _members(gemma.config, members, model.mesh)
  batches = batches_lib.Batches(text, model.mesh)
  wirings = {sae.name: sae.wiring for sae in saes}
  cards = {sae.name: sae.card for sae in members}
  references = centres.measure(model, wirings, cards, batches)
  rule_of = references.rule_of
  for sae in saes:
    sae.rule, sae.spares = rule_of[sae.name]
  controls_of = _controls(model, saes, references, text, seed)

  targets = sorted({target for sae in saes for target in sae.wiring.targets})
  zeros = {target: ablation(target, 'zero', 0.0) for target in targets}
  means = {
    target: ablation(target, 'm', references.centres[target].mean_D)
    for target in targets
  }
  for target in targets:  # as the SAEs there, if these agree
    rules = {rule_of[sae.name] for sae in saes if target in sae.wiring.targets}
    if len(rules) == 1:
      for replacement in (zeros[target], means[target]):
        replacement.rule, replacement.spares = next(iter(rules))
  queue = [*zeros.values(), *means.values()]
  for sae in saes:
    queue += [sae, *controls_of[sae].values()]
  watch.says('measuring each SAE and its controls')
  measure(model, batches, references, queue)

  metrics = {}
  for sae in saes:
    metrics[sae.name] = _metrics(sae, controls_of[sae], zeros, means) | {
      'sequences': batches.size,
      'clusters': batches.clusters,
      'clustered_by': batches.clustered_by,
      **references.describe(sae.name, sae.wiring.targets),
    }
    metrics[sae.name]['outliers']['tokens'] = int(
      (sae.tally['tokens'] - sae.tally['inliers']).sum()
    )
  _add_nulls(metrics, members)
  return metrics


def _metrics(
  sae: Replacement,
  twins: Mapping[str, Replacement],
  zeros: Mapping[sites.Site, Replacement],
  means: Mapping[sites.Site, Replacement],
) -> dict[str, Any]:
  """Figures of an SAE and of its controls, from what was tallied."""
  targets = sae.wiring.targets
  names = list(map(str, targets)) if sae.wiring.several else []

  def ablated(by_target, name):
    return np.concatenate(
      [by_target[target].tally[name] for target in targets], 1
    )

  ablations = {
    'zero': ablated(zeros, 'delta'),
    'mean': ablated(means, 'delta'),
    'zero_kl': ablated(zeros, 'kl'),
  }
  control_figures = {
    kind: estimates.fidelity(twin.tally, names) for kind, twin in twins.items()
  }
  return {
    **estimates.of_sae(sae.tally, sae.fired_F, ablations, names),
    'control': estimates.strongest(control_figures),
    'controls': control_figures,
  }


def _add_nulls(
  metrics_of: dict[str, dict[str, Any]], members: Sequence[release.Released]
) -> None:
  """Adds to each SAE the figures of its nulls: SAEs with frozen parts."""

  def key_of(card):
    null = card.get('null') or ''
    fields = {
      field: card.get(field)
      for field in ('sites', 'targets', 'width', 'sparsity')
    }
    trained = str(card.get('architecture')).removeprefix(f'{null}_')
    return null, repr((fields, trained, card.get('seed')))

  nulls: dict[str, dict] = collections.defaultdict(dict)
  for sae in members:
    null, key = key_of(sae.card)
    if null:
      metrics = metrics_of[sae.name]
      nulls[key][null] = {
        figure: metrics[figure] for figure in ('l0', *estimates.ERRORS)
      }
  for sae in members:
    null, key = key_of(sae.card)
    if not null and key in nulls:
      metrics_of[sae.name]['nulls'] = nulls[key]


def _mesh_of(params: lm.Params) -> Mesh | None:
  sharding = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _members(
  config: lm.Config, members, mesh: Mesh | None
) -> list[Replacement]:
  """The SAEs, checked; their parameters on the devices when they fit."""
  if not members:
    raise ValueError('There is nothing to evaluate: no SAE was given.')
  for name, count in collections.Counter(sae.name for sae in members).items():
    if count > 1:
      raise ValueError(f'{count} of the SAEs are named {name}.')
  loaded = [(sae.name, sae.load(), sae.card) for sae in members]
  loads = released.on_demand([arrays for _, arrays, _ in loaded], mesh)
  saes = []
  for (name, arrays, card), load in zip(loaded, loads, strict=True):
    wiring = _fitting_wiring(config, name, arrays, card)
    for key, array in arrays.items():
      if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f'{name} has NaN or infinity in {key}.')
    saes.append(Replacement(wiring, name, load))
  return saes


def _fitting_wiring(config: lm.Config, name: str, arrays, card) -> sites.Wiring:
  """What an SAE reads and writes, if its parameters fit this model there."""
  wiring = sites.wiring_of(card)
  wiring.check_one_model(name)
  for site in (*wiring.sites, *wiring.targets):
    site.check(config)
  known = {*sae_folder.KEYS, *sae_folder.OPTIONAL_KEYS}
  if not set(sae_folder.KEYS) <= set(arrays) <= known:
    raise ValueError(
      f'{name} has the parameters {", ".join(sorted(arrays))}; expected '
      f'{", ".join(sae_folder.KEYS)} and at most '
      f'{", ".join(sae_folder.OPTIONAL_KEYS)}.'
    )
  sizes = {
    'd_in': wiring.sites[0].width(config),
    'd_out': wiring.targets[0].width(config),
    'width': arrays['b_enc'].size,
  }
  shapes = {key: array.shape for key, array in arrays.items()}
  try:
    sae_folder.check_shapes(
      shapes, {**card, **sizes, 'affine': 'W_skip' in arrays}
    )
  except files.Refused as error:
    raise ValueError(
      f'{name} {error}, as in {config.name} at {wiring}: is it an SAE of '
      'another model or site?'
    ) from None
  return wiring


def _controls(
  model: centres.Model,
  saes: Sequence[Replacement],
  references: centres.References,
  text: batches_lib.Text,
  seed: int,
) -> dict[Replacement, dict[str, Replacement]]:
  """SAE -> its controls by kind, of its mean L0 on the rows they are fitted on.

  Rows that are outliers by an SAE's own card are left out, as in its training.
  Least-squares decoders are left out once those of the SAEs before would take
  too much memory.
  """
  fit = text
  if text.fit_NT is not None:
    fit = dataclasses.replace(
      text, sequences_NT=text.fit_NT, documents_NT=None, fit_NT=None
    )
  samples = list(batches_lib.Batches(fit, model.mesh).sample())
  size = sum(batch.keep_BT.size for batch in samples)
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for sae in saes:
    width = sae.params()['b_enc'].size
    groups[sae.wiring][width, sae.rule if sae.spares else None].append(sae)
  twins, room = {}, _DECODER_BYTES
  for sites_read, wirings in _fitting(
    sorted(groups, key=sites.wiring_order), model.gemma.config, 4 * size
  ):
    model.watch.says('reading the rows that controls are fitted on')
    all_rows = _rows(model, samples, sites_read)
    for wiring in wirings:
      for (width, rule), group in groups[wiring].items():
        model.watch.says(
          f'fitting controls: {len(twins)} of {len(saes)} SAEs have theirs'
        )
        model.watch.poll()
        rows = all_rows
        if rule is not None:
          outlier_R = outliers.is_outlier(rows, references.bounds[rule])
          if outlier_R.all():
            raise ValueError(
              f'By the rule of the card of {group[0].name} all tokens of this '
              'text are outliers: was it trained on another model?'
            )
          rows = {site: x_RD[~outlier_R] for site, x_RD in rows.items()}
        x = controls.beside(rows, wiring.sites, wiring.several)
        l0 = [controls.mean_l0(sae.params(), x, model.mesh) for sae in group]
        room -= len(group) * controls.decoder_bytes(wiring, width, rows)
        kinds = [
          kind
          for kind in controls.KINDS
          if kind != 'least_squares' or room >= 0
        ]
        shape = controls.Shape(wiring, width, seed)
        fitted = controls.fit(shape, l0, rows, model.mesh, kinds)
        for sae, by_kind in zip(group, fitted, strict=True):
          twins[sae] = {
            kind: _control(sae, kind, params)
            for kind, params in by_kind.items()
          }
  return twins


def _control(sae: Replacement, kind: str, params) -> Replacement:
  """A control of this SAE: it replaces the tokens that the SAE replaces."""
  return Replacement(
    sae.wiring,
    f'{sae.name} {kind}',
    params,
    rule=sae.rule,
    spares=sae.spares,
    turn=controls.KINDS.index(kind),
  )


def _rows(
  model: centres.Model, samples, sites_read
) -> dict[sites.Site, np.ndarray]:
  """Raw activations [R, D] of the tokens that count, on the host."""
  rows_by_site = collections.defaultdict(list)
  for batch in samples:
    taps = model.taps(batch.tokens_BT, sites_read)
    taps, keep = jax.device_get(
      passes.fetched(
        ({site: taps[site] for site in sites_read}, batch.keep_BT), model.mesh
      )
    )
    for site, x_BTD in taps.items():
      rows_by_site[site].append(x_BTD[keep > 0])
  return {site: np.concatenate(rows) for site, rows in rows_by_site.items()}


def _fitting(
  ordered: Sequence[sites.Wiring], config, bytes_a_value: int
) -> Iterator[tuple[tuple[sites.Site, ...], list[sites.Wiring]]]:
  """Groups of wirings whose activations fit in `_SAMPLE_BYTES`; their sites."""
  sites_read, group = set(), []
  for wiring in ordered:
    extended = sites_read | {*wiring.sites, *wiring.targets}
    size = bytes_a_value * sum(site.width(config) for site in extended)
    if group and size > _SAMPLE_BYTES:
      yield tuple(sorted(sites_read)), group
      extended, group = {*wiring.sites, *wiring.targets}, []
    sites_read = extended
    group.append(wiring)
  yield tuple(sorted(sites_read)), group
