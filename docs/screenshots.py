"""Pictures of the microscope's pages, by a headless Chromium.

  python docs/screenshots.py runs/tiny/microscope/pages docs/microscope FEATURE

Needs Debian's chromium and playwright (launch/lock/ci.txt). FEATURE is a route
of the pages, such as s/0/f/639; the second SAE is compared with the first.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

from playwright.sync_api import sync_playwright

ARGUMENTS = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update',
  '--disable-sync',
]  # fmt: skip


def main() -> None:
  pages, out, feature = sys.argv[1:]
  address = pathlib.Path(pages, 'index.html').resolve().as_uri()
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  member = feature.split('/')[1]
  shots = {
    'collection': ('#/', 'light', (1280, 900)),
    'list': (f'#/s/{member}', 'light', (1280, 900)),
    'feature': (f'#/{feature}', 'light', (1280, 1300)),
    'feature_dark': (f'#/{feature}', 'dark', (1280, 900)),
    'compare': ('#/c/0/1', 'light', (1280, 900)),
    'phone': (f'#/{feature}', 'light', (390, 844)),
  }
  with sync_playwright() as play:
    browser = play.chromium.launch(
      executable_path=shutil.which('chromium'), args=ARGUMENTS
    )
    for name, (route, scheme, (width, height)) in shots.items():
      page = browser.new_page(
        viewport={'width': width, 'height': height}, color_scheme=scheme
      )
      page.goto(address + route)
      page.wait_for_selector('main h1')
      page.screenshot(path=folder / f'{name}.png')
      page.close()
    browser.close()


if __name__ == '__main__':
  main()
