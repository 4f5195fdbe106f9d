"""Small training runs on the embedded model."""

from __future__ import annotations

import json
import os
import pathlib
import sys

from ml_collections import ConfigDict

import gemma_scope
from configs import tiny
from gemma_scope.text import corpus

ROOT = pathlib.Path(gemma_scope.__file__).parents[1]


STEPS = 40


TEXTS = ['abc', 'ast', 'bisect', 'calendar', 'copy', 'csv', 'dis', 'enum']


def small(tmp_path: pathlib.Path, **changes) -> ConfigDict:
  """The tiny config, smaller: 4 SAEs, 40 steps, 5 chunks.

  All that carries state is on: the centre and the bound of the norms,
  BatchTopK's threshold, counters, resampling.
  """
  config = tiny.get_config('layers=0,1;sites=attn_out,resid_post;sparsity=4')
  config.update_from_flattened_dict(
    {
      'text.source': f'files:{tmp_path}/texts/*.txt',
      'text.seq_len': 33,
      'collection.widths': (32,),
      'collection.architectures': ('batch_topk',),
      'objective.auxk': 1 / 32,
      'train.resample_every': 9,
      'train.dead_after': 200,
      'train.active_limit': 12,  # some steps are sparse
      'activations.chunk_rows': 512,
      'activations.centre': 'geometric_median',
      'activations.scale': 'centred_rms',
      'activations.max_norm': 1.5,
      'activations.lm_batch': 4,
      'train.steps': STEPS,
      'train.batch': 64,
      'train.warm_up': 5,
      'train.decay': 10,
      'train.sparsity_warm_up': 10,
      'checkpoint.every': 7,
      'metrics.every': 1,
      'evaluation.sequences': 8,
      **changes,
    }
  )
  folder = tmp_path / 'texts'
  if not folder.exists():
    folder.mkdir()
    for name in TEXTS:
      source = pathlib.Path(os.__file__).parent / f'{name}.py'
      for part in range(8):
        text = source.read_text()[3000 * part :][:6000]
        (folder / f'{name}{part}.txt').write_text(text)
    # The split goes by name: one that is held out.
    names = (f'heldout{i}.txt' for i in range(1000))
    heldout = next(n for n in names if corpus.Document(n, '').split == 'eval')
    (folder / heldout).write_text(text * 3)
  return config


def flags_of(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
  """The command line that makes this config."""
  default = tiny.get_config()
  command = [sys.executable, str(ROOT / 'launch/train.py')]
  command += ['--config=configs/tiny.py', f'--workdir={workdir}']
  for section, fields in config.items():
    if isinstance(fields, ConfigDict):
      command += [
        f'--config.{section}.{name}={value}'
        for name, value in fields.items()
        if value != default[section][name]
      ]
  return command


def last_step(workdir: pathlib.Path) -> int:
  try:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])['step']
  except (OSError, IndexError, json.JSONDecodeError):
    return 0
