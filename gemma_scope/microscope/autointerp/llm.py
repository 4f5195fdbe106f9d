"""A language model that answers questions: one function, text in, text out.

  Endpoint    any server with OpenAI's chat completions API
  LocalGemma  an instruction-tuned Gemma on this machine, in its chat format
  Kept        wraps either: caches answers on disk and limits the questions

The API key is read from the environment when a question is sent and appears
only in a header of that request: never in a file, a log, a repr or an error. A
redirect is an error, because it could send the key to another host, and the key
is never sent unencrypted except to this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Protocol

from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import generate
from gemma_scope.text import rollouts, tokenizers

_LONGEST = 1 << 20  # maximum size of an answer in bytes
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0


class Model(Protocol):
  """Answers a question; `name` identifies the model."""

  name: str

  def __call__(self, question: str) -> str: ...


class AskError(RuntimeError):
  """The model gave no answer; the message says why and what to do."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *unused):
    return None


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A server with OpenAI's `POST {base_url}/chat/completions`.

  Attributes:
    name: the server's name for the model.
    base_url: for example http://127.0.0.1:8000/v1.
    key_variable: the environment variable with the API key; may be unset if the
      server needs no key.
    max_tokens: maximum length of an answer.
    timeout_s: timeout of one attempt.
    tries: maximum number of attempts per question.
    wait_s: wait before the second attempt; it doubles after each, unless the
      server's Retry-After header sets it (a minute at most).
  """

  name: str
  base_url: str
  key_variable: str = 'OPENAI_API_KEY'
  max_tokens: int = 256
  timeout_s: float = 60.0
  tries: int = 5
  wait_s: float = 1.0

  def __post_init__(self):
    url = urllib.parse.urlsplit(self.base_url)
    if url.scheme not in ('http', 'https') or not url.hostname:
      raise ValueError(
        f'{self.base_url!r} is not a server URL; expected something like '
        'https://host/v1.'
      )
    unencrypted = url.scheme == 'http' and not self._local
    if unencrypted and os.environ.get(self.key_variable):
      raise ValueError(
        f'{self.base_url} is not encrypted and {self.key_variable} is set: the '
        'key would be sent unencrypted. Use https, or unset the variable.'
      )

  @property
  def _local(self) -> bool:
    host = urllib.parse.urlsplit(self.base_url).hostname
    return host in ('127.0.0.1', 'localhost', '::1')

  def __call__(self, question: str) -> str:
    """The answer; AskError after the last attempt or a permanent failure."""
    wait_s, why = self.wait_s, ''
    for attempt in range(self.tries):
      if attempt:
        time.sleep(wait_s)
        wait_s *= 2
      try:
        return self._once(question)
      except urllib.error.HTTPError as error:
        why = f'status {error.code}'
        if error.code not in _BUSY:
          break
        after = error.headers.get('Retry-After', '')
        if after.isdigit():
          wait_s = min(float(after), _LONGEST_WAIT)
      except (OSError, http.client.HTTPException) as error:
        why = type(error).__name__
      except ValueError:
        why = 'the reply is not a chat completion'
    raise AskError(
      f'{self.base_url} gave no answer ({why}); check the address, the model '
      f'name {self.name!r} and the key in {self.key_variable}.'
    )

  def _once(self, question: str) -> str:
    body = {
      'model': self.name,
      'messages': [{'role': 'user', 'content': question}],
      'temperature': 0,
      'max_tokens': self.max_tokens,
    }
    headers = {'Content-Type': 'application/json'}
    key = os.environ.get(self.key_variable)
    if key:
      headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(
      self.base_url.rstrip('/') + '/chat/completions',
      json.dumps(body).encode(),
      headers,
    )
    handlers = [_NoRedirect]
    if self._local:  # never through a proxy
      handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    with opener.open(request, timeout=self.timeout_s) as reply:
      data = reply.read(_LONGEST + 1)
    try:
      content = json.loads(data)['choices'][0]['message']['content']
    except (LookupError, TypeError) as error:
      raise ValueError('not a chat completion') from error
    if len(data) > _LONGEST or not isinstance(content, str):
      raise ValueError('not a chat completion')
    return content


@dataclasses.dataclass(frozen=True, eq=False)
class LocalGemma:
  """An instruction-tuned Gemma on this machine, decoded greedily."""

  name: str
  gemma: lm.Gemma
  params: lm.Params
  tokenizer: tokenizers.Tokenizer
  max_tokens: int = 256

  def __call__(self, question: str) -> str:
    tokenizer = self.tokenizer
    ids = [tokenizer.bos_id, *rollouts.encode(tokenizer, question)]
    ends = (tokenizer.end_of_turn, tokenizer.eos_id)
    greedy = generate.Sampling(
      self.max_tokens, temperature=0.0, stop=ends, forbid=[tokenizer.bos_id]
    )
    (reply,) = generate.generate(self.gemma, self.params, [ids], greedy)
    return tokenizer.decode([i for i in reply if i not in ends])


class Kept:
  """A model with a cache on disk: the same question is sent only once.

  The cache is a JSONL file of questions and answers, without the API key. Each
  answer is appended as it arrives, so that an interrupted run continues where
  it stopped; an incomplete last line is dropped.

  Args:
    model: the model to ask.
    path: the cache file; created if missing.
    most: maximum number of questions to send; the next one raises AskError.
  """

  def __init__(
    self, model: Model, path: str | os.PathLike[str], most: int = 10_000
  ):
    self.name, self._model, self._most = model.name, model, most
    self._path, self.asked, self._answers = pathlib.Path(path), 0, {}
    self._path.parent.mkdir(parents=True, exist_ok=True)
    complete = b''
    if self._path.exists():
      data = self._path.read_bytes()
      complete = data[: data.rfind(b'\n') + 1]
      if complete != data:
        self._path.write_bytes(complete)
    for line in complete.splitlines():
      record = json.loads(line)
      self._answers[record['key']] = record['answer']

  def __call__(self, question: str) -> str:
    key = hashlib.sha256(f'{self.name}\0{question}'.encode()).hexdigest()
    if key in self._answers:
      return self._answers[key]
    if self.asked >= self._most:
      raise AskError(
        f'The limit of {self._most} questions is reached; raise it to '
        'continue. The answers so far are kept.'
      )
    self.asked += 1
    answer = self._model(question)
    self._answers[key] = answer
    line = {
      'key': key,
      'model': self.name,
      'question': question,
      'answer': answer,
    }
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')
    return answer
