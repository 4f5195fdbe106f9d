"""What an SAE is called by its path: nothing of the machine."""

from __future__ import annotations

import pytest

from gemma_scope.release import paths


@pytest.mark.parametrize(
  'path, name',
  [
    ('/home/alice/saes/mine', 'mine'),
    ('/home/alice/sae-x/layers.3.mlp', 'layers.3.mlp'),
    (
      '/d/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71',
      'gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71',
    ),
    (
      '/home/alice/out/blocks.1.hook_resid_post/width_128/average_l0_11',
      'blocks.1.hook_resid_post/width_128/average_l0_11',
    ),
    # On the hub, and in a release.
    ('me/my-saes/mine', 'me/my-saes/mine'),
    ('resid_post/layer_1/width_1k/x y', 'resid_post/layer_1/width_1k/x_y'),
  ],
)
def test_a_name_has_no_folder_of_the_machine(path, name):
  assert paths.name_of(path) == name


@pytest.mark.parametrize(
  'given, words',
  [
    (('/home/a/1/release', '/home/a/2/release'), ['1_release', '2_release']),
    (('/home/a/x', '/home/a/y'), ['x', 'y']),
    (('/home/a/x', 'google/x'), ['x', 'google_x']),
  ],
)
def test_equal_names_are_told_apart_by_what_differs(given, words):
  assert paths.told_apart(given) == words
