"""How many latents have an outlier token as their largest example.

  python docs/outlier_examples.py WITHOUT WITH

Both are folders of launch/microscope.py build on the same SAEs and text, WITH
by `build --outliers`. WITHOUT lists the outlier tokens, and leaves them out.
For each SAE of WITH: the latents that fire, and for how many of them the
largest example, or one of the ten largest, is an outlier token.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

from gemma_scope.microscope.index import store

MOST = 10


def outlier_FE(index: store.Index, outlier_NT: np.ndarray) -> np.ndarray:
  """Which of each latent's largest examples are outlier tokens."""
  sequence_FE = index.top_sequence_FE[:, :MOST]
  marked = outlier_NT[sequence_FE, index.top_position_FE[:, :MOST]]
  return marked & (index.top_FE[:, :MOST] > 0)


def main(without: str, with_outliers: str) -> None:
  root = pathlib.Path(with_outliers, 'indexes')
  for path in sorted(root.rglob('index.json')):
    name = path.parent.relative_to(root)
    ruled = store.read(pathlib.Path(without, 'indexes', name))
    free = store.read(path.parent)
    if not np.array_equal(ruled.sequences_NT, free.sequences_NT):
      raise SystemExit(f'{name}: the two folders index different texts')
    outlier_NT = np.zeros(free.sequences_NT.shape, bool)
    outlier_NT[ruled.outlier_sequence_O, ruled.outlier_position_O] = True
    print(f'{name}: {outlier_NT.sum()} outlier tokens of {free.meta["tokens"]}')
    for label, index in (('with', free), ('without', ruled)):
      found_FE = outlier_FE(index, outlier_NT)[index.fired_F > 0]
      print(
        f'  {label:8} {len(found_FE)} latents fire; the largest example is an '
        f'outlier token for {found_FE[:, 0].mean():.1%}, one of the {MOST} '
        f'largest for {found_FE.any(1).mean():.1%}'
      )


if __name__ == '__main__':
  if len(sys.argv) != 3:
    raise SystemExit(__doc__)
  main(*sys.argv[1:])
