r"""Measures speed here: a table, and with --out one JSON line a measurement.

  bash launch/benchmark.sh --d=768 --width=16384 --batch=1024 --k=64 \
      --arch=jumprelu,topk --branch=dense,auto --out=benchmark.jsonl
  bash launch/benchmark.sh --what=harvest,collection,data --lm=tiny

Lists (a,b) are measured in all combinations, in interleaved rounds of one
process. docs/benchmark.md explains the columns.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib

from gemma_scope import command_line
from gemma_scope.command_line import whole, words
from gemma_scope.config_fields import ARCHITECTURES

WHATS = ('step', 'harvest', 'collection', 'data')
KNOWN = {
  'what': WHATS,
  'arch': tuple(ARCHITECTURES),
  'dtype': ('float32', 'bfloat16'),
  'branch': ('dense', 'auto', 'sparse'),
}
FLAGS = command_line.Flags(
  __doc__,
  words('what', ('step',), f'What to measure: {", ".join(WHATS)}.'),
  words('arch', ('jumprelu',), 'Architectures: jumprelu, topk, ...'),
  words('d', ('768',), 'Width of the activations.'),
  words('width', ('16384',), 'Number of latents.'),
  words('batch', ('1024',), 'Rows of a training step.'),
  words('k', ('64',), 'Latents that fire on a row.'),
  whole(
    'limit', 0, 'Latents per row in a sparse step; 0: derived from k.', low=0
  ),
  words('members', ('1',), 'SAEs that train together.'),
  words(
    'dtype', ('float32',), 'Type of the matrix products: float32, bfloat16.'
  ),
  words('branch', ('dense', 'auto'), 'Kinds of step: dense, auto, sparse.'),
  words('mesh', ('1', '1', '1'), 'Sizes of the axes sae, data, latent.'),
  whole('repeats', 5, 'Interleaved rounds.', low=1),
  command_line.text(
    'lm', 'tiny', 'Language model of harvest, collection and data.'
  ),
  whole('seq_len', 128, 'Tokens of a sequence.', low=2),
  whole('lm_batch', 32, 'Sequences of a forward pass.', low=1),
  whole('rows', 2**16, 'Rows of a chunk.', low=1),
  command_line.new_file('out', 'File to append JSON lines to.', default=''),
  name='benchmark',
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    sizes = [
      whole_numbers(parsed, name)
      for name in ('d', 'width', 'batch', 'k', 'members')
    ]
    mesh_sizes = whole_numbers(parsed, 'mesh')
    if len(mesh_sizes) != 3:
      raise ValueError('--mesh must be three sizes: sae, data, latent.')
    for name, known in KNOWN.items():
      if unknown := set(getattr(parsed, name)) - set(known):
        raise ValueError(
          f'--{name} must be of {", ".join(known)}; found '
          f'{", ".join(sorted(unknown))}.'
        )
    if parsed.out:
      pathlib.Path(parsed.out).parent.mkdir(parents=True, exist_ok=True)
    import jax

    from gemma_scope import mesh as mesh_lib
    from gemma_scope.language_model import gemma as lm
    from gemma_scope.performance import benchmark

    models = ['tiny', *lm.SIZES]
    if parsed.lm not in models:
      raise ValueError(
        f'--lm must be of {", ".join(models)}; found {parsed.lm}.'
      )
    shape = dict(zip(mesh_lib.AXES, mesh_sizes, strict=True))
    mesh = mesh_lib.make(shape, jax.devices()[: math.prod(mesh_sizes)])
    model = parsed.lm, parsed.seq_len, parsed.lm_batch, mesh, parsed.repeats
    for d, width, batch, k, members in itertools.product(*sizes):
      # What is compared is interleaved; sizes come one after the other.
      cases = [
        benchmark.Case(
          arch, d, width, batch, k, parsed.limit, members, dtype, branch
        )
        for dtype, arch, branch in itertools.product(
          parsed.dtype, parsed.arch, parsed.branch
        )
      ]
      if 'step' in parsed.what:
        show(benchmark.steps(cases, mesh, parsed.repeats), parsed.out)
      if 'collection' in parsed.what:
        show((benchmark.collection(case, *model) for case in cases), parsed.out)
      if 'data' in parsed.what:
        show(
          benchmark.data(cases[0], parsed.rows, mesh, parsed.repeats),
          parsed.out,
        )
    if 'harvest' in parsed.what:
      show([benchmark.harvest(*model)], parsed.out)


def whole_numbers(parsed, name: str) -> list[int]:
  """A list flag as whole numbers above 0."""
  values = getattr(parsed, name)
  if not all(value.isdigit() and int(value) for value in values):
    raise ValueError(
      f'--{name} must be whole numbers above 0, separated by commas; found '
      f'{",".join(values)!r}.'
    )
  return list(map(int, values))


def show(records, out: str) -> None:
  """Prints a line a record, and appends it to --out."""
  for record in records:
    print('  '.join(_words(record)), flush=True)
    if out:
      with open(out, 'a') as file:
        file.write(json.dumps(record) + '\n')


def _words(record):
  """What is measured, its figures with their range, and where."""
  from gemma_scope.runtime import progress

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
  main()
