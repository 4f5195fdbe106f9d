"""Our SAEs beside other trainers': the same rows in the same order, one judge.

One site of Gemma 3 270M. From the repository's root:

  export PYTHONPATH=.
  .venv/bin/python docs/comparison.py --stage=rows
  .venv/bin/python docs/comparison.py --stage=ours
  python docs/comparison_peers.py   # in an environment with torch
  .venv/bin/python docs/comparison.py --stage=score
  .venv/bin/python docs/comparison_model.py --stage=losses
  .venv/bin/python docs/comparison_model.py --stage=probing

  rows     activations to disk (chunks of 69,000 rows), and as NumPy for peers:
           train (450 batches of 256, from chunks 0 and 1), validation (what the
           run leaves of chunk 1), test (chunk 2)
  ours     the variants of `OURS`
  score    FVU, L0 and silent latents of every SAE, on validation and test rows

Outlier rows are left out for all. Every SAE is scored as it was trained (the k
largest latents of a row, or the threshold that it kept), and with its
thresholds times the one factor that gives the target L0 on the last 64 batches
of training, which is what is compared.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

WIDTH, TARGETS, STEPS, BATCH = 4096, (16, 32, 64), 450, 256
CHUNKS, VALIDATION, TEST = 3, 64, 32  # batches but the first
BEST = {
  'train.learning_rate': 3e-3,
  'objective.active_set': True,
  'train.refit_decoders': True,
  'train.closing_batches': 128,  # of the 180 of its last chunk
}
AT_64 = {'collection.sparsity': (64.0,)}
MOMENTUM = BEST | {'train.b1': 0.9, 'train.learning_rate': 4e-3}
NULLS = {  # half as long; nulls cannot be whitened
  'train.learning_rate': 3e-3,
  'initialise.whitening': 0.0,
  'train.steps': STEPS // 2,
  'train.warm_up': 8,
  'train.decay': STEPS // 6,
  'train.l0_steps': STEPS // 6,
  'collection.sparsity': (32.0,),
  'collection.nulls': (
    'frozen_decoder',
    'soft_frozen_decoder',
    'frozen_encoder',
  ),
}
# Name -> changes to the recipe of configs/gemma3_270m.py. What stands before
# the first space are different trainers; of each the variant of lowest FVU on
# validation rows is compared, at each L0. After ' + ': more SAEs of a variant.
OURS = {
  'best 0.003': BEST,
  'best 0.004': BEST | AT_64 | {'train.learning_rate': 4e-3},
  'best 0.003 momentum': MOMENTUM | AT_64 | {'train.learning_rate': 3e-3},
  'best 0.002 momentum': MOMENTUM | AT_64 | {'train.learning_rate': 2e-3},
  'best 0.004 momentum': MOMENTUM | AT_64,
  'best 0.004 momentum + lower L0': (
    MOMENTUM | {'collection.sparsity': (16.0, 32.0)}
  ),
  'best 0.004 momentum + seeds': MOMENTUM | {'collection.seeds': (1, 2)},
  'best 0.006 momentum': MOMENTUM | AT_64 | {'train.learning_rate': 6e-3},
  'best 0.003 constant L0': (
    BEST | AT_64 | {'train.initial_l0': 0.0, 'train.l0_steps': 0}
  ),
  'nulls': NULLS,
  'nulls + seeds': NULLS | {'collection.seeds': (1, 2)},
}


class Comparison:
  """The folder of a comparison at one site."""

  def __init__(self, out: str, site: str, source: str):
    from gemma_scope import sites

    self.out, self.site = pathlib.Path(out), sites.parse(site)
    self.source = source
    self.folder = self.out / f'{self.site.kind}.{self.site.layer}'
    self.folder.mkdir(parents=True, exist_ok=True)

  def config(self, changes):
    """The recipe of configs/gemma3_270m.py at this site."""
    from configs import gemma3_270m

    config = gemma3_270m.get_config(f'layers={self.site.layer};widths={WIDTH}')
    config.collection.sites = (self.site.kind,)
    config.collection.sparsity = tuple(map(float, TARGETS))
    config.text.source = self.source
    config.text.store = str(self.out / 'harvest' / 'tokens')
    config.activations.store = str(self.out / 'store')
    config.activations.chunk_rows = 2**16
    config.activations.dtype = 'bfloat16'
    config.activations.lm_batch = 16
    config.evaluation.sequences = 0
    for name in ('warm_up', 'decay', 'l0_steps'):  # shares of the run
      config.train[name] = config.train[name] * STEPS // config.train.steps
    config.train.steps, config.train.batch = STEPS, BATCH
    config.update_from_flattened_dict(changes)
    return config

  def card(self, name: str) -> dict:
    """What evaluation reads of a card."""
    with np.load(self.folder / 'normalisation.npz') as file:
      bound, d_in = float(file['norm_bound']), len(file['centre'])
    site = str(self.site)
    return {
      'name': name,
      'type': 'sae',
      'sites': [site],
      'targets': [site],
      'd_in': d_in,
      'd_out': d_in,
      'width': WIDTH,
      'architecture': 'jumprelu',
      'outliers': {'max_norm': 4.0, 'norm_bounds': {site: bound}},
    }

  def last_rows(self) -> np.ndarray:
    """The last 64 batches of training, on which L0 is set."""
    rows_KBD = np.load(self.folder / 'train.npy', mmap_mode='r')
    return rows_KBD[STEPS - 64 : STEPS].reshape(-1, rows_KBD.shape[-1])


def make_rows(comparison: Comparison) -> None:
  """Harvests where there is no store, and writes the rows as NumPy."""
  from gemma_scope import mesh as mesh_lib
  from gemma_scope.activations import chunks as chunks_lib
  from gemma_scope.activations import store as store_lib

  out, folder, site = comparison.out, comparison.folder, comparison.site
  if not (out / 'store' / 'manifest.json').exists():
    harvest = [
      sys.executable,
      'launch/harvest.py',
      f'--config=configs/gemma3_270m.py:layers={site.layer}',
      '--config.collection.sites=resid_post,mlp_out',
      '--config.activations.chunk_rows=65536',
      '--config.activations.dtype=bfloat16',
      '--config.activations.lm_batch=16',
      f'--config.text.source={comparison.source}',
      f'--workdir={out}/harvest',
      f'--out={out}/store',
      f'--chunks={CHUNKS}',
    ]
    subprocess.run(harvest, check=True)
  config = comparison.config({})
  activations, mesh = config.activations, mesh_lib.make(config.mesh)
  source = store_lib.StoreSource(out / 'store', [site], BATCH)
  chunks = chunks_lib.Chunks(
    source, config.seed, mesh, max_norm=activations.max_norm
  )
  chunk_rows = []
  for index in range(CHUNKS):
    chunk = chunks.load(index)
    if index == 0:
      normalisation = chunks_lib.measure(
        chunk, chunks.norm_bounds, activations.centre, activations.scale
      )[site]
      np.savez(folder / 'normalisation.npz', **normalisation._asdict())
    chunk_rows.append(np.asarray(chunk.rows[site], np.float32))
  x_KBD = np.concatenate(chunk_rows[:-1])
  np.save(folder / 'train.npy', x_KBD[:STEPS])
  validation_RD = np.concatenate(x_KBD[STEPS : STEPS + VALIDATION])
  np.save(folder / 'validation.npy', validation_RD)
  np.save(folder / 'test.npy', np.concatenate(chunk_rows[-1][:TEST]))


def train_ours(comparison: Comparison, names: list[str]) -> None:
  """Each variant at all of its L0 and seeds, in one run."""
  from gemma_scope import pipeline

  for name in names or OURS:
    folder = comparison.folder / 'ours' / name.replace(' ', '_')
    config = comparison.config(OURS[name])
    began = time.perf_counter(), time.process_time()
    if not pipeline.run(config, folder):
      return  # stopped on request
    seconds_path = folder / 'seconds.json'
    if not seconds_path.exists():
      seconds = time.perf_counter() - began[0], time.process_time() - began[1]
      seconds_path.write_text(
        json.dumps({'wall': seconds[0], 'cpu': seconds[1]}) + '\n'
      )


def all_saes(comparison: Comparison):
  """Yields (facts, parameters) of every SAE there is."""
  from gemma_scope import release, specs

  for name in OURS:
    path = comparison.folder / 'ours' / name.replace(' ', '_') / 'release'
    for sae in release.load_all(path) if path.exists() else ():
      card = sae.card
      null = specs.null_of(card['architecture'])
      trainer, _, variant = name.partition(' + ')[0].partition(' ')
      facts = {
        'trainer': '_'.join(filter(None, ('ours', trainer, null))),
        'variant': variant,
        'target': int(card['sparsity']['value']),
        'seed': card['seed'],
      }
      yield facts, dict(sae.load())
  for path in sorted((comparison.folder / 'peers').glob('*.json')):
    facts = json.loads(path.read_text())
    if facts['rows'] == 'own':
      facts['trainer'] += '_own'
    with np.load(path.with_suffix('.npz')) as file:
      params = dict(file)
    params['threshold'] = np.full(WIDTH, params['threshold'], np.float32)
    yield facts | {'variant': f'{facts["rate"]:g}'}, params


def with_target_l0(params, x_RD: np.ndarray, target: int):
  """The parameters with thresholds that give the target L0 on these rows.

  All thresholds times one factor; one threshold for all where they are 0.
  """
  theta_F = params['threshold']
  theta_F = theta_F if theta_F.min() > 0 else np.ones_like(theta_F)
  z = ((x_RD @ params['W_enc'] + params['b_enc']) / theta_F).reshape(-1)
  index = z.size - target * len(x_RD)
  factor = max(np.partition(z, index)[index], 0)
  return params | {'threshold': np.float32(factor) * theta_F}


def judge(params, x_RD: np.ndarray) -> dict[str, float]:
  """FVU, mean L0 and the share of latents that never fire on these rows."""
  import jax

  from gemma_scope import sae

  @jax.jit
  def of_batch(params, x_BD):
    f_BF = sae.encode(params, x_BD)
    error_BD = x_BD - sae.decode(params, f_BF)
    return (error_BD**2).sum(), (f_BF > 0).sum(0)

  error, fired_F = 0.0, 0
  for start in range(0, len(x_RD), 2048):
    batch_error, batch_fired_F = of_batch(params, x_RD[start : start + 2048])
    error, fired_F = error + float(batch_error), fired_F + batch_fired_F
  variance = np.square(x_RD - x_RD.mean(0)).sum(dtype=np.float64)
  return {
    'fvu': error / variance,
    'l0': float(fired_F.sum()) / len(x_RD),
    'never': float((fired_F == 0).mean()),
  }


def name_of(facts) -> str:
  return '{trainer} {variant} {target} {seed}'.format(**facts)


def score(comparison: Comparison) -> None:
  """Scores what is not scored yet -> scores.json; prints the tables."""
  folder = comparison.folder
  path = folder / 'scores.json'
  scores = json.loads(path.read_text()) if path.exists() else {}
  test_RD = np.load(folder / 'test.npy')
  validation_RD, last_RD = np.load(folder / 'validation.npy'), None
  for facts, params in all_saes(comparison):
    name = name_of(facts)
    if name in scores:
      continue
    last_RD = comparison.last_rows() if last_RD is None else last_RD
    as_trained = dict(params)
    if facts['trainer'].endswith('_topk') and 'batch' not in facts['trainer']:
      as_trained['k'] = np.int32(facts['target'])
    params = with_target_l0(params, last_RD, facts['target'])
    scores[name] = facts | {
      'validation': judge(params, validation_RD),
      'as_trained': judge(as_trained, test_RD),
      'at_target': judge(params, test_RD),
    }
    path.write_text(json.dumps(scores, indent=1) + '\n')
  for name, s in scores.items():
    cells = [
      '{fvu:.4f} L0 {l0:.1f} never {never:.1%}'.format(**s[key])
      for key in ('validation', 'as_trained', 'at_target')
    ]
    print(f'{name}: {"; ".join(cells)}; {s.get("cpu_seconds", "")}')
  best = best_variants(scores)
  table = collections.defaultdict(list)
  for s in scores.values():
    if s['variant'] == best[s['trainer'], s['target']]:
      table[s['target'], s['trainer']].append(s['at_target'])
  for (target, trainer), figures in sorted(table.items()):
    cells = [spread([f[k] for f in figures]) for k in ('fvu', 'l0', 'never')]
    print(f'| {target} | {trainer} {best[trainer, target]} | {len(figures)} | '
          f'{" | ".join(cells)} |')  # fmt: skip


def spread(values) -> str:
  """Mean, and in brackets least and most, with four digits."""
  low, high = min(values), max(values)
  return f'{np.mean(values):.4g} [{low:.4g}, {high:.4g}]'


def best_variants(scores) -> dict[tuple[str, int], str]:
  """(trainer, target) -> the variant of lowest FVU on validation rows."""
  best: dict = {}
  for s in scores.values():
    if s['seed'] == 0:
      key = s['trainer'], s['target']
      candidate = s['validation']['fvu'], s['variant']
      best[key] = min(best.get(key, candidate), candidate)
  return {key: variant for key, (_, variant) in best.items()}


def chosen(comparison: Comparison, trainers: str = ''):
  """Yields facts and parameters, at the target L0, of what is compared."""
  scores = json.loads((comparison.folder / 'scores.json').read_text())
  best, last_RD = best_variants(scores), comparison.last_rows()
  for facts, params in all_saes(comparison):
    key = facts['trainer'], facts['target']
    if trainers and facts['trainer'] not in trainers.split(','):
      continue
    if facts['variant'] == best.get(key):
      yield facts, with_target_l0(params, last_RD, facts['target'])


def parser(text: str, stages) -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(description=text.partition('\n')[0])
  made.add_argument('--stage', choices=list(stages), required=True)
  made.add_argument('--out', default='runs/comparison')
  made.add_argument('--site', default='resid_post/9')
  made.add_argument('--source', default='prose', help='text, as text.source')
  return made


def main() -> None:
  flags = parser(__doc__, ('rows', 'ours', 'score'))
  flags.add_argument(
    '--variants', default='', help='of ours, separated by commas; empty: all'
  )
  given = flags.parse_args()
  comparison = Comparison(given.out, given.site, given.source)
  if given.stage == 'rows':
    make_rows(comparison)
  elif given.stage == 'ours':
    train_ours(comparison, [v for v in given.variants.split(',') if v])
  else:
    score(comparison)


if __name__ == '__main__':
  main()
