"""Object stores on this machine, and a proxy before them that misbehaves.

`gcp-storage-emulator` stands for Google's and `moto` for S3. The emulator of
Google's ignores the generation that a request names and the bounds of a list;
the proxy holds requests to both, one at a time, as Google's documentation
defines them. It also injects faults: answers of 5xx, slow ones, and ones that
are cut off.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gemma_scope.runtime import objects

BUCKET = 'bucket'
# A request that fails is tried again soon: all servers are on this machine.
SOON = objects.RETRIES | {'initial_delay': '50ms', 'max_delay': '1s'}
# A fault: takes the method and the path, says what to do.
Fault = Callable[[str, str], str]


def no_fault(method: str, path: str) -> str:
  return ''


class Proxy:
  """Passes requests on to a server; `fault` may spoil the answers.

  Attributes:
    fault: '' passes a request on; '503' refuses it, '403' for good; 'lost'
      passes it on and answers 503; 'cut' sends half of the answer's bytes;
      'slow' waits 0.2 s.
    requests: method and path of each request.
    spoiled: how many were not passed on as they are.
  """

  def __init__(self, port: int, google: bool):
    self.port, self.google = port, google
    self.fault: Fault = no_fault
    self.requests: list[tuple[str, str]] = []
    self.spoiled = 0
    self.turn = threading.Lock()
    proxy = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def log_message(self, *unused):
        pass

      def answer(self):
        proxy.answer(self)

      do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.server.daemon_threads = True
    self.server.handle_error = lambda *unused: None  # of a client that is gone
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    self.url = f'http://127.0.0.1:{self.server.server_address[1]}'

  def answer(self, request) -> None:
    size = int(request.headers.get('content-length') or 0)
    if 'chunked' in request.headers.get('transfer-encoding', ''):
      body = self._chunks(request.rfile)
    else:
      body = request.rfile.read(size)
    self.requests.append((request.command, request.path))
    fault = self.fault(request.command, request.path)
    self.spoiled += bool(fault)
    if fault in ('503', '403'):
      self._send(request, int(fault), [], b'not now')
      return
    if fault == 'slow':
      time.sleep(0.2)
    with self.turn:
      status, headers, data = self._checked(request, body)
    if fault == 'lost':
      self._send(request, 503, [], b'try again')
    elif fault == 'cut':
      self._send(request, status, headers, data, data[: len(data) // 2])
    else:
      self._send(request, status, headers, data)

  def _chunks(self, stream) -> bytes:
    chunks = []
    while size := int(stream.readline().split(b';')[0], 16):
      chunks.append(stream.read(size))
      stream.readline()
    stream.readline()
    return b''.join(chunks)

  def _checked(self, request, body: bytes):
    """The server's answer; of Google's, only if the generation is right."""
    if not self.google:
      return self._ask(request.command, request.path, request.headers, body)
    path = urllib.parse.urlsplit(request.path)
    query = urllib.parse.parse_qs(path.query)
    uploads = path.path.startswith('/upload/')
    object_path = path.path.removeprefix('/upload')
    if uploads:
      object_path += '/' + urllib.parse.quote(query['name'][0], safe='')
    reads = query.get('alt') == ['media']
    if request.command == 'GET' and path.path.endswith('/o'):
      return self._listed(request, query)
    if not ('ifGenerationMatch' in query or reads):
      return self._ask(request.command, request.path, request.headers, body)
    status, _, described = self._ask('GET', object_path, {}, b'')
    generation = json.loads(described)['generation'] if status == 200 else '0'
    if query.get('ifGenerationMatch', [generation]) != [generation]:
      return (412 if generation != '0' or uploads else 404), [], b'{}'
    status, headers, data = self._ask(
      request.command, request.path, request.headers, body
    )
    return status, [*headers, ('x-goog-generation', generation)], data

  def _listed(self, request, query):
    status, headers, data = self._ask('GET', request.path, request.headers, b'')
    listing = json.loads(data)
    low, high = (query.get(f'{end}Offset', [''])[0] for end in ('start', 'end'))
    listing['items'] = [
      item
      for item in listing.get('items', [])
      if item['name'] >= low and (not high or item['name'] < high)
    ]
    return status, headers, json.dumps(listing).encode()

  def _ask(self, method: str, path: str, headers, body: bytes):
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
    passed_headers = {
      name: value
      for name, value in headers.items()
      if name.lower() not in ('transfer-encoding', 'content-length', 'expect')
    }
    connection.request(method, path, body or None, passed_headers)
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    dropped = ('content-length', 'transfer-encoding', 'connection', 'date')
    reply_headers = [
      (name, value)
      for name, value in reply.getheaders()
      if name.lower() not in dropped
    ]
    return reply.status, reply_headers, data

  def _send(self, request, status, headers, data, sent=None) -> None:
    request.send_response(status)
    for name, value in headers:
      if name.lower() != 'server':
        request.send_header(name, value)
    request.send_header('content-length', str(len(data)))
    request.end_headers()
    with contextlib.suppress(OSError):
      request.wfile.write(data if sent is None else sent)
      if sent is not None:
        request.wfile.flush()
        request.close_connection = True
        request.connection.shutdown(2)


@contextlib.contextmanager
def started(scheme: str) -> Iterator[tuple[Proxy, dict[str, str]]]:
  """A server with an empty bucket, its proxy, and the environment to use it."""
  port = _free_port()
  command = {
    'gs': [
      'gcp_storage_emulator',
      'start',
      '--host=127.0.0.1',
      f'--port={port}',
      '--in-memory',
      f'--default-bucket={BUCKET}',
      '--quiet',
    ],
    's3': ['moto.server', '-H', '127.0.0.1', '-p', str(port)],
  }[scheme]
  server = subprocess.Popen(
    [sys.executable, '-m', *command],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    _wait(port, server)
    if scheme == 's3':
      bucket_url = f'http://127.0.0.1:{port}/{BUCKET}'
      urllib.request.urlopen(
        urllib.request.Request(bucket_url, method='PUT')
      ).close()
    proxy = Proxy(port, scheme == 'gs')
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(objects, 'RETRIES', SOON)
      yield proxy, _environment(scheme, proxy.url)
    proxy.server.shutdown()
  finally:
    server.kill()
    server.wait()


def _environment(scheme: str, url: str) -> dict[str, str]:
  if scheme == 'gs':
    return {
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
    }
  return {
    'AWS_ENDPOINT_URL_S3': url,
    'AWS_REGION': 'us-east-1',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
  }


def _free_port() -> int:
  import socket

  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _wait(port: int, server: subprocess.Popen[Any]) -> None:
  for _ in range(600):
    if server.poll() is not None:
      raise RuntimeError('the object store did not start')
    try:
      urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=5).close()
      return
    except urllib.error.HTTPError:
      return
    except OSError:
      time.sleep(0.05)
  raise RuntimeError('the object store does not answer')


def environment(
  server_variables: dict[str, str], **extra: str
) -> dict[str, str]:
  """The environment of a process that uses a server."""
  return {**os.environ, **server_variables, **extra}
