"""The graph of `why`: traced, its supernodes and heads measured, kept as files.

graph              the graph, with the text, the names of its SAEs and labels
graph_neuronpedia  the same as circuit-tracer and Neuronpedia read it
head               why an attention head attends, for a place
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from gemma_scope import files
from gemma_scope.microscope import inputs
from gemma_scope.microscope.circuits import (
  attention_scores,
  attribution_graph,
  graph_files,
  intervene,
  permutation_test,
  readout,
  supernodes,
)
from gemma_scope.microscope.circuits.replacement_model import Replacement
from gemma_scope.microscope.session import Session
from gemma_scope.release import Released


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is explained beside the logit; '' and None for nothing.

  Attributes:
    place: the score of an attention head (`inputs.head`).
    target: what is traced instead of the logit, as in --target.
    supernodes: as in --supernodes.
  """

  place: attention_scores.Place | None = None
  target: str = ''
  supernodes: str = ''


@dataclasses.dataclass(frozen=True)
class Opened:
  """What a graph is traced through, opened from the files that were named.

  Attributes:
    saes: a CLT, or one transcoder for each layer.
    subjects: these in the model.
    reading: of --target.
    supernodes: the saved graph of --supernodes.
  """

  wanted: Wanted
  saes: list[Released]
  subjects: list[intervene.Subject]
  reading: permutation_test.Reading | None
  supernodes: dict[str, Any] | None


def opened(session: Session, sae: Released, wanted: Wanted) -> Opened:
  """Opens what is wanted, so that it is refused before work is done."""
  saved = _supernodes(wanted)
  saes = _together(session, sae)
  subjects = [session.subject(member) for member in saes]
  config, reading = session.model[0].config, None
  if wanted.target:
    widths = lambda site: site.check(config).width(config)
    reading = inputs.target(wanted.target, subjects, widths)
  return Opened(wanted, saes, subjects, reading, saved)


def trace(
  session: Session, through: Opened, prompt: graph_files.Prompt
) -> dict[str, Any]:
  """The graph through an SAE and those of the other layers; see the head."""
  result, ids, wanted = {}, prompt.ids, through.wanted
  subjects, config = through.subjects, session.model[0].config
  traced = attribution_graph.trace(
    subjects, ids, prompt.logit, reading=through.reading
  )
  names = [session.named(member) for member in through.saes]
  named = lambda member, feature: names[member](feature)
  session.report(attribution_graph.report(traced, prompt.pieces, named))
  graph = attribution_graph.plain(traced) | {
    'text': prompt.text,
    'pieces': list(prompt.pieces),
    'logit': readout.logit_pieces(session.tokenizer, prompt.logit),
    'saes': [member.name for member in through.saes],
  }
  for node in graph['nodes']:
    if node['kind'] == 'feature':
      node['label'] = named(node['member'], node['feature'])
  if wanted.supernodes:
    _group(graph, through.supernodes, named, wanted.supernodes)
    supernodes.measure(graph, subjects, ids, prompt.logit)
    session.report(supernodes.report(graph))
  result['graph'] = graph
  model = graph_files.Model(
    session.config.lm.name,
    config.num_layers,
    [subject.width // len(subject.place.sites) for subject in subjects],
  )
  content = graph_files.plain(graph, prompt, model, 'graph', named)
  result['graph_neuronpedia'] = content
  if wanted.place is not None:
    score = attention_scores.decompose(Replacement(subjects, ids), wanted.place)
    comparison = attention_scores.compare(subjects, ids, score)
    session.report(attention_scores.report(score, comparison, named))
    result['head'] = attention_scores.plain(score) | comparison
  return result


def _supernodes(wanted: Wanted) -> dict[str, Any] | None:
  """The saved graph of --supernodes; None for similar features, or none."""
  path = wanted.supernodes
  if path and wanted.target:
    raise ValueError(
      '--supernodes measures effects on a logit, and --target traces something '
      'else; give one of the two.'
    )
  if path in ('', 'similar'):
    return None
  try:
    saved = files.read_json(pathlib.Path(path))
    if not saved.get('supernodes'):
      raise ValueError('it has none')
  except (OSError, ValueError) as error:
    raise ValueError(
      f'--supernodes={path!r} must be similar, or a graph.json with '
      f'supernodes ({str(error).rstrip(".")}).'
    ) from None
  return saved


def _group(graph, saved, named, path: str) -> None:
  """Sets the graph's supernodes: the saved ones, or similar features."""
  if saved is None:
    graph['supernodes'] = supernodes.named(graph, graph['similar'], named)
    return
  try:
    graph['supernodes'] = supernodes.carried_over(saved, graph)
  except ValueError as error:
    raise ValueError(f'--supernodes={path!r}: {error}.') from None


def _together(session: Session, sae: Released) -> list[Released]:
  """The SAEs of one graph: a CLT, or one transcoder for each layer."""
  indexed = [session.indexed(sae) for sae in session.saes]
  position = session.saes.index(sae)
  return [session.saes[i] for i in readout.together(indexed, position)]
