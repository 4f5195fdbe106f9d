"""A cloud's notice ends a run as SIGTERM does, but with exit code 1."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import threading
import time

import pytest

from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import preemption
from tests.helpers import processes
from tests.helpers import runs as run_helpers
from tests.helpers.cluster import Cluster

GOOGLE = '/computeMetadata/v1/instance/'
AWS = '/latest/meta-data/spot/instance-action'


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers from the server's dict; as strict as the clouds' servers are."""

  def log_message(self, *unused):
    pass

  def do_PUT(self):
    assert self.headers['X-aws-ec2-metadata-token-ttl-seconds']
    self.answer('a token')

  def do_GET(self):
    self.server.asked += 1
    google = self.path.startswith('/computeMetadata/')
    allowed = (
      self.headers['Metadata-Flavor'] == 'Google'
      if google
      else self.headers['X-aws-ec2-metadata-token'] == 'a token'
    )
    self.answer(self.server.values.get(self.path) if allowed else None)

  def answer(self, text):
    data = (text or '').encode()
    self.send_response(404 if text is None else 200)
    self.send_header('content-length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)


@pytest.fixture
def metadata(monkeypatch):
  """A metadata server without a notice: its values, by path."""
  for name in ('GCE_METADATA_HOST', 'AWS_EC2_METADATA_SERVICE_ENDPOINT'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(preemption, '_noticed', threading.Event())
  monkeypatch.setattr(preemption, '_EVERY_S', 0.02)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.asked = 0
  server.values = {f'{GOOGLE}preempted': 'FALSE'}
  server.values[f'{GOOGLE}maintenance-event'] = 'NONE'
  threading.Thread(target=server.serve_forever, daemon=True).start()
  server.host = f'127.0.0.1:{server.server_address[1]}'
  yield server
  server.shutdown()


def wait_for(holds) -> None:
  deadline = time.monotonic() + 30
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.005)


def asked_again(server) -> None:
  """Waits until the present values were read."""
  before = server.asked
  wait_for(lambda: server.asked >= before + 4)


def ended(interrupt) -> bool:
  with contextlib.suppress(interrupt_lib.Interrupted):
    interrupt.check()
    return False
  return interrupt.at_step(3)


@pytest.mark.parametrize(
  'path, notice',
  [
    (f'{GOOGLE}preempted', 'TRUE'),
    (f'{GOOGLE}maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE'),
    (AWS, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'),
  ],
)
def test_a_notice_asks_the_run_to_end(path, notice, metadata, monkeypatch):
  if path == AWS:
    url = f'http://{metadata.host}/'
    monkeypatch.setenv('AWS_EC2_METADATA_SERVICE_ENDPOINT', url)
  else:
    monkeypatch.setenv('GCE_METADATA_HOST', metadata.host)
  with interrupt_lib.Interrupt() as interrupt:
    asked_again(metadata)
    # A machine that moves to another host while it runs needs no save.
    metadata.values[f'{GOOGLE}maintenance-event'] = (
      'MIGRATE_ON_HOST_MAINTENANCE'
    )
    asked_again(metadata)
    assert not ended(interrupt) and not preemption.of_any_machine()
    metadata.values[path] = notice
    wait_for(lambda: interrupt.requested)
    assert ended(interrupt) and preemption.of_any_machine()
  asked = metadata.asked
  time.sleep(0.1)
  assert metadata.asked <= asked + 1  # nobody asks any more


def test_a_notice_that_stood_before_stops_nothing(
  metadata, monkeypatch, capsys
):
  monkeypatch.setenv('GCE_METADATA_HOST', metadata.host)
  metadata.values[f'{GOOGLE}preempted'] = 'TRUE'
  with interrupt_lib.Interrupt() as interrupt:
    asked_again(metadata)
    assert not ended(interrupt) and not preemption.noticed()
  assert 'as was known when this process started' in capsys.readouterr().out


def test_a_server_that_fails_says_nothing(metadata, monkeypatch):
  monkeypatch.setenv('GCE_METADATA_HOST', metadata.host)
  with interrupt_lib.Interrupt() as interrupt:
    asked_again(metadata)
    metadata.values.clear()  # 404 for everything
    asked_again(metadata)
    assert not ended(interrupt)


def test_no_server_is_asked_outside_the_clouds(metadata, monkeypatch):
  monkeypatch.setattr(preemption, '_firmware', lambda name: 'ThinkPad')
  assert preemption.server() is None
  monkeypatch.setattr(preemption, '_firmware', lambda name: 'Google')
  assert preemption.server().args == (f'http://{preemption._ADDRESS}',)
  with interrupt_lib.Interrupt() as interrupt:
    assert not interrupt.requested


def test_the_notice_of_one_machine_ends_all_at_one_step(metadata, tmp_path):
  """Two processes of a run save at one step and end with exit code 1."""
  one = {'collection.layers': (0,), 'collection.sites': ('resid_post',)}
  config = run_helpers.small(tmp_path, **one, **{'train.steps': 4000})
  run = tmp_path / 'run'
  flags = ['launch/train.py', *run_helpers.flags_of(config, run)[2:]]
  with Cluster(tmp_path, 2, on_a_machine, metadata.host, *flags) as two:
    two.wait_for(lambda: run_helpers.last_step(run) >= 2)
    metadata.values[f'{GOOGLE}preempted'] = 'TRUE'
    assert two.codes(range(2)) == [1, 1], two.outputs()
    first, second = two.outputs()
  (step,) = map(int, re.findall(r'stopped and saved at step (\d+)', first))
  assert (run / 'checkpoints' / str(step)).is_dir()
  assert 'will take this machine away (preempted TRUE)' in second
  assert 'will take this machine away' not in first
  assert not (run / 'run.lease').exists()
  for output in (first, second):
    assert 'start the same command again' in output


def on_a_machine(host: str, *flags: str) -> None:
  """The second process's machine is one of Google's."""
  if os.environ['PROCESS_ID'] == '1':
    os.environ['GCE_METADATA_HOST'] = host
  processes.script(*flags)
