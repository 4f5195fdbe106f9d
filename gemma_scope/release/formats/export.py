"""SAEs -> a folder in a layout that other tools read.

  gemma_scope_1   gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/
  gemma_scope_2   resid_post/layer_12_width_16k_l0_medium[_affine]/, clt/...
  saelens         blocks.12.hook_resid_post/width_16k/average_l0_71/

Beside them README.md, a card as Hugging Face shows it, and manifest.json with
every file's size and SHA-256. Labels of Gemma Scope 2 are by L0: small below
25, medium below 75, then big; where two SAEs would have the same, numbers stand
for all. Only a measured L0 is called average_l0.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

from gemma_scope import files, sites
from gemma_scope.release import folder as folder_lib
from gemma_scope.release import manifest, npz, sae_folder, table
from gemma_scope.release.formats import gemma_scope_2, hook_points, saelens
from gemma_scope.release.released import Released

LAYOUTS = ('gemma_scope_1', 'gemma_scope_2', 'saelens')
_FORMAT = 'gemma_scope.export'
_KINDS = {'resid_post': 'res', 'mlp_out': 'mlp', 'attn_out': 'att'}
_HOW = {
  'gemma_scope_1': "numpy.load('{path}/params.npz')",
  'gemma_scope_2': "safetensors.numpy.load_file('{path}/params.safetensors')",
  'saelens': "sae_lens.SAE.load_from_disk('{path}')",
}


def write(
  folder: str | os.PathLike[str],
  saes: Sequence[Released],
  layout: str,
  license_name: str = 'apache-2.0',
  overwrite: bool = False,
) -> list[str]:
  """Writes SAEs in one of `LAYOUTS`, all or none.

  Args:
    folder: made here.
    saes: what to write.
    layout: of `LAYOUTS`.
    license_name: Hugging Face licence identifier of the weights.
    overwrite: replace an export that is there; nothing else is replaced.

  Returns:
    The SAEs' paths below the folder.

  Raises:
    release.ReleaseError: the folder is taken, or the layout has no place for an
      SAE.
  """
  target = pathlib.Path(os.path.abspath(folder))
  try:
    if layout not in LAYOUTS:
      raise files.Refused(
        f'There is no layout {files.show(layout)}; expected one of '
        f'{", ".join(LAYOUTS)}.'
      )
    check_free(target, overwrite)
    paths = _paths(saes, layout)
    needed = sum(sae.nbytes for sae in saes) + (len(saes) << 14)
    files.check_room(target, needed, 'The export')
    with files.whole_folder(target, replace=True) as draft:
      for path, sae in zip(paths, saes, strict=True):
        _write_one(draft / path, sae, layout)
      _describe(draft, saes, paths, layout, license_name)
  except files.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None
  return paths


def check_free(target: pathlib.Path, overwrite: bool) -> None:
  """Raises `files.Refused` unless an export may be written here."""
  if not os.path.lexists(target):
    return
  shown = files.show(target)
  if not target.is_dir():
    raise files.Refused(f'{shown} is a file; an export is a folder.')
  if not any(target.iterdir()):
    return
  if not overwrite:
    raise files.Refused(
      f'{shown} is there already; choose another folder, or pass --overwrite '
      'to replace an export.'
    )
  found_manifest = None
  if (target / manifest.NAME).is_file():
    found_manifest = manifest.read_json(target / manifest.NAME)
  found_format = (
    found_manifest.get('format') if isinstance(found_manifest, dict) else None
  )
  if not str(found_format).startswith(_FORMAT):
    raise files.Refused(f'{shown} holds no export, and is not replaced.')
  known = {target / name for name in (manifest.NAME, *found_manifest['files'])}
  for path in target.rglob('*'):
    if not path.is_dir() and path not in known:
      raise files.Refused(
        f'{files.show(path)} is no part of the export it lies in and would be '
        'lost; move it, or choose another folder.'
      )


def _write_one(folder: pathlib.Path, sae: Released, layout: str) -> None:
  try:
    if sae.wiring.pair:
      raise files.Refused(
        f'is a {sae.wiring}, for which no other layout has a place'
      )
    params, card = sae_folder.fit(sae.load(), sae.card), sae.card
    if layout == 'saelens':
      saelens.write(folder, params, card)
    elif layout == 'gemma_scope_2':
      gemma_scope_2.write(folder, params, card, _l0(sae, measured=False))
    else:
      if set(params) != set(sae_folder.KEYS):
        extra = ', '.join(set(params) - set(sae_folder.KEYS))
        raise files.Refused(
          f'has {extra}, and Gemma Scope 1 has no such parameter'
        )
      folder.mkdir(parents=True)
      npz.write(folder / 'params.npz', params)
  except files.Refused as error:
    raise files.Refused(f'{files.show(sae.name)} {error}.') from None


def _l0(sae: Released, measured: bool) -> float | None:
  """L0 as measured, or unless `measured` the L0 that it was trained for."""
  l0 = table.value((sae.metrics or {}).get('l0'))
  sparsity = sae.card.get('sparsity') or {}
  if l0 is None and not measured and sparsity.get('kind') in ('target_l0', 'k'):
    l0 = table.value(sparsity.get('value'))
  return l0


def _paths(saes: Sequence[Released], layout: str) -> list[str]:
  """The SAEs' paths; equal names get a number."""
  if layout == 'gemma_scope_2':
    names = [_in_gemma_scope_2(sae, _label) for sae in saes]
    if len(set(names)) < len(names):
      names = [_in_gemma_scope_2(sae, round) for sae in saes]
  else:
    name = _in_gemma_scope_1 if layout == 'gemma_scope_1' else _in_saelens
    names = list(map(name, saes))
  paths: list[str] = []
  for path in names:
    count, base = 1, path
    while path in paths:
      count += 1
      path = f'{base}_{count}'
    paths.append(path)
  return paths


def _label(l0: float) -> str:
  return 'small' if l0 < 25 else 'medium' if l0 < 75 else 'big'


def _in_gemma_scope_1(sae: Released) -> str:
  wiring, name = sae.wiring, files.show(sae.name)
  model = re.fullmatch(r'gemma2-(\d+b)(-it)?', sae.card.get('model', ''))
  kind = _KINDS.get(wiring.kind) if wiring.type == 'sae' else None
  if (wiring.type, wiring.kind) == ('transcoder', 'mlp_in_ungained'):
    kind = 'transcoders'
  if not (model and kind):
    raise files.Refused(
      f'{name} is a {wiring} of {sae.card.get("model")!r}; Gemma Scope 1 has '
      'SAEs of attn_out, mlp_out and resid_post and transcoders of '
      'mlp_in_ungained, all of Gemma 2.'
    )
  l0 = _l0(sae, measured=True)
  if l0 is None:
    raise files.Refused(
      f'{name} was never evaluated, and Gemma Scope 1 names a folder by the '
      'measured L0; evaluate it first.'
    )
  tuning = 'it' if model[2] else 'pt'
  width = sites.width_name(sae.card['width'])
  return (
    f'gemma-scope-{model[1]}-{tuning}-{kind}/layer_{wiring.sites[0].layer}/'
    f'width_{width}/average_l0_{round(l0)}'
  )


def _in_gemma_scope_2(sae: Released, label) -> str:
  wiring, width = sae.wiring, sites.width_name(sae.card['width'])
  l0 = _l0(sae, measured=False)
  if l0 is None:
    raise files.Refused(
      f'{files.show(sae.name)} has no L0, measured or asked for; evaluate it '
      'first.'
    )
  layers = f'layer_{"_".join(str(site.layer) for site in wiring.sites)}_'
  affine = '_affine' * bool(sae.card.get('affine'))
  layers = '' if wiring.type == 'clt' else layers
  return f'{wiring.folder}/{layers}width_{width}_l0_{label(l0)}{affine}'


def _in_saelens(sae: Released) -> str:
  hook = hook_points.of_transformer_lens(sae.wiring.sites[0])
  width = sites.width_name(sae.card['width'])
  l0 = _l0(sae, measured=True)
  leaf = 'unmeasured' if l0 is None else f'average_l0_{round(l0)}'
  return f'{hook}/width_{width}/{leaf}'


def _describe(root, saes, paths, layout, license_name) -> None:
  """README.md and manifest.json, beside the SAEs."""
  front = ['---', f'license: {license_name}']
  if layout != 'gemma_scope_2':
    front.append('library_name: saelens')
  front += ['tags:', '- sparse-autoencoder', '- interpretability', '---']
  text = [
    *front,
    '',
    f'# Sparse autoencoders for {saes[0].card.get("model", "a model")}',
    '',
    'Trained with gemma_scope. They act on raw activations. To read one:',
    '',
    '```python',
    'from gemma_scope.release.formats import published',
    f"params, card = published.load('{paths[0]}')",
    '',
    f'# or {_HOW[layout].format(path=paths[0])}',
    '```',
    '',
    table.table([(sae.card, sae.metrics) for sae in saes], markdown=True),
    '',
    *(f'- `{path}`' for path in paths),
    '',
  ]
  files.write_text(root / 'README.md', '\n'.join(text))
  written = sorted(path for path in root.rglob('*') if path.is_file())
  sealed = manifest.seal(
    {
      'format': f'{_FORMAT}.{layout}',
      'files': {
        path.relative_to(root).as_posix(): manifest.describe(path)
        for path in written
      },
    }
  )
  manifest.write_json(root / manifest.NAME, sealed)
