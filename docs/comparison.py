"""Our SAEs beside other trainers': the same rows in the same order, one judge.

One site of Gemma 3 270M. From the repository's root:

  export PYTHONPATH=.
  .venv/bin/python docs/comparison.py --stage=rows
  .venv/bin/python docs/comparison.py --stage=ours
  python docs/comparison_peers.py --seeds=3   # in an environment with torch
  .venv/bin/python docs/comparison.py --stage=score
  .venv/bin/python docs/comparison.py --stage=losses

  rows     activations to disk (chunks of 69,000 rows), and as NumPy for peers:
           train (900 batches of 256, from chunks 0 to 3), validation (what the
           run leaves of chunk 3), test (chunk 4)
  ours     the recipe of configs/gemma3_270m.py, and its best variant
  score    FVU, L0 and silent latents of every SAE, on the test rows
  losses   delta loss and KL of the chosen ones, on held-out documents

Outlier rows are left out for all. A peer's SAE is scored as it was trained (the
k largest latents of a row, or the threshold that it kept), and with the one
threshold that gives the target L0 on its last 64 batches of training, which is
how ours are released.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

WIDTH, TARGETS, STEPS, BATCH = 4096, (16, 32, 64), 450, 256
CHUNKS, TRAIN, VALIDATION, TEST = 5, 900, 64, 32  # batches but the first
BEST = {
  'objective.active_set': True,
  'train.refit_decoders': True,
  'train.closing_batches': 128,  # of the 180 of its last chunk
}
# Name -> learning rate, changes to the recipe.
OURS = {
  'recipe 0.002': (2e-3, {'collection.seeds': (0, 1)}),
  'recipe 0.003': (3e-3, {}),
  'recipe 0.004': (4e-3, {}),
  'best 0.002': (2e-3, BEST),
  'best 0.003': (3e-3, BEST),
}


class Comparison:
  """The folder of a comparison at one site."""

  def __init__(self, out: str, site: str, source: str):
    from gemma_scope import sites

    self.out, self.site = pathlib.Path(out), sites.parse(site)
    self.source = source
    self.folder = self.out / f'{self.site.kind}.{self.site.layer}'
    self.folder.mkdir(parents=True, exist_ok=True)

  def config(self, **changes):
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
  config = comparison.config()
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
  np.save(folder / 'train.npy', x_KBD[:TRAIN])
  validation_RD = np.concatenate(x_KBD[TRAIN : TRAIN + VALIDATION])
  np.save(folder / 'validation.npy', validation_RD)
  np.save(folder / 'test.npy', np.concatenate(chunk_rows[-1][:TEST]))


def train_ours(comparison: Comparison) -> None:
  """Each variant at all L0 and seeds, in one run."""
  from gemma_scope import pipeline

  for name, (rate, changes) in OURS.items():
    folder = comparison.folder / 'ours' / name.replace(' ', '_')
    config = comparison.config(**changes)
    config.train.learning_rate = rate
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
  from gemma_scope import release

  for name, (rate, _) in OURS.items():
    path = comparison.folder / 'ours' / name.replace(' ', '_') / 'release'
    for sae in release.load_all(path) if path.exists() else ():
      card = sae.card
      target = int(card['sparsity']['value'])
      yield (
        {
          'trainer': f'ours_{name.partition(" ")[0]}',
          'target': target,
          'rows': 'ours',
          'rate': rate,
          'seed': card['seed'],
        },
        dict(sae.load()),
      )
  for path in sorted((comparison.folder / 'peers').glob('*.json')):
    facts = json.loads(path.read_text())
    with np.load(path.with_suffix('.npz')) as file:
      params = dict(file)
    params['threshold'] = np.full(WIDTH, params['threshold'], np.float32)
    yield facts, params


def with_target_l0(params, x_RD: np.ndarray, target: int):
  """The parameters with the one threshold of the target L0 on these rows."""
  z = (x_RD @ params['W_enc'] + params['b_enc']).reshape(-1)
  index = z.size - target * len(x_RD)
  theta = max(np.partition(z, index)[index], 0)
  return params | {'threshold': np.full(WIDTH, theta, np.float32)}


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


def score(comparison: Comparison) -> None:
  """Scores what is not scored yet -> scores.json; prints a table."""
  folder = comparison.folder
  path = folder / 'scores.json'
  scores = json.loads(path.read_text()) if path.exists() else {}
  test_RD = np.load(folder / 'test.npy', mmap_mode='r')[: TEST * BATCH]
  last_RD = np.load(folder / 'train.npy', mmap_mode='r')[STEPS - 64 : STEPS]
  last_RD = last_RD.reshape(-1, last_RD.shape[-1])
  validation_RD = np.load(folder / 'validation.npy', mmap_mode='r')
  for facts, params in all_saes(comparison):
    name = '{trainer} {rows} {target} {rate:g} {seed}'.format(**facts)
    if name in scores:
      continue
    ours = facts['trainer'].startswith('ours')
    as_trained = dict(params)
    if facts['trainer'].endswith('_topk') and 'batch' not in facts['trainer']:
      as_trained['k'] = np.int32(facts['target'])
    metrics = {'as_trained': judge(as_trained, test_RD)}
    if ours:  # peers have written theirs
      metrics['validation_fvu'] = judge(params, validation_RD)['fvu']
    else:
      params = with_target_l0(params, last_RD, facts['target'])
      metrics['at_target'] = judge(params, test_RD)
    scores[name] = facts | metrics
    path.write_text(json.dumps(scores, indent=1) + '\n')
  for name, entry in scores.items():
    cells = [
      '{fvu:.4f} L0 {l0:.1f} never {never:.1%}'.format(**entry[key])
      for key in ('as_trained', 'at_target')
      if key in entry
    ]
    print(f'{name}: {"; ".join(cells)}; {entry.get("seconds", "")}')


def chosen(comparison: Comparison, seeds: int):
  """Each trainer at its rate of lowest validation FVU at L0 32."""
  scores = json.loads((comparison.folder / 'scores.json').read_text()).values()
  best_rates = {}
  for entry in scores:
    if entry['target'] == 32 and entry['seed'] == 0:
      key = entry['trainer'], entry['rows']
      candidate = entry['validation_fvu'], entry['rate']
      best_rates[key] = min(best_rates.get(key, candidate), candidate)
  for facts, params in all_saes(comparison):
    key = facts['trainer'], facts['rows']
    if facts['seed'] < seeds and facts['rate'] == best_rates[key][1]:
      yield facts, params


def losses(comparison: Comparison, sequences: int, trainers: str) -> None:
  """Delta loss, KL and FVU on held-out documents -> losses.json; a table.

  By the passes of gemma_scope.evaluation, without its controls.
  """
  from gemma_scope import sites
  from gemma_scope.evaluation import batches as batches_lib
  from gemma_scope.evaluation import centres, estimates, replacements
  from gemma_scope.language_model import weights
  from gemma_scope.runtime import progress as progress_lib
  from gemma_scope.sae import released
  from gemma_scope.text import prepare
  from gemma_scope.training import setup

  config, folder = comparison.config(), comparison.folder
  last_RD = np.load(folder / 'train.npy', mmap_mode='r')[STEPS - 64 : STEPS]
  last_RD = last_RD.reshape(-1, last_RD.shape[-1])
  facts_of, params_of = {}, {}
  for facts, params in chosen(comparison, 1):
    if trainers and facts['trainer'] not in trainers.split(','):
      continue
    name = '{trainer} {rows} {target}'.format(**facts)
    if not facts['trainer'].startswith('ours'):
      params = with_target_l0(params, last_RD, facts['target'])
    facts_of[name], params_of[name] = facts, params
  tokenizer, store = prepare.open_text(config, comparison.out, print)
  gemma, lm_params = weights.load(config.lm.name)
  held_out = store.sequences(config.text.seq_len, 'eval')
  order = prepare.shuffled(range(len(held_out)), config.seed)
  index = [order[i] for i in range(min(sequences, len(held_out)))]
  text = batches_lib.Text(
    np.stack([held_out[i] for i in index]),
    setup.special(tokenizer, store).keep,
    batch=8,
    documents_NT=held_out.documents(index, tokenizer.eos_id),
    loss_every=4,
  )
  progress = progress_lib.Progress(
    len(index), config.text.seq_len, label='loss'
  )
  watch = batches_lib.Watch(lambda done, _: progress.update(round(done, 1), {}))
  model = centres.Model(gemma, lm_params, None, watch)
  batches = batches_lib.Batches(text, None)
  cards = {name: comparison.card(name) for name in params_of}
  wirings = {name: sites.wiring_of(card) for name, card in cards.items()}
  references = centres.measure(model, wirings, cards, batches)
  queue = []
  loads = released.on_demand(list(params_of.values()), None)
  for name, load in zip(params_of, loads, strict=True):
    rule, spares = references.rule_of[name]
    queue.append(
      replacements.Replacement(
        wirings[name], name, load, rule=rule, spares=spares
      )
    )
  replacements.measure(model, batches, references, queue)
  progress.close()
  results = {}
  for replacement in queue:
    results[replacement.name] = facts_of[replacement.name] | estimates.fidelity(
      replacement.tally
    )
    cells = [
      '{value:.4g} [{low:.4g}, {high:.4g}]'.format(
        **results[replacement.name][key]
      )
      for key in ('l0', 'fvu_inliers', 'delta_loss', 'kl')
    ]
    print(f'| {replacement.name} | {" | ".join(cells)} |')
  print(f'{batches.clusters} {batches.clustered_by}, {len(index)} sequences')
  (folder / 'losses.json').write_text(json.dumps(results, indent=1) + '\n')


def main() -> None:
  stages = ['rows', 'ours', 'score', 'losses']
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--stage', choices=stages, required=True)
  parser.add_argument('--out', default='runs/comparison')
  parser.add_argument('--site', default='resid_post/9')
  parser.add_argument('--source', default='prose', help='text, as text.source')
  parser.add_argument('--sequences', type=int, default=32, help='of losses')
  parser.add_argument('--trainers', default='', help='of losses; empty: all')
  options = parser.parse_args()
  comparison = Comparison(options.out, options.site, options.source)
  if options.stage == 'losses':
    losses(comparison, options.sequences, options.trainers)
  else:
    {'rows': make_rows, 'ours': train_ours, 'score': score}[options.stage](
      comparison
    )


if __name__ == '__main__':
  main()
