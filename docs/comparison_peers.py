"""Other trainers on the rows of docs/comparison.py; needs no JAX.

Run by an environment of its own, after
`pip install torch sae-lens==6.54.12 dictionary-learning eai-sparsify`:

  python docs/comparison_peers.py --out=runs/comparison --site=resid_post/9

Each trainer sees the batches of `--stage=rows` in order, with the schedule of
our recipe (warm-up over 16 steps, decay to zero over the last third) and with
its own optimiser, loss and initial parameters. Settings that count steps or
tokens are scaled to a run of 115,200 rows, as ours are: latents silent for
10,000 rows are dead. Rows are centred and divided by their spread, as ours, or
`own`: as they are, with the normalisation that the trainer applies itself.

For each trainer three learning rates are tried at L0 32 (a fourth beside the
best where that is the first or last); the best by FVU on validation rows trains
the other L0 and seeds. --rate trains at one rate without this search. Every run
is kept, and a second call trains the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time

import numpy as np
import torch

WIDTH, TARGETS, RATES = 4096, (16, 32, 64), (2e-3, 4e-3, 8e-3)
STEPS, WARM_UP, DEAD_ROWS = 450, 16, 10_000
TRAINERS = ('saelens_batch_topk', 'saelens_topk', 'saelens_matryoshka',
            'dictionary_batch_topk', 'sparsify_topk')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  trainer: str
  rate: float
  target: int
  seed: int = 0
  rows: str = 'ours'  # or 'own': the trainer's own normalisation

  @property
  def name(self) -> str:
    rows = '' if self.rows == 'ours' else f'_{self.rows}'
    return f'{self.trainer}{rows}_l0_{self.target}_{self.rate:g}_{self.seed}'


def saelens(run: Run, x_KBD: torch.Tensor) -> dict[str, torch.Tensor]:
  """SAELens' BatchTopK, TopK or Matryoshka BatchTopK, by its SAETrainer."""
  import sae_lens
  from sae_lens.config import SAETrainerConfig

  kind = {
    'saelens_topk': 'TopK',
    'saelens_batch_topk': 'BatchTopK',
    'saelens_matryoshka': 'MatryoshkaBatchTopK',
  }[run.trainer]
  steps, batch, d_in = x_KBD.shape
  settings = {'k': run.target}
  if kind.startswith('Matryoshka'):
    settings['matryoshka_widths'] = [WIDTH // n for n in (16, 8, 4, 2, 1)]
  own_normalisation = run.rows == 'own'
  config = getattr(sae_lens, f'{kind}TrainingSAEConfig')(
    d_in=d_in,
    d_sae=WIDTH,
    normalize_activations='expected_average_only_in'
    if own_normalisation
    else 'none',
    **settings,
  )
  options = SAETrainerConfig(
    total_training_samples=steps * batch,
    train_batch_size_samples=batch,
    lr=run.rate,
    lr_warm_up_steps=WARM_UP,
    lr_decay_steps=steps // 3,
    lr_end=0.0,
    dead_feature_window=DEAD_ROWS // batch,
  )
  sae = getattr(sae_lens, f'{kind}TrainingSAE')(config)
  trainer = sae_lens.SAETrainer(options, sae, iter(x_KBD))
  if own_normalisation:
    # Before `fit`, which would take the rows for it from the run's.
    trainer.activation_scaler.estimate_scaling_factor(d_in, iter(x_KBD), 64)
  sae = trainer.fit()
  sae.fold_W_dec_norm()
  trained_params = {
    name: value.detach() for name, value in sae.named_parameters()
  }
  params = {name: trained_params[name] for name in ('W_enc', 'W_dec', 'b_dec')}
  params['b_enc'] = (
    trained_params['b_enc'] - trained_params['b_dec'] @ trained_params['W_enc']
  )
  params['threshold'] = getattr(sae, 'topk_threshold', torch.tensor(0.0))
  return params


def dictionary(run: Run, x_KBD: torch.Tensor) -> dict[str, torch.Tensor]:
  """BatchTopK of dictionary_learning, by its trainer."""
  from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

  steps, _, d_in = x_KBD.shape
  trainer = BatchTopKTrainer(
    steps=steps,
    activation_dim=d_in,
    dict_size=WIDTH,
    k=run.target,
    layer=9,
    lm_name='gemma3-270m',
    lr=run.rate,
    warmup_steps=WARM_UP,
    decay_start=steps - steps // 3,
    threshold_beta=0.99,
    threshold_start_step=steps // 2,
    seed=run.seed,
    device='cpu',
  )
  trainer.dead_feature_threshold = DEAD_ROWS
  for step, x_BD in enumerate(x_KBD):
    trainer.update(step, x_BD)
  sae = trainer.ae
  W_enc = sae.encoder.weight.detach().T
  b_dec = sae.b_dec.detach()
  return {
    'W_enc': W_enc,
    'b_enc': sae.encoder.bias.detach() - b_dec @ W_enc,
    'W_dec': sae.decoder.weight.detach().T,
    'b_dec': b_dec,
    'threshold': torch.as_tensor(sae.threshold).detach(),
  }


def sparsify(run: Run, x_KBD: torch.Tensor) -> dict[str, torch.Tensor]:
  """TopK of sparsify with Adam and its auxiliary loss.

  Its trainer runs a language model itself; here its coder takes the same steps
  on given rows.
  """
  os.environ.setdefault('SPARSIFY_DISABLE_TRITON', '1')
  from sparsify.config import SparseCoderConfig
  from sparsify.sparse_coder import SparseCoder
  from transformers import get_linear_schedule_with_warmup

  steps, batch, d_in = x_KBD.shape
  sae = SparseCoder(d_in, SparseCoderConfig(num_latents=WIDTH, k=run.target))
  adam = torch.optim.Adam(sae.parameters(), lr=run.rate)
  schedule = get_linear_schedule_with_warmup(adam, WARM_UP, steps)
  sae.b_dec.data = x_KBD[0].mean(0)
  silent_F = torch.zeros(WIDTH, dtype=torch.long)
  for x_BD in x_KBD:
    sae.set_decoder_norm_to_unit_norm()
    output = sae(x_BD, dead_mask=silent_F > DEAD_ROWS)
    (output.fvu + output.auxk_loss / 32).backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    adam.step()
    adam.zero_grad()
    schedule.step()
    silent_F += batch
    silent_F[output.latent_indices.flatten()] = 0
  sae.set_decoder_norm_to_unit_norm()
  W_enc, b_dec = sae.encoder.weight.detach().T, sae.b_dec.detach()
  return {
    'W_enc': W_enc,
    'b_enc': sae.encoder.bias.detach() - b_dec @ W_enc,
    'W_dec': sae.W_dec.detach(),
    'b_dec': b_dec,
    'threshold': torch.tensor(0.0),
  }


def trained(run: Run, x_KBD: torch.Tensor) -> dict[str, np.ndarray]:
  """Parameters on the rows as given: f = z > threshold ? z : 0 for BatchTopK,
  the `k` largest of relu(z) for TopK, with z = x W_enc + b_enc.
  """
  torch.manual_seed(run.seed)
  library = run.trainer.partition('_')[0]
  train = {'saelens': saelens, 'dictionary': dictionary, 'sparsify': sparsify}
  params = train[library](run, x_KBD)
  return {
    name: value.numpy().astype(np.float32) for name, value in params.items()
  }


class Data:
  """Rows of one site, see `rows` of docs/comparison.py."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    with np.load(folder / 'normalisation.npz') as file:
      self.centre_D, self.scale = file['centre'], float(file['scale'])
    self.train_KBD = np.load(folder / 'train.npy', mmap_mode='r')
    self.validation_RD = np.load(folder / 'validation.npy')

  def batches(self, rows: str, steps: int = STEPS) -> torch.Tensor:
    x_KBD = np.array(self.train_KBD[:steps])
    if rows == 'ours':
      x_KBD -= self.centre_D
      x_KBD /= self.scale
    return torch.from_numpy(x_KBD)

  def raw(self, params, rows: str) -> dict[str, np.ndarray]:
    """Parameters that act on the rows as they are."""
    if rows == 'own':
      return params
    scaled = dict(params)
    scaled['W_enc'] = scaled['W_enc'] / self.scale
    scaled['b_enc'] = scaled['b_enc'] - self.centre_D @ scaled['W_enc']
    scaled['W_dec'] = scaled['W_dec'] * self.scale
    scaled['b_dec'] = scaled['b_dec'] * self.scale + self.centre_D
    return scaled

  def validate(self, params, target: int) -> dict[str, float]:
    """FVU on validation rows, with one threshold that gives the target L0."""
    tensors = {
      name: torch.from_numpy(np.asarray(value))
      for name, value in params.items()
    }
    x_RD = torch.from_numpy(self.validation_RD)
    z_RF = x_RD @ tensors['W_enc'] + tensors['b_enc']
    own_l0 = float((z_RF > tensors['threshold']).sum() / len(x_RD))
    index = z_RF.numel() - target * len(x_RD)
    theta = max(float(np.partition(z_RF.flatten().numpy(), index)[index]), 0.0)
    f_RF = torch.where(z_RF > theta, z_RF, 0)
    error_RD = x_RD - f_RF @ tensors['W_dec'] - tensors['b_dec']
    fvu = error_RD.square().sum() / (x_RD - x_RD.mean(0)).square().sum()
    return {'validation_fvu': float(fvu), 'own_l0': own_l0}


def train(data: Data, run: Run) -> dict:
  """Trains and keeps a run, or finds it -> its settings, FVU and seconds."""
  facts = data.folder / 'peers' / f'{run.name}.json'
  if facts.exists():
    return json.loads(facts.read_text())
  x_KBD = data.batches(run.rows)
  began = time.perf_counter(), time.process_time()
  params = trained(run, x_KBD)
  seconds = time.perf_counter() - began[0], time.process_time() - began[1]
  params = data.raw(params, run.rows)
  record = dataclasses.asdict(run) | {
    'file': f'{run.name}.npz',
    **data.validate(params, run.target),
    'seconds': round(seconds[0], 1),
    'cpu_seconds': round(seconds[1], 1),
  }
  facts.parent.mkdir(exist_ok=True)
  np.savez(facts.with_suffix('.npz'), **params)
  facts.write_text(json.dumps(record) + '\n')
  print(json.dumps(record), flush=True)
  return record


def best_rate(data: Data, trainer: str, rows: str) -> float | None:
  """The rate of lowest FVU at L0 32; None while one is to be tried."""
  fvu_of_rate = {}
  for path in (data.folder / 'peers').glob(f'{trainer}*_l0_32_*.json'):
    run = json.loads(path.read_text())
    if (run['trainer'], run['rows'], run['seed']) == (trainer, rows, 0):
      fvu_of_rate[run['rate']] = run['validation_fvu']
  if not set(RATES) <= set(fvu_of_rate):
    return None
  return min(fvu_of_rate, key=fvu_of_rate.get)


def plan(data: Data, trainer: str, options) -> list[Run]:
  """The runs of a trainer that can be named by now, done ones included."""
  rows = options.rows
  if options.rate:
    return [
      Run(trainer, options.rate, target, seed, rows)
      for seed in range(options.seeds)
      for target in map(int, options.targets.split(','))
    ]
  runs = [Run(trainer, rate, 32, rows=rows) for rate in RATES]
  best = best_rate(data, trainer, rows)
  if best is None:
    return runs
  if best in (min(RATES), max(RATES)):
    next_rate = best * (2 if best == max(RATES) else 0.5)
    runs.append(Run(trainer, next_rate, 32, rows=rows))
    if not (data.folder / 'peers' / f'{runs[-1].name}.json').exists():
      return runs
  if rows == 'own':  # at the one L0
    return runs
  return runs + [
    Run(trainer, best, target, seed)
    for seed in range(options.seeds)
    for target in TARGETS
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', default='runs/comparison')
  parser.add_argument('--site', default='resid_post/9')
  parser.add_argument('--trainers', default=','.join(TRAINERS))
  parser.add_argument('--rows', default='ours', choices=['ours', 'own'])
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--rate', type=float, default=0, help='0: search')
  parser.add_argument('--targets', default='16,32,64', help='L0 with --rate')
  parser.add_argument(
    '--minutes', type=float, default=1e9, help='start no more'
  )
  parser.add_argument('--part', default='0/1', help='i/n: every n-th trainer')
  options = parser.parse_args()
  began = time.monotonic()
  torch.set_num_threads(1)
  data = Data(pathlib.Path(options.out) / options.site.replace('/', '.'))
  own_part, part_count = map(int, options.part.split('/'))
  for trainer in options.trainers.split(',')[own_part::part_count]:
    while True:
      runs = plan(data, trainer, options)
      missing = [
        run
        for run in runs
        if not (data.folder / 'peers' / f'{run.name}.json').exists()
      ]
      if not missing:
        break
      if time.monotonic() - began > 60 * options.minutes:
        print('stopped; the same command continues')
        return
      train(data, missing[0])


if __name__ == '__main__':
  main()
