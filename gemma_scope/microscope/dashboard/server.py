"""The live view: the pages, and questions to the model behind them.

  GET  /...        the folder of pages (`pages`), nothing outside of it
  POST /api/NAME   JSON in, JSON out (`api`)

The server listens on this machine only. It prints an address with a random
token once; opening it sets a cookie that requests from other sites do not
carry. The server refuses a request without the cookie, with another Host header
(a name that was made to point here) or from another origin. An answer depends
on the question alone, and nothing is written. One question is answered at a
time.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from gemma_scope.microscope.dashboard.api import Questions

_MOST_BYTES = 1 << 20  # of a question
_POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; "
  "connect-src 'self'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'"
)


def app(questions: Questions, pages: str | os.PathLike[str], token: str):
  """The view as an ASGI application, for `serve` and for tests."""
  from starlette.applications import Starlette
  from starlette.concurrency import run_in_threadpool
  from starlette.middleware import Middleware
  from starlette.middleware.trustedhost import TrustedHostMiddleware
  from starlette.responses import JSONResponse
  from starlette.routing import Mount, Route
  from starlette.staticfiles import StaticFiles

  def answer(name: str, question: Mapping) -> dict[str, Any]:
    if name in questions.instant:
      return questions.instant[name](question)
    with questions.lock:
      return questions.answers[name](question)

  async def api(request):
    name, body = request.path_params['name'], b''
    if name not in questions.answers and name not in questions.instant:
      return JSONResponse(
        {'error': 'There is no question with this name.'}, 404
      )
    async for chunk in request.stream():
      body += chunk
      if len(body) > _MOST_BYTES:
        return JSONResponse({'error': 'The question is too long.'}, 413)
    try:
      question = json.loads(body)
      if not isinstance(question, dict):
        raise ValueError('A question must be a JSON object.')
      question.pop('ids', None)  # of `warm` alone
      return JSONResponse(await run_in_threadpool(answer, name, question))
    except (ValueError, RecursionError) as error:
      return JSONResponse({'error': str(error)[:500]}, 400)
    except (RuntimeError, OSError) as error:  # no memory, no file any more
      message = f'{type(error).__name__}: {error}'
      return JSONResponse({'error': message[:500]}, 500)

  return Starlette(
    routes=[
      Route('/api/{name}', api, methods=['POST']),
      Mount('/', StaticFiles(directory=pages, html=True)),
    ],
    middleware=[
      Middleware(
        TrustedHostMiddleware,
        allowed_hosts=['127.0.0.1', 'localhost'],
        www_redirect=False,
      ),
      Middleware(_Guard, token=token),
    ],
  )


class _Guard:
  """Refuses requests without the token, and sets the browser's policies."""

  def __init__(self, inner, token: str):
    self._inner, self._token = inner, token

  async def __call__(self, scope, receive, send):
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, RedirectResponse

    if scope['type'] != 'http':
      return await self._inner(scope, receive, send)
    request = Request(scope)
    matches_token = lambda token: hmac.compare_digest(
      token.encode(errors='replace'), self._token.encode()
    )
    headers = {
      'Content-Security-Policy': _POLICY,
      'X-Content-Type-Options': 'nosniff',
      'Referrer-Policy': 'no-referrer',
      'Cross-Origin-Resource-Policy': 'same-origin',
      'Cache-Control': 'no-store',
    }

    async def sending(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [
          *message['headers'],
          *(
            (name.lower().encode(), value.encode())
            for name, value in headers.items()
          ),
        ]
      await send(message)

    # Browsers send a cookie to all ports of a host: its name has this one's.
    cookie = f'microscope_{request.url.port}'
    origin = request.headers.get('origin')
    own_origin = f'http://{request.headers.get("host", "")}'
    if origin is not None and origin != own_origin:
      inner = PlainTextResponse(
        'Refused: the request comes from another site.', 403
      )
    elif request.url.path == '/' and matches_token(
      request.query_params.get('token', '')
    ):
      inner = RedirectResponse('/', 303)
      inner.set_cookie(
        cookie, self._token, httponly=True, samesite='strict', path='/'
      )
    elif not matches_token(request.cookies.get(cookie, '')):
      inner = PlainTextResponse(
        'Open the address that launch/microscope.py serve printed: it has the '
        'token.',
        403,
      )
    else:
      inner = self._inner
    await inner(scope, receive, sending)


def serve(
  questions: Questions,
  pages: str | os.PathLike[str],
  port: int,
  report: Callable[[str], None] = print,
) -> None:
  """Serves on 127.0.0.1 only, until it is interrupted."""
  import uvicorn

  token = secrets.token_urlsafe(24)
  report(f'live  http://127.0.0.1:{port}/?token={token}')
  report(
    'Only this machine can open it. Programs are compiled in the background '
    '(warming up). Ctrl-C ends the server.'
  )
  questions.warm({'member': 0})
  try:
    uvicorn.run(
      app(questions, pages, token),
      host='127.0.0.1',
      port=port,
      log_level='warning',
      access_log=False,
      server_header=False,
    )
  finally:
    questions.close()
