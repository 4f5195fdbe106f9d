"""How many latents of each SAE of a run never fire on a long text.

  python docs/dead_latents.py WORKDIR [TOKENS]

Reads at least TOKENS tokens (50,000 by default) of the run's training text,
evenly spread over it, and as many of its held-out text, or all of that. Tokens
that do not count (BOS, and what is an outlier by the SAE's card) are left out.
Prints the share of latents that never fired, for each SAE and both texts.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae as sae_lib
from gemma_scope.activations import outliers
from gemma_scope.language_model import splice
from gemma_scope.microscope import session
from gemma_scope.runtime import progress
from gemma_scope.sae import released
from gemma_scope.text import prepare
from gemma_scope.training import setup

TOKENS, BATCH = 50_000, 8


@jax.jit
def fired(params, x, keep_BT):
  """On how many of the tokens that count each latent fires, [F]."""
  x = released.stacked(x, params['W_enc'].ndim == 3)
  with jax.default_matmul_precision('highest'):
    f = sae_lib.encode(params, x)
  f_RF = f.reshape(keep_BT.size, -1)
  return jnp.sum((f_RF > 0) & keep_BT.reshape(-1, 1), 0)


def texts(opened: session.Session, tokens: int) -> dict[str, tuple]:
  """Of each split: sequences [N, T], and where their tokens count."""
  tokenizer, store = prepare.open_text(
    opened.config, opened.workdir, opened.report
  )
  keep, found = setup.special(tokenizer, store).keep, {}
  for split in ('train', 'eval'):
    rows = store.sequences(opened.config.text.seq_len, split)
    least = min(tokens // opened.config.text.seq_len, len(rows))
    for count in range(least, len(rows) + 1):
      chosen = np.linspace(0, len(rows) - 1, count).astype(int)
      tokens_NT = np.stack([rows[i] for i in chosen])
      keep_NT = keep(tokens_NT)
      if keep_NT.sum() >= tokens:
        break
    found[split] = tokens_NT, keep_NT
  return found


def dead(opened: session.Session, tokens_NT, keep_NT, label: str):
  """Each SAE's share of latents that never fired, and the tokens it read."""
  saes = [sae.loaded() for sae in opened.saes]
  bounds = [outliers.norm_bounds(sae.card) for sae in saes]
  loads = released.on_demand([sae.load() for sae in saes], opened.mesh)
  at = {s for sae in saes for s in sae.wiring.sites} | {
    *sum(map(list, bounds), [])
  }
  counts = [0] * len(saes)
  seen = [0] * len(saes)
  with progress.Progress(len(tokens_NT), label=label) as shown:
    for start in range(0, len(tokens_NT), BATCH):
      chosen = np.arange(start, min(start + BATCH, len(tokens_NT)))
      filled = np.resize(chosen, BATCH)  # one shape, one program
      taps = splice.taps(*opened.model, tokens_NT[filled], tuple(sorted(at)))
      keep_BT = keep_NT[filled] & (np.arange(BATCH) < len(chosen))[:, None]
      for i, (sae, bound, load) in enumerate(
        zip(saes, bounds, loads, strict=True)
      ):
        here_BT = keep_BT
        if bound:
          rows = {site: taps[site] for site in bound}
          here_BT = keep_BT & ~np.asarray(outliers.is_outlier(rows, bound))
        x = tuple(taps[site] for site in sae.wiring.sites)
        counts[i] = counts[i] + np.asarray(fired(load(), x, here_BT))
        seen[i] += int(here_BT.sum())
      shown.update(int(chosen[-1]) + 1, {})
  return [float((count == 0).mean()) for count in counts], seen


def main(workdir: str, tokens: str = str(TOKENS)) -> None:
  opened = session.Session(pathlib.Path(workdir))
  columns = [
    (split, *dead(opened, *text, split))
    for split, text in texts(opened, int(tokens)).items()
  ]
  for split, _, seen in columns:
    print(f'{split}: {min(seen):,} to {max(seen):,} tokens')
  print(f'{"SAE":50}' + ''.join(f'{split:>8}' for split, *_ in columns))
  for i, sae in enumerate(opened.saes):
    cells = ''.join(f'{shares[i]:>8.2%}' for _, shares, _ in columns)
    print(f'{sae.name:50}{cells}')


if __name__ == '__main__':
  if len(sys.argv) not in (2, 3):
    raise SystemExit(__doc__)
  main(*sys.argv[1:])
