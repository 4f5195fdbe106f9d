"""Other tools under the faults that this project is tested with.

  python docs/reliability_peers.py NAME TIMES [flip,cut,full,kill,two]

  orbax, steps           in this project's environment
  gemma_scope, our_steps the same formats and faults, this project
  saelens                in an environment with sae-lens
  dictionary             ... with dictionary-learning
  sparsify               ... with eai-sparsify

Each fault prints a line of JSON.
  flip, cut  a flipped bit, a file that is cut: right (the values that were
             saved are loaded), refused (any error), wrong (other values are
             loaded and no error is raised)
  full       the folder is written again while files may not grow beyond a part
             of their size: told (the write raised an error), kept (the values
             of before are still loaded)
  kill       a process that writes one SAE of 8 MB and another in turns into a
             folder is killed with SIGKILL; right: one of the two is loaded;
             mixed: the parameters of one with the config of the other
  two        two processes each write an SAE into one folder, ten times, at the
             same time; right as for kill; told: a writer raised an error;
             hung: a writer did not end
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
LARGE = 256, 4096  # 8 MB


def values(seed: int = 0) -> dict[str, np.ndarray]:
  """An SAE's parameters."""
  draw = np.random.default_rng(seed).standard_normal
  shapes = {'W_enc': (D, F), 'b_enc': (F,), 'W_dec': (F, D), 'b_dec': (D,)}
  return {name: draw(s).astype(np.float32) for name, s in shapes.items()}


class Peer:
  """A format: `write` a folder of it, `read` it, write it again."""

  library = 'json'  # what a process that writes it imports

  def again(self, folder, seed):
    """A function that writes the SAE of this seed into a folder."""
    return lambda: self.write(folder, seed)


class Orbax(Peer):
  """A checkpoint of arrays, as Orbax writes and restores it."""

  library = 'orbax.checkpoint'

  def __init__(self):
    import orbax.checkpoint as ocp

    self.lib = ocp

  def write(self, folder, seed=0):
    with self.lib.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / 'step', values(seed), force=True)

  def read(self, folder):
    with self.lib.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(folder / 'step', values())


class Steps(Orbax):
  """Two steps of a run, as Orbax's manager keeps them; the newest is read."""

  def _manager(self, folder):
    options = self.lib.CheckpointManagerOptions(max_to_keep=2)
    return self.lib.CheckpointManager(folder / 'steps', options=options)

  def _save(self, manager, seed):
    step = (manager.latest_step() or 0) + 1
    manager.save(step, args=self.lib.args.StandardSave(values(seed)))
    manager.wait_until_finished()

  def write(self, folder, seed=0):
    with self._manager(folder) as manager:
      self._save(manager, seed)

  def again(self, folder, seed):
    manager = self._manager(folder)
    return lambda: self._save(manager, seed)

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

    self.values = lambda seed=0: jax.device_put(values(seed))
    self.open = lambda at: checkpoints.Checkpoints(at / 'steps', keep=2)

  def write(self, folder, seed=0):
    with self.open(folder) as saves:
      saves.save(max(saves.steps(), default=0) + 1, self.values(seed), {})

  def read(self, folder):
    with self.open(folder) as saves:
      return saves.restore(self.values()).state


class SaeLens(Peer):
  """A folder of an SAE, as SAELens writes and loads it."""

  library = 'sae_lens'

  def _write_files(self, folder):
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

  def again(self, folder, seed):
    import torch
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as place:
      self._write_files(pathlib.Path(place))
      sae = SAE.load_from_disk(place)
    with torch.no_grad():
      for name, value in values(seed).items():
        getattr(sae, name).copy_(torch.from_numpy(value))
    sae.cfg.metadata.hook_name = f'blocks.{seed}.hook_resid_post'
    return lambda: sae.save_model(folder)

  def write(self, folder, seed=0):
    self.again(folder, seed)()

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

  def again(self, folder, seed):
    import torch
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    torch.manual_seed(seed)
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=4 + seed))
    return lambda: sae.save_to_disk(folder)

  def write(self, folder, seed=0):
    self.again(folder, seed)()

  def read(self, folder):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    state = {k: v.detach().numpy() for k, v in sae.state_dict().items()}
    return state | {'k': np.array(sae.cfg.k)}


class Dictionary(Peer):
  """A folder of an SAE, as dictionary_learning writes and loads it."""

  library = 'dictionary_learning'

  def again(self, folder, seed):
    import torch
    from dictionary_learning import AutoEncoder

    torch.manual_seed(seed)
    state = AutoEncoder(D, F).state_dict()
    return lambda: torch.save(state, folder / 'ae.pt')  # as its trainers do

  def write(self, folder, seed=0):
    config = {'trainer': {'dict_class': 'AutoEncoder', 'layer': 2}}
    (folder / 'config.json').write_text(json.dumps(config))
    self.again(folder, seed)()

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
      peer.write(copy, 1)
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


def _write_in_turns(name: str, folder: pathlib.Path, seeds, times) -> None:
  """Writes the SAEs of some seeds into a folder in turns."""
  global D, F
  D, F = LARGE
  writers = [PEERS[name]().again(folder, seed) for seed in seeds]
  (folder.parent / f'ready{seeds[0]}').touch()
  if len(seeds) == 1:  # begin at the same time as the other
    while not (folder.parent / f'ready{1 - seeds[0]}').exists():
      time.sleep(0.001)
  for _ in range(times):
    for write in writers:
      write()


class Written:
  """Folders that processes write, and what is read in them afterwards."""

  def __init__(self, name: str, folder: pathlib.Path):
    global D, F
    D, F = LARGE
    self.name, self.folder, self.peer = name, folder, PEERS[name]()
    self._fork = multiprocessing.get_context('forkserver')
    self._fork.set_forkserver_preload([self.peer.library])
    self._expected = [self.peer.read(self.new(f'e{i}', i)) for i in range(2)]

  def new(self, name: str, seed: int = 0) -> pathlib.Path:
    place = self.folder / name / 'sae'
    place.mkdir(parents=True)
    self.peer.write(place, seed)
    return place

  def start(self, place: pathlib.Path, seeds, times: int):
    process = self._fork.Process(
      target=_write_in_turns,
      args=(self.name, place, seeds, times),
      daemon=True,
    )
    process.start()
    return process

  def outcome(self, place: pathlib.Path) -> str:
    try:
      found = self.peer.read(place)
    except Exception:
      return 'refused'
    if any(same(expected, found) for expected in self._expected):
      return 'right'
    parts = (
      any(np.array_equal(np.asarray(e[key]), value) for e in self._expected)
      for key, value in found.items()
    )
    return 'mixed' if all(parts) else 'wrong'


def killed(name: str, folder: pathlib.Path, times: int) -> dict[str, int]:
  """Kills a process that writes a folder again and again."""
  written, dice = Written(name, folder), random.Random(0)
  counts = dict(tried=0, right=0, refused=0, mixed=0, wrong=0)
  for trial in range(times):
    place = written.new(str(trial))
    process = written.start(place, (0, 1), 10**9)
    while not (place.parent / 'ready0').exists() and process.is_alive():
      time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.3))
    if not process.is_alive():
      raise RuntimeError(f'The process of {name} that writes has ended.')
    process.kill()
    process.join()
    counts['tried'] += 1
    counts[written.outcome(place)] += 1
    shutil.rmtree(place.parent)
  return counts


def of_two(name: str, folder: pathlib.Path, times: int) -> dict[str, int]:
  """Two processes write into one folder at the same time."""
  written = Written(name, folder)
  counts = dict(tried=0, right=0, mixed=0, refused=0, wrong=0, told=0, hung=0)
  for trial in range(times):
    place = written.new(str(trial))
    two = [written.start(place, (seed,), 10) for seed in range(2)]
    for process in two:
      process.join(60)
    codes = [process.exitcode for process in two]
    for process in two:
      process.kill()
      process.join()
    counts['tried'] += 1
    counts['told'] += any(codes)
    counts['hung'] += None in codes
    counts[written.outcome(place)] += 1
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
  kinds = sys.argv[3] if len(sys.argv) > 3 else 'flip,cut,full,kill,two'
  logging.disable(logging.CRITICAL)
  warnings.simplefilter('ignore')
  peer = PEERS[name]()
  for kind in kinds.split(','):
    with tempfile.TemporaryDirectory() as place:
      folder = pathlib.Path(place)
      if kind in ('kill', 'two'):
        counts = (killed if kind == 'kill' else of_two)(name, folder, times)
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
