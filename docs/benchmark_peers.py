"""Tokens/s of the peers' training steps, as launch/benchmark.py measures ours.

  python docs/benchmark_peers.py --out=peers.jsonl

Needs torch, sae-lens and eai-sparsify, in an environment of their own. A step
is what their trainers do with a batch: forward, backward, the decoder's norm,
Adam, and SAELens' own bookkeeping. Interleaved with torch's matmul of the same
shapes. JumpReLU starts at the thresholds at which k latents fire.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time


def saelens(kind: str, torch, d: int, width: int, k: int, x):
  """SAELens' trainer on the batch x."""
  import sae_lens
  from sae_lens.config import SAETrainerConfig

  if kind == 'topk':
    settings, name = {'k': k}, 'TopK'
  else:
    settings, name = {'l0_coefficient': 1.0}, 'JumpReLU'
  make = getattr(sae_lens, f'{name}TrainingSAE')
  config = getattr(sae_lens, f'{name}TrainingSAEConfig')
  sae = make(config(d_in=d, d_sae=width, **settings))
  if kind == 'jumprelu':
    with torch.no_grad():
      z = x[:128] @ sae.W_enc[:, :: max(1, width // 2**14)] + sae.b_enc[0]
      at = z.flatten().kthvalue(int((1 - k / width) * z.numel())).values
      sae.threshold.fill_(at)
  options = SAETrainerConfig(
      total_training_samples=10**9, train_batch_size_samples=len(x), lr=0.0,
      lr_warm_up_steps=0, lr_decay_steps=0, lr_end=0.0,
  )  # fmt: skip
  trainer = sae_lens.SAETrainer(options, sae, iter([x]))
  return lambda: trainer.step(x)


def sparsify(torch, d: int, width: int, k: int, x):
  """sparsify's coder, by the lines of its trainer that one batch goes through.

  With `fused` Adam, the fastest of torch's.
  """
  from sparsify import SparseCoder, SparseCoderConfig

  coder = SparseCoder(d, SparseCoderConfig(num_latents=width, k=k))
  adam = torch.optim.Adam(coder.parameters(), lr=0.0, fused=True)

  def step():
    coder.set_decoder_norm_to_unit_norm()
    coder(x).fvu.backward()
    coder.remove_gradient_parallel_to_decoder_directions()
    adam.step()
    adam.zero_grad()

  return step


def main() -> None:
  """Measures, prints, and appends a JSON line a peer."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name, value in dict(d=768, width=16384, batch=1024, k=64).items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--out', default='')
  args = parser.parse_args()
  d, width, batch, k = args.d, args.width, args.batch, args.k
  os.environ.setdefault('SPARSIFY_DISABLE_TRITON', '1')
  try:
    import torch
  except ImportError:
    sys.exit('No torch here: this runs in the environment of the peers.')
  torch.manual_seed(0)
  x = torch.randn(batch, d) * d**-0.5
  W = torch.randn(d, width)
  runs = {
    'matmul': lambda: x @ W,
    'SAELens JumpReLU': saelens('jumprelu', torch, d, width, k, x),
    'SAELens TopK': saelens('topk', torch, d, width, k, x),
    'sparsify TopK': sparsify(torch, d, width, k, x),
  }
  times = {name: [] for name in runs}
  for run in (*runs.values(), *runs.values()):
    run()
  for _ in range(args.repeats):
    for name, run in runs.items():
      count = 5 if name == 'matmul' else 1
      began = time.perf_counter()
      for _ in range(count):
        run()
      times[name].append((time.perf_counter() - began) / count)
  matmul = 2 * batch * d * width / statistics.median(times.pop('matmul'))
  for name, seconds in times.items():
    rates = [batch / s for s in seconds]
    record = {
      'measure': 'step', 'peer': name, 'd': d, 'width': width, 'batch': batch,
      'k': k, 'dtype': 'float32', 'device': f'cpu, {torch.get_num_threads()}',
      'tokens_per_s': statistics.median(rates),
      'tokens_per_s_low': min(rates), 'tokens_per_s_high': max(rates),
      'matmul_share': 10 * d * width * statistics.median(rates) / matmul,
      'matmul_flops': matmul,
    }  # fmt: skip
    print(
      f'{name}: {record["tokens_per_s"]:,.0f} tokens/s '
      f'[{min(rates):,.0f}, {max(rates):,.0f}], '
      f'share {record["matmul_share"]:.2f}',
      flush=True,
    )
    if args.out:
      with open(args.out, 'a') as file:
        file.write(json.dumps(record) + '\n')


if __name__ == '__main__':
  main()
