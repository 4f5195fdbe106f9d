"""The microscope: an index of what every latent fires on, and pages to read it.

  .venv/bin/python launch/microscope.py build --workdir=runs/tiny
  .venv/bin/python launch/microscope.py build --workdir=runs/tiny \
      --release='runs/tiny/release/resid_post/layer_2/width_1k/average_l0_33'
  .venv/bin/python launch/microscope.py export --workdir=runs/tiny \
      --model=gemma-2-2b --name=my-saes --out=neuronpedia

build reads the run's text with its language model, writes <workdir>/microscope,
and prints the address of its pages, which open without a server. --release
takes releases, or SAEs of any format, in a folder or on the hub, with commas.
export writes Neuronpedia's bulk files from the indexes.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a training run.')
RELEASE = flags.DEFINE_string('release', None, "SAEs; default: the run's.")
SEQUENCES = flags.DEFINE_integer('sequences', 1024, 'To read.', 2)
BATCH = flags.DEFINE_integer('batch', 32, 'Sequences a forward pass.', 1)
OUT = flags.DEFINE_string('out', None, 'Default <workdir>/microscope.')
MODEL = flags.DEFINE_string('model', '', "Neuronpedia's name of the model.")
NAME = flags.DEFINE_string('name', 'gemma-scope', 'Of the export.')
CREATOR = flags.DEFINE_string('creator', '', 'Who made the SAEs.')
flags.mark_flag_as_required('workdir')


def build(workdir: pathlib.Path, out: pathlib.Path) -> None:
  from ml_collections import ConfigDict

  from gemma_scope import collection, metrics, runs, weights
  from gemma_scope import mesh as mesh_lib
  from gemma_scope.formats import published
  from gemma_scope.microscope import build as build_lib
  from gemma_scope.microscope import index, logits, pages

  config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
  members = published.offered(RELEASE.value or str(workdir / 'release'))
  tokenizer, store = collection.open_text(config, workdir, print)
  text = build_lib.spread(
    store, config.text.seq_len, SEQUENCES.value,
    collection.special(tokenizer, store).keep, tokenizer.eos_id,
  )  # fmt: skip
  mesh = mesh_lib.make(config.mesh)
  gemma, params = weights.load(
      config.lm.name, config.lm.checkpoint, dtype=config.lm.dtype, mesh=mesh,
  )  # fmt: skip
  progress = metrics.Progress(
    2 * len(text.sequences_NT), config.text.seq_len, label='index', every_s=20
  )
  out.mkdir(parents=True, exist_ok=True)
  rows = [(m.load(), m.card) for m in members]
  entries = []
  with runs.Interrupt() as interrupt:
    found = build_lib.build(
      gemma,
      params,
      rows,
      text,
      batch=BATCH.value,
      mesh=mesh,
      progress=lambda done, _: progress.update(done, {}),
      poll=interrupt.check,
      state=build_lib.State(out / 'partial.npz', text, members),
    )
    for member, (arrays, _), one in zip(members, rows, found, strict=True):
      path = build_lib.name_of(member.path)
      index.write(out / 'indexes' / path, one)
      decoder_FD = logits.decoders(arrays)
      entries.append(pages.Entry(path, one, member.metrics, decoder_FD))
  progress.close()
  (out / 'partial.npz').unlink(missing_ok=True)
  pages.write(out / 'pages', entries, tokenizer.pieces)
  print(f'microscope  {(out / "pages" / "index.html").resolve().as_uri()}')


def export(workdir: pathlib.Path, out: pathlib.Path) -> None:
  from ml_collections import ConfigDict

  from gemma_scope import text, weights
  from gemma_scope.microscope import index, neuronpedia

  config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
  tokenizer = text.Tokenizer(
    config.lm.tokenizer
    or weights.tokenizer(config.lm.name, config.lm.checkpoint)
  )
  root = workdir / 'microscope' / 'indexes'
  for path in sorted(root.rglob('index.json')):
    name = path.parent.relative_to(root)
    count = neuronpedia.write(
        out / name, index.read(path.parent), tokenizer.pieces,
        model=MODEL.value or config.lm.name, name=NAME.value,
        creator=CREATOR.value,
    )  # fmt: skip
    print(f'{out / name}: {count:,} latents')


COMMANDS = {'build': build, 'export': export}


def main(arguments: list[str]) -> None:
  if len(arguments) != 2 or arguments[1] not in COMMANDS:
    raise app.UsageError(f'Say one of {", ".join(COMMANDS)}, then flags.')
  logging.set_verbosity(logging.WARNING)
  from gemma_scope import runs

  workdir = pathlib.Path(WORKDIR.value)
  default = 'microscope' if arguments[1] == 'build' else 'neuronpedia'
  try:
    COMMANDS[arguments[1]](
      workdir, pathlib.Path(OUT.value or workdir / default)
    )
  except runs.Interrupted:
    sys.exit('stopped and saved; the same command continues')
  except (ValueError, RuntimeError, OSError) as error:
    sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
  app.run(main)
