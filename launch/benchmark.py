"""Measures speed here: a table, and with --out one JSON line a measurement.

  bash launch/benchmark.sh --d=768 --width=16384 --batch=1024 --k=64 \
      --arch=jumprelu,topk --branch=dense,auto --out=benchmark.jsonl
  bash launch/benchmark.sh --what=harvest,collection,data --lm=tiny

Lists (a,b) are measured in all combinations, in interleaved rounds of one
process. What the columns mean: gemma_scope/benchmark.py, docs/benchmark.md.
"""

from __future__ import annotations

import itertools
import json
import math
import sys

from absl import app, flags

from gemma_scope.runtime import progress

WHAT = flags.DEFINE_list(
  'what', ['step'], 'Of step, harvest, collection and data.'
)
ARCH = flags.DEFINE_list('arch', ['jumprelu'], 'jumprelu, topk, ...')
D = flags.DEFINE_list('d', ['768'], 'Width of the activations.')
WIDTH = flags.DEFINE_list('width', ['16384'], 'Latents.')
BATCH = flags.DEFINE_list('batch', ['1024'], 'Rows a step.')
K = flags.DEFINE_list('k', ['64'], 'Latents that fire on a row.')
LIMIT = flags.DEFINE_integer('limit', 0, 'Room for candidates; 0: from k.')
MEMBERS = flags.DEFINE_list('members', ['1'], 'SAEs that train together.')
DTYPE = flags.DEFINE_list('dtype', ['float32'], 'float32, bfloat16.')
BRANCH = flags.DEFINE_list('branch', ['dense', 'auto'], 'dense, auto, sparse.')
MESH = flags.DEFINE_list('mesh', ['1', '1', '1'], 'Sizes of sae, data, latent.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Interleaved rounds.', 1)
LM = flags.DEFINE_string('lm', 'tiny', 'Language model of the other three.')
SEQ_LEN = flags.DEFINE_integer('seq_len', 128, 'Tokens a sequence.', 2)
LM_BATCH = flags.DEFINE_integer('lm_batch', 32, 'Sequences a pass.', 1)
ROWS = flags.DEFINE_integer('rows', 2**16, 'Rows of a chunk.', 1)
OUT = flags.DEFINE_string('out', '', 'File to append JSON lines to.')


def main(_) -> None:
  import jax

  from gemma_scope import mesh as mesh_lib
  from gemma_scope.performance import benchmark

  shape = dict(zip(mesh_lib.AXES, map(int, MESH.value), strict=True))
  mesh = mesh_lib.make(shape, jax.devices()[: math.prod(shape.values())])
  sizes = (map(int, flag.value) for flag in (D, WIDTH, BATCH, K, MEMBERS))
  model = LM.value, SEQ_LEN.value, LM_BATCH.value, mesh, REPEATS.value
  try:
    for d, width, batch, k, members in itertools.product(*sizes):
      # What is compared is interleaved; sizes come one after the other.
      cases = [
        benchmark.Case(
          arch, d, width, batch, k, LIMIT.value, members, dtype, way
        )
        for dtype, arch, way in itertools.product(
          DTYPE.value, ARCH.value, BRANCH.value
        )
      ]
      if 'step' in WHAT.value:
        show(*benchmark.steps(cases, mesh, REPEATS.value))
      if 'collection' in WHAT.value:
        show(*(benchmark.collection(case, *model) for case in cases))
      if 'data' in WHAT.value:
        show(*benchmark.data(cases[0], ROWS.value, mesh, REPEATS.value))
    if 'harvest' in WHAT.value:
      show(benchmark.harvest(*model))
  except ValueError as error:
    sys.exit(f'{type(error).__name__}: {error}')


def show(*records) -> None:
  """Prints a line a record, and appends it to --out."""
  for record in records:
    print('  '.join(_words(record)), flush=True)
    if OUT.value:
      with open(OUT.value, 'a') as file:
        file.write(json.dumps(record) + '\n')


def _words(record):
  """What is measured, its figures with their range, and where."""

  for name, value in record.items():
    if f'{name}_low' in record:
      low, high = record[f'{name}_low'], record[f'{name}_high']
      show = progress.quantity if value >= 100 else '{:.2f}'.format
      yield f'{name} {show(value)} [{show(low)}, {show(high)}]'
    elif name == 'peak_bytes' and value:
      yield f'peak {value / 2**30:.2f} GiB'
    elif name in ('measure', 'arch', 'branch', 'dtype', 'device', 'lm'):
      yield str(value)
    elif name in ('d', 'width', 'batch', 'k', 'limit', 'members', 'devices'):
      yield f'{name} {value}'
    elif name in ('l0', 'sparse_steps'):
      yield f'{name} {value:.3g}'


if __name__ == '__main__':
  app.run(main)
