"""Several hosts write one activation store, each its own chunks."""

from __future__ import annotations

import pathlib
import time

import numpy as np
import pytest

from gemma_scope import specs
from gemma_scope.activations import store
from tests.helpers import processes
from tests.helpers import runs as run_helpers
from tests.helpers.cluster import Cluster

CHUNKS = 4


def write_three(folder: pathlib.Path, *flags: str) -> None:
  """A harvest whose first process ends at its second chunk."""
  write = store._write_chunk

  def failing(folder_, source, chunk, poll):
    others = folder / 'store' / 'chunk_000003'
    while chunk == 2 and not others.exists():
      time.sleep(0.01)  # the other process writes both of its chunks
    if chunk == 2:
      raise OSError('The disk is gone.')
    return write(folder_, source, chunk, poll)

  store._write_chunk = failing
  processes.script('launch/harvest.py', *flags)


def test_hosts_write_side_by_side_and_another_number_goes_on(tmp_path):
  config = run_helpers.small(tmp_path)
  out = tmp_path / 'store'
  flags = run_helpers.flags_of(config, tmp_path / 'work')[2:]
  flags += [f'--out={out}', f'--chunks={CHUNKS}']
  with Cluster(tmp_path, 2, write_three, tmp_path, *flags) as two:
    assert two.codes(range(2)) == [1, 1], two.outputs()
    assert 'The disk is gone' in two.outputs()[0]
  written = {path.name: path.stat().st_mtime_ns for path in out.glob('chunk*')}
  assert sorted(written) == [f'chunk_00000{i}' for i in (0, 1, 3)]
  with pytest.raises(ValueError, match='is not complete'):
    store.StoreSource(out, specs.site_list(config), 64)
  one = processes.Script(tmp_path / 'one.log', 'launch/harvest.py', *flags)
  code, output = one.end()
  assert code == 0, output
  for name, time_ns in written.items():  # none was written again
    assert (out / name).stat().st_mtime_ns == time_ns
  whole = tmp_path / 'whole'
  flags[-2] = f'--out={whole}'
  code, output = processes.Script(
    tmp_path / 'whole.log', 'launch/harvest.py', *flags
  ).end()
  assert code == 0, output
  found, expected = (
    store.StoreSource(folder, specs.site_list(config), 64)
    for folder in (out, whole)
  )
  assert found.chunks == expected.chunks == CHUNKS
  for chunk in range(CHUNKS):
    np.testing.assert_array_equal(found.counts(chunk), expected.counts(chunk))
    for a, b in zip(found.passes(chunk), expected.passes(chunk), strict=True):
      ((site, x_RD),) = a.items()
      np.testing.assert_allclose(x_RD, b[site], rtol=1e-5, atol=1e-5)
