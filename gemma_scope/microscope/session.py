"""A run's folder, opened: its model, text and SAEs, and the microscope's files.

  <out>/indexes/<name>/   an index an SAE (`index`), labels.jsonl (`explain`)
  <out>/members.json      which SAEs they are of, in the order of the pages
  <out>/pages/            the pages

The config is the run's own, or one that names the model and text of published
SAEs. Everything is opened when it is first asked for.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_scope import collection, lm, metrics, release, tokenizers, weights
from gemma_scope import mesh as mesh_lib
from gemma_scope.formats import published
from gemma_scope.microscope import build as build_lib
from gemma_scope.microscope import index, intervene, logits, pages
from gemma_scope.microscope.index import Index

_MEMBERS, _LABELS = 'members.json', 'labels.jsonl'


class Session:
  """A run's folder, and the folder of its microscope.

  Args:
    workdir: of the run; holds config.json and release/ unless others are given.
    out: of the microscope; by default <workdir>/microscope.
    config: None: the run's.
    saes: releases, or SAEs anywhere, joined by commas; '': those that are
      indexed, else the run's.
    report: takes a line of text.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    out: pathlib.Path | None = None,
    config: ConfigDict | None = None,
    saes: str = '',
    report: Callable[[str], None] = print,
  ):
    self.workdir, self.out = workdir, out or workdir / 'microscope'
    self.saes, self._config, self.report = saes, config, report

  @functools.cached_property
  def config(self) -> ConfigDict:
    """ValueError where there is none."""
    if self._config is not None:
      return self._config
    path = self.workdir / 'config.json'
    if not path.exists():
      raise ValueError(
        f'{self.workdir} has no config.json; name the folder of a run, or say '
        '--config=, which names the model and the text.'
      )
    return ConfigDict(json.loads(path.read_text()))

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices, as the config lays them out."""
    return mesh_lib.make(self.config.mesh)

  @functools.cached_property
  def model(self) -> tuple[lm.Gemma, lm.Params]:
    """The language model and its parameters."""
    c = self.config.lm
    return weights.load(c.name, c.checkpoint, dtype=c.dtype, mesh=self.mesh)

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The model's."""
    c = self.config.lm
    return tokenizers.Tokenizer(
      c.tokenizer or weights.tokenizer(c.name, c.checkpoint)
    )

  def text(self, sequences: int) -> build_lib.Text:
    """Sequences of the run's training text."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer, store = collection.open_text(
      self.config, self.workdir, self.report
    )
    return build_lib.spread(
      store, self.config.text.seq_len, sequences,
      collection.special(tokenizer, store).keep, tokenizer.eos_id,
    )  # fmt: skip

  @functools.cached_property
  def members(self) -> list[release.Member]:
    """The SAEs, in the order of the pages."""
    kept = self.out / _MEMBERS
    if not self.saes and kept.exists():
      return published.offered(json.loads(kept.read_text())['saes'])
    return published.offered(self.saes or str(self.workdir / 'release'))

  def find(self, name: str) -> release.Member:
    """The member of this name, or the only one whose name has it in it."""
    names = [build_lib.name_of(member.path) for member in self.members]
    found = [i for i, each in enumerate(names) if name in each]
    exact = [i for i in found if names[i] == name]
    if len(exact or found) != 1:
      shown = [names[i] for i in found] or names
      raise ValueError(
        f'--sae={name!r} names {len(found)} SAEs and should name one; there '
        f'are {", ".join(shown[:8])}{", ..." if len(shown) > 8 else ""}.'
      )
    return self.members[(exact or found)[0]]

  def index(self, member: release.Member) -> Index:
    """Its index; ValueError where it was not built."""
    return index.read(self.folder(member))

  def folder(self, member: release.Member) -> pathlib.Path:
    """Of its index and labels."""
    return self.out / 'indexes' / build_lib.name_of(member.path)

  def subject(self, member: release.Member) -> intervene.Subject:
    """It in its model, in units of its index's largest values."""
    special = self.tokenizer
    return intervene.subject(
      *self.model, member.load(), member.card, self.index(member).max_F,
      (special.pad_id, special.bos_id, special.eos_id), self.mesh,
    )  # fmt: skip

  def build(
    self, sequences: int, batch: int, poll: Callable[[], None]
  ) -> pathlib.Path:
    """Indexes all members in one pass and writes the pages -> their address.

    Stopped by `poll`, it goes on from what is on disk when called again; what
    is built of this text and of these SAEs is left as it is.
    """
    text, members = self.text(sequences), self.members
    rows = [(member.load(), member.card) for member in members]
    state = build_lib.State(self.out / 'partial.npz', text, rows)
    saes = self.saes or str(self.workdir / 'release')
    about = json.dumps({'saes': saes, 'key': state.key}) + '\n'
    kept, first = self.out / _MEMBERS, self.out / 'pages' / 'index.html'
    if first.exists() and kept.exists() and kept.read_text() == about:
      self.report(f'{self.out} is built')
      return first
    progress = metrics.Progress(
      2 * len(text.sequences_NT), self.config.text.seq_len, label='index',
      every_s=20,
    )  # fmt: skip
    self.out.mkdir(parents=True, exist_ok=True)
    found = build_lib.build(
      *self.model, rows, text, batch=batch, mesh=self.mesh, poll=poll,
      progress=lambda done, _: progress.update(done, {}), state=state,
    )  # fmt: skip
    for member, one in zip(members, found, strict=True):
      index.write(self.folder(member), one)
    progress.close()
    kept.write_text(about)
    (self.out / 'partial.npz').unlink(missing_ok=True)
    return self.pages()

  def pages(self) -> pathlib.Path:
    """Writes the pages from indexes and labels -> the first one's path."""
    self.report(f'writing the pages of {len(self.members)} SAEs')
    entries = [
      pages.Entry(
        build_lib.name_of(member.path), self.index(member), member.metrics,
        logits.decoders(member.load()), self.labels(member),
      )
      for member in self.members
    ]  # fmt: skip
    pages.write(self.out / 'pages', entries, self.tokenizer.pieces)
    return self.out / 'pages' / 'index.html'

  def labels(self, member: release.Member) -> dict[int, dict]:
    """What `explain` wrote of it, as the pages show it; {} without."""
    path = self.folder(member) / _LABELS
    if not path.exists():
      return {}
    rows = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    value = lambda score: None if score is None else score['value']
    return {
      row['feature']: {
        'text': row['label'],
        'by': row['by'],
        'score': value(row['detection']),
        'control': value(row['shuffled']),
        'low': row['low_score'],
      }
      for row in rows
      if row['label'] is not None
    }

  def label_file(self, member: release.Member) -> pathlib.Path:
    """Where its labels are."""
    return self.folder(member) / _LABELS

  def named(self, member: release.Member) -> Callable[[int], str]:
    """feature -> its label, or the words that it fires on, for a report."""
    labels, one = self.labels(member), self.index(member)

    def name(feature: int) -> str:
      if feature in labels:
        return labels[feature]['text']
      words = self.tokenizer.pieces(pages.words(one, feature)[:4])
      return ' '.join(repr(word.replace('▁', ' ')) for word in words)

    return name


def spoken(pieces: Sequence[str]) -> str:
  """Pieces as a reader writes them."""
  return ' less '.join(repr(piece.replace('▁', ' ')) for piece in pieces)
