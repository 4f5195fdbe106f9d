"""How long the live view takes to answer: docs/microscope.md has the figures.

  python docs/live_times.py WORKDIR SAE TEXT

Starts the server of `launch/microscope.py serve` on a free port, waits until it
has warmed up for texts of this length, and asks each question six times over
HTTP: about TEXT, and about five texts that add a word at its end. Prints how
long the first answer took, and the median and the longest of the later ones;
in brackets the CPU time, which other programs on the machine do not change
much. WORKDIR has an index of the SAE.
"""

from __future__ import annotations

import http.client
import json
import pathlib
import socket
import sys
import threading
import time

import numpy as np
import uvicorn

from gemma_scope.microscope import session
from gemma_scope.microscope.circuits import effects, readout
from gemma_scope.microscope.dashboard import api, server

_TOKEN = 'a' * 32
_ENDINGS = ('.', ' and', ' the', ' of', ' is')


class Asker:
  """Asks the server on a port."""

  def __init__(self, port: int):
    self._port = port

  def __call__(self, name: str, **question) -> dict:
    connection = http.client.HTTPConnection('127.0.0.1', self._port)
    headers = {'Cookie': f'microscope_{self._port}={_TOKEN}'}
    body = json.dumps(question | {'member': 0}).encode()
    connection.request('POST', f'/api/{name}', body, headers)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    if reply.status != 200:
      raise SystemExit(f'{name}: {answer["error"]}')
    return answer


def started(questions: api.Questions, pages: pathlib.Path):
  """The server, running in the background, and its port."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  config = uvicorn.Config(
    server.app(questions, pages, _TOKEN), port=port, log_level='warning'
  )
  live_server = uvicorn.Server(config)
  threading.Thread(target=live_server.run, daemon=True).start()
  while not live_server.started:
    time.sleep(0.01)
  return live_server, port


def warmed_up(ask: Asker) -> float:
  """Seconds until all programs are compiled."""
  start = time.monotonic()
  while True:
    state = ask('warm')
    if state['done'] >= state['total'] > 1:
      return time.monotonic() - start
    time.sleep(0.2)


def timed(ask: Asker, question: str, **fields) -> tuple[dict, float, float]:
  """An answer, with the seconds it took: waited, and of CPU time."""
  start, cpu = time.monotonic(), time.process_time()
  answer = ask(question, **fields)
  return answer, time.monotonic() - start, time.process_time() - cpu


def main(workdir: str, name: str, text: str) -> None:
  opened = session.Session(workdir)
  sae = opened.indexed(opened.find(name))
  questions = api.Questions(opened.model, opened.tokenizer, [sae])
  ids = readout.with_bos(opened.tokenizer, text + _ENDINGS[0])
  questions.warm_lengths = (effects.padded_length(len(ids)),)
  live_server, port = started(questions, opened.out / 'pages')
  ask = Asker(port)
  cpu = time.process_time()
  waited = warmed_up(ask)
  cpu = time.process_time() - cpu
  print(f'warmed up after {waited:.0f} s, {cpu:.0f} s of CPU time')
  reading, *first = timed(ask, 'read', text=text)
  feature = next(row[0][0] for row in reversed(reading['latents']) if row)
  change = {'feature': feature, 'kind': 'ablate', 'strength': 1.0}
  fields_of = {
    'read': {}, 'change': {'changes': [change]},
    'steer': {'changes': [change], 'tokens': 48}, 'why': {},
  }  # fmt: skip
  print(
    f'{len(reading["ids"])} tokens; seconds (of CPU time): the first answer, '
    f'the median and the longest of {len(_ENDINGS)} later ones'
  )
  for question, fields in fields_of.items():
    if question != 'read':
      first = timed(ask, question, text=text, **fields)[1:]
    later = [
      timed(ask, question, text=text + ending, **fields)[1:]
      for ending in _ENDINGS
    ]
    cells = first, np.median(later, 0), np.max(later, 0)
    shown = ('{:6.2f} ({:.2f})'.format(*cell) for cell in cells)
    print(f'{question:8}' + ''.join(f'{cell:>18}' for cell in shown))
  live_server.should_exit = True
  questions.close()


if __name__ == '__main__':
  main(*sys.argv[1:])
