"""SAEs -> a release, in our layout or another's; listed, or sent to the hub.

  .venv/bin/python launch/release.py --workdir=runs/tiny --out=/data/release
  .venv/bin/python launch/release.py --release=runs/tiny/release \
      --layout=saelens --out=/data/saelens
  .venv/bin/python launch/release.py --release=/data/saelens --push=me/my-saes
  .venv/bin/python launch/release.py --list=google/gemma-scope-2b-pt-res

launch/train.py writes <workdir>/release when it is done; --workdir writes one
from the newest checkpoint of a run that is not, or elsewhere. A release that is
there and the same is left alone; another is replaced only with --overwrite.
--push says what it would send; with --nodry_run it does, to a private
repository of yours, and the same command continues what was cut off.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging

from gemma_scope import release
from gemma_scope.release import npz, table
from gemma_scope.release.formats import export, hub, published

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a training run.')
RELEASE = flags.DEFINE_string('release', None, 'A release that is there.')
OUT = flags.DEFINE_string('out', None, 'Release; default <workdir>/release.')
LAYOUT = flags.DEFINE_enum(
  'layout', 'gemma_scope', ['gemma_scope', *export.LAYOUTS], 'Of what is made.'
)
LICENSE = flags.DEFINE_string('license', 'apache-2.0', 'Of the weights.')
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a release there.')
PUSH = flags.DEFINE_string('push', None, 'owner/name on the hub to send it to.')
DRY_RUN = flags.DEFINE_bool('dry_run', True, 'Only say what would be sent.')
LIST = flags.DEFINE_string('list', None, 'Only print what this path holds.')
REVISION = flags.DEFINE_string('revision', '', 'Of a repository to list.')


def write(workdir: pathlib.Path, out: pathlib.Path) -> bool:
  from ml_collections import ConfigDict

  from gemma_scope import pipeline
  from gemma_scope.training import loop  # JAX: not needed for all else

  config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
  members = loop.load(config, workdir).members(config)
  scores = {}
  if (workdir / 'evaluation.json').exists():
    scores = json.loads((workdir / 'evaluation.json').read_text())['members']
  return pipeline.write_release(
      workdir, members, scores, out,
      license_name=LICENSE.value, overwrite=OVERWRITE.value,
  )  # fmt: skip


def show(path: str) -> None:
  """A line an SAE: with its measurements, or with what its path says."""
  if (pathlib.Path(path) / 'manifest.json').exists():
    try:
      rows = [(m.card, m.metrics) for m in release.load_all(path)]
      print(table.table(rows))
      return
    except release.ReleaseError:
      pass  # the manifest of another layout
  print(published.table(published.listed(path, REVISION.value)))


def main(arguments: list[str]) -> None:
  source = WORKDIR.value or RELEASE.value
  if arguments[1:] or not (source or LIST.value):
    raise app.UsageError('Give --workdir, --release or --list.')
  logging.set_verbosity(logging.WARNING)
  try:
    if LIST.value:
      show(LIST.value)
      return
    out = pathlib.Path(RELEASE.value or OUT.value or f'{WORKDIR.value}/release')
    if WORKDIR.value:
      written = write(pathlib.Path(WORKDIR.value), out)
      print(f'{out}: {"written" if written else "already there, the same"}')
    if LAYOUT.value != 'gemma_scope':
      if not OUT.value or WORKDIR.value:
        raise ValueError('--layout turns a --release into a new folder --out.')
      rows = [(m.load, m.card, m.metrics) for m in release.load_all(out)]
      out = pathlib.Path(OUT.value)
      export.write(out, rows, LAYOUT.value, LICENSE.value)
      print(f'{out}: written, {LAYOUT.value}')
    if PUSH.value:
      hub.push(out, PUSH.value, not DRY_RUN.value, print)
    else:
      show(str(out))
  except (ValueError, RuntimeError, OSError, npz.Refused) as error:
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
