"""Releases: files round-trip; what lies there already is kept."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from gemma_scope import release
from gemma_scope.release import npz, table
from tests.helpers import commands, releases
from tests.helpers.releases import (
  MEMBER,
  D,
  F,
  figure,
  files_in,
  metrics_of,
  params_of,
  python,
)

pytestmark = pytest.mark.usefixtures('no_picture')


def test_round_trip_is_exact_in_the_papers_form(tmp_path):
  params, card, metrics = params_of(), releases.card(), metrics_of()
  assert releases.save(tmp_path / 'out', [(params, card, metrics)])
  folder = tmp_path / 'out' / MEMBER
  for path in (folder, str(folder), folder / 'params.npz'):
    loaded, found = release.load(path)
    assert found == card
    assert list(loaded) == ['W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold']
    for key, array in params.items():
      np.testing.assert_array_equal(loaded[key], array)
      assert loaded[key].dtype == np.float32
  (member,) = release.load_all(tmp_path / 'out')
  assert (member.path, member.card, member.metrics) == (MEMBER, card, metrics)
  np.testing.assert_array_equal(member.load()['W_enc'], params['W_enc'])
  assert release.verify(tmp_path / 'out') > 4 * 2 * D * F
  # What others read it with.
  with np.load(folder / 'params.npz', allow_pickle=False) as plain:
    assert plain['W_dec'].shape == (F, D)


def test_equal_members_give_equal_files_and_are_not_written_twice(tmp_path):
  members = [
    (params_of(i), releases.card(seed=i), metrics_of(l0=5 + 10 * i))
    for i in range(2)
  ]
  assert releases.save(tmp_path / 'a', members)
  assert releases.save(tmp_path / 'b', members[::-1])
  names = sorted(
    p.relative_to(tmp_path / 'a') for p in files_in(tmp_path / 'a')
  )
  assert len(names) == 9
  for name in names:
    same = (tmp_path / 'a' / name).read_bytes()
    assert same == (tmp_path / 'b' / name).read_bytes(), name
  before = (tmp_path / 'a' / 'manifest.json').stat().st_mtime_ns
  assert not releases.save(tmp_path / 'a', members)
  assert (tmp_path / 'a' / 'manifest.json').stat().st_mtime_ns == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


def test_equal_names_are_told_apart(tmp_path):
  members = [
    (params_of(0), releases.card(seed=0), metrics_of()),
    (params_of(1), releases.card(seed=1), metrics_of()),
    (params_of(2), releases.card(seed=1), metrics_of(5.3)),
    (params_of(3), releases.card(seed=1), metrics_of(5.4)),
  ]
  releases.save(tmp_path / 'out', members)
  found = release.load_all(tmp_path / 'out')
  assert {member.path: member.card['seed'] for member in found} == {
    MEMBER: 0,
    f'{MEMBER}_seed_1': 1,
    f'{MEMBER}_2': 1,
    f'{MEMBER}_3': 1,
  }


def test_several_architectures_are_told_apart(tmp_path):
  names = ('jumprelu', 'matryoshka_batch_topk')
  members = [
    (params_of(i), releases.card(architecture=name), metrics_of())
    for i, name in enumerate(names)
  ]
  releases.save(tmp_path / 'out', members)
  found = release.load_all(tmp_path / 'out')
  assert [member.path for member in found] == [
    f'{MEMBER}_{name}' for name in names
  ]
  for member, (params, _, _) in zip(found, members, strict=True):
    np.testing.assert_array_equal(member.load()['W_enc'], params['W_enc'])
  lines = table.table([(m.card, m.metrics) for m in found]).split('\n')
  assert 'architecture' in lines[0] and 'batch_topk' in lines[3]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
  metrics = metrics_of() | {'fvu': figure(float('nan')), 'dense': np.float32(0)}
  releases.save(tmp_path / 'out', [(params_of(), releases.card(), metrics)])
  (member,) = release.load_all(tmp_path / 'out')
  assert member.metrics['fvu']['value'] is None
  assert member.metrics['dense'] == 0.0


def test_three_lines_load_without_jax(folder):
  code = f"""
    import sys
    class Refuse:
      def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in (
            'jax', 'jaxlib', 'flax', 'optax', 'gemma', 'matplotlib'):
          raise ImportError(name)
    sys.meta_path.insert(0, Refuse())
    from gemma_scope import release
    params, card = release.load({str(folder)!r})
    print(params['W_enc'].shape, *card['sites'])
    assert not [m for m in sys.modules if m.startswith('gemma_scope.training')]
  """
  done = python(code)
  assert done.stdout.split('\n')[0] == f'({D}, {F}) resid_post/2', done.stderr


def test_a_published_file_needs_no_card_and_no_upper_case(tmp_path):
  """As Gemma Scope 1 lies on the hub: params.npz alone; Fortran order too."""
  params = params_of(d_out=6)
  folder = tmp_path / 'layer_20' / 'width_16k' / 'average_l0_71'
  folder.mkdir(parents=True)
  lower = {key.lower(): array for key, array in params.items()}
  lower['w_enc'] = np.asfortranarray(lower['w_enc'])
  np.savez(folder / 'params.npz', **lower)
  loaded, card = release.load(folder)
  assert card == {'d_in': D, 'd_out': 6, 'width': F}
  for key, array in params.items():
    np.testing.assert_array_equal(loaded[key], array)


def test_a_different_release_is_replaced_only_when_asked(tmp_path):
  out = tmp_path / 'out'
  releases.save(out, [(params_of(0), releases.card(), metrics_of())])
  other = [(params_of(1), releases.card(), metrics_of())]
  with pytest.raises(release.ReleaseError, match='different release'):
    releases.save(out, other)
  assert releases.save(out, other, overwrite=True)
  np.testing.assert_array_equal(
    release.load(out / MEMBER)[0]['W_enc'], params_of(1)['W_enc']
  )
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_what_is_not_ours_is_never_replaced(tmp_path):
  members = [(params_of(0), releases.card(), metrics_of())]
  out = tmp_path / 'out'
  releases.save(out, members)
  (out / 'notes.txt').write_text('keep')
  with pytest.raises(release.ReleaseError, match='notes.txt'):
    releases.save(out, [(params_of(1), releases.card(), None)], overwrite=True)
  assert (out / 'notes.txt').read_text() == 'keep'
  home = tmp_path / 'home'
  home.mkdir()
  (home / 'thesis').touch()
  with pytest.raises(release.ReleaseError, match='not empty'):
    releases.save(home, members, overwrite=True)
  with pytest.raises(release.ReleaseError, match='is a file'):
    releases.save(home / 'thesis', members, overwrite=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['home', 'out']


def test_a_killed_writer_leaves_nothing_half_done(tmp_path, monkeypatch):
  out, members = (
    tmp_path / 'out',
    [(params_of(0), releases.card(), metrics_of())],
  )
  releases.save(out, members)
  # Killed between the two renames, and while building.
  os.rename(out, tmp_path / '.out.replaced')
  assert not releases.save(out, members)
  assert [p.name for p in tmp_path.iterdir()] == ['out']

  def full(path, arrays):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(npz, 'write', full)
  with pytest.raises(release.ReleaseError, match='No space left'):
    releases.save(out, [(params_of(1), releases.card(), None)], overwrite=True)
  assert release.verify(out)
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_damaged_release_is_mended_when_asked(tmp_path):
  out, members = (
    tmp_path / 'out',
    [(params_of(0), releases.card(), metrics_of())],
  )
  releases.save(out, members)
  (out / 'README.md').write_text('x')
  with pytest.raises(release.ReleaseError, match='README.md'):
    releases.save(out, members)
  assert releases.save(out, members, overwrite=True)
  assert release.verify(out)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda p, c: p.update(W_enc=p['W_enc'].astype(np.float64)), 'float64'),
    (lambda p, c: p['b_enc'].__setitem__(0, np.nan), 'not finite'),
    (lambda p, c: p['threshold'].__setitem__(0, -1), 'below 0'),
    (lambda p, c: p.update(W_dec=p['W_dec'].T), 'transposed'),
    (lambda p, c: p.pop('b_dec'), 'expected W_enc'),
    (lambda p, c: p.update(extra=p['b_dec']), 'extra'),
    (lambda p, c: c.update(d_in=2304), 'd_in = 2304'),
    (lambda p, c: c.update(width=True), 'whole number'),
    (
      lambda p, c: c.update(sites=['../../etc']),
      'which is no site|written kind',
    ),
    (lambda p, c: c.update(text=object()), 'numbers, strings'),
  ],
)
def test_unfit_members_are_not_released(tmp_path, change, words):
  params, card = params_of(), releases.card()
  change(params, card)
  with pytest.raises(release.ReleaseError, match=words):
    releases.save(tmp_path / 'out', [(params, card, None)])
  assert not list(tmp_path.iterdir())


def test_the_command_lists_a_release(folder, capsys):
  done = commands.run(capsys, 'release', f'--list={folder.parents[3]}')
  assert done.code == 0, done.err
  assert 'resid_post' in done.out and '0.310' in done.out
