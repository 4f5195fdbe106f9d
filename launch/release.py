"""A run's SAEs -> a release: weights, cards, metrics, manifest, model card.

  .venv/bin/python launch/release.py --workdir=runs/tiny --out=/data/release
  .venv/bin/python launch/release.py --list=runs/tiny/release

launch/train.py writes <workdir>/release when it is done; this writes one from
the newest checkpoint of a run that is not, or elsewhere. A release that is
there and the same is left alone; another is replaced only with --overwrite.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging

from gemma_scope import release

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a training run.')
OUT = flags.DEFINE_string('out', None, 'Release; default <workdir>/release.')
LICENSE = flags.DEFINE_string('license', 'apache-2.0', 'Of the weights.')
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a release there.')
LIST = flags.DEFINE_string('list', None, 'Only print what this release holds.')


def write(workdir: pathlib.Path, out: pathlib.Path) -> bool:
  from ml_collections import ConfigDict

  from gemma_scope import (
    pipeline,
    train,
  )  # JAX: not needed to list a release

  config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
  members = train.load(config, workdir).members(config)
  scores = {}
  if (workdir / 'evaluation.json').exists():
    scores = json.loads((workdir / 'evaluation.json').read_text())['members']
  return pipeline.write_release(
      workdir, members, scores, out,
      license_name=LICENSE.value, overwrite=OVERWRITE.value,
  )  # fmt: skip


def main(arguments: list[str]) -> None:
  if arguments[1:] or not (WORKDIR.value or LIST.value):
    raise app.UsageError('Give --workdir, or --list.')
  logging.set_verbosity(logging.WARNING)
  try:
    out = pathlib.Path(LIST.value or OUT.value or f'{WORKDIR.value}/release')
    if not LIST.value:
      written = write(pathlib.Path(WORKDIR.value), out)
      print(f'{out}: {"written" if written else "already there, the same"}')
    rows = [(member.card, member.metrics) for member in release.load_all(out)]
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')
  print(release.table(rows))


if __name__ == '__main__':
  app.run(main)
