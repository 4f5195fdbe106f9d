"""The frontier's picture: deterministic, any number of sites, no display."""

import sys

import pytest

from gemma_scope import sites
from gemma_scope.release import frontier


def _figure(value):
  return {'value': value, 'low': 0.9 * value, 'high': 1.1 * value, 'tokens': 9}


def _card(name, width=64, **more):
  place = {'type': 'sae', 'sites': [name], 'targets': [name]}
  return place | {'width': width, 'architecture': 'jumprelu'} | more


def _rows(names, widths=(64, 128), l0s=(4.0, 8.0, 16.0), delta=0.5):
  rows = []
  for name in names:
    for width in widths:
      for l0 in l0s:
        card = _card(name, width)
        twin = {'fvu': _figure(0.9), 'delta_loss': _figure(2.0)}
        metrics = {
          'l0': _figure(l0),
          'fvu': _figure(l0**-0.5),
          'delta_loss': _figure(delta / l0),
          'control': twin,
        }
        rows.append((card, metrics))
  return rows


def _size(path):
  data = path.read_bytes()
  assert data.startswith(b'\x89PNG')
  width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
  return width, height


@pytest.mark.parametrize('suffix', ['png', 'svg'])
def test_equal_rows_give_equal_bytes_in_any_order(tmp_path, suffix):
  rows = _rows(['resid_post/1'])
  first, second = tmp_path / f'a.{suffix}', tmp_path / f'b.{suffix}'
  frontier.frontier(first, rows)
  frontier.frontier(second, rows[::-1])
  assert first.read_bytes() == second.read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, second.name]


def test_one_site_and_many_sites_both_fit(tmp_path):
  frontier.frontier(tmp_path / 'one.png', _rows(['resid_post/0'], l0s=(4.0,)))
  many = _rows([f'resid_post/{i}' for i in range(4)], widths=(64,), l0s=(4.0,))
  frontier.frontier(tmp_path / 'many.png', many)
  one, several = _size(tmp_path / 'one.png'), _size(tmp_path / 'many.png')
  assert one[0] < several[0] and one[1] < several[1]


def test_a_long_line_of_layers_is_broken_evenly():
  found = [sites.wiring_of(_card(f'mlp_out/{i}')) for i in range(9)]
  found += [sites.wiring_of(_card('resid_post/3'))] * 2
  grid = [[str(site) for site in line] for line in frontier._grid(found)]
  assert [len(line) for line in grid] == [5, 4, 1]
  assert grid[1] == [f'mlp_out/{i}' for i in range(5, 9)]
  assert grid[2] == ['resid_post/3']


def test_architectures_and_types_are_told_apart(tmp_path):
  names = ('jumprelu', 'topk', 'batch_topk')
  rows = _rows(['resid_post/0'], widths=(64,), l0s=(4.0, 8.0))
  rows = [({**c, 'architecture': name}, m) for c, m in rows for name in names]
  looks = frontier._looks(rows)
  for key in ('color', 'marker', 'linestyle', 'label'):
    assert len({str(look[key]) for look in looks.values()}) == 3
  wide = frontier._looks([*rows, ({**rows[0][0], 'width': 128}, None)])
  assert wide[64, 'topk']['color'] == wide[64, 'jumprelu']['color']
  assert wide[128, 'jumprelu']['marker'] == wide[64, 'jumprelu']['marker']
  assert wide[64, 'topk']['linestyle'] != wide[64, 'jumprelu']['linestyle']

  def place(type, reads, writes):
    return {'type': type, 'sites': reads, 'targets': writes}

  resid = [f'resid_post/{i}' for i in range(6)]
  kinds = [
    place('transcoder', ['mlp_in/3'], ['mlp_out/3']),
    place('crosscoder', resid, resid),
    place('crosscoder', resid[:2], resid[:2]),
  ]
  rows += [(c | kind, m) for (c, m) in rows[:2] for kind in kinds]
  rows += [(c | kinds[0] | {'affine': True}, m) for c, m in rows[:1]]
  grid = frontier._grid([sites.wiring_of(card) for card, _ in rows])
  assert [list(map(frontier._title, line)) for line in grid] == [
    ['resid_post, layer 0'],
    ['transcoder mlp_in/3'],
    ['crosscoder resid_post\n0,1', 'crosscoder resid_post\n0-5'],
  ]
  frontier.frontier(tmp_path / 'frontier.png', rows)
  assert (64, 'jumprelu, affine') in frontier._looks(rows)


def test_awkward_rows_are_drawn_or_left_out(tmp_path):
  rows = _rows(['attn_out/0'], delta=-0.01)  # no logarithm of these
  unmeasured = (_card('mlp_out/0', architecture=None), None)
  dead = (_card('mlp_out/0', architecture=None), {'l0': 0.0, 'fvu': 1.0})
  bare = (_card('mlp_out/0', architecture=None), {'l0': 3.0, 'fvu': 0.5})
  relu = (rows[0][0] | {'architecture': 'relu'}, rows[0][1])
  path = tmp_path / 'frontier.png'
  frontier.frontier(path, [unmeasured, *rows, dead, bare, relu])
  assert _size(path)
  assert not frontier.has_points(unmeasured) and not frontier.has_points(dead)
  with pytest.raises(ValueError, match='at least one member'):
    frontier.frontier(path, [unmeasured, dead])


def test_no_backend_is_chosen_for_the_caller(tmp_path):
  frontier.frontier(tmp_path / 'a.png', _rows(['resid_post/0'], l0s=(4.0,)))
  assert 'matplotlib.pyplot' not in sys.modules
