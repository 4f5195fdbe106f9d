"""Objects of a bucket, by name: read, written whole, written on a condition.

TensorStore's key-value stores do the work, for gs:// and s3:// alike: requests
that fail (a server's 5xx, a cut connection) are tried again with growing waits,
and a write may name the generation (Google) or ETag (S3) that it replaces, so
that of two writers one is refused. An object appears whole or not at all: that
is what a bucket has in place of a rename.

Credentials are the clouds' own: application default credentials, or the AWS_*
variables and files. AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names another
server that speaks S3; TENSORSTORE_GCS_HTTP_URL another that speaks Google's.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

SCHEMES = ('gs', 's3')
_ADDRESS = re.compile(r'(gs|s3)://([a-z0-9][a-z0-9._-]{1,221})(?:/(.*))?')
_TIMEOUT_S = 900.0  # for one object of at most PART bytes, with all retries
_AT_ONCE = 16  # requests in flight
# Between attempts of a request that fails: each wait is twice the one before.
RETRIES = {'max_retries': 32, 'initial_delay': '1s', 'max_delay': '32s'}
PART = 64 << 20  # bytes of an object, at most: S3 takes 5 GB in one request
ABSENT = b'\2'  # TensorStore's generation of an object that does not exist


class BucketError(OSError):
  """A request to a bucket failed, after all retries; one sentence."""


class Objects:
  """The objects below an address; their names are relative to it.

  Args:
    address: gs://BUCKET/PATH or s3://BUCKET/PATH.

  Raises:
    ValueError: it is no such address.
    BucketError: from every method, where the bucket does not answer or refuses.
  """

  def __init__(self, address: str):
    self.address = address.rstrip('/')
    self._store = _opened(self.address)

  def read(self, name: str) -> bytes | None:
    """An object's bytes; None where there is none."""
    return self.read_generation(name)[0]

  def read_generation(self, name: str) -> tuple[bytes | None, bytes]:
    """An object's bytes (None: there is none) and its generation."""
    result = self._done(self._store.read(name), 'read', name)
    data = result.value if result.state == 'value' else None
    return data, result.stamp.generation

  def write(self, name: str, data: bytes) -> None:
    """Writes an object; what is there is replaced."""
    self._done(self._store.write(name, data), 'written', name)

  def replace(self, name: str, data: bytes | None, generation: bytes) -> bytes:
    """Writes an object, or deletes it (None), if it has this generation.

    Returns:
      The new generation; b'' where the object had another one, so that nothing
      was done. (A write whose answer was lost is tried again, and then finds
      its own: the caller compares the content.)
    """
    write = self._store.write(name, data, if_equal=generation)
    return self._done(write, 'written', name).generation

  def names(self, below: str = '') -> list[str]:
    """Names of all objects that begin with `below`, in order."""
    import tensorstore as ts

    range_ = ts.KvStore.KeyRange(below, _after(below))
    keys = self._done(self._store.list(range_), 'listed', below)
    return sorted(name.decode('utf-8', 'replace') for name in keys)

  def delete(self, name: str) -> None:
    """Deletes an object, if it is there."""
    self._done(self._store.write(name, None), 'deleted', name)

  def delete_below(self, below: str) -> None:
    """Deletes all objects whose names begin with `below`, which is not ''."""
    if not below:
      raise ValueError('delete_below needs the beginning of a name.')
    self.write_all((name, None) for name in self.names(below))

  def write_all(self, items: Iterable[tuple[str, Any]]) -> None:
    """Writes many objects (or deletes: None), several at once."""
    waiting = collections.deque()
    for name, data in items:
      waiting.append((name, self._store.write(name, data)))
      if len(waiting) >= _AT_ONCE:
        name, future = waiting.popleft()
        self._done(future, 'written', name)
    for name, future in waiting:
      self._done(future, 'written', name)

  def read_all(self, names: Iterable[str]) -> Iterator[bytes | None]:
    """Reads many objects, several at once, in their order."""
    waiting = collections.deque()
    for name in names:
      waiting.append((name, self._store.read(name)))
      if len(waiting) >= _AT_ONCE:
        yield self._value(*waiting.popleft())
    while waiting:
      yield self._value(*waiting.popleft())

  def _value(self, name: str, future) -> bytes | None:
    result = self._done(future, 'read', name)
    return result.value if result.state == 'value' else None

  def _done(self, future, action: str, name: str) -> Any:
    try:
      return future.result(timeout=_TIMEOUT_S)
    except Exception as error:  # TensorStore raises many kinds
      raise BucketError(
        f'{self.address}/{name} could not be {action}: {_sentence(error)}'
      ) from error


def _opened(address: str):
  import tensorstore as ts

  match = _ADDRESS.fullmatch(address)
  if not match:
    raise ValueError(
      f'{address!r} is no address of a bucket; one looks like '
      'gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.'
    )
  scheme, bucket, path = match.groups()
  driver = 'gcs' if scheme == 'gs' else 's3'
  spec = {'driver': driver, 'bucket': bucket}
  spec['context'] = {f'{driver}_request_retries': RETRIES}
  spec['path'] = f'{path}/' if path else ''
  if scheme == 's3':
    for field, names in (
      ('endpoint', ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL')),
      ('aws_region', ('AWS_REGION', 'AWS_DEFAULT_REGION')),
    ):
      values = [os.environ[name] for name in names if os.environ.get(name)]
      spec |= {field: values[0]} if values else {}
    if os.environ.get('AWS_ACCESS_KEY_ID'):  # no search for files, which logs
      spec['aws_credentials'] = {'type': 'environment'}
  try:
    return ts.KvStore.open(spec).result(timeout=_TIMEOUT_S)
  except Exception as error:
    raise BucketError(
      f'{address} could not be opened: {_sentence(error)}'
    ) from error


def _after(below: str) -> bytes:
  """The end of the range of names that begin with `below`; b'' for all."""
  data = below.encode()
  return data[:-1] + bytes([data[-1] + 1]) if data else b''


def _sentence(error: Exception) -> str:
  if isinstance(error, TimeoutError):
    return f'there was no answer for {_TIMEOUT_S:.0f} s.'
  text = re.sub(
    r' \[(source locations|tensorstore_spec|http_).*', '', str(error)
  )
  text = ' '.join(text.split())[:300] or type(error).__name__
  return text if text.endswith('.') else f'{text}.'
