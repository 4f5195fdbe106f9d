"""Training steps of ours and of the peers, in turns, on one machine.

  python docs/benchmark_peers.py --peers=PATH_OF_A_PYTHON --out=peers.jsonl

PATH_OF_A_PYTHON is that of an environment where torch, sae-lens and
eai-sparsify are. Two processes live side by side and take one step each in
turn, each beside a matmul of its own library of the same shapes. A step is what
the trainers do with a batch: forward, backward, the decoder's norm, Adam, and
their bookkeeping. JumpReLU starts at the thresholds at which k latents fire.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

D, WIDTH, BATCH, K = 768, 16384, 1024, 64
ARCHITECTURES = {
  'jumprelu': 'JumpReLU',
  'topk': 'TopK',
  'batch_topk': 'BatchTopK',
}


def our_steps():
  """Name -> a step that takes the sparse way where all candidates fit."""
  import jax

  from gemma_scope import mesh as mesh_lib
  from gemma_scope.performance import benchmark

  one_device = dict.fromkeys(mesh_lib.AXES, 1)
  mesh = mesh_lib.make(one_device, jax.devices()[:1])
  steps = {'matmul': benchmark.plain_matmul(BATCH, D, WIDTH, 'float32')}
  for arch, name in ARCHITECTURES.items():
    case = benchmark.Case(arch, D, WIDTH, BATCH, K, 0, 1, 'float32', 'auto')
    steps[f'ours {name}'] = benchmark.compiled(case, mesh)[0]
  return steps


def peer_steps():
  """Name -> a step of SAELens' trainer, or the lines of sparsify's."""
  os.environ.setdefault('SPARSIFY_DISABLE_TRITON', '1')
  import sae_lens
  import torch
  from sae_lens.config import SAETrainerConfig
  from sparsify import SparseCoder, SparseCoderConfig

  torch.manual_seed(0)
  x, W = torch.randn(BATCH, D) * D**-0.5, torch.randn(D, WIDTH)
  steps = {'matmul': lambda: x @ W}
  for name in ARCHITECTURES.values():
    own_settings = {'l0_coefficient': 1.0} if name == 'JumpReLU' else {'k': K}
    config = getattr(sae_lens, f'{name}TrainingSAEConfig')
    make = getattr(sae_lens, f'{name}TrainingSAE')
    sae = make(config(d_in=D, d_sae=WIDTH, **own_settings))
    if name == 'JumpReLU':
      with torch.no_grad():
        z = (x[:128] @ sae.W_enc + sae.b_enc).flatten()
        threshold = z.kthvalue(int((1 - K / WIDTH) * z.numel())).values
        sae.threshold.fill_(threshold)
    options = SAETrainerConfig(
      total_training_samples=10**9,
      train_batch_size_samples=BATCH,
      lr=0.0,
      lr_warm_up_steps=0,
      lr_decay_steps=0,
      lr_end=0.0,
    )
    trainer = sae_lens.SAETrainer(options, sae, iter([x]))
    steps[f'SAELens {name}'] = lambda trainer=trainer: trainer.step(x)

  coder = SparseCoder(D, SparseCoderConfig(num_latents=WIDTH, k=K))
  adam = torch.optim.Adam(coder.parameters(), lr=0.0, fused=True)

  def step():
    coder.set_decoder_norm_to_unit_norm()
    coder(x).fvu.backward()
    coder.remove_gradient_parallel_to_decoder_directions()
    adam.step()
    adam.zero_grad()

  return {**steps, 'sparsify TopK': step}


def serve(steps) -> None:
  """Takes the step that a line of the input names; answers with its seconds."""
  for step in (*steps.values(), *steps.values()):
    step()
  print(json.dumps(list(steps)), flush=True)
  for line in sys.stdin:
    began = time.perf_counter()
    steps[line.rstrip('\n')]()
    print(json.dumps(time.perf_counter() - began), flush=True)


class _Server:
  def __init__(self, command: list[str]):
    self._process = subprocess.Popen(
      command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    self.names = self._answer()

  def _answer(self):
    for line in self._process.stdout:
      try:
        return json.loads(line)
      except json.JSONDecodeError:
        pass  # what a peer prints
    sys.exit('A side ended: what it printed says why.')

  def seconds(self, name: str) -> float:
    self._process.stdin.write(f'{name}\n')
    self._process.stdin.flush()
    return self._answer()


def main() -> None:
  """Measures in rounds, prints a table, and appends a JSON line a trainer."""
  global D, WIDTH, BATCH, K
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--serve', choices=('ours', 'peers'))
  parser.add_argument('--peers')
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument(
    '--shape', default=f'{D},{WIDTH},{BATCH},{K}', help='d, width, batch, k'
  )
  parser.add_argument('--out')
  args = parser.parse_args()
  D, WIDTH, BATCH, K = map(int, args.shape.split(','))
  if args.serve:
    return serve(our_steps() if args.serve == 'ours' else peer_steps())
  if not args.peers:
    parser.error('--peers names the Python where torch and the peers are.')
  sides = [
    _Server([python, __file__, f'--serve={side}', f'--shape={args.shape}'])
    for python, side in ((sys.executable, 'ours'), (args.peers, 'peers'))
  ]
  times = {(side, name): [] for side in sides for name in side.names}
  previous_side = None
  for _ in range(args.rounds):
    for (side, name), side_times in times.items():
      if side is not previous_side:
        time.sleep(1)  # the other's threads spin for a while
        for other_name in side.names:  # and the first steps after it are cold
          side.seconds(other_name)
      previous_side = side
      side_times.append(side.seconds(name))
  for (side, name), side_times in times.items():
    if name == 'matmul':
      continue
    seconds = statistics.median(side_times)
    matmul = statistics.median(times[side, 'matmul'])
    low, high = (
      BATCH / quartile
      for quartile in statistics.quantiles(side_times, n=4)[2::-2]
    )
    record = {
      'measure': 'step',
      'trainer': name,
      'd': D,
      'width': WIDTH,
      'batch': BATCH,
      'k': K,
      'dtype': 'float32',
      'device': 'cpu',
      'rounds': args.rounds,
      'tokens_per_s': BATCH / seconds,
      'tokens_per_s_low': low,
      'tokens_per_s_high': high,
      'matmul_share': 5 * matmul / seconds,
      'matmul_s': matmul,
    }
    print(
      f'{name:18} {BATCH / seconds:7,.0f} tokens/s, half of the rounds in '
      f'[{low:,.0f}, {high:,.0f}], share {5 * matmul / seconds:.2f}',
      flush=True,
    )
    if args.out:
      with open(args.out, 'a') as file:
        file.write(json.dumps(record) + '\n')


if __name__ == '__main__':
  main()
