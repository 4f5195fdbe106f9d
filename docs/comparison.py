"""Our SAEs beside SAELens': the same rows, the same order, the same judge.

Four stages, from the repository's root; the second may run in another
environment, with `pip install torch sae-lens==6.54.12`:

  python docs/comparison.py --stage=rows    activations to disk; ours, trained
  python docs/comparison.py --stage=peer    SAELens on the same batches
  python docs/comparison.py --stage=score   all through gemma_scope.evaluate
  python docs/comparison.py --stage=speed   steps of what is installed here

`--out` (runs/comparison) holds the rows, the SAEs and results.json; what is
there is not made again. docs/comparison.md says what was found.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import runpy
import subprocess
import sys
import time

import numpy as np

ARGUMENT = 'layers=2;sites=resid_post;widths=1k'
SITE, WIDTH, TARGETS = 'resid_post/2', 1024, (8, 32)
RATES = (3e-4, 1e-3, 3e-3)  # tried for each peer
COEFFICIENTS = (0.5, 1.0, 2.0, 4.0)  # of the tanh penalty, then interpolated


def make_rows(out: pathlib.Path) -> None:
  """Harvests, trains ours from the store, and writes its batches as numpy."""
  config, store = get_config(), out / 'store'
  command = [f'--config=configs/tiny.py:{ARGUMENT}', f'--workdir={out}/harvest']
  launch('harvest', *command, f'--out={store}', '--chunks=6')
  launch(
    'train',
    command[0],
    f'--workdir={out}/ours',
    f'--config.activations.store={store}',
    f'--config.text.store={out}/harvest/tokens',
  )
  if (out / 'validation.npy').exists():
    return
  from gemma_scope import activation_store, activations, mesh, sites

  site, batch = sites.parse(SITE), config.train.batch
  source = activation_store.StoreSource(store, [site], batch)
  chunks = activations.Chunks(source, config.seed, mesh.make(config.mesh))
  x_KBD = np.concatenate(
    [np.asarray(chunks.load(c).rows[site]) for c in range(source.chunks)]
  )
  np.save(out / 'train.npy', x_KBD[: config.train.steps])
  # What ours did not get to: the peers' settings are chosen on these rows.
  np.save(out / 'validation.npy', np.concatenate(x_KBD[config.train.steps :]))


def get_config(argument: str = ARGUMENT):
  return runpy.run_path('configs/tiny.py')['get_config'](argument)


def launch(name: str, *arguments: str) -> None:
  subprocess.run([sys.executable, f'launch/{name}.py', *arguments], check=True)


def peer_trainer(kind: str, x_KBD: np.ndarray, rate: float, value: float):
  """SAELens' trainer on batches [K, B, D]; `value` is k, L0* or lambda."""
  try:
    import sae_lens
    import torch
  except ImportError as error:
    sys.exit(
      f'This stage needs {error.name}: run it with the Python of an '
      'environment where `pip install torch sae-lens==6.54.12` was done.'
    )
  from sae_lens.config import SAETrainerConfig

  steps, batch, d_in = x_KBD.shape
  settings = {
      'TopK': dict(k=int(value)),
      'BatchTopK': dict(k=float(value)),
      # The advice of SAELens' page on training, but for lambda.
      'JumpReLU, tanh': dict(
          jumprelu_sparsity_loss_mode='tanh', l0_coefficient=value,
          jumprelu_bandwidth=2.0, jumprelu_init_threshold=0.1,
          pre_act_loss_coefficient=3e-6, l0_warm_up_steps=steps,
      ),
      # Made for a short run: thresholds start, and reach, further.
      'JumpReLU, target': dict(
          jumprelu_sparsity_loss_mode='quadratic', target_l0=value,
          jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.5,
          pre_act_loss_coefficient=3e-6, l0_warm_up_steps=steps // 5,
      ),
  }[kind]  # fmt: skip
  name = kind.split(',')[0]
  torch.manual_seed(0)
  config = getattr(sae_lens, f'{name}TrainingSAEConfig')(
      d_in=d_in, d_sae=WIDTH, normalize_activations='expected_average_only_in',
      **settings,
  )  # fmt: skip
  options = SAETrainerConfig(
      total_training_samples=steps * batch, train_batch_size_samples=batch,
      lr=rate, lr_warm_up_steps=50, lr_decay_steps=steps // 5,
      dead_feature_window=200,
  )  # fmt: skip
  sae = getattr(sae_lens, f'{name}TrainingSAE')(config)
  x = torch.from_numpy(x_KBD)
  trainer = sae_lens.SAETrainer(options, sae, iter(x))
  # Before `fit` would, which takes the rows for it from the training's.
  trainer.activation_scaler.estimate_scaling_factor(d_in, iter(x), 250)
  return trainer


def run_peer(out: pathlib.Path, kind: str, rate: float, value: float) -> dict:
  """Trains one peer, or finds it trained: settings, L0 and FVU, its file."""
  path = out / 'peer' / f'{kind}_{value:.4g}_{rate:g}.npz'.replace(', ', '_')
  facts = path.with_suffix('.json')
  if facts.exists():
    return json.loads(facts.read_text())
  x_KBD, x_RD = np.load(out / 'train.npy'), np.load(out / 'validation.npy')
  started = time.monotonic()
  sae = peer_trainer(kind, x_KBD, rate, value).fit()
  seconds = time.monotonic() - started
  native_RD = sae(sae.W_enc.new_tensor(x_RD)).detach().numpy()
  sae.fold_W_dec_norm()
  p = {key: v.detach().numpy() for key, v in sae.named_parameters()}
  p['b_enc'] = p['b_enc'] - p['b_dec'] @ p['W_enc']
  if 'threshold' not in p:  # k latents on average, over some rows of training
    some_RD = np.concatenate(x_KBD[-64:])
    z = (some_RD @ p['W_enc'] + p['b_enc']).reshape(-1)
    at = z.size - int(value * len(some_RD))
    threshold = max(np.partition(z, at)[at], 0)
    p['threshold'] = np.full(WIDTH, threshold, np.float32)
  p['threshold'] = np.maximum(p['threshold'], 0)
  z = x_RD @ p['W_enc'] + p['b_enc']
  f = z * (z > p['threshold'])
  variance = np.sum((x_RD - x_RD.mean(0)) ** 2)
  fvu = lambda y_RD: float(np.sum((x_RD - y_RD) ** 2) / variance)
  found = {
    'kind': kind, 'rate': rate, 'value': value, 'seconds': seconds,
    'l0': float((f > 0).sum(1).mean()), 'fvu': fvu(f @ p['W_dec'] + p['b_dec']),
    'fvu_native': fvu(native_RD), 'file': path.name,
  }  # fmt: skip
  path.parent.mkdir(exist_ok=True)
  np.savez(path, **p)
  facts.write_text(json.dumps(found) + '\n')
  print(json.dumps(found), flush=True)
  return found


def make_peers(out: pathlib.Path) -> None:
  """Every peer at every rate; the best of each kind and target by FVU."""
  chosen = {}
  for kind in ('TopK', 'BatchTopK', 'JumpReLU, target'):
    for target in TARGETS:
      tried = [run_peer(out, kind, rate, target) for rate in RATES]
      chosen[f'{kind}, {target}'] = min(tried, key=lambda run: run['fvu'])
  kind, curves = 'JumpReLU, tanh', {}
  for rate in RATES:
    runs = [run_peer(out, kind, rate, value) for value in COEFFICIENTS]
    runs.sort(key=lambda run: run['l0'])
    curves[rate] = np.log([[r['l0'], r['fvu'], r['value']] for r in runs]).T
  for target in TARGETS:
    # The rate that does best at this L0, and the lambda that leads there.
    at = {r: np.interp(np.log(target), *c[:2]) for r, c in curves.items()}
    rate = min(at, key=at.get)
    l0, _, value = curves[rate]
    value = float(np.exp(np.interp(np.log(target), l0, value)))
    chosen[f'{kind}, {target}'] = run_peer(out, kind, rate, value)
  (out / 'chosen.json').write_text(json.dumps(chosen, indent=1) + '\n')


def score(out: pathlib.Path) -> None:
  """Ours and the chosen peers through gemma_scope.evaluate, in one table."""
  import jax
  import jax.numpy as jnp

  from gemma_scope import pipeline, release, runs, sae

  config = get_config()
  config.text.store = f'{out}/harvest/tokens'
  saes = [
    (member.load(), {**member.card, 'name': f'ours, {member.card["name"]}'})
    for member in release.load_all(out / 'ours' / 'release')
  ]
  chosen = json.loads((out / 'chosen.json').read_text())
  topk = {}
  for name, run in chosen.items():
    params = dict(np.load(out / 'peer' / run['file']))
    saes.append((params, {'site': SITE, 'name': name}))
    if run['kind'] == 'TopK':
      topk[int(run['value'])] = params, {'site': SITE, 'name': f'{name} exact'}
  with runs.Interrupt() as interrupt:
    judge = lambda saes, file: pipeline.evaluate_saes(
      config, out, saes, interrupt, out / file
    )
    scores = judge(saes, 'scores.json')
    for k, member in topk.items():  # as trained: the k largest of each row

      def encode(params, x_BD, k=k):
        z_BF = jax.nn.relu(x_BD @ params['W_enc'] + params['b_enc'])
        return jnp.where(z_BF >= jax.lax.top_k(z_BF, k)[0][..., -1:], z_BF, 0)

      sae.encode = encode
      jax.clear_caches()
      scores |= judge([member], f'scores_top{k}.json')
  for name, m in scores.items():
    cells = [
      f'{m[key]["value"]:.4g} [{m[key]["low"]:.4g}, {m[key]["high"]:.4g}]'
      for key in ('l0', 'fvu', 'delta_loss')
    ]
    print(f'| {name} | {" | ".join(cells)} | {m["dead"]:.1%} |')


def speed(out: pathlib.Path) -> None:
  """SAE tokens a second of what this environment has, data at hand."""
  x_KBD = np.load(out / 'train.npy')[:120]
  steps, batch, _ = x_KBD.shape
  takes = {}
  try:
    import jax
  except ImportError:
    for kind in ('JumpReLU, tanh', 'JumpReLU, target', 'BatchTopK', 'TopK'):
      trainer = peer_trainer(kind, x_KBD, 1e-3, 32)
      takes[kind] = 1, trainer.step, [*trainer.data_provider]
  else:
    import jax.numpy as jnp

    from gemma_scope import collection, stack, weights

    model = weights.read_config('tiny', '')
    for argument in (f'{ARGUMENT};sparsity=32', ARGUMENT, ''):
      stacks, _ = collection.make_stacks(get_config(argument), model)
      count = sum(len(s.seeds) for s in stacks)
      step = jax.jit(
        lambda s, x, i, t=stacks: stack.step_all(
          t, s, {site: x for one in t for site in one.sites}, i
        ),
        donate_argnums=0,
      )
      state = [tuple(s.init(jax.random.key(0)) for s in stacks), None]

      def take(x_BD, step=step, state=state):
        state[:] = step(state[0], x_BD, jnp.int32(500))
        return jax.block_until_ready(state[1])

      takes[f'ours, {count}'] = count, take, [*jnp.asarray(x_KBD)]
  rates = {name: [] for name in takes}
  for name, (count, take, data) in takes.items():
    for x_BD in data[:20]:
      take(x_BD)
  for _ in range(3):
    for name, (count, take, data) in takes.items():
      started = time.monotonic()
      for x_BD in data[20:]:
        take(x_BD)
      rates[name].append(
        count * batch * (steps - 20) / (time.monotonic() - started)
      )
  for name, found in rates.items():
    print(f'{name}: {sorted(int(r) for r in found)} SAE tokens/s')


def main() -> None:
  stages = {
    'rows': make_rows,
    'peer': make_peers,
    'score': score,
    'speed': speed,
  }
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--stage', choices=stages, required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/comparison')
  flags = parser.parse_args()
  flags.out.mkdir(parents=True, exist_ok=True)
  stages[flags.stage](flags.out)


if __name__ == '__main__':
  main()
