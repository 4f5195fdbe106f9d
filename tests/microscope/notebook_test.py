"""What a notebook displays: features, shaded tokens, curves."""

from __future__ import annotations

import types

import numpy as np
import pytest

from gemma_scope.microscope import notebook


def test_tokens_are_escaped_and_shaded():
  shown = notebook.tokens(['\u2581<b>', 'x\n', 'y'], [2.0, -1.0, 0.0])
  assert '<b>' not in shown._repr_html_()
  assert '&lt;b&gt;' in shown._repr_html_()
  assert '46,139,87,1.00' in shown.html and '205,92,92,0.50' in shown.html
  assert repr(shown) == ' <b>[2]x\u21b5[-1]y'
  assert repr(notebook.tokens(['a'], [0.0])) == 'a'


def session():
  """A session whose index holds two latents and one text of eight tokens."""
  window_EW = np.zeros((2, 5), np.float32)
  window_EW[0, 2] = 3.0
  index = types.SimpleNamespace(
    max_F=np.array([3.0, 0.0]),
    density_F=np.array([0.25, 0.0]),
    positive_FL=np.array([[10, 11], [10, 11]]),
    negative_FL=None,
    sequences_NT=np.array([[2, 21, 22, 23, 24, 25, 26, 27]]),
    top_sequence_FE=np.array([[0, -1], [-1, -1]]),
    top_position_FE=np.array([[3, 0], [0, 0]]),
    windows=lambda name, feature: window_EW * (feature == 0),
  )
  return types.SimpleNamespace(
    index=lambda sae: index,
    tokenizer=types.SimpleNamespace(
      pieces=lambda ids: [f'\u2581{int(i)}' for i in ids]
    ),
    named=lambda sae: lambda feature: 'a <label>' if feature == 0 else '',
  )


def test_show_marks_the_token_that_fires():
  sae = types.SimpleNamespace(name='resid_post/9')
  shown = notebook.show(session(), sae, 0)
  assert 'a &lt;label&gt;' in shown.html and '<label>' not in shown.html
  lines = repr(shown).splitlines()
  assert '25.00%' in lines[0] and 'at most 3.' in lines[0]
  assert lines[1] == "raises: ' 10', ' 11'"
  assert lines[2] == ' 21 22 23[3] 24 25'
  assert len(lines) == 3
  assert 'never fires' in repr(notebook.show(session(), sae, 1))
  with pytest.raises(ValueError, match='no feature 2'):
    notebook.show(session(), sae, 2)


def test_a_dose_response_is_drawn_beside_its_controls():
  curve = [
    {'strength': s, 'kl': s / 9, 'control': {'kl': [0.0, -s, s]}}
    for s in (0.0, 1.0)
  ]
  (axes,) = notebook.dose_response(curve, 'kl').axes
  assert [line.get_ydata().tolist() for line in axes.lines] == [
    [0.0, 0.0],
    [0.0, 1 / 9],
  ]
  band = axes.collections[0].get_paths()[0].vertices
  assert (band[:, 1].min(), band[:, 1].max()) == (-1.0, 1.0)
