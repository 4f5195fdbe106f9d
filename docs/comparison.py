"""Our SAEs beside other trainers': the same rows in the same order, one judge.

One site of Gemma 3 270M. From the repository's root, in this order; the stage
peer may run in an environment of its own, after
`pip install torch sae-lens==6.54.12`:

  --stage=rows     activations to disk, and the batches of a run as numpy
  --stage=ours     ours, on these batches
  --stage=peer     SAELens on the same batches, each at three learning rates
  --stage=score    all through gemma_scope.evaluation, on held-out documents

Peers see rows as ours do: centred, divided by their spread, outlier rows left
out. SAELens' BatchTopK also sees rows as they are, with SAELens' own
normalisation. What is subtracted and scaled is folded into the parameters.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

SITE, LAYER, WIDTH, TARGETS, STEPS, BATCH = (
  'resid_post/9', 9, 4096, (32,), 300, 1024,
)  # fmt: skip
RATES = (1e-3, 3e-3, 1e-2)
CHUNKS = 5


def get_config(**changes):
  """The recipe of configs/gemma3_270m.py at one site."""
  from configs import gemma3_270m

  config = gemma3_270m.get_config(f'layers={LAYER};widths={WIDTH}')
  config.collection.sites = ('resid_post',)
  config.collection.sparsity = tuple(map(float, TARGETS))
  config.activations.chunk_rows = 2**16
  config.activations.dtype = 'bfloat16'
  config.activations.lm_batch = 16
  config.train.steps, config.train.batch = STEPS, BATCH
  config.update_from_flattened_dict(changes)
  return config


def make_rows(out: pathlib.Path, source: str) -> None:
  """Harvests, and writes the batches of a run as numpy."""
  from gemma_scope import mesh as mesh_lib
  from gemma_scope import sites
  from gemma_scope.activations import chunks as chunks_lib
  from gemma_scope.activations import store as store_lib

  harvest = [
    sys.executable, 'launch/harvest.py',
    f'--config=configs/gemma3_270m.py:layers={LAYER}',
    '--config.collection.sites=resid_post',
    '--config.activations.chunk_rows=65536',
    '--config.activations.dtype=bfloat16', '--config.activations.lm_batch=16',
    f'--config.text.source={source}', f'--workdir={out}/harvest',
    f'--out={out}/store', f'--chunks={CHUNKS}',
  ]  # fmt: skip
  if not (out / 'store' / 'manifest.json').exists():
    subprocess.run(harvest, check=True)
  config, site = get_config(), sites.parse(SITE)
  a, mesh = config.activations, mesh_lib.make(config.mesh)
  source = store_lib.StoreSource(out / 'store', [site], BATCH)
  for name, max_norm in (('train', a.max_norm), ('raw', 0.0)):
    chunks = chunks_lib.Chunks(source, config.seed, mesh, max_norm=max_norm)
    x_KBD, normalisation = [], None
    for index in range(source.chunks):
      chunk = chunks.load(index)
      if normalisation is None:
        normalisation = chunks_lib.measure(
          chunk, chunks.norm_bounds, a.centre, a.scale
        )[site]
      x_KBD.append(np.asarray(chunk.rows[site], np.float32))
    x_KBD = np.concatenate(x_KBD)
    if name == 'train':
      np.savez(
        out / 'normalisation.npz',
        centre=normalisation.centre,
        scale=normalisation.scale,
      )
      # What no trainer gets to: the peers' rates are chosen on these rows.
      validation_RD = np.concatenate(x_KBD[STEPS:])
      np.save(out / 'validation.npy', validation_RD)
      x_KBD = normalisation.apply(x_KBD)
    np.save(out / f'{name}.npy', x_KBD[:STEPS])


def train_ours(out: pathlib.Path) -> None:
  """Plain BatchTopK, and with our options, three seeds each."""
  from gemma_scope import pipeline

  for name, changes in OURS.items():
    folder = out / 'ours' / name
    config = get_config(**changes)
    config.activations.store = str(out / 'store')
    config.text.store = str(out / 'harvest' / 'tokens')
    config.evaluation.sequences = 0
    began = time.perf_counter()
    pipeline.run(config, folder)
    if not (folder / 'seconds').exists():
      (folder / 'seconds').write_text(f'{time.perf_counter() - began:.1f}\n')


OURS = {
  'batch_topk': {'train.meet_l0': True, 'train.refit_decoders': False},
  'refit': {'train.meet_l0': True, 'train.refit_decoders': True},
  'active_set, refit': {
    'train.meet_l0': True,
    'train.refit_decoders': True,
    'objective.active_set': True,
  },
}


def saelens_trainer(kind: str, x_KBD: np.ndarray, rate, value, normalise, seed):
  """SAELens' trainer on batches [K, B, D], as its documentation advises."""
  import sae_lens
  import torch
  from sae_lens.config import SAETrainerConfig

  steps, batch, d_in = x_KBD.shape
  settings = {
    'TopK': {'k': int(value)},
    'BatchTopK': {'k': float(value)},
    'MatryoshkaBatchTopK': {
      'k': float(value),
      'matryoshka_widths': [WIDTH // n for n in (16, 8, 4, 2, 1)],
    },
  }[kind]
  torch.manual_seed(seed)
  sae = getattr(sae_lens, f'{kind}TrainingSAE')(
    getattr(sae_lens, f'{kind}TrainingSAEConfig')(
      d_in=d_in,
      d_sae=WIDTH,
      normalize_activations=normalise,
      **settings,
    )
  )
  options = SAETrainerConfig(
    total_training_samples=steps * batch,
    train_batch_size_samples=batch,
    lr=rate,
    lr_warm_up_steps=16,
    lr_decay_steps=steps // 3,
    lr_end=rate / 10,
    dead_feature_window=50,
  )
  x = torch.tensor(x_KBD)
  trainer = sae_lens.SAETrainer(options, sae, iter(x))
  if normalise != 'none':
    # Here, because `fit` would take the rows for it from those of training.
    trainer.activation_scaler.estimate_scaling_factor(d_in, iter(x), 64)
  return trainer


def run_peer(out: pathlib.Path, kind: str, rows: str, rate, value, seed=0):
  """Trains a peer, or finds it -> its settings, L0, FVU and file."""
  path = out / 'peer' / f'{kind}_{rows}_{value:g}_{rate:g}_{seed}.npz'
  facts = path.with_suffix('.json')
  if facts.exists():
    return json.loads(facts.read_text())
  x_KBD = np.load(out / f'{rows}.npy')
  normalise = 'none' if rows == 'train' else 'expected_average_only_in'
  trainer = saelens_trainer(kind, x_KBD, rate, value, normalise, seed)
  began = time.perf_counter()
  sae = trainer.fit()  # folds SAELens' own scale in
  seconds = time.perf_counter() - began
  sae.fold_W_dec_norm()
  p = {key: v.detach().numpy() for key, v in sae.named_parameters()}
  p['b_enc'] = p['b_enc'] - p['b_dec'] @ p['W_enc']
  some_RD = np.concatenate(x_KBD[-32:])
  if hasattr(sae, 'topk_threshold'):
    p['threshold'] = np.full(WIDTH, float(sae.topk_threshold), np.float32)
  else:  # TopK: k latents on average over rows of training
    z = (some_RD @ p['W_enc'] + p['b_enc']).reshape(-1)
    at = z.size - int(value * len(some_RD))
    p['threshold'] = np.full(WIDTH, np.partition(z, at)[at], np.float32)
  p['threshold'] = np.maximum(p['threshold'], 0)
  if rows == 'train':  # back to raw rows
    with np.load(out / 'normalisation.npz') as n:
      centre, scale = n['centre'], n['scale']
    p['W_enc'] = p['W_enc'] / scale
    p['b_enc'] = p['b_enc'] - centre @ p['W_enc']
    p['W_dec'], p['b_dec'] = p['W_dec'] * scale, p['b_dec'] * scale + centre
  x_RD = np.load(out / 'validation.npy')[:16384]
  z_RF = x_RD @ p['W_enc'] + p['b_enc']
  f_RF = np.where(z_RF > p['threshold'], z_RF, 0)
  error_RD = x_RD - f_RF @ p['W_dec'] - p['b_dec']
  fvu = np.sum(error_RD**2) / np.sum((x_RD - x_RD.mean(0)) ** 2)
  found = {
    'kind': kind, 'rows': rows, 'rate': rate, 'value': value, 'seed': seed,
    'file': path.name, 'l0': float(np.mean(np.sum(f_RF > 0, 1))),
    'fvu': float(fvu), 'seconds': seconds,
  }  # fmt: skip
  path.parent.mkdir(exist_ok=True)
  np.savez(path, **{k: v.astype(np.float32) for k, v in p.items()})
  facts.write_text(json.dumps(found) + '\n')
  print(found, flush=True)
  return found


def make_peers(out: pathlib.Path) -> None:
  """Every peer at every rate; the best of each kind by FVU, three seeds."""
  chosen = []
  for kind, rows in (
    ('BatchTopK', 'train'),
    ('TopK', 'train'),
    ('MatryoshkaBatchTopK', 'train'),
    ('BatchTopK', 'raw'),
  ):
    for value in TARGETS:
      tried = [run_peer(out, kind, rows, rate, value) for rate in RATES]
      best = min(tried, key=lambda run: run['fvu'])
      chosen.append(best)
      chosen += [
        run_peer(out, kind, rows, best['rate'], value, seed)
        for seed in (1, 2)
        if rows == 'train'
      ]
      (out / 'chosen.json').write_text(json.dumps(chosen, indent=1) + '\n')


def score(out: pathlib.Path) -> None:
  """Ours and the chosen peers through gemma_scope.evaluation, in one table."""
  from gemma_scope import pipeline, release
  from gemma_scope.runtime import interrupt

  saes = []
  for name in OURS:
    for sae in release.open_all(out / 'ours' / name / 'release'):
      params, seed = sae.load(), sae.card['seed']
      saes.append(_named(f'ours, {name}, seed {seed}', params))
  for run in json.loads((out / 'chosen.json').read_text()):
    with np.load(out / 'peer' / run['file']) as file:
      name = f'SAELens {run["kind"]}, {run["rows"]}, seed {run["seed"]}'
      saes.append(_named(f'{name}, rate {run["rate"]:g}', dict(file)))
  config = get_config()
  config.text.store = str(out / 'harvest' / 'tokens')
  config.evaluation.sequences = 64
  with interrupt.Interrupt() as stop:
    scores = pipeline.evaluate_saes(
      config, out, saes, stop, out / 'scores.json'
    )
  for name, m in scores.items():
    figures = [m[key] for key in ('l0', 'delta_loss', 'fvu')]
    cells = ['{value:.4g} [{low:.4g}, {high:.4g}]'.format(**f) for f in figures]
    print(f'| {name} | {" | ".join(cells)} | {m["dead"]:.1%} |')


def _named(name: str, params: dict[str, np.ndarray]):
  from gemma_scope import release

  with np.load(pathlib.Path(OUT) / 'normalisation.npz') as n:
    d_in = len(n['centre'])
  card = {
    'name': name, 'type': 'sae', 'sites': [SITE], 'targets': [SITE],
    'd_in': d_in, 'd_out': d_in, 'width': WIDTH, 'architecture': 'jumprelu',
  }  # fmt: skip
  return release.Released(card, lambda: params, name=name)


OUT = ''

if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--stage', choices=['rows', 'ours', 'peer', 'score'])
  parser.add_argument('--out', default='runs/comparison')
  parser.add_argument('--source', default='prose', help='text, as text.source')
  given = parser.parse_args()
  OUT = given.out
  folder = pathlib.Path(given.out)
  folder.mkdir(parents=True, exist_ok=True)
  if given.stage == 'rows':
    make_rows(folder, given.source)
  else:
    {'ours': train_ours, 'peer': make_peers, 'score': score}[given.stage](
      folder
    )
