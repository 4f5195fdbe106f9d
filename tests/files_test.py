"""Files appear whole or not at all, and leave nothing behind."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from gemma_scope import files


def names(folder) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path):
  path = tmp_path / 'a.txt'
  files.write_text(path, 'old')
  with files.whole_file(path) as file:
    file.write(b'new')
    assert path.read_text() == 'old'
  assert path.read_text() == 'new'
  assert names(tmp_path) == ['a.txt']


def test_a_device_is_not_replaced(tmp_path):
  """Root may write /dev/null, and would put a file in its place."""
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  with pytest.raises(files.NotWritten, match='is a device or a pipe'):
    files.write_text(pipe, 'x')
  with pytest.raises(files.NotWritten, match='is a device or a pipe'):
    with files.whole_folder(pipe, replace=True):
      pass
  assert pipe.is_fifo() and os.listdir(tmp_path) == ['pipe']


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path):
  path = tmp_path / 'a.txt'
  files.write_text(path, 'old')
  with pytest.raises(KeyError), files.whole_file(path) as file:
    file.write(b'half')
    raise KeyError
  assert path.read_text() == 'old' and names(tmp_path) == ['a.txt']


@pytest.mark.parametrize('replace', [False, True])
def test_a_folder_appears_at_the_end(tmp_path, replace):
  path = tmp_path / 'above' / 'a'
  with files.whole_folder(path, replace) as draft:
    (draft / 'sub').mkdir()
    (draft / 'sub' / 'x').write_text('x')
    assert not path.exists()
  assert (path / 'sub' / 'x').read_text() == 'x'
  assert names(path.parent) == ['a']


def test_a_folder_is_replaced_only_when_asked(tmp_path):
  path = tmp_path / 'a'
  for content in ('first', 'second'):
    with files.whole_folder(path, replace=True) as draft:
      (draft / content).touch()
  assert names(path) == ['second'] and names(tmp_path) == ['a']
  with pytest.raises(FileExistsError), files.whole_folder(path) as d:
    (d / 'third').touch()
  assert names(path) == ['second'] and names(tmp_path) == ['a']


def test_a_stop_between_two_renames_loses_nothing(tmp_path):
  (tmp_path / '.a.replaced').mkdir()
  (tmp_path / '.a.replaced' / 'old').touch()
  path = tmp_path / 'a'
  with pytest.raises(KeyError), files.whole_folder(path, replace=True):
    raise KeyError
  assert names(path) == ['old'] and names(tmp_path) == ['a']


def test_writers_that_replace_one_folder_at_once_take_turns(tmp_path):
  def write(writer):
    for number in range(25):
      with files.whole_folder(tmp_path / 'a', replace=True) as draft:
        (draft / f'{writer}-{number}').touch()

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(write, range(4)))  # raises what a writer raised
  assert len(names(tmp_path / 'a')) == 1 and names(tmp_path) == ['a']


@pytest.mark.parametrize('what', ['whole_file', 'whole_folder'])
def test_the_draft_of_a_killed_writer_is_removed(tmp_path, what):
  code = (
    'import os, signal, sys\n'
    'from gemma_scope import files\n'
    f'with files.{what}(sys.argv[1]):\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  path = tmp_path / 'a'
  killed = subprocess.run([sys.executable, '-c', code, str(path)], check=False)
  assert killed.returncode == -signal.SIGKILL
  assert len(names(tmp_path)) == 1 and not path.exists()
  files.write_text(path, 'x')
  assert names(tmp_path) == ['a']


def test_the_draft_of_a_living_writer_stays(tmp_path):
  with files.whole_file(tmp_path / 'a') as one:
    one.write(b'one')
    files.write_text(tmp_path / 'a', 'two')
    assert (tmp_path / 'a').read_text() == 'two'
  assert (tmp_path / 'a').read_text() == 'one'


def test_digests(tmp_path):
  files.write_json(tmp_path / 'a.json', {'b': 1, 'a': [2]}, sort_keys=True)
  assert (tmp_path / 'a.json').read_text() == '{"a": [2], "b": 1}\n'
  # Of `printf '{"a": [2], "b": 1}' | sha256sum`, and with the line's end.
  assert files.json_sha256({'b': 1, 'a': [2]}).startswith('41ff4104bc489a1b')
  assert files.sha256(tmp_path / 'a.json').startswith('6d53b6ccb47967a2')


def test_only_plain_files_under_the_cap_are_opened(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(b'12345')
  (tmp_path / 'link').symlink_to(path)
  os.mkfifo(tmp_path / 'pipe')
  with files.open_plain(path, 5) as (file, size):
    assert size == 5 and file.read() == b'12345'
  for name, why in {
    'a': 'at most 4',
    'link': 'symbolic link',
    'pipe': 'not a plain file',
    'none': 'does not exist',
    '.': 'not a plain file',
  }.items():
    with pytest.raises(files.Refused, match=why):
      with files.open_plain(tmp_path / name, 4):
        pass


def test_links_of_the_hubs_cache_are_followed(tmp_path):
  snapshot = tmp_path / 'models--a--b' / 'snapshots' / 'f00' / 'layer_1'
  blobs = tmp_path / 'models--a--b' / 'blobs'
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  (blobs / '0a').write_bytes(b'12345')
  (tmp_path / 'secret').write_bytes(b'54321')
  (snapshot / 'good').symlink_to('../../../blobs/0a')
  (snapshot / 'bad').symlink_to('../../../../secret')
  with files.open_plain(snapshot / 'good', 5) as (file, _):
    assert file.read() == b'12345'
  with pytest.raises(files.Refused, match='symbolic link'):
    with files.open_plain(snapshot / 'bad', 5):
      pass


ADDRESSES = ('gs://bucket/run', 's3://bucket/run', 'memory://run', 'file:///a')


@pytest.mark.parametrize('address', ADDRESSES)
def test_an_address_is_never_a_local_folder(address, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  writers = (
    lambda path: files.write_text(path, 'text'),
    lambda path: files.write_text(pathlib.Path(path), 'text'),
    lambda path: files.whole_folder(path).__enter__(),
    lambda path: files.whole_folder(pathlib.Path(path)).__enter__(),
  )
  for write in writers:
    with pytest.raises(ValueError, match='found the address'):
      write(address)
  assert names(tmp_path) == []


def test_a_path_of_this_machine_is_no_address(tmp_path):
  for path in (tmp_path, 'runs/tiny', './a:b', 'C', 'a b:', '~/run', 'a/b:/c'):
    assert files.scheme(path) == ''


def test_a_disk_without_room_is_refused_before_the_work(tmp_path):
  files.check_room(tmp_path / 'a' / 'b', 10, 'It')
  with pytest.raises(files.NotWritten) as error:
    files.check_room(tmp_path / 'a' / 'b', 1 << 60, 'The store')
  assert str(error.value).startswith(
    'The store needs 1,152,921,504,606,846,976'
  )
  assert 'are free: make room' in str(error.value)
  assert not (tmp_path / 'a').exists()


def test_a_failed_write_names_its_target_and_a_failed_read_its_source(
  tmp_path, monkeypatch
):
  path = tmp_path / 'x.json'
  files.write_text(path, 'old')

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(files.NotWritten) as error:
      files.write_text(path, 'new')
  assert error.value.errno == errno.ENOSPC
  assert str(error.value).startswith(f"'{path}' could not be written (No space")
  assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
  with pytest.raises(FileNotFoundError, match='texts'):
    with files.whole_folder(tmp_path / 'out'):
      open(tmp_path / 'texts')
  with pytest.raises(ConnectionResetError):
    with files.whole_file(tmp_path / 'out'):
      raise ConnectionResetError(104, 'Connection reset by peer')
