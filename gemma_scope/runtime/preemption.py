"""Notices that this machine will be taken away, from its cloud's own server.

  Google  instance/preempted          TRUE: a spot machine has 30 s left
          instance/maintenance-event  TERMINATE_ON_HOST_MAINTENANCE
  AWS     spot/instance-action        exists: a spot machine has two minutes

A thread asks every two seconds, on machines of these clouds alone, which are
told by their firmware. GCE_METADATA_HOST and AWS_EC2_METADATA_SERVICE_ENDPOINT,
the variables of the clouds' own libraries, name another server.

A notice that stands when the process starts stops nothing: whoever started the
process there knew of it, and would start it again and again.
"""

from __future__ import annotations

import functools
import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np
from jax.experimental import multihost_utils

from gemma_scope.runtime import cluster

_EVERY_S = 2.0
_TIMEOUT_S = 5.0
_ADDRESS = '169.254.169.254'  # by number: no name is looked up

# Asks the cloud: the notice, or '' where there is none. Raises OSError.
Ask = Callable[[], str]

_noticed = threading.Event()


def server() -> Ask | None:
  """What to ask for notices on this machine; None outside the clouds."""
  host = os.environ.get('GCE_METADATA_HOST')
  if host or 'Google' in _firmware('product_name'):
    return functools.partial(_google, f'http://{host or _ADDRESS}')
  endpoint = os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT')
  if endpoint or 'Amazon EC2' in _firmware('sys_vendor'):
    endpoint = (endpoint or f'http://{_ADDRESS}').rstrip('/')
    return functools.partial(_aws, endpoint)
  return None


def _firmware(name: str) -> str:
  try:
    return pathlib.Path('/sys/class/dmi/id', name).read_text()
  except OSError:
    return ''


def _google(url: str) -> str:
  for name, notice in (
    ('preempted', 'TRUE'),
    ('maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE'),
  ):
    path = f'{url}/computeMetadata/v1/instance/{name}'
    if _read(path, {'Metadata-Flavor': 'Google'}) == notice:
      return f'{name} {notice}'
  return ''


def _aws(url: str) -> str:
  token = _read(
    f'{url}/latest/api/token',
    {'X-aws-ec2-metadata-token-ttl-seconds': '60'},
    'PUT',
  )
  try:
    return _read(
      f'{url}/latest/meta-data/spot/instance-action',
      {'X-aws-ec2-metadata-token': token},
    )
  except urllib.error.HTTPError as error:
    if error.code == 404:  # no notice
      return ''
    raise


def _read(url: str, headers: dict[str, str], method: str = 'GET') -> str:
  request = urllib.request.Request(url, headers=headers, method=method)
  with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
    return answer.read(4096).decode('utf-8', 'replace').strip()


class Watch:
  """A thread that asks for notices, and calls `act` with the first new one.

  Args:
    ask: see `server`.
    act: called once, in the thread.
    report: told of a notice that stood before.
  """

  def __init__(
    self,
    ask: Ask,
    act: Callable[[str], None],
    report: Callable[[str], None] = print,
  ):
    self._ask, self._act, self._report = ask, act, report
    self._stopped = threading.Event()
    self._thread = threading.Thread(
      target=self._run, name='preemption', daemon=True
    )
    self._thread.start()

  def stop(self) -> None:
    """Asks no more; returns at once."""
    self._stopped.set()

  def _run(self) -> None:
    before = None
    while not self._stopped.is_set():
      try:
        now = self._ask()
      except (OSError, ValueError):  # no answer says nothing
        now = before
      if now and before is None:
        self._report(
          f'This machine will be taken away ({now}), as was known when this '
          'process started: it runs on until then.'
        )
      elif now and now != before:
        _noticed.set()
        self._act(now)
        return
      before = now
      self._stopped.wait(_EVERY_S)


def noticed() -> bool:
  """Whether this process was told that its machine will be taken away."""
  return _noticed.is_set()


def of_any_machine() -> bool:
  """Whether a process of the run was told so; every process calls it."""
  if cluster.part()[1] == 1:
    return noticed()
  told = np.asarray(noticed())
  return bool(multihost_utils.process_allgather(told).any())
