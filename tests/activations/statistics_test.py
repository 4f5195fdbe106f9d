"""The table of a site's rows, against NumPy on rows that a test chooses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from gemma_scope import mesh as mesh_lib
from gemma_scope import sites
from gemma_scope.activations import harvest, statistics

SITE = sites.Site(1, 'resid_post')
D, PARTS, ROWS = 6, 4, 40  # rows a part


class Given:
  """Two chunks of rows with a large mean, in parts; some are special."""

  def __init__(self):
    rng = np.random.default_rng(0)
    self.layout = harvest.Layout(11, PARTS * ROWS // 10, 8, 4, 'float32')
    self.widths, self.parts = {SITE: D}, PARTS
    spread = np.array([3, 1, 1, 0.5, 0.1, 0.1])
    x = 20 + spread * rng.standard_t(4, (2, PARTS * ROWS, D))
    x[0, [15, 30]] *= 50
    x[1, 77] *= 50
    x[1, 3] = np.nan
    self.x = x.astype(np.float32)
    self.kept = rng.random(self.x.shape[:2]) > 0.1
    self.kept[0, [15, 30]] = self.kept[1, [3, 77]] = True
    self.token = rng.integers(3, 9, (2, PARTS * ROWS))
    self.token[0, [15, 30]] = self.token[1, 77] = 42

  def passes(self, chunk, poll):
    for part in np.split(self.x[chunk], PARTS):
      poll()
      yield {SITE: part}

  def counts(self, chunk):
    return self.kept[chunk]

  def tokens(self, chunk):
    bos = np.full((self.layout.sequences, 1), 2)
    return np.concatenate([bos, self.token[chunk].reshape(-1, 10)], 1)


def mesh_of(shape):
  axes = dict(zip(mesh_lib.AXES, shape, strict=True))
  return mesh_lib.make(axes, jax.devices()[: int(np.prod(shape))])


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 4, 1)])
def test_the_table_is_that_of_the_rows(shape):
  given = Given()
  mesh = mesh_of(shape)
  reports = []
  tables = statistics.measure(
    given,
    mesh,
    statistics.Request(chunks=2, max_norm=5.0),
    given.tokens,
    report=lambda done, total: reports.append((done, total)),
  )
  assert reports == [(i + 1, 2 * PARTS) for i in range(2 * PARTS)]
  table = tables[SITE]
  finite = np.isfinite(given.x).all(-1)
  usable = given.kept & finite
  assert table['special'] == (~given.kept).sum()
  assert table['not_finite'] == 1
  x = given.x[usable].astype(np.float64)
  norm = np.linalg.norm(x, axis=1)
  above = norm > 500
  assert above.sum() == 3
  for name, rows in (('all', x), ('ordinary', x[~above])):
    found = table[name]
    centred = rows - rows.mean(0)
    variance = (centred**2).mean(0)
    assert found['rows'] == len(rows)
    expected = {
      'rms': np.sqrt((rows**2).sum(1).mean()),
      'mean_share': (rows.mean(0) ** 2).sum() / (rows**2).sum(1).mean(),
      'variance': variance.sum(),
      'kurtosis': np.median((centred**4).mean(0) / variance**2),
    }
    for key, value in expected.items():
      np.testing.assert_allclose(found[key], value, rtol=1e-3, err_msg=key)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    share = values / values.sum()
    assert found['components_90'] == np.sum(np.cumsum(share) < 0.9) + 1
    np.testing.assert_allclose(
      found['effective_rank'], np.exp(-(share * np.log(share)).sum()), rtol=1e-3
    )
  largest = table['ordinary']['dimensions'][0]
  assert largest['dimension'] == 0 and largest['variance_share'] > 0.5
  outliers = table['outliers']
  assert outliers['rows'] == 3
  assert [(t['token'], t['rows'], t['of']) for t in outliers['tokens']] == [
    (42, 3, 3)
  ]
  assert {p['position'] for p in outliers['positions']} == {6, 1, 8}
  lost = ((x[~above] - x[~above].mean(0)) ** 2).sum()
  whole = ((x - x.mean(0)) ** 2).sum()
  np.testing.assert_allclose(
    outliers['variance_share'], 1 - lost / whole, rtol=1e-3
  )
  np.testing.assert_allclose(table['norm']['0.5'], np.median(norm), rtol=1e-5)
  text = statistics.to_text(str(SITE), table)
  assert 'resid_post/1' in text and '3 rows' in text


def test_rows_that_are_all_special_are_a_table_without_figures():
  given = Given()
  given.kept[:] = False
  mesh = mesh_of((1, 1, 1))
  table = statistics.measure(given, mesh, statistics.Request(1, 5.0))[SITE]
  assert table['all'] == {} and 'outliers' not in table
  assert 'no usable row' in statistics.to_text(str(SITE), table)
