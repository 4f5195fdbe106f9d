"""Sets of transcoders of circuit-tracer: read as it runs them, or refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from gemma_scope import release, sae
from gemma_scope.release.formats import gemma_scope_2, hub, published
from tests.helpers import peer_formats

D, F, LAYERS = 12, 32, 3
CONFIG = {
  'model_name': 'google/gemma-3-270m', 'model_kind': 'transcoder_set',
  'feature_input_hook': 'mlp.hook_in', 'feature_output_hook': 'hook_mlp_out',
  'scan': ['gemma-3-270m/transcoders'],
}  # fmt: skip


def weights(layer: int, skip: bool, threshold: bool):
  """As circuit-tracer stores them: encoder and skip are [out, in]."""
  draw = lambda seed, *shape: peer_formats.rows(10 * layer + seed, *shape)
  found = {
    'W_enc': draw(1, F, D), 'b_enc': draw(2, F),
    'W_dec': draw(3, F, D), 'b_dec': draw(4, D),
  }  # fmt: skip
  if skip:
    found['W_skip'] = draw(5, D, D)
  if threshold:
    found['activation_function.threshold'] = np.abs(draw(6, F))
  return found


def write(folder, config, skip=False, threshold=False):
  folder.mkdir()
  (folder / 'config.yaml').write_text(yaml.safe_dump(config))
  every = [weights(layer, skip, threshold) for layer in range(LAYERS)]
  for layer, found in enumerate(every):
    save_file(found, folder / f'layer_{layer}.safetensors')
  return every


def run(p, x):
  """What circuit-tracer computes: latents and reconstruction."""
  z = x @ p['W_enc'].T + p['b_enc']
  f = np.where(z > p.get('activation_function.threshold', 0), z, 0)
  y = f @ p['W_dec'] + p['b_dec']
  return f, y + (x @ p['W_skip'].T if 'W_skip' in p else 0)


@pytest.mark.parametrize('skip, threshold', [(False, False), (True, True)])
def test_a_set_is_a_transcoder_for_each_layer(skip, threshold, tmp_path):
  folder = tmp_path / 'set'
  every = write(folder, CONFIG, skip, threshold)
  saes = published.open_all(str(folder))
  assert len(saes) == LAYERS
  x = peer_formats.rows(9, 20, D)
  for layer, (one, theirs) in enumerate(zip(saes, every, strict=True)):
    assert str(one.wiring) == f'transcoder mlp_in/{layer}'
    assert [str(site) for site in one.wiring.targets] == [f'mlp_out/{layer}']
    assert one.card['model'] == 'gemma3-270m'
    assert one.card['architecture'] == ('jumprelu' if threshold else 'relu')
    assert one.card.get('affine', False) is skip
    params, (want_f, want_y) = one.load(), run(theirs, x)
    with jax.default_matmul_precision('highest'):
      f = sae.encode(params, x)
      y = sae.decode(params, f, x)
    np.testing.assert_array_equal(np.asarray(f) > 0, want_f > 0)
    assert 0.02 < (want_f > 0).mean() < 0.9
    np.testing.assert_allclose(f, want_f, atol=1e-5)
    np.testing.assert_allclose(y, want_y, atol=1e-4)
  alone = published.open_sae(str(folder / 'layer_1'))
  peer_formats.same(alone.load(), saes[1].load())
  assert [e.layer for e in published.listed(str(folder))] == ['0', '1', '2']
  with pytest.raises(release.ReleaseError, match='name one, such as'):
    published.open_sae(str(folder))


def test_paths_and_addresses_are_followed(tmp_path, monkeypatch):
  """hf:// of a copy below the folder, or fetched; and Gemma Scope's files."""
  folder = tmp_path / 'set'
  copy = 'hf://me/repository/weights/first.safetensors'
  away = 'hf://me/repository/away.safetensors?revision=v1'
  config = CONFIG | {
    'transcoders': [copy, away, str(tmp_path / 'scope.safetensors')],
    'feature_input_hook': 'ln2.hook_normalized', 'model_name': 'gemma-2-2b',
  }  # fmt: skip
  every = write(folder, config)
  (folder / 'weights').mkdir()
  (folder / 'layer_2.safetensors').rename(
    folder / 'weights' / 'first.safetensors'
  )
  asked = []
  monkeypatch.setattr(
    hub, 'file', lambda a: asked.append(a) or folder / 'layer_1.safetensors'
  )
  params, card = peer_formats.make_member('skip')
  gemma_scope_2.write(tmp_path / 'scope', params, card, 5.0)
  (tmp_path / 'scope' / 'params.safetensors').rename(
    tmp_path / 'scope.safetensors'
  )
  saes = published.open_all(str(folder))
  assert [str(s.wiring.sites[0]) for s in saes] == [
    f'mlp_in_ungained/{layer}' for layer in range(3)
  ]
  loaded = [one.load() for one in saes]
  for got, theirs in zip(loaded, (every[2], every[1]), strict=False):
    np.testing.assert_array_equal(got['W_dec'], theirs['W_dec'])
  assert set(asked) == {away}
  peer_formats.same(loaded[2], params)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'twist': 1}, "the field 'twist', which circuit-tracer"),
    ({'model_kind': 'cross_layer_transcoder'}, "kind 'cross_layer_transcoder'"),
    ({'model_name': 'meta-llama/Llama-3.2-1B'}, 'no Gemma'),
    ({'feature_input_hook': 'hook_nowhere'}, 'hook_nowhere'),
    ({'feature_output_hook': None}, 'None'),
    ({'activation': 'topk', 'k': 128}, 'activation topk; .* negative values'),
    ({'k': 128}, "k = '128'"),
    ({'activation': 'gelu'}, "activation 'gelu'"),
    ({'activation': 'jump_relu'}, 'has no thresholds, and config.yaml'),
    ({'scan': 3}, "scan = '3'"),
    ({'transcoders': 'layer_0.safetensors'}, 'no list'),
    ({'transcoders': []}, 'lists no transcoders'),
    ({'transcoders': [3]}, "'3' in transcoders"),
    ({'transcoders': ['missing.safetensors']}, 'missing.safetensors'),
    (
      {'transcoders': [{'id': 'a', 'layer': 1, 'filepath': 'x', 'new': 1}]},
      "the field 'new'",
    ),
  ],
)
def test_a_field_is_used_or_refused_by_name(change, words, tmp_path):
  write(tmp_path / 'set', CONFIG | change)
  with pytest.raises(release.ReleaseError, match=words) as refusal:
    published.open_all(str(tmp_path / 'set'))
  text = str(refusal.value)
  assert text.endswith('.') and '\n' not in text


def test_a_file_is_used_whole_or_refused(tmp_path):
  folder = tmp_path / 'set'
  (first, *_) = write(folder, CONFIG, threshold=True)
  path = folder / 'layer_0.safetensors'
  names = {'threshold': 'activation_function.threshold'}
  broken = {
    'holds .*more': first | {'more': np.zeros(3, np.float32)},
    'negative thresholds': first
    | {names['threshold']: -np.ones(F, np.float32)},
    'has k;': first | {'k': np.array(3)},
    'has thresholds': first | {names['threshold']: np.ones(5, np.float32)},
    'lacks W_dec': {k: v for k, v in first.items() if k != 'W_dec'},
  }
  for words, found in broken.items():
    save_file(found, path)
    with pytest.raises(release.ReleaseError, match=words):
      published.load(str(folder / 'layer_0'))
  one = first | {names['threshold']: np.array(0.5, np.float32)}
  save_file(one, path)
  params, _ = published.load(str(folder / 'layer_0'))
  assert (params['threshold'] == 0.5).all()
  for text in ('a: [', '- 1', '&a [*a]'):
    (folder / 'config.yaml').write_text(text)
    with pytest.raises(release.ReleaseError, match='config.yaml'):
      published.load(str(folder / 'layer_0'))
