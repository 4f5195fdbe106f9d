"""Two models compared by crosscoders: what does one have that the other lacks?

  pipeline    trains a crosscoder of the two models for each site (lm.second)
  latents     relative norms and latent scaling on held-out text
              (`evaluation.latent_scaling`): shared, specific, or artefact
  ablations   specific latents, and shared ones that fire as often, taken out of
              either model (`evaluation.latent_ablation`): loss and KL

What is taken out of model m is beta f_j o_j: o_j is the latent's decoder in the
model that has it, and beta the fit of latent scaling to the error in m, so that
in the other model it is as much as that model's own activation holds.

diffing.json in the run's folder has the result. A command that was stopped
continues: the crosscoders that are done are in diffing/. The folder may be in a
bucket, and several processes may run the command as one job.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import config as config_lib
from gemma_scope import files, path_values, pipeline, release, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import outliers
from gemma_scope.evaluation import batches as batches_lib
from gemma_scope.evaluation import latent_ablation, latent_scaling
from gemma_scope.language_model import splice, weights
from gemma_scope.runtime import checksums, cluster, opened, remote
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import progress as progress_lib
from gemma_scope.sae import released
from gemma_scope.text import prepare, tokenizers
from gemma_scope.training import setup

RESULT = 'diffing.json'
_PARTS = 'diffing'

Report = Callable[[str], None]


def run(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  ablated: int = 8,
  report: Report = print,
) -> bool:
  """Trains, compares and prints; True when all is done.

  Args:
    config: with lm.second, and collection.type 'crosscoder'.
    workdir: the run's folder, or its address in a bucket (gs://, s3://); made
      if it does not exist.
    ablated: how many specific latents of each crosscoder to ablate.
    report: called with lines of text.
  """
  check(config)
  if not pipeline.run(config, workdir, report):
    return False
  with remote.folder(workdir) as local:
    return _run(config, local, ablated, report)


def _run(
  config: ConfigDict, workdir: pathlib.Path, ablated: int, report: Report
) -> bool:
  """`run` after the training, in the folder or in the copy of a bucket's."""
  if not cluster.first():
    report = lambda line: None  # noqa: E731
  path = workdir / RESULT
  try:
    with (
      opened.exclusive(workdir, report),
      interrupt_lib.Interrupt() as interrupt,
    ):
      with cluster.first_goes_ahead():
        remote.fetch(workdir)
      if not _exists(path):
        measure(config, workdir, ablated, interrupt.check, report)
  except interrupt_lib.Interrupted:
    report('stopped in the comparison; the same command continues')
    return False
  if cluster.first():
    report(table(files.read_json(path)))
    report(f'result   {remote.shown(path)}')
  return True


def _exists(path: pathlib.Path) -> bool:
  """Whether a file exists, as seen by the first process."""
  return checksums.from_all(path.exists())[0]


def check(config: ConfigDict) -> None:
  """Refuses a config that cannot run or compares nothing.

  Raises:
    ConfigError: one sentence.
  """
  if specs.second_model(config) is None:
    raise config_lib.ConfigError(
      'The config names no second model to compare with: set '
      'lm.second.checkpoint (or lm.second.name).'
    )
  config_lib.check(config)
  if not config.evaluation.sequences:
    raise config_lib.ConfigError(
      'Models are compared on held-out text: set evaluation.sequences above 0.'
    )


def measure(
  config: ConfigDict,
  workdir: pathlib.Path,
  ablated: int,
  poll: Callable[[], None],
  report: Report,
) -> None:
  """Compares on held-out text, by every crosscoder of the run's release."""
  saes = release.load_all(workdir / 'release')
  report('comparing on held-out text')
  tokenizer, store = prepare.open_text(config, workdir, report)
  keep = setup.special(tokenizer, store).keep
  text = pipeline.held_out(config, store, tokenizer.eos_id, keep)
  mesh, loaded = mesh_lib.make(config.mesh), []
  second = specs.second_model(config)
  for name, checkpoint in ((config.lm.name, config.lm.checkpoint), second):
    report(f'loading all of {name}')
    loaded.append(
      weights.load(name, checkpoint, dtype=config.lm.dtype, mesh=mesh)
    )
  models = latent_ablation.Models.of(loaded, mesh)
  comparison = Comparison(
    models, batches_lib.Batches(text, mesh), tokenizer, ablated, poll
  )
  results = []
  for number, sae in enumerate(saes):
    part_path = workdir / _PARTS / f'{number}.json'
    if not _exists(part_path):
      report(f'{number + 1} of {len(saes)}: {sae.name}')
      results.append(comparison.of(sae))
      if cluster.first():
        part_path.parent.mkdir(exist_ok=True)
        files.write_json(part_path, results[-1])
    elif cluster.first():  # which alone writes the whole
      results.append(files.read_json(part_path))
  comparison_result = {
    'first': config.lm.name,
    'second': second[0],
    'second_checkpoint': path_values.shortened_path(second[1]),
    'same_parameters': _same(models),
    'text': store.fingerprint,
    'clusters': comparison.batches.clusters,
    'clustered_by': comparison.batches.clustered_by,
    'code': gemma_scope.__version__,
    'crosscoders': results,
  }
  if cluster.first():
    files.write_json(workdir / RESULT, comparison_result, indent=1)
    remote.delete(workdir / _PARTS)


def _same(models: latent_ablation.Models) -> bool:
  """Whether the two models have equal parameters."""
  equal = jax.jit(
    lambda *pair: splice.everywhere(jnp.array_equal(*pair), models.mesh)
  )
  pairs = zip(*map(jax.tree.leaves, models.params), strict=True)
  return all(bool(equal(*pair)) for pair in pairs)


class Comparison:
  """Two models on a text, compared by one crosscoder after another."""

  def __init__(
    self,
    models: latent_ablation.Models,
    batches: batches_lib.Batches,
    tokenizer: tokenizers.Tokenizer,
    ablated: int,
    poll: Callable[[], None],
  ):
    self.models, self.batches, self.poll = models, batches, poll
    self._tokenizer, self._ablated = tokenizer, ablated

  def of(self, sae: release.Released) -> dict[str, Any]:
    """What one crosscoder says about the two models, plain for JSON."""
    params, wiring = sae.load(), sae.wiring
    scales = [sae.card['scales'][str(site)] for site in wiring.sites]
    decoders = latent_scaling.Decoders.of(params, scales)
    pair = latent_ablation.Pair(
      released.put(params, self.models.mesh),
      wiring,
      outliers.norm_bounds(sae.card),
    )
    total = self._sums(pair, decoders)
    scaled = latent_scaling.scaling(total, decoders)
    weight_F = total.square_F * np.square(decoders.own_FD).sum(-1)
    specific = np.flatnonzero(scaled.specific)
    heaviest = specific[np.argsort(-weight_F[specific])].tolist()
    controls = latent_scaling.alike(scaled, heaviest)
    specific_latents = heaviest[: self._ablated]
    ablated_latents = specific_latents + controls[: self._ablated]
    effects = self._ablate(pair, decoders, scaled, ablated_latents)
    ablated = [
      _latent(scaled, i, total.rows) | effect
      for i, effect in zip(ablated_latents, effects, strict=True)
    ]
    return {
      'name': sae.name,
      'site': str(pair.site),
      'width': sae.card['width'],
      **_summary(scaled, total),
      'exclusive': [
        _latent(scaled, i, total.rows) for i in np.flatnonzero(scaled.exclusive)
      ],
      'controls': controls,
      'ablations': {
        'specific': ablated[: len(specific_latents)],
        'shared': ablated[len(specific_latents) :],
      },
    }

  def _sums(self, pair, decoders) -> latent_scaling.Sums:
    """The sums of latent scaling over all of the text, float64."""
    total = None
    with progress_lib.Progress(
      len(self.batches), label='latents', status=lambda: 'reading both models'
    ) as progress:
      for done, batch in enumerate(self.batches, 1):
        self.poll()
        x = tuple(
          self.models.taps(m, batch.tokens_BT, (pair.site,))[pair.site]
          for m in (0, 1)
        )
        keep_BT = pair.keep(x, batch.keep_BT)
        sums = latent_scaling.sums(
          pair.params, decoders, x, keep_BT, self.models.mesh
        )
        sums = jax.tree.map(lambda array: np.asarray(array, np.float64), sums)
        total = sums if total is None else total.add(sums)
        if cluster.first():
          progress.update(done)
    return total

  def _ablate(self, pair, decoders, scaled, latents) -> list[dict[str, Any]]:
    """Effects of taking out the chosen latents."""
    if not latents:
      return []
    vectors_MKD = (
      scaled.beta_MF[:, latents, None]
      * decoders.scale_M[:, None, None]
      * decoders.own_FD[latents]
    ).astype(np.float32)
    ablation = latent_ablation.Ablation(
      self.models, pair, latents, vectors_MKD, self._show
    )
    done = 0
    with progress_lib.Progress(
      2 * len(latents) * len(self.batches), label='ablations'
    ) as progress:

      def tick():
        nonlocal done
        done += 1
        self.poll()
        if cluster.first():
          progress.update(done)

      return ablation.run(self.batches, tick)

  def _show(self, ids: np.ndarray) -> str:
    """Token ids as text, spaces as spaces."""
    return tokenizers.readable(''.join(self._tokenizer.pieces(ids)))


def _summary(scaled: latent_scaling.Scaling, total) -> dict[str, Any]:
  """How many latents are of which kind, and how nu is spread among them."""

  def by_model(mask_F) -> dict[str, int]:
    return {
      name: int((mask_F & (scaled.own_F == m)).sum())
      for m, name in enumerate(latent_scaling.MODELS)
    }

  def quartiles(nu_F, mask_F) -> list[float] | None:
    finite = nu_F[mask_F & np.isfinite(nu_F)]
    return (
      np.quantile(finite, (0.25, 0.5, 0.75)).tolist() if finite.size else None
    )

  edges = np.linspace(0, 1, 21)
  rho_F, fired = scaled.rho_F[scaled.fired], int(scaled.fired.sum())
  return {
    'tokens': int(total.rows),
    'l0': float(total.fired_F.sum() / total.rows),
    'fvu': dict(zip(latent_scaling.MODELS, total.fvu().tolist(), strict=True)),
    'fired': fired,
    'shared': int(scaled.shared.sum()),
    'exclusive_latents': by_model(scaled.exclusive),
    'shrunk': by_model(scaled.shrunk),
    'decoupled': by_model(scaled.decoupled),
    'specific': by_model(scaled.specific),
    'share_specific': float(scaled.specific.sum() / max(fired, 1)),
    'nu': {
      name: {
        'error': quartiles(scaled.nu_error_F, chosen_F),
        'reconstruction': quartiles(scaled.nu_reconstruction_F, chosen_F),
      }
      for name, chosen_F in (
        ('shared', scaled.shared),
        ('exclusive', scaled.exclusive),
      )
    },
    'relative_norms': np.histogram(rho_F, edges)[0].tolist(),
  }


def _latent(scaled, latent: int, rows: float) -> dict[str, Any]:
  """Figures of one latent."""
  number = lambda value: float(value) if np.isfinite(value) else None  # noqa: E731
  return {
    'latent': int(latent),
    'model': latent_scaling.MODELS[scaled.own_F[latent]],
    'relative_norm': float(scaled.rho_F[latent]),
    'nu_error': number(scaled.nu_error_F[latent]),
    'nu_reconstruction': number(scaled.nu_reconstruction_F[latent]),
    'specific': bool(scaled.specific[latent]),
    'frequency': float(scaled.fired_F[latent] / rows),
  }


def table(result: dict[str, Any]) -> str:
  """The result for a reader: latents by kind, then those that were ablated."""
  names = result['first'], result['second']
  lines = [
    f'first {names[0]}, second {names[1]}'
    + ' with the same parameters: a control' * result['same_parameters'],
    '',
    '| crosscoder | L0 | FVU first, second | fired | shared | exclusive | '
    'shrunk | decoupled | specific: first, second |',
    '|---|---:|---:|---:|---:|---:|---:|---:|---:|',
  ]
  for result_of_sae in result['crosscoders']:
    fvu, specific = result_of_sae['fvu'], result_of_sae['specific']
    lines.append(
      f'| {result_of_sae["name"]} | {result_of_sae["l0"]:.1f} | '
      f'{fvu["first"]:.3f}, {fvu["second"]:.3f} | {result_of_sae["fired"]:,} | '
      f'{result_of_sae["shared"]:,} | '
      f'{sum(result_of_sae["exclusive_latents"].values()):,} | '
      f'{sum(result_of_sae["shrunk"].values()):,} | '
      f'{sum(result_of_sae["decoupled"].values()):,} | {specific["first"]:,}, '
      f'{specific["second"]:,} |'
    )
  for result_of_sae in result['crosscoders']:
    lines += _ablations(result_of_sae)
  return '\n'.join(lines)


def _ablations(crosscoder: dict[str, Any]) -> list[str]:
  """Lines about the latents of one crosscoder that were ablated."""
  if not crosscoder['ablations']['specific']:
    return ['', f'{crosscoder["name"]}: no specific latent to ablate']
  lines = [
    '',
    f'{crosscoder["name"]}: KL in nats at tokens where a latent fires, without '
    'it',
    '',
    '| latent | in | fires on | nu error | nu reconstruction | KL first '
    '| KL second | on |',
    '|---|---|---:|---:|---:|---:|---:|---|',
  ]
  for kind, rows in crosscoder['ablations'].items():
    for row in rows:
      kl = [
        row['effect'][model]['kl']['value'] for model in latent_scaling.MODELS
      ]
      models = row['model'] if kind == 'specific' else 'both'
      examples = row['examples']
      text = repr(examples[0][1]) if examples else '-'
      lines.append(
        f'| {row["latent"]} | {models} | {row["frequency"]:.2%} | '
        f'{_shown(row["nu_error"])} | {_shown(row["nu_reconstruction"])} | '
        f'{_shown(kl[0], 4)} | {_shown(kl[1], 4)} | {text} |'
      )
  return lines


def _shown(value: float | None, digits: int = 2) -> str:
  return '-' if value is None else f'{value:.{digits}f}'
