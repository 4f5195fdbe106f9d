"""A few trials of every fault that is quick; launch/faults.py runs them all."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest

from gemma_scope import files, release
from gemma_scope.release.formats import export
from gemma_scope.text import prepare
from launch import faults
from tests.faults import calls, damage, soak
from tests.faults.catalogue import FAULTS
from tests.faults.registry import Fault, Trial, attempt

QUICK = [name for name, fault in FAULTS.items() if fault.quick]


@pytest.mark.parametrize('name', QUICK)
def test_a_fault_ends_as_it_must(name, tmp_path):
  fault = FAULTS[name]
  found = fault.run(tmp_path / 'fault', fault.quick)
  assert not found['wrong'] and not found['broken'], found.get('bad')
  assert 'bad' not in found, found['bad']
  # One flip may hit a copy that nobody reads: not all of many.
  assert found['tried'] >= min(fault.quick, 8)
  if name.startswith(('flip', 'cut')):
    assert found['refused'] > 0


def test_what_must_not_happen_is_counted_and_shown(tmp_path):
  ends = iter(
    [Trial('survived', 'a', seconds=1.0), Trial('wrong', 'b', 'accepted')]
  )
  fault = Fault('x', 'x', lambda folder, times: ends, 2, 1)
  found = fault.run(tmp_path / 'x', 2)
  assert (found['tried'], found['survived'], found['wrong']) == (2, 1, 1)
  assert found['bad'] == ['b: wrong: accepted']
  assert found['delay_s']['longest'] == 1.0
  json.dumps(found)


@pytest.mark.parametrize(
  'memory, files, outcome',
  [(0.0, 0.0, 'survived'), (0.05, 0.0, 'wrong'), (0.0, 0.01, 'wrong')],
)
def test_a_soak_sees_memory_and_files_that_grow(memory, files, outcome):
  seconds = np.arange(3600)
  samples = np.stack([500 + memory * seconds, 15 + files * seconds], 1)
  assert soak._verdict('x', samples, '60 min').outcome == outcome


@pytest.mark.parametrize(
  'error, outcome',
  [
    (ValueError('The file x.json is damaged; write it again.'), 'refused'),
    (OSError(5, 'Input/output error'), 'broken'),
    (KeyError('name'), 'broken'),
    (RuntimeError('no'), 'broken'),
  ],
)
def test_only_a_sentence_is_a_refusal(error, outcome):
  def use():
    raise error

  assert attempt(use, lambda value: True).outcome == outcome
  assert attempt(lambda: 3, lambda value: value == 3).outcome == 'survived'
  assert attempt(lambda: 4, lambda value: value == 3).outcome == 'wrong'


def test_an_error_of_reading_names_its_file(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(b'x')
  with calls.watched(tmp_path, 'r', calls.fails(1, errno.EIO)) as made:
    with pytest.raises(OSError, match='Input/output error: .*/a'):
      files.sha256(path)
  assert made == ['open', 'read']
  with calls.watched(tmp_path, 'r', calls.fails(0, errno.EIO)):
    with pytest.raises(files.Refused, match='cannot be read'):
      with files.open_plain(path, 5) as (file, _):
        file.read()


def test_the_command_lists_runs_and_refuses(capsys):
  faults.main(['--list'])
  listed = capsys.readouterr().out
  assert all(name in listed for name in FAULTS)
  faults.main(['--only=cut-index', '--times=3'])
  (line,) = capsys.readouterr().out.splitlines()
  assert json.loads(line)['tried'] == 3
  with pytest.raises(SystemExit, match='No fault begins with kil9'):
    faults.main(['--only=kil9'])


@pytest.mark.parametrize('what', ['release', 'activations', 'tokens', 'export'])
def test_a_writer_asks_for_room_before_it_works(what, tmp_path, monkeypatch):
  """Nothing is written where the disk is known to be too small."""
  real = shutil.disk_usage
  folder = tmp_path / 'out'
  folder.mkdir()
  if what == 'tokens':
    (tmp_path / 'a.txt').write_text('some words ' * 100)
    source, tokenizer = f'files:{tmp_path}/*.txt', damage._tokenizer()
    write = lambda: prepare.prepare(
      source, tokenizer, folder, limit_tokens=1000
    )
  elif what == 'export':
    saes = [release.in_memory(*sae) for sae in damage._SAES]
    write = lambda: export.write(folder / 'x', saes, 'saelens')
  else:
    write = lambda: damage.KEPT[what].make(folder)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda path: real(path)._replace(free=7)
  )
  with pytest.raises((ValueError, OSError), match=r'needs [\d,]+ bytes .*7'):
    write()
  assert not folder.exists() or not list(folder.rglob('*'))
