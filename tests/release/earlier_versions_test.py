"""A release that version 0.3.0 wrote is read, checked and written again.

release_0_3_0/ was written by that version's `release.save` from `made` below.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from gemma_scope import release, sae
from gemma_scope.release.formats import published

FOLDER = pathlib.Path(__file__).parent / 'release_0_3_0'
F = {'resid_post/layer_1': 24, 'resid_post/layer_2': 1536, 'transcoder': 12}


def random(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def made(path: str) -> dict[str, np.ndarray]:
  """The parameters that were saved under `path`."""
  lead = (3,) if path.startswith('clt') else ()
  d = 2 if 'layer_2/' in path else 4
  f = next((n for start, n in F.items() if path.startswith(start)), 6)
  params = {
    'W_enc': random(1, *lead, d, f),
    'b_enc': random(2, *lead, f),
    'W_dec': random(3, *lead, f, *lead, d),
    'b_dec': random(4, *lead, d),
    'threshold': np.abs(random(5, *lead, f)),
  }
  for layer in range(3 if lead else 0):
    params['W_dec'][layer, :, :layer] = 0
  if path.startswith('transcoder'):
    params |= {'W_skip': random(6, 4, 4), 'k': np.float32(3)}
    params['threshold'] = np.zeros(f, np.float32)
  return params


def test_it_is_whole_and_holds_what_was_saved():
  assert release.verify(FOLDER) > 100_000
  saes = release.load_all(FOLDER)
  assert len(saes) == 4
  for one in saes:
    params, wanted = one.load(), made(one.path)
    assert set(params) == set(wanted)
    for key, array in wanted.items():
      np.testing.assert_array_equal(params[key], array, err_msg=key)
    again, card = release.load(FOLDER / one.path)
    assert card == one.card and set(again) == set(params)
    shape = (5, *params['W_enc'].shape[:-2], params['W_enc'].shape[-2])
    x = random(7, *shape)
    f = sae.encode(params, x)
    assert np.isfinite(sae.decode(params, f, x)).all()


def test_it_is_written_again_by_this_version(tmp_path):
  old = published.open_all(str(FOLDER))
  assert release.save(tmp_path / 'out', old)
  new = release.load_all(tmp_path / 'out')
  for a, b in zip(old, new, strict=True):
    assert (a.name, a.card, a.metrics) == (b.name, b.card, b.metrics)
  # 1,536 latents are no longer called 1k, and no folder of its writer is told.
  changed = {a.path: b.path for a, b in zip(old, new, strict=True)}
  before = 'resid_post/layer_2/width_1k/unmeasured_l0_5_jumprelu'
  assert changed.pop(before) == before.replace('1k', '1536')
  assert all(a == b for a, b in changed.items())
  for path in (tmp_path / 'out').rglob('*'):
    assert path.is_dir() or b'/home/someone' not in path.read_bytes()


@pytest.mark.parametrize('one', release.load_all(FOLDER), ids=lambda s: s.name)
def test_its_cards_say_what_they_are(one):
  assert one.wiring.type in ('sae', 'transcoder', 'clt')
  assert one.card['text']['source'].startswith('files:*.txt (path sha256 ')
