"""Intervals of the metrics, and the L0 and splices of controls."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope.evaluation import (
  batches,
  controls,
)
from gemma_scope.release import table
from tests.helpers.evaluations import BATCH, measure, text


def test_intervals_cover(model, saes):
  tokens_NT = text(96, seed=5)
  name = saes[3][1]['name']
  whole = measure(model, saes[3:], tokens_NT)[name]
  parts = [
    measure(model, saes[3:], tokens_NT[i : i + 6])[name]
    for i in range(0, 96, 6)
  ]
  for key in ('delta_loss', 'fvu', 'l0'):
    truth = whole[key]['value']
    covered = [part[key]['low'] < truth < part[key]['high'] for part in parts]
    assert sum(covered) >= 12  # 16 of them; 95 % of 16 is 15.2
    width = lambda figure: figure['high'] - figure['low']
    assert (
      width(whole[key]) < np.median([width(part[key]) for part in parts]) / 2
    )


def test_controls_have_the_members_l0(model, saes, monkeypatch):
  monkeypatch.setattr(batches, '_SAMPLE_TOKENS', 1)  # 32 sequences of 96
  for metrics in measure(model, saes[2:], text(96)).values():
    assert set(metrics['controls']) == set(controls.KINDS)
    for kind, control in metrics['controls'].items():
      ratio = control['l0']['value'] / metrics['l0']['value']
      assert 0.93 < ratio < 1.07, kind
      assert 0 < control['fvu']['value'] < 1, kind
    fvu = {kind: c['fvu']['value'] for kind, c in metrics['controls'].items()}
    assert metrics['control']['fvu']['value'] == min(fvu.values())
    assert fvu[metrics['control']['kinds']['fvu']] == min(fvu.values())


def test_controls_are_spliced_on_a_third_of_many_batches(model, saes):
  (metrics,) = measure(model, saes[3:], text(4 * BATCH * 2)).values()
  tokens = [c['delta_loss']['tokens'] for c in metrics['controls'].values()]
  assert sum(tokens) == metrics['delta_loss']['tokens']
  for control in metrics['controls'].values():
    assert control['fvu']['tokens'] == metrics['fvu']['tokens']
    assert 0 < control['delta_loss']['tokens'] < sum(tokens)


def test_copies_of_a_document_are_not_new_draws(model, saes):
  """Each sequence four times: as one document, and as four sequences."""
  tokens_NT = np.repeat(text(12), 4, 0)
  name = saes[3][1]['name']
  documents_NT = np.repeat(np.arange(12), 4)[:, None] + 0 * tokens_NT
  once = measure(model, saes[3:], text(12))[name]
  apart = measure(model, saes[3:], tokens_NT)[name]
  whole = measure(model, saes[3:], tokens_NT, documents_NT=documents_NT)[name]
  assert (whole['clusters'], whole['clustered_by']) == (12, 'documents')
  assert (apart['clusters'], apart['clustered_by']) == (48, 'sequences')
  assert 'over 12 documents' in table.note([({}, whole)])
  assert 'rough' in table.note([({}, whole)])
  assert 'rough' not in table.note([({}, apart)])
  width = lambda metrics, key: metrics[key]['high'] - metrics[key]['low']
  for key in ('fvu', 'l0', 'delta_loss', 'kl', 'clean_loss'):
    assert whole[key]['value'] == pytest.approx(once[key]['value'], rel=1e-3)
    assert width(whole, key) == pytest.approx(width(once, key), rel=2e-3)
    assert width(apart, key) < 0.6 * width(whole, key)


def test_a_document_that_spans_sequences_is_one_draw(model, saes):
  tokens_NT = text(6)
  documents_NT = np.zeros_like(tokens_NT)
  documents_NT[:, 6:] = 1  # each sequence holds parts of both
  (metrics,) = measure(
    model, saes[3:], tokens_NT, documents_NT=documents_NT
  ).values()
  assert metrics['clusters'] == 2
  assert metrics['l0']['low'] < metrics['l0']['value'] < metrics['l0']['high']
