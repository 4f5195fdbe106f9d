"""Access to a run's model, text and SAEs, and to the microscope's files.

  <out>/members.json         the SAEs that were indexed, in page order
  <out>/indexes/<name>/      one index for each SAE (`index`)
  <out>/labels/<name>.jsonl  labels and scores from `explain`
  <out>/effects/<name>.json  causal cards from `effects`
  <out>/pages/               the dashboards

The config is the run's own, or one that names the model and text of published
SAEs. Everything is opened on first use. Indexes and labels store the digest of
the SAE's parameters: an index of other parameters raises an error, and labels
of other parameters are ignored.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import files, release
from gemma_scope import mesh as mesh_lib
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import weights
from gemma_scope.microscope.autointerp import label_store
from gemma_scope.microscope.autointerp import labels as labels_lib
from gemma_scope.microscope.circuits import (
  card_results,
  effects,
  intervene,
  readout,
)
from gemma_scope.microscope.dashboard import pages
from gemma_scope.microscope.index import build as build_lib
from gemma_scope.microscope.index import store as store_lib
from gemma_scope.microscope.index.store import Index, Indexed
from gemma_scope.release import paths as paths_lib
from gemma_scope.release.formats import model_names, published
from gemma_scope.runtime import progress as progress_lib
from gemma_scope.runtime import remote
from gemma_scope.text import prepare, tokenizers
from gemma_scope.training import setup

_MEMBERS = 'members.json'
_ACTIVE = 512  # latents of a token that are compared with their maximum


class Firing(NamedTuple):
  """A latent that fires on a token.

  Attributes:
    feature: its number.
    value: f, in the units of the activation.
    share: of its largest value on the index's text.
    label: or, without one that predicts where it fires, the tokens that it
      fires on most.
  """

  feature: int
  value: float
  share: float
  label: str


class Session:
  """A run's folder, and the folder of its microscope.

  Args:
    workdir: the run's folder. It contains config.json and release/, unless
      `config` and `paths` replace them.
    out: the microscope's folder; by default <workdir>/microscope.
    config: by default the run's config.
    paths: releases or single SAEs, separated by commas. If empty: the SAEs that
      were indexed, or, before the first build, the SAEs of the run.
    report: called with each line of output.
    site: of a params.npz without a card (`published.described`).
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    out: pathlib.Path | None = None,
    config: ConfigDict | None = None,
    paths: str = '',
    report: Callable[[str], None] = print,
    site: str = '',
  ):
    self.workdir = pathlib.Path(workdir)
    self.out = out or self.workdir / 'microscope'
    self._given_paths, self._config, self.report = paths, config, report
    self._site = site or (self._built or {}).get('site', '')
    self._indexes: dict[str, tuple[Any, Index]] = {}  # by name, with a stamp

  @functools.cached_property
  def config(self) -> ConfigDict:
    """The given config or the run's; ValueError if there is none."""
    if self._config is not None:
      return self._config
    path = self.workdir / 'config.json'
    if not path.exists():
      raise ValueError(
        f'{remote.shown(self.workdir)} has no config.json. Give the folder of '
        'a run, or use --config to name the model and the text.'
      )
    return config_lib.read(path)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The device mesh of the config."""
    return mesh_lib.make(self.config.mesh)

  @functools.cached_property
  def model(self) -> tuple[lm.Gemma, lm.Params]:
    """The language model and its parameters."""
    c = self.config.lm
    return weights.load(c.name, c.checkpoint, dtype=c.dtype, mesh=self.mesh)

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The language model's tokenizer."""
    c = self.config.lm
    return tokenizers.Tokenizer(
      c.tokenizer or weights.tokenizer(c.name, c.checkpoint)
    )

  def text(self, sequences: int) -> build_lib.Text:
    """Sequences of the run's training text."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer, store = prepare.open_text(self.config, self.workdir, self.report)
    return build_lib.spread(
      store,
      self.config.text.seq_len,
      sequences,
      setup.special(tokenizer, store).keep,
      tokenizer.eos_id,
    )

  @property
  def _built(self) -> dict[str, Any] | None:
    """The contents of members.json; None before the first build."""
    path = self.out / _MEMBERS
    return files.read_json(path) if path.exists() else None

  @functools.cached_property
  def _paths(self) -> list[str]:
    """Paths of the SAEs; local ones are relative to `workdir`.

    So they stay valid when the folder is moved.
    """
    if not self._given_paths and self._built:
      return self._built['saes']
    paths = self._given_paths or str(self.workdir / 'release')
    return [
      os.path.relpath(path, self.workdir) if os.path.exists(path) else path
      for path in paths.split(',')
    ]

  @functools.cached_property
  def saes(self) -> list[release.Released]:
    """The SAEs of `paths`, or else those that were indexed, in page order."""
    opened, model = [], self.config.lm.name if self._site else ''
    about = published.described(self._site, model)
    for path in self._paths:
      local_path = self.workdir / path
      path = os.path.abspath(local_path) if local_path.exists() else path
      for sae in published.open_all(path, about=about):
        opened.append((paths_lib.name_of(sae.path), path, sae))
    names = [name for name, _, _ in opened]
    words = paths_lib.told_apart([path for _, path, _ in opened])
    saes = [
      dataclasses.replace(
        sae, name=f'{word}/{name}' if names.count(name) > 1 else name
      )
      for word, (name, _, sae) in zip(words, opened, strict=True)
    ]
    if len({sae.name for sae in saes}) < len(saes):
      raise ValueError('--release names the same SAE twice.')
    cards = [sae.card for sae in saes]
    if note := model_names.note_of_others(cards, self.config.lm.name):
      self.report(note)
    return saes

  def find(self, name: str) -> release.Released:
    """The SAE with this name, or the only one whose name contains it."""
    matches = [sae for sae in self.saes if name in sae.name]
    matches = [sae for sae in matches if sae.name == name] or matches
    if len(matches) != 1:
      shown = [sae.name for sae in matches or self.saes]
      raise ValueError(
        f'--sae={name!r} must match one SAE but matches {len(matches)}; choose '
        f'from {", ".join(shown[:8])}{", ..." if len(shown) > 8 else ""}.'
      )
    return matches[0]

  def index(self, sae: release.Released) -> Index:
    """The SAE's index; ValueError if it has not been built.

    Each index is read and hashed once, unless another build replaces it.
    """
    folder = self.out / 'indexes' / sae.name
    written = (folder / 'index.json').stat() if folder.exists() else None
    stamp = written and (written.st_ino, written.st_mtime_ns)
    if sae.name not in self._indexes or self._indexes[sae.name][0] != stamp:
      self._indexes[sae.name] = stamp, store_lib.read(folder)
    return self._indexes[sae.name][1]

  def indexed(self, sae: release.Released) -> Indexed:
    """The SAE with its index and labels; ValueError if it has no index."""
    index, path = self.index(sae), self.effects_path(sae)
    cards = card_results.read(path, index.meta['sae_sha256'])
    return Indexed(sae, index, self.labels(sae), cards)

  def effects_path(self, sae: release.Released) -> pathlib.Path:
    """The files of its causal cards, without their endings."""
    return self.out / 'effects' / sae.name

  def subject(self, sae: release.Released) -> intervene.Subject:
    """The SAE in its model; strengths are in units of the index's maxima."""
    indexed, t = self.indexed(sae), self.tokenizer
    special_ids = t.pad_id, t.bos_id, t.eos_id
    return intervene.subject(
      self.model, indexed.checked, indexed.index.max_F, special_ids, self.mesh
    )

  def read(
    self, sae: release.Released, text: str, most: int = 8
  ) -> list[tuple[str, list[Firing]]]:
    """The tokens of a text, BOS first, each with the latents that fire on it.

    Args:
      sae: an element of `saes`, such as `find` returns; must be indexed.
      text: the prompt.
      most: maximum number of latents per token, those first whose value is the
        largest share of their own maximum: values of different latents do not
        compare, and the largest are of latents that fire everywhere.
    """
    ids = readout.with_bos(self.tokenizer, text)
    max_F = np.maximum(self.index(sae).max_F, 1e-12)
    reading = effects.read(self.subject(sae), ids, min(len(max_F), _ACTIVE))
    label = self.named(sae)

    def strongest(feature_K, value_K):
      order_K = np.argsort(-value_K / max_F[feature_K], kind='stable')
      for k in order_K[:most]:
        feature, value = int(feature_K[k]), float(value_K[k])
        if value > 0:
          share = value / float(max_F[feature])
          yield Firing(feature, value, share, label(feature))

    return [
      (
        tokenizers.readable(piece),
        list(strongest(feature_K, value_K)) if counts else [],
      )
      for piece, feature_K, value_K, counts in zip(
        self.tokenizer.pieces(ids),
        reading.feature_TK,
        reading.value_TK,
        reading.counts_T,
        strict=True,
      )
    ]

  def build(
    self,
    sequences: int,
    batch: int,
    poll: Callable[[], None],
    label: bool = True,
    outliers: bool = False,
  ) -> pathlib.Path:
    """Indexes all SAEs in one pass, labels them and writes the pages.

    If `poll` stops it, the next call continues from the files on disk. If these
    SAEs are already indexed on this text, nothing is done.

    Args:
      sequences: number of text sequences to index.
      batch: sequences per forward pass.
      poll: called before each batch; may raise to stop.
      label: whether to label, by rule, the features that fire.
      outliers: whether to include outlier tokens.

    Returns:
      The path of the first page.
    """
    devices = self.mesh.shape['data']
    if batch % devices:
      raise ValueError(
        f'--batch={batch} sequences cannot be split evenly over the {devices} '
        "devices of the mesh's data axis."
      )
    text = self.text(sequences)
    saes = [sae.loaded() for sae in self.saes]
    state = build_lib.State(
      self.out / 'partial.npz', text, saes, outliers=outliers
    )
    first = self.out / 'pages' / 'index.html'
    built = {'site': ''} | (self._built or {})
    about = {'saes': self._paths, 'key': state.key, 'site': self._site}
    if first.exists() and about.items() <= built.items():
      self.report(f'{self.out} is already built')
      return first
    build_lib.check_room(self.out, saes)
    self.out.mkdir(parents=True, exist_ok=True)
    with progress_lib.Progress(
      2 * len(text.sequences_NT), self.config.text.seq_len, label='index'
    ) as progress:
      progress.say('compiling')

      def show(done: int, _: int) -> None:
        progress.say('')
        progress.update(done)

      settings = build_lib.How(batch, self.mesh, show, poll, state, outliers)
      built = build_lib.build(*self.model, saes, text, settings)
      for number, (sae, index) in enumerate(zip(saes, built, strict=True), 1):
        progress.say(f'logit lenses: {number} of {len(saes)} are made')
        store_lib.write(self.out / 'indexes' / sae.name, index)
    if label:
      self._label_by_rule(poll)
    remote.delete(self.out / _MEMBERS)  # until the pages are written
    about['date'] = datetime.date.today().isoformat()
    first = self._write_pages(about['date'])
    files.write_json(self.out / _MEMBERS, about)
    remote.delete(self.out / 'partial.npz')
    return first

  def _label_by_rule(self, poll: Callable[[], None]) -> None:
    """Labels the features that fire, of every SAE that has no labels yet."""
    for sae in progress_lib.track(self.saes, 'labels by rule'):
      poll()
      if self._label_rows(sae):
        continue
      index = self.index(sae)
      alive = [int(j) for j in np.flatnonzero(index.fired_F)]
      rows = labels_lib.explain(index, alive, self.tokenizer.pieces)
      self.keep_labels(sae, rows)
    rows = {s.name: list(self._label_rows(s).values()) for s in self.saes}
    for line in label_store.clearest(rows):
      self.report(line)

  def pages(self) -> pathlib.Path:
    """Rewrites the pages with the current labels; returns the first page."""
    self.check_built()
    return self._write_pages((self._built or {}).get('date', ''))

  def check_built(self) -> None:
    """Raises ValueError unless the pages exist and show these SAEs."""
    built = self._built
    if built is None or not (self.out / 'pages' / 'index.html').exists():
      raise ValueError(f'{self.out} has no dashboards; run build first.')
    if built['saes'] != self._paths:
      raise ValueError(
        f'{self.out} was built for {", ".join(built["saes"])}, and --release '
        'names other SAEs. Omit --release, run build, or choose another --out.'
      )

  def _write_pages(self, date: str) -> pathlib.Path:
    pages.write(
      self.out / 'pages',
      map(self.indexed, progress_lib.track(self.saes, 'pages')),
      self.tokenizer.pieces,
      f'Sparse autoencoders of {self.config.lm.name}',
      date,
      weights.quantisation(self.config.lm.name, self.config.lm.checkpoint),
    )
    return self.out / 'pages' / 'index.html'

  def _label_rows(self, sae: release.Released) -> dict[int, dict[str, Any]]:
    return label_store.read(*self._label_file(sae))

  def keep_labels(
    self, sae: release.Released, rows: Sequence[dict[str, Any]]
  ) -> pathlib.Path:
    """Adds or replaces rows from `explain`; returns the path of the file."""
    label_store.add(*self._label_file(sae), rows)
    return self._label_file(sae)[0]

  def _label_file(self, sae: release.Released) -> tuple[pathlib.Path, str]:
    """The file of an SAE's labels, and the hash of the SAE that they are of."""
    path = self.out / 'labels' / f'{sae.name}.jsonl'
    return path, self.index(sae).meta['sae_sha256']

  def labels(self, sae: release.Released) -> dict[int, dict[str, Any]]:
    """Maps each labelled feature to its label and scores, for the pages."""
    return label_store.shown(self._label_rows(sae))

  def named(self, sae: release.Released) -> Callable[[int], str]:
    """A function that names a feature.

    By its label, or by its top tokens where the label does not predict where it
    fires.
    """
    labels, index = self.labels(sae), self.index(sae)

    def name(feature: int) -> str:
      if feature in labels and not labels[feature]['low']:
        return labels[feature]['text']
      words = self.tokenizer.pieces(pages.words(index, feature)[:4])
      return ' '.join(repr(tokenizers.readable(word)) for word in words)

    return name


def spoken(pieces: Sequence[str]) -> str:
  """A logit or logit difference as text, such as "' yes' - ' no'"."""
  return ' - '.join(repr(tokenizers.readable(piece)) for piece in pieces)
