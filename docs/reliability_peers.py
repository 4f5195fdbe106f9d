"""Other tools under the faults that this project is tested with.

  python docs/reliability_peers.py NAME TIMES [flip,cut,full,kill]

  orbax, steps           in this project's environment
  gemma_scope, our_steps the same formats and faults, this project
  saelens                in an environment with sae-lens
  dictionary             ... with dictionary-learning
  sparsify               ... with eai-sparsify

Each fault prints a line of JSON.
  flip, cut  a flipped bit, a file that is cut: tried, right (the values that
             were saved are loaded), refused (any error), wrong (other values
             are loaded and no error is raised)
  full       the folder is written again while files may not grow beyond a part
             of their size: told (the write raised an error), kept (the values
             of before are still loaded)
  kill       a process that writes the folder again and again is killed with
             SIGKILL: kept (the folder still loads), lost (it does not)
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings

import numpy as np

D, F = 16, 64


def values(seed: int = 0) -> dict[str, np.ndarray]:
  """An SAE's parameters."""
  draw = np.random.default_rng(seed).standard_normal
  shapes = {'W_enc': (D, F), 'b_enc': (F,), 'W_dec': (F, D), 'b_dec': (D,)}
  return {name: draw(s).astype(np.float32) for name, s in shapes.items()}


class Peer:
  """A format: `write` a folder of it, `read` it, write it again."""

  library = 'json'  # what a process that writes it imports

  def again(self, folder):
    """A function that writes the folder again each time it is called."""
    return lambda: self.rewrite(folder)


class Orbax(Peer):
  """A checkpoint of arrays, as Orbax writes and restores it."""

  library = 'orbax.checkpoint'

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


class Steps(Orbax):
  """Two steps of a run, as Orbax's manager keeps them; the newest is read."""

  def _manager(self, folder):
    options = self.lib.CheckpointManagerOptions(max_to_keep=2)
    return self.lib.CheckpointManager(folder / 'steps', options=options)

  def _save(self, manager, step):
    manager.save(step, args=self.lib.args.StandardSave(values()))
    manager.wait_until_finished()

  def write(self, folder):
    with self._manager(folder) as manager:
      self._save(manager, 0)

  def again(self, folder):
    manager = self._manager(folder)
    return lambda: self._save(manager, manager.latest_step() + 1)

  def read(self, folder):
    with self._manager(folder) as manager:
      wanted = self.lib.args.StandardRestore(values())
      return manager.restore(manager.latest_step(), args=wanted)


class OurSteps(Peer):
  """The same, as this project keeps them."""

  library = 'orbax.checkpoint'

  def __init__(self):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import jax

    from gemma_scope.runtime import checkpoints

    self.values = lambda: jax.device_put(values())
    self.open = lambda at: checkpoints.Checkpoints(at / 'steps', keep=2)

  def write(self, folder):
    with self.open(folder) as saves:
      saves.save(0, self.values(), {})

  def again(self, folder):
    saves = self.open(folder)
    step = saves.restore(self.values()).step

    def save():
      nonlocal step
      step += 1
      saves.save(step, self.values(), {})

    return save

  def read(self, folder):
    with self.open(folder) as saves:
      return saves.restore(self.values()).state


class SaeLens(Peer):
  """A folder of an SAE, as SAELens writes and loads it."""

  library = 'sae_lens'

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

  def again(self, folder):
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    return lambda: sae.save_model(folder)

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


class Sparsify(Peer):
  """A folder of an SAE, as sparsify writes and loads it."""

  library = 'sparsify'

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


class Dictionary(Peer):
  """A folder of an SAE, as dictionary_learning writes and loads it."""

  library = 'dictionary_learning'

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


class GemmaScope(Peer):
  """A release of one SAE of this project."""

  library = 'gemma_scope.release'

  def __init__(self):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from tests.helpers import releases

    self.lib = releases

  def write(self, folder, seed=0):
    card = self.lib.card(d_in=D, d_out=D, width=F)
    sae = self.lib.params_of(seed, D, F), card, None
    self.lib.save(folder / 'release', [sae], overwrite=True)

  def rewrite(self, folder):
    self.write(folder, 1)

  def read(self, folder):
    from gemma_scope import release

    (sae,) = release.load_all(folder / 'release')
    return {**sae.load(), 'card': np.array(json.dumps(sae.card))}


PEERS = {
  'gemma_scope': GemmaScope,
  'our_steps': OurSteps,
  'orbax': Orbax,
  'steps': Steps,
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


def _write_again(name: str, folder: pathlib.Path, sizes) -> None:
  """Writes a folder again and again, until it is killed."""
  global D, F
  D, F = sizes
  again = PEERS[name]().again(folder)
  (folder.parent / 'ready').touch()
  while True:
    again()


def killed(name: str, folder: pathlib.Path, times: int) -> dict[str, int]:
  """Kills a process that writes an SAE of 8 MB again and again."""
  global D, F
  D, F = 256, 4096
  peer, dice = PEERS[name](), random.Random(0)
  fork = multiprocessing.get_context('forkserver')
  fork.set_forkserver_preload([peer.library])
  counts = dict(tried=0, kept=0, lost=0)
  for trial in range(times):
    place = folder / str(trial) / 'sae'
    place.mkdir(parents=True)
    peer.write(place)
    process = fork.Process(
      target=_write_again, args=(name, place, (D, F)), daemon=True
    )
    process.start()
    while not (place.parent / 'ready').exists() and process.is_alive():
      time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.3))
    if not process.is_alive():
      raise RuntimeError(f'The process of {name} that writes has ended.')
    process.kill()
    process.join()
    counts['tried'] += 1
    try:
      peer.read(place)
      counts['kept'] += 1
    except Exception:
      counts['lost'] += 1
    shutil.rmtree(place.parent)
  return counts


def damaged(peer, folder: pathlib.Path, kind: str, times: int, dice):
  """Reads a copy that is damaged, again and again."""
  counts = dict(tried=0, right=0, refused=0, wrong=0)
  whole, copy = folder / 'whole', folder / 'copy'
  whole.mkdir()
  peer.write(whole)
  wanted = peer.read(whole)
  for _ in range(times):
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
  return counts


def main() -> None:
  name, times = sys.argv[1], int(sys.argv[2])
  kinds = sys.argv[3] if len(sys.argv) > 3 else 'flip,cut,full,kill'
  logging.disable(logging.CRITICAL)
  warnings.simplefilter('ignore')
  peer = PEERS[name]()
  for kind in kinds.split(','):
    with tempfile.TemporaryDirectory() as place:
      folder = pathlib.Path(place)
      if kind == 'kill':
        counts = killed(name, folder, times)
      elif kind == 'full':
        (folder / 'whole').mkdir()
        peer.write(folder / 'whole')
        counts = full(peer, folder / 'whole', times)
      else:
        dice = random.Random(name + kind)
        counts = damaged(peer, folder, kind, times, dice)
    print(json.dumps({'peer': name, 'fault': kind, **counts}), flush=True)


if __name__ == '__main__':
  main()
