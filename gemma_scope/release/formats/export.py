"""Members -> a folder in the layout that others read.

  gemma_scope_1   gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/
  gemma_scope_2   resid_post/layer_12_width_16k_l0_medium[_affine]/, clt/...
  saelens         blocks.12.hook_resid_post/width_16k/average_l0_71/

Beside them README.md, a card as Hugging Face shows it, and manifest.json with
every file's size and SHA-256. Built in a hidden folder and renamed: whole or
not at all. Labels of Gemma Scope 2 are by L0: small below 25, medium below 75,
then big; where two members would have the same, numbers stand for all.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_scope import sites
from gemma_scope.release import folder as folder_lib
from gemma_scope.release import manifest, npz, sae_folder, table
from gemma_scope.release.formats import gemma_scope_2, hook_points, saelens

Row = tuple[Callable[[], sae_folder.Params], dict[str, Any], dict | None]

LAYOUTS = ('gemma_scope_1', 'gemma_scope_2', 'saelens')
_KINDS = {'resid_post': 'res', 'mlp_out': 'mlp', 'attn_out': 'att'}
_HOW = {
  'gemma_scope_1': "numpy.load('{path}/params.npz')",
  'gemma_scope_2': "safetensors.numpy.load_file('{path}/params.safetensors')",
  'saelens': "sae_lens.SAE.load_from_disk('{path}')",
}


def write(
  folder: str | os.PathLike[str],
  rows: Sequence[Row],
  layout: str,
  license_name: str = 'apache-2.0',
) -> list[str]:
  """Writes members in one of `LAYOUTS`.

  Args:
    folder: made here; must not be there yet.
    rows: (what loads the parameters, card, metrics or None) of each.
    layout: of `LAYOUTS`.
    license_name: Hugging Face licence identifier of the weights.

  Returns:
    The members' paths below the folder.

  Raises:
    release.ReleaseError: the folder is taken, or the layout has no place for a
      member.
  """
  target = pathlib.Path(os.path.abspath(folder))
  partial = target.with_name(f'.{target.name}.partial')
  try:
    if layout not in LAYOUTS:
      raise npz.Refused(
        f'There is no layout {npz.show(layout)}; expected one of '
        f'{", ".join(LAYOUTS)}.'
      )
    if os.path.lexists(target):
      raise npz.Refused(f'{npz.show(target)} is there already; name another.')
    paths = _paths(rows, layout)
    shutil.rmtree(partial, ignore_errors=True)
    for path, (load, card, metrics) in zip(paths, rows, strict=True):
      _write_member(partial / path, load(), card, metrics, layout)
    _describe(partial, rows, paths, layout, license_name)
    os.rename(partial, target)
  except npz.Refused as error:
    raise folder_lib.ReleaseError(str(error)) from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return paths


def _write_member(folder, params, card, metrics, layout) -> None:
  try:
    params = sae_folder.fit(params, card)
    if layout == 'saelens':
      saelens.write(folder, params, card)
    elif layout == 'gemma_scope_2':
      gemma_scope_2.write(folder, params, card, _l0(card, metrics))
    else:
      if set(params) != set(sae_folder.KEYS):
        more = ', '.join(set(params) - set(sae_folder.KEYS))
        raise npz.Refused(f'has {more}, and Gemma Scope 1 has no such thing')
      folder.mkdir(parents=True)
      npz.write(folder / 'params.npz', params)
  except npz.Refused as error:
    raise npz.Refused(f'{npz.show(card["name"])} {error}.') from None


def _l0(card: Mapping[str, Any], metrics: Mapping[str, Any] | None):
  """L0 as measured; else as asked for, where a number of latents was."""
  found = table.value((metrics or {}).get('l0'))
  if found is None:
    asked = card.get('sparsity') or {}
    if asked.get('kind') not in ('target_l0', 'k'):
      raise npz.Refused(
        f'{npz.show(card["name"])} has no L0: evaluate it first.'
      )
    found = asked['value']
  return found


def _paths(rows: Sequence[Row], layout: str) -> list[str]:
  name = {
    'gemma_scope_1': _in_gemma_scope_1,
    'gemma_scope_2': functools.partial(_in_gemma_scope_2, label=_label),
    'saelens': _in_saelens,
  }[layout]
  measured = [(card, _l0(card, metrics)) for _, card, metrics in rows]
  found = [name(card, l0) for card, l0 in measured]
  if layout == 'gemma_scope_2' and len(set(found)) < len(found):
    found = [_in_gemma_scope_2(card, l0, round) for card, l0 in measured]
  paths: list[str] = []
  for path in found:
    count, base = 1, path
    while path in paths:
      count += 1
      path = f'{base}_{count}'
    paths.append(path)
  return paths


def _label(l0: float) -> str:
  return 'small' if l0 < 25 else 'medium' if l0 < 75 else 'big'


def _in_gemma_scope_1(card, l0) -> str:
  place = sites.wiring_of(card)
  model = re.fullmatch(r'gemma2-(\d+b)(-it)?', card.get('model', ''))
  kind = _KINDS.get(place.kind) if place.type == 'sae' else None
  if (place.type, place.kind) == ('transcoder', 'mlp_in_ungained'):
    kind = 'transcoders'
  if not (model and kind):
    raise npz.Refused(
      f'{npz.show(card["name"])} is a {place} of {card.get("model")!r}; '
      'Gemma Scope 1 has SAEs of attn_out, mlp_out and resid_post and '
      'transcoders of mlp_in_ungained, all of Gemma 2.'
    )
  tuning = 'it' if model[2] else 'pt'
  width = sites.width_name(card['width'])
  return (
    f'gemma-scope-{model[1]}-{tuning}-{kind}/layer_{place.sites[0].layer}/'
    f'width_{width}/average_l0_{round(l0)}'
  )


def _in_gemma_scope_2(card, l0, label) -> str:
  place, width = sites.wiring_of(card), sites.width_name(card['width'])
  layers = f'layer_{"_".join(str(site.layer) for site in place.sites)}_'
  affine = '_affine' * bool(card.get('affine'))
  layers = '' if place.type == 'clt' else layers
  return f'{place.folder}/{layers}width_{width}_l0_{label(l0)}{affine}'


def _in_saelens(card, l0) -> str:
  hook = hook_points.of_transformer_lens(sites.wiring_of(card).sites[0])
  width = sites.width_name(card['width'])
  return f'{hook}/width_{width}/average_l0_{round(l0)}'


def _describe(root, rows, paths, layout, license_name) -> None:
  """README.md and manifest.json, beside the members."""
  measured = [(card, metrics) for _, card, metrics in rows]
  front = ['---', f'license: {license_name}']
  if layout != 'gemma_scope_2':
    front.append('library_name: saelens')
  front += ['tags:', '- sparse-autoencoder', '- interpretability', '---']
  text = [
    *front,
    '',
    f'# Sparse autoencoders for {measured[0][0].get("model", "a model")}',
    '',
    'Trained with gemma_scope; they work on raw activations. One is read by',
    '',
    '```python',
    'from gemma_scope.formats import published',
    f"params, card = published.load('{paths[0]}')",
    '',
    f'# or {_HOW[layout].format(path=paths[0])}',
    '```',
    '',
    table.table(measured, markdown=True),
    '',
    *(f'- `{path}`' for path in paths),
    '',
  ]
  manifest.write_text(root / 'README.md', '\n'.join(text))
  files = sorted(path for path in root.rglob('*') if path.is_file())
  sealed = manifest.seal(
    {
      'format': f'gemma_scope.export.{layout}',
      'files': {
        path.relative_to(root).as_posix(): manifest.describe(path)
        for path in files
      },
    }
  )
  manifest.write_json(root / manifest.NAME, sealed)
