"""Reading of pages, and a headless browser."""

from __future__ import annotations

import base64
import gzip
import json
import pathlib
import re
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def data(folder: pathlib.Path, name: str):
  text = (folder / 'data' / f'{name}.js').read_text()
  key, packed = re.fullmatch(
    r"scope\('([\w/]+)','([\w+/=]+)'\)\n", text
  ).groups()
  assert key == name
  return json.loads(gzip.decompress(base64.b64decode(packed)))


def chromium(address):
  """A page of a headless browser; what it said and asked for are kept."""
  path = shutil.which('chromium')
  playwright = pytest.importorskip(
    'playwright.sync_api',
    reason='playwright, which drives it, is not installed',
  )
  if path is None:
    pytest.skip('Chromium is not installed')
  with playwright.sync_playwright() as play:
    browser = play.chromium.launch(
      executable_path=path,
      args=[
        '--no-sandbox',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
      ],
    )
    page = browser.new_page(viewport={'width': 1200, 'height': 900})
    page.said, page.asked = [], []
    page.on('console', lambda m: page.said.append(m.text))
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('request', lambda r: page.asked.append(r.url))
    page.goto(address)
    page.wait_for_selector('main h1')
    yield page
    browser.close()


def audit(page) -> list[str]:
  """What axe-core finds wrong by WCAG 2.1 A and AA: rule, and where."""
  path = ROOT / 'node_modules/axe-core/axe.min.js'
  if not path.exists():
    pytest.skip('axe-core is not installed: run npm ci')
  page.evaluate(path.read_text())
  report = page.evaluate(
    "axe.run({preload: false, runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa']})"
  )
  return [
    f'{violation["id"]}: {node["html"][:120]}'
    for violation in report['violations']
    for node in violation['nodes'][:3]
  ]
