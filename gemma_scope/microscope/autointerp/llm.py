"""A language model that answers questions: one function, text in, text out.

  Endpoint    any server that speaks OpenAI's chat completions
  LocalGemma  a Gemma through `generate`, in its own chat format
  Kept        either, with its answers on disk and a bound on the questions

A key is read from the environment when a question is sent, and goes into one
header of that request: never into a file, a log, a repr or an error. A redirect
is an error, for it would carry the key to another host, and a key is not sent
unencrypted except to this machine.
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

_LONGEST = 1 << 20  # bytes of an answer
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0


class Model(Protocol):
  """Answers a question; `name` says who did."""

  name: str

  def __call__(self, question: str) -> str: ...


class AskError(RuntimeError):
  """No answer: the message says why and what to do."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *unused):
    return None


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A server with OpenAI's `POST {base_url}/chat/completions`.

  Attributes:
    name: the model, as the server calls it.
    base_url: such as http://127.0.0.1:8000/v1.
    key_variable: the environment variable that holds the key; it need not be
      set where the server wants none.
    max_tokens: of an answer.
    timeout_s: of one try.
    tries: of one question; waits double from `wait_s`, or are the server's
      Retry-After, a minute at most.
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
        f'{self.base_url!r} is no address of a server; expected something like '
        'https://host/v1.'
      )
    clear = url.scheme == 'http' and not self._local
    if clear and os.environ.get(self.key_variable):
      raise ValueError(
        f'{self.base_url} is not encrypted and {self.key_variable} is set: the '
        'key would go over the network in the clear. Use https, or unset it.'
      )

  @property
  def _local(self) -> bool:
    host = urllib.parse.urlsplit(self.base_url).hostname
    return host in ('127.0.0.1', 'localhost', '::1')

  def __call__(self, question: str) -> str:
    """The answer; AskError after the last try, or at once where none helps."""
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
        why = 'an answer that is not a chat completion'
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
    if self._local:  # a proxy of the environment is not this machine
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
  """An instruction-tuned Gemma on this machine; the likeliest answer."""

  name: str
  gemma: lm.Gemma
  params: lm.Params
  tokenizer: tokenizers.Tokenizer
  max_tokens: int = 256

  def __call__(self, question: str) -> str:
    tokenizer = self.tokenizer
    ids = [tokenizer.bos_id, *rollouts.encode(tokenizer, question)]
    (reply,) = generate.generate(
      self.gemma,
      self.params,
      [ids],
      max_new_tokens=self.max_tokens,
      temperature=0.0,
      stop=[tokenizer.end_of_turn, tokenizer.eos_id],
      forbid=[tokenizer.bos_id],
    )
    ends = (tokenizer.end_of_turn, tokenizer.eos_id)
    return tokenizer.decode([i for i in reply if i not in ends])


class Kept:
  """A model whose answers are kept: a question is paid for once.

  The file is JSONL, appended to after each answer, so that a killed run goes on
  where it was; a line that a kill cut short is dropped. It holds questions and
  answers, no key.

  Args:
    model: whom to ask.
    path: of the file; made if need be.
    most: questions that may be sent; AskError at the next one.
  """

  def __init__(
    self, model: Model, path: str | os.PathLike[str], most: int = 10_000
  ):
    self.name, self._model, self._most = model.name, model, most
    self._path, self.asked, self._answers = pathlib.Path(path), 0, {}
    self._path.parent.mkdir(parents=True, exist_ok=True)
    whole = b''
    if self._path.exists():
      data = self._path.read_bytes()
      whole = data[: data.rfind(b'\n') + 1]
      if whole != data:
        self._path.write_bytes(whole)
    for line in whole.splitlines():
      one = json.loads(line)
      self._answers[one['key']] = one['answer']

  def __call__(self, question: str) -> str:
    key = hashlib.sha256(f'{self.name}\0{question}'.encode()).hexdigest()
    if key in self._answers:
      return self._answers[key]
    if self.asked >= self._most:
      raise AskError(
        f'{self._most} questions were sent, which is the bound; raise it to go '
        'on: the answers so far are kept.'
      )
    self.asked += 1
    answer = self._model(question)
    self._answers[key] = answer
    line = {
      'key': key, 'model': self.name, 'question': question, 'answer': answer
    }  # fmt: skip
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')
    return answer
