"""Rows a second of training steps, ours or SAELens', on one core (Linux).

  python docs/comparison_speed.py runs/comparison/train.npy

Times what is installed in this environment: run it by turns in both. Rows that
several SAEs learn from count once for each. No language model, no reading.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time

import comparison
import numpy as np


def our_steps(x_KBD: np.ndarray):
  """Steps of one member, of two, and of all of configs/tiny.py."""
  import jax

  from gemma_scope.language_model import weights
  from gemma_scope.training import setup, stack

  model, two = weights.read_config('tiny', ''), comparison.ARGUMENT
  for argument in (f'{two};sparsity=32', two, ''):
    stacks, _ = setup.make_stacks(comparison.get_config(argument), model)
    state = [tuple(one.init(jax.random.key(0)) for one in stacks)]

    @jax.jit
    def step(states, x_BD, stacks=stacks):
      rows = {site: x_BD for one in stacks for site in one.sites}
      return stack.step_all(stacks, states, rows, 500)[0]

    def take(x_BD, step=step, state=state):
      state[0] = jax.block_until_ready(step(state[0], x_BD))

    yield 'ours, together', sum(len(one.seeds) for one in stacks), take


def peer_steps(x_KBD: np.ndarray):
  """Steps of SAELens' trainer, its own bookkeeping included."""
  for kind in ('JumpReLU, tanh', 'TopK'):
    trainer = comparison.peer_trainer(kind, x_KBD, 1e-3, 32)
    new = trainer.sae.W_enc.new_tensor
    yield kind, 1, lambda x_BD, t=trainer, new=new: t.step(new(x_BD))


def main(store: str) -> None:
  """Rows a second, times SAEs: steps alone, on one core (Linux)."""
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  x_KBD = np.load(store)[:60]
  peer = importlib.util.find_spec('sae_lens')
  for name, members, take in (peer_steps if peer else our_steps)(x_KBD):
    for x_BD in x_KBD[:10]:  # compiles
      take(x_BD)
    started = time.monotonic()
    for x_BD in x_KBD[10:]:
      take(x_BD)
    rate = members * x_KBD[10:, :, 0].size / (time.monotonic() - started)
    print(f'{name}, {members}: {rate:,.0f} rows/s')


if __name__ == '__main__':
  main(sys.argv[1])
