"""A run that version 0.3.0 began is continued by this version.

run_0_3_0.tar.gz was written by that version: a run of 12 steps with the
checkpoint of step 8, its token store, and the parameters that it released.
"""

from __future__ import annotations

import pathlib
import shutil

import numpy as np

from gemma_scope import config as config_lib
from gemma_scope import pipeline, release

ARCHIVE = pathlib.Path(__file__).parent / 'run_0_3_0.tar.gz'


def test_a_run_of_0_3_0_ends_with_the_same_sae(tmp_path, monkeypatch):
  shutil.unpack_archive(ARCHIVE, tmp_path, filter='data')
  monkeypatch.chdir(tmp_path)  # its config names the text 'tokens'
  config = config_lib.read(pathlib.Path('run/config.json'))
  config.mesh.data, config.mesh.latent = 4, 2
  said = []
  assert pipeline.run(config, pathlib.Path('run'), said.append)
  assert 'continuing at step 8' in said
  (sae,) = release.load_all('run/release')
  params = sae.load()
  with np.load('finished.npz') as finished:
    assert set(params) == set(finished)
    for key, expected in finished.items():
      np.testing.assert_allclose(
        params[key], expected, rtol=1e-4, atol=1e-5, err_msg=key
      )
