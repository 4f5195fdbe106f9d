"""Pictures of the microscope, by a headless Chromium.

  python docs/screenshots.py OUT PAGES SAE FEATURE         of the static pages
  python docs/screenshots.py OUT ADDRESS SAE FEATURE TEXT  of the live view

PAGES is the folder of the pages, ADDRESS what launch/microscope.py serve has
printed, SAE a name in the pages. Needs Debian's chromium, and playwright
(launch/lock/ci.txt).
"""

from __future__ import annotations

import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ARGUMENTS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
]
WIDE, PHONE = (1280, 900), (390, 844)


def static(page: Page, folder: pathlib.Path, sae: int, feature: int) -> None:
  """Collection, list, a feature in both themes and on a phone, a comparison."""
  feature_page = f'#/s/{sae}/f/{feature}'
  near = page.evaluate(f'all.members[{sae}].near[0]')
  shots = {
    'collection': ('#/', 'light', WIDE),
    'list': (f'#/s/{sae}', 'light', WIDE),
    'feature': (feature_page, 'light', (1280, 1300)),
    'feature_dark': (feature_page, 'dark', WIDE),
    'compare': (f'#/c/{sae}/{near}', 'light', WIDE),
    'phone': (feature_page, 'light', PHONE),
  }
  for name, (route, scheme, (width, height)) in shots.items():
    page.set_viewport_size({'width': width, 'height': height})
    page.evaluate(f"location.hash = '{route}'; paint('{scheme}')")
    page.wait_for_timeout(500)
    page.screenshot(path=folder / f'{name}.png')


def live(
  page: Page, folder: pathlib.Path, sae: int, feature: int, text: str
) -> None:
  """A text read, a change steered, a logit traced; a graph, if there is one."""
  page.evaluate(f"location.hash = '#/live/{sae}/f/{feature}'")
  page.wait_for_selector('textarea')
  page.fill('textarea', text)
  page.get_by_role('button', name='Read', exact=True).click()
  page.wait_for_timeout(3000)
  graph = page.get_by_role('button', name='Graph')
  if graph.count():
    graph.click()
    page.wait_for_selector('#cause svg', timeout=120_000)
    page.locator('section.card:has(#cause)').screenshot(
      path=folder / 'graph.png'
    )
    return
  page.locator('select').select_option('ablate')
  page.get_by_label('temperature').fill('0')
  page.get_by_role('textbox', name='tokens').fill('16')
  page.get_by_role('button', name='Steer').click()
  page.wait_for_selector('#result .grid', timeout=120_000)
  page.get_by_role('button', name='Why').click()
  page.wait_for_selector('#verdict', timeout=120_000)
  page.screenshot(path=folder / 'live.png', full_page=True)


def main() -> None:
  out, at, name, feature, *text = sys.argv[1:]
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  if not at.startswith('http'):
    at = pathlib.Path(at, 'index.html').resolve().as_uri()
  with sync_playwright() as play:
    browser = play.chromium.launch(
      executable_path=shutil.which('chromium'), args=ARGUMENTS
    )
    page = browser.new_page(viewport={'width': 1280, 'height': 900})
    page.goto(at)
    page.wait_for_selector('main h1')
    names = page.evaluate('all.members.map((m) => m.name)')
    sae = names.index(name)
    if text:
      live(page, folder, sae, int(feature), text[0])
    else:
      static(page, folder, sae, int(feature))
    browser.close()
  for path in folder.glob('*.png'):  # few colours: a third of the bytes
    Image.open(path).convert('RGB').quantize(128).save(path, optimize=True)


if __name__ == '__main__':
  main()
