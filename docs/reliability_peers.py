"""What other tools do with damaged files: flipped bits and cut files.

  python docs/reliability_peers.py orbax 200      (this project's environment)
  python docs/reliability_peers.py saelens 300    (one with sae-lens)
  python docs/reliability_peers.py dictionary 300 (one with dictionary-learning)
  python docs/reliability_peers.py sparsify 300   (one with eai-sparsify)

A line of JSON: tried, right (loaded, and the values are those that were saved),
refused (any error), wrong (loaded with other values and no error).
"""

from __future__ import annotations

import json
import logging
import pathlib
import random
import shutil
import sys
import tempfile
import warnings

import numpy as np

D, F = 16, 64


def values() -> dict[str, np.ndarray]:
  """An SAE's parameters."""
  draw = np.random.default_rng(0).standard_normal
  shapes = {'W_enc': (D, F), 'b_enc': (F,), 'W_dec': (F, D), 'b_dec': (D,)}
  return {name: draw(s).astype(np.float32) for name, s in shapes.items()}


class Orbax:
  """A checkpoint of arrays, as Orbax writes and restores it."""

  def __init__(self):
    import orbax.checkpoint as ocp

    self.lib = ocp

  def write(self, folder):
    with self.lib.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / 'step', values())

  def read(self, folder):
    with self.lib.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(folder / 'step', values())


class SaeLens:
  """A folder of an SAE, as SAELens writes and loads it."""

  def write(self, folder):
    from safetensors.numpy import save_file

    save_file(values(), folder / 'sae_weights.safetensors')
    config = {
      'architecture': 'standard', 'd_in': D, 'd_sae': F, 'dtype': 'float32',
      'device': 'cpu', 'apply_b_dec_to_input': True,
      'normalize_activations': 'none', 'reshape_activations': 'none',
      'metadata': {
        'model_name': 'gemma-2-2b', 'hook_name': 'blocks.2.hook_resid_post',
        'sae_lens_version': '6.54.12',
      },
    }  # fmt: skip
    (folder / 'cfg.json').write_text(json.dumps(config))

  def read(self, folder):
    import torch
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    x = np.random.default_rng(1).standard_normal((8, D)).astype(np.float32)
    with torch.no_grad():
      latents = sae.encode(torch.from_numpy(x)).numpy()
    state = {k: v.numpy() for k, v in sae.state_dict().items()}
    metadata = sae.cfg.metadata
    state['about'] = np.array(f'{metadata.model_name} {metadata.hook_name}')
    return state | {'latents': latents}


class Sparsify(SaeLens):
  """A folder of an SAE, as sparsify writes and loads it."""

  def write(self, folder):
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    SparseCoder(D, SparseCoderConfig(num_latents=F, k=4)).save_to_disk(folder)

  def read(self, folder):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    state = {k: v.detach().numpy() for k, v in sae.state_dict().items()}
    return state | {'k': np.array(sae.cfg.k)}


class Dictionary(SaeLens):
  """A folder of an SAE, as dictionary_learning writes and loads it."""

  def write(self, folder):
    import torch
    from dictionary_learning import AutoEncoder

    torch.manual_seed(0)
    torch.save(AutoEncoder(D, F).state_dict(), folder / 'ae.pt')
    config = {'trainer': {'dict_class': 'AutoEncoder', 'layer': 2}}
    (folder / 'config.json').write_text(json.dumps(config))

  def read(self, folder):
    from dictionary_learning.utils import load_dictionary

    found, _ = load_dictionary(str(folder), device='cpu')
    return {k: v.detach().numpy() for k, v in found.state_dict().items()}


PEERS = {
  'orbax': Orbax,
  'saelens': SaeLens,
  'sparsify': Sparsify,
  'dictionary': Dictionary,
}


def same(a, b) -> bool:
  return a.keys() == b.keys() and all(
    np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a
  )


def damage(folder: pathlib.Path, dice: random.Random, kind: str) -> None:
  found = sorted(p for p in folder.rglob('*') if p.is_file())
  found = [p for p in found if p.stat().st_size]
  weights = None if dice.random() < 0.5 else [p.stat().st_size for p in found]
  (path,) = dice.choices(found, weights)
  data = bytearray(path.read_bytes())
  if kind == 'flip':
    end = len(data) if dice.random() < 0.5 else min(len(data), 512)
    data[dice.randrange(end)] ^= 1 << dice.randrange(8)
  else:
    data = data[: dice.choice((0, len(data) // 2, len(data) - 1))]
  path.write_bytes(data)


def main() -> None:
  name, times = sys.argv[1], int(sys.argv[2])
  logging.disable(logging.CRITICAL)
  warnings.simplefilter('ignore')
  peer = PEERS[name]()
  for kind in ('flip', 'cut'):
    counts = dict(tried=0, right=0, refused=0, wrong=0)
    dice = random.Random(name + kind)
    with tempfile.TemporaryDirectory() as place:
      whole = pathlib.Path(place) / 'whole'
      whole.mkdir()
      peer.write(whole)
      wanted = peer.read(whole)
      for _ in range(times):
        copy = pathlib.Path(place) / 'copy'
        shutil.copytree(whole, copy)
        damage(copy, dice, kind)
        counts['tried'] += 1
        try:
          found = peer.read(copy)
        except Exception:
          counts['refused'] += 1
        else:
          counts['right' if same(wanted, found) else 'wrong'] += 1
        shutil.rmtree(copy)
    print(json.dumps({'peer': name, 'fault': kind, **counts}), flush=True)


if __name__ == '__main__':
  main()
