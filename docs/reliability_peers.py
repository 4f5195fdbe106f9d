"""What other tools do with damaged files, and with a disk that fills up.

  python docs/reliability_peers.py orbax 200      (this project's environment)
  python docs/reliability_peers.py saelens 300    (one with sae-lens)
  python docs/reliability_peers.py dictionary 300 (one with dictionary-learning)
  python docs/reliability_peers.py sparsify 300   (one with eai-sparsify)
  python docs/reliability_peers.py gemma_scope 300 (this project)

A line of JSON: tried, right (loaded, and the values are those that were saved),
refused (any error), wrong (loaded with other values and no error). The last
line is of a folder that is written again while files may not grow beyond a part
of their size: told (the write raised an error), kept (what was there before is
still loaded).
"""

from __future__ import annotations

import json
import logging
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import warnings

import numpy as np

D, F = 16, 64


def values(seed: int = 0) -> dict[str, np.ndarray]:
  """An SAE's parameters."""
  draw = np.random.default_rng(seed).standard_normal
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

  def rewrite(self, folder):
    with self.lib.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / 'step', values(1), force=True)

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

  def rewrite(self, folder):
    import torch
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    with torch.no_grad():
      sae.W_enc.mul_(2)
    sae.save_model(folder)

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

  rewrite = write  # of other random values

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

    torch.save(AutoEncoder(D, F).state_dict(), folder / 'ae.pt')
    config = {'trainer': {'dict_class': 'AutoEncoder', 'layer': 2}}
    (folder / 'config.json').write_text(json.dumps(config))

  rewrite = write  # of other random values

  def read(self, folder):
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), device='cpu')
    return {k: v.detach().numpy() for k, v in dictionary.state_dict().items()}


class GemmaScope:
  """A release of one SAE of this project."""

  def __init__(self):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from tests.helpers import releases

    self.lib = releases

  def write(self, folder, seed=0):
    sae = self.lib.params_of(seed), self.lib.card(), None
    self.lib.save(folder / 'release', [sae], overwrite=True)

  def rewrite(self, folder):
    self.write(folder, 1)

  def read(self, folder):
    from gemma_scope import release

    (sae,) = release.load_all(folder / 'release')
    return {**sae.load(), 'card': np.array(json.dumps(sae.card))}


PEERS = {
  'gemma_scope': GemmaScope,
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
  paths = sorted(p for p in folder.rglob('*') if p.is_file())
  paths = [p for p in paths if p.stat().st_size]
  weights = None if dice.random() < 0.5 else [p.stat().st_size for p in paths]
  (path,) = dice.choices(paths, weights)
  data = bytearray(path.read_bytes())
  if kind == 'flip':
    end = len(data) if dice.random() < 0.5 else min(len(data), 512)
    data[dice.randrange(end)] ^= 1 << dice.randrange(8)
  else:
    data = data[: dice.choice((0, len(data) // 2, len(data) - 1))]
  path.write_bytes(data)


def full(peer, intact: pathlib.Path, times: int) -> dict[str, int]:
  """Writes again where files may not grow beyond a part of their size."""
  counts = dict(tried=0, told=0, kept=0)
  expected, dice = peer.read(intact), random.Random(0)
  largest = max(p.stat().st_size for p in intact.rglob('*') if p.is_file())
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for _ in range(times):
    copy = intact.with_name('copy')
    shutil.copytree(intact, copy)
    counts['tried'] += 1
    resource.setrlimit(
      resource.RLIMIT_FSIZE, (int(largest * dice.random()), hard)
    )
    try:
      peer.rewrite(copy)
    except Exception:
      counts['told'] += 1
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
      counts['kept'] += same(expected, peer.read(copy))
    except Exception:
      pass
    shutil.rmtree(copy)
  return counts


def main() -> None:
  name, times = sys.argv[1], int(sys.argv[2])
  logging.disable(logging.CRITICAL)
  warnings.simplefilter('ignore')
  peer = PEERS[name]()
  for kind in ('flip', 'cut'):
    counts = dict(tried=0, right=0, refused=0, wrong=0)
    dice = random.Random(name + kind)
    with tempfile.TemporaryDirectory() as place:
      intact = pathlib.Path(place) / 'whole'
      intact.mkdir()
      peer.write(intact)
      expected = peer.read(intact)
      for _ in range(times):
        copy = pathlib.Path(place) / 'copy'
        shutil.copytree(intact, copy)
        damage(copy, dice, kind)
        counts['tried'] += 1
        try:
          params = peer.read(copy)
        except Exception:
          counts['refused'] += 1
        else:
          counts['right' if same(expected, params) else 'wrong'] += 1
        shutil.rmtree(copy)
    print(json.dumps({'peer': name, 'fault': kind, **counts}), flush=True)
  with tempfile.TemporaryDirectory() as place:
    intact = pathlib.Path(place) / 'whole'
    intact.mkdir()
    peer.write(intact)
    counts = full(peer, intact, times)
  print(json.dumps({'peer': name, 'fault': 'full', **counts}), flush=True)


if __name__ == '__main__':
  main()
