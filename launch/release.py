r"""Writes a release, converts it to another tool's format, lists or uploads it.

  gemma-scope release --workdir=runs/tiny --out=/data/release
  gemma-scope release --release=runs/tiny/release \
      --layout=saelens --out=/data/saelens
  gemma-scope release --release=/data/saelens --push=me/my-saes
  gemma-scope release --list=google/gemma-scope-2b-pt-res

`train` writes <workdir>/release when it is done. --workdir writes one from the
newest checkpoint of a run, finished or not. A release that exists and is equal
is left alone; another is replaced only with --overwrite.

--push says what it would upload; with --nodry_run it uploads, to a private
repository of yours, and the same command continues an upload that was cut off.
"""

from __future__ import annotations

import pathlib

from gemma_scope import command_line, path_values, release
from gemma_scope.release.formats import export

OURS = 'gemma_scope'
FLAGS = command_line.Flags(
  __doc__,
  command_line.folder('workdir', 'Folder of a training run to write from.'),
  command_line.path(
    'release',
    'A release that exists, or an SAE in any published format, to convert or '
    'push.',
  ),
  command_line.text(
    'site',
    '',
    'Site of a params.npz that has no card: resid_post/12, or of a transcoder '
    'mlp_in/12:mlp_out/12.',
  ),
  command_line.text(
    'model', '', 'Language model of such a params.npz: gemma2-2b.'
  ),
  command_line.local_folder(
    'out', 'Folder to write; with --workdir, by default <workdir>/release.'
  ),
  command_line.choice(
    'layout', OURS, (OURS, *export.LAYOUTS), 'Format of what is written.'
  ),
  command_line.text('license', 'apache-2.0', 'Licence of the weights.'),
  command_line.switch('overwrite', False, 'Replace a release in --out.'),
  command_line.text(
    'push', None, 'Repository on the hub to upload to, owner/name.'
  ),
  command_line.switch('dry_run', True, 'Only say what would be uploaded.'),
  command_line.path('list', 'Only print the SAEs at this path.'),
  command_line.text('revision', '', 'Revision of the repository to list.'),
  name='release',
  needs_flags=True,
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    sources = [
      name for name in ('workdir', 'release', 'list') if getattr(parsed, name)
    ]
    if len(sources) != 1:
      raise ValueError(
        'release needs one of --workdir, --release and --list; found '
        f'{" and ".join("--" + name for name in sources) or "none"}.'
      )
    if parsed.list:
      show(parsed.list, parsed.revision)
      return
    if parsed.layout != OURS and not parsed.out:
      raise ValueError(f'--layout={parsed.layout} needs --out, a new folder.')
    from gemma_scope.runtime import remote

    with remote.folder(parsed.workdir or '') as workdir:
      if parsed.workdir:
        remote.fetch(workdir)
        path_values.existing(workdir, 'workdir')
        path_values.existing(workdir / 'config.json', 'workdir')
      out = pathlib.Path(parsed.out or parsed.release or workdir / 'release')
      if parsed.workdir or parsed.out:
        write(parsed, workdir, out)
      if parsed.push:
        from gemma_scope.release.formats import hub

        hub.push(out, parsed.push, not parsed.dry_run, print)
      else:
        show(str(out))


def write(parsed, workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the SAEs of a run or a release into `out`, in the layout asked."""
  if parsed.layout != OURS:
    export.check_free(out, parsed.overwrite)  # before anything is loaded
  if parsed.workdir:
    saes = trained(workdir)
  else:
    from gemma_scope.release.formats import published

    about = published.described(parsed.site, parsed.model)
    saes = published.open_all(parsed.release, about=about)
  options = {'license_name': parsed.license, 'overwrite': parsed.overwrite}
  if parsed.layout != OURS:
    export.write(out, saes, parsed.layout, **options)
    print(f'{out}: written, in the layout {parsed.layout}')
    return
  written = release.save(out, saes, **options)
  print(f'{out}: {"written" if written else "exists already, equal"}')


def trained(workdir: pathlib.Path) -> list[release.Released]:
  """The SAEs of a run's newest checkpoint, with their metrics."""
  from gemma_scope import config as config_lib
  from gemma_scope import pipeline  # JAX: only here
  from gemma_scope.training import trained

  config = config_lib.read(workdir / 'config.json')
  saes = trained.load(config, workdir).saes(config)
  scores = {}
  if (workdir / 'evaluation.json').exists():
    scores = pipeline.read_scores(workdir / 'evaluation.json')
  return [sae.measured(scores.get(sae.name)) for sae in saes]


def show(path: str, revision: str = '') -> None:
  """Prints one line for each SAE, with its metrics where they are known."""
  from gemma_scope.release import table
  from gemma_scope.release.formats import published

  if (pathlib.Path(path) / 'manifest.json').exists():
    try:
      rows = [(sae.card, sae.metrics) for sae in release.load_all(path)]
      print(table.table(rows))
      return
    except release.ReleaseError:
      pass  # the manifest of another layout
  print(published.table(published.listed(path, revision)))


if __name__ == '__main__':
  main()
