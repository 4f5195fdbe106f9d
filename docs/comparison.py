"""Our SAEs beside SAELens': the same rows in the same order, the same judge.

From the repository's root; --stage=peer may run in an environment of its own,
with `pip install torch sae-lens==6.54.12`:

  --stage=rows     activations to disk; ours, trained from there
  --stage=peer     SAELens on the same batches
  --stage=score    all through gemma_scope.evaluate
"""

from __future__ import annotations

import argparse
import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np

from gemma_scope.runtime import interrupt

ARGUMENT = 'layers=2;sites=resid_post;widths=1k;sparsity=8,32'
SITE, WIDTH, TARGETS, STEPS = 'resid_post/2', 1024, (8, 32), 1500
RATES = (1e-3, 3e-3, 1e-2)  # tried for each peer
COEFFICIENTS = (0.05, 0.3, 2.0)  # of the tanh penalty, then interpolated


def get_config(argument: str = ARGUMENT):
  return runpy.run_path('configs/tiny.py')['get_config'](argument)


def launch(name: str, *flags: str) -> None:
  config = f'--config=configs/tiny.py:{ARGUMENT}'
  command = [sys.executable, f'launch/{name}.py', config, *flags]
  subprocess.run(command, check=True)


def make_rows(out: pathlib.Path) -> None:
  """Harvests, trains ours from the store, and writes its batches as numpy."""
  from gemma_scope import mesh, sites
  from gemma_scope.activations import chunks as chunks_lib
  from gemma_scope.activations import store as store_lib

  config, harvest, store = get_config(), out / 'harvest', out / 'store'
  launch('harvest', f'--workdir={harvest}', f'--out={store}', '--chunks=6')
  source = f'--config.activations.store={store}'
  text = f'--config.text.store={harvest}/tokens'
  length, site = f'--config.train.steps={STEPS}', sites.parse(SITE)
  launch('train', f'--workdir={out}/ours', source, text, length)
  source = store_lib.StoreSource(store, [site], config.train.batch)
  chunks = chunks_lib.Chunks(source, config.seed, mesh.make(config.mesh))
  loaded = [chunks.load(index).rows[site] for index in range(source.chunks)]
  x_KBD = np.concatenate([np.asarray(x) for x in loaded])
  np.save(out / 'train.npy', x_KBD[:STEPS])
  # What ours did not get to: the peers' settings are chosen on these rows.
  np.save(out / 'validation.npy', np.concatenate(x_KBD[STEPS:]))


def peer_trainer(kind: str, x_KBD: np.ndarray, rate: float, value: float):
  """SAELens' trainer on batches [K, B, D]; `value` is k, L0* or lambda."""
  try:
    import sae_lens
    import torch
    from sae_lens.config import SAETrainerConfig
  except ImportError as error:
    sys.exit(
      f'No {error.name} here: run --stage=peer in an environment where '
      '`pip install torch sae-lens==6.54.12` was done.'
    )
  steps, batch, d_in = x_KBD.shape
  settings = {
      'TopK': dict(k=int(value)),
      'JumpReLU, tanh': dict(  # SAELens' page on training, but for lambda
          jumprelu_sparsity_loss_mode='tanh', l0_coefficient=value,
          jumprelu_bandwidth=2.0, jumprelu_init_threshold=0.1,
          pre_act_loss_coefficient=3e-6, l0_warm_up_steps=steps,
      ),
      'JumpReLU, target': dict(  # for a short run: a wide window, far along
          jumprelu_sparsity_loss_mode='quadratic', target_l0=value,
          jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.5,
          pre_act_loss_coefficient=3e-6, l0_warm_up_steps=steps // 5,
      ),
  }[kind]  # fmt: skip
  torch.manual_seed(0)
  torch.set_num_threads(1)  # more wait for each other on a busy machine
  name = kind.split(',')[0]
  sae = getattr(sae_lens, f'{name}TrainingSAE')(
    getattr(sae_lens, f'{name}TrainingSAEConfig')(
        d_in=d_in, d_sae=WIDTH, **settings,
        normalize_activations='expected_average_only_in',
    )
  )  # fmt: skip
  options = SAETrainerConfig(
      total_training_samples=steps * batch, train_batch_size_samples=batch,
      lr=rate, lr_warm_up_steps=50, lr_decay_steps=steps // 5, lr_end=rate / 10,
      dead_feature_window=200,
  )  # fmt: skip
  x = torch.tensor(x_KBD)
  trainer = sae_lens.SAETrainer(options, sae, iter(x))
  # Here, because `fit` would take the rows for it from those of training.
  scaler, count = trainer.activation_scaler, min(250, steps)
  scaler.estimate_scaling_factor(d_in, iter(x), count)
  return trainer


def run_peer(out: pathlib.Path, kind: str, rate: float, value: float) -> dict:
  """Trains a peer, or finds it: its settings, L0, FVU and released form."""
  path = out / 'peer' / f'{kind}_{value:.4g}_{rate:g}.npz'.replace(', ', '_')
  facts = path.with_suffix('.json')
  if facts.exists():
    return json.loads(facts.read_text())
  x_KBD, x_RD = np.load(out / 'train.npy'), np.load(out / 'validation.npy')
  sae = peer_trainer(kind, x_KBD, rate, value).fit()  # folds the scale in
  error_RD = x_RD - sae(sae.W_enc.new_tensor(x_RD)).detach().numpy()
  fvu = np.sum(error_RD**2) / np.sum((x_RD - x_RD.mean(0)) ** 2)
  sae.fold_W_dec_norm()
  p = {key: v.detach().numpy() for key, v in sae.named_parameters()}
  p['b_enc'] = p['b_enc'] - p['b_dec'] @ p['W_enc']
  if 'threshold' not in p:  # k latents on average, over some rows of training
    some_RD = np.concatenate(x_KBD[-64:])
    z = (some_RD @ p['W_enc'] + p['b_enc']).reshape(-1)
    at = z.size - int(value * len(some_RD))
    p['threshold'] = np.full(WIDTH, np.partition(z, at)[at], np.float32)
  p['threshold'] = np.maximum(p['threshold'], 0)
  z_RF = x_RD @ p['W_enc'] + p['b_enc']
  l0 = np.mean(np.sum(z_RF > p['threshold'], 1))
  found = {'kind': kind, 'rate': rate, 'value': value, 'file': path.name}
  found |= {'l0': float(l0), 'fvu': float(fvu)}
  path.parent.mkdir(exist_ok=True)
  np.savez(path, **p)
  facts.write_text(json.dumps(found) + '\n')
  return found


def make_peers(out: pathlib.Path) -> None:
  """Every peer at every rate; the best of each kind and target by FVU."""
  chosen, kind, curves = [], 'JumpReLU, tanh', {}
  point = lambda run: tuple(np.log([run['l0'], run['fvu'], run['value']]))
  for rate in RATES:
    tried = [point(run_peer(out, kind, rate, v)) for v in COEFFICIENTS]
    curves[rate] = np.transpose(sorted(tried))
  for target in np.log(TARGETS):
    # The rate that does best at this L0, and the lambda that leads there.
    at = {r: np.interp(target, *c[:2], 9, 9) for r, c in curves.items()}
    rate = min(at, key=at.get)
    for _ in range(2):
      value = np.exp(np.interp(target, *curves[rate][[0, 2]]))
      run = run_peer(out, kind, rate, float(value))
      tried = [*map(tuple, curves[rate].T), point(run)]
      curves[rate] = np.transpose(sorted(tried))
    chosen.append(run)
  for kind in ('JumpReLU, target', 'TopK'):
    for target in TARGETS:
      tried = [run_peer(out, kind, rate, target) for rate in RATES]
      chosen.append(min(tried, key=lambda run: run['fvu']))
    (out / 'chosen.json').write_text(json.dumps(chosen, indent=1) + '\n')


def card_of(name: str) -> dict:
  return {'name': name, 'type': 'sae', 'sites': [SITE], 'targets': [SITE]}


def score(out: pathlib.Path) -> None:
  """Ours and the chosen peers through gemma_scope.evaluate, in one table."""
  from gemma_scope import pipeline, release

  config, saes = get_config(), []
  config.text.store = f'{out}/harvest/tokens'
  for m in release.load_all(out / 'ours' / 'release'):
    name = f'ours, {m.card["sparsity"]["value"]:g}'
    saes.append((m.load(), card_of(name)))
  for run in json.loads((out / 'chosen.json').read_text()):
    card = card_of(run['file'])
    saes.append((dict(np.load(out / 'peer' / run['file'])), card))
    if run['kind'] == 'TopK':  # as trained: the k largest of each row
      exact = saes[-1][0] | {'k': np.float32(run['value'])}
      saes.append((exact, card_of(f'{run["file"]}, exact')))
  with interrupt.Interrupt() as stop:
    scores = pipeline.evaluate_saes(
      config, out, saes, stop, out / 'scores.json'
    )
  for name, m in scores.items():
    figures = [m[key] for key in ('l0', 'fvu', 'delta_loss')]
    cells = ['{value:.4g} [{low:.4g}, {high:.4g}]'.format(**f) for f in figures]
    print(f'| {name} | {" | ".join(cells)} | {m["dead"]:.1%} |')


if __name__ == '__main__':
  stages = dict(rows=make_rows, peer=make_peers, score=score)
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--stage', choices=stages, required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/comparison')
  flags = parser.parse_args()
  stages[flags.stage](flags.out)
