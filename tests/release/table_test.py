"""The table of a release."""

from __future__ import annotations

from gemma_scope.release import card as release_card
from gemma_scope.release import table
from tests.helpers import releases
from tests.helpers.releases import metrics_of


def test_table_is_sorted_and_has_the_control_beside():
  rows = [
    (releases.card('resid_post/10'), metrics_of(l0=20)),
    (releases.card('resid_post/2'), metrics_of(l0=20)),
    (releases.card('resid_post/2'), metrics_of(l0=5)),
    (releases.card('attn_out/7'), None),
  ]
  text = table.table(rows, columns=200)
  lines = text.split('\n')
  assert [line.split()[:2] for line in lines[2:]] == [
    ['attn_out', '7'],
    ['resid_post', '2'],
    ['resid_post', '2'],
    ['resid_post', '10'],
  ]
  assert '5.0 ±1.0' in lines[3] and '0.900' in lines[3] and '12.5' in lines[3]
  assert lines[2].split()[-5:] == ['-'] * 5
  narrow = table.table(rows, columns=80)
  assert '±' not in narrow
  assert len({len(line) for line in narrow.split('\n')[:2]}) == 1
  assert 'seed' not in lines[0]
  assert 'seed' in table.table([*rows, (releases.card(seed=1), None)])


def test_the_counter_of_training_is_beside_the_latents_that_never_fired():
  """Where training was long enough for it to say something."""
  counted = releases.card(silent={'share': 0.25, 'tokens': 1000})
  short = releases.card(silent={'share': 0.0, 'tokens': 10**6}, seed=1)
  rows = [(counted, metrics_of()), (short, metrics_of())]
  head, _, *lines = table.table(rows, markdown=True).split('\n')
  column = head.split(' | ').index('never fired %')
  assert head.split(' | ')[column + 1] == 'silent %'
  shown = [line.split(' | ')[column : column + 2] for line in lines]
  assert shown == [['12.5', '25.0'], ['12.5', '-']]
  assert 'silent' not in table.table(rows[1:])
  readme = release_card.model_card(
    rows, ['a', 'b'], title=None, license_name='apache-2.0', picture=None
  )
  assert 'on the last 1,000 tokens of training' in readme
  assert 'last 1,000,000' not in readme


def test_the_two_faces_of_the_table_agree():
  rows = [
    (releases.card('mlp_out/1', target=t), metrics_of(l0=t)) for t in (5, 20)
  ]
  plain = table.table(rows, columns=500).split('\n')
  marked = table.table(rows, markdown=True).split('\n')
  cells = [[c.strip() for c in line.strip('|').split('|')] for line in marked]
  assert len(plain) == len(marked)
  assert [' '.join(line.split()) for line in plain[2:]] == [
    ' '.join(line) for line in cells[2:]
  ]


def test_three_controls_are_printed_beside_every_sae():
  by_kind = dict(zip(table.CONTROLS, (0.7, 0.5, 0.4), strict=True))
  metrics = metrics_of() | {
    'controls': {
      kind: {'fvu': figure, 'delta_loss': 10 * figure}
      for kind, figure in by_kind.items()
    }
  }
  for row in table.table([(releases.card(), metrics)] * 2).split('\n')[-2:]:
    assert '7.000, 5.000, 4.000' in row and '0.700, 0.500, 0.400' in row


def test_figures_that_are_none_are_dashes():
  for figure in (None, 'x', float('nan'), {'value': None}, True, 10**400):
    assert table.value(figure) is None
  assert table.control({'control': [1]}) == {}


def test_the_fvu_beside_controls_is_of_the_tokens_that_an_sae_is_for():
  figures = {'fvu': {'value': 3.0}, 'fvu_inliers': {'value': 0.2}}
  metrics = {
    **figures,
    'control': {**figures, 'l0': {'value': 5.0}},
    'controls': {kind: dict(figures) for kind in table.CONTROLS},
  }
  for rule in (None, {'rule': '4 medians'}):
    assert table.comparable({**metrics, 'outliers': rule})['fvu'] == {
      'value': 3.0
    }
  ruled = {**metrics, 'outliers': {'rule': 'card'}}
  for part in (
    table.comparable(ruled),
    table.comparable(ruled)['control'],
    *table.comparable(ruled)['controls'].values(),
  ):
    assert part['fvu'] == {'value': 0.2}
  assert ruled['fvu'] == {'value': 3.0}  # what was given is as it was
  assert table.comparable(None) == {}
