"""The model card of a release."""

from __future__ import annotations

import hashlib

from gemma_scope import release
from tests.helpers import releases
from tests.helpers.releases import MEMBER, metrics_of, params_of


def test_the_model_card_says_what_was_measured(tmp_path):
  members = [
    (params_of(i), releases.card(seed=i), metrics_of(l0=5 + 10 * i))
    for i in range(2)
  ]
  releases.save(tmp_path / 'out', members, license_name='cc-by-4.0')
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert text.startswith(
    '---\nlicense: "cc-by-4.0"\nlibrary_name: "gemma_scope"\ntags: ["sparse-'
  )
  for words in ('ab' * 32, 'Seed: 0, 1', '4,096', '61,440', MEMBER, '0.1.0'):
    assert words in text, words
  assert '](frontier.png)' in text
  picture = (tmp_path / 'out' / 'frontier.png').read_bytes()
  assert picture.startswith(b'\x89PNG')
  sha256 = hashlib.sha256(picture).hexdigest()
  assert sha256 in (tmp_path / 'out' / 'manifest.json').read_text()


def test_words_in_a_card_cannot_open_html_or_a_cell(tmp_path, no_picture):
  nasty = '</td><script>alert(1)</script>|[x](y)`\n---\ud800'
  card = releases.card(text={'source': nasty}, model=nasty, code=nasty)
  releases.save(tmp_path / 'out', [(params_of(), card, None)], title=nasty)
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert '<script' not in text and '</td' not in text and '[x]' not in text
  assert text.count('\n---\n') == 1
  assert release.load_all(tmp_path / 'out')[0].card == card
