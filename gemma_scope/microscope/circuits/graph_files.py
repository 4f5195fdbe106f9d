"""Graphs as files of circuit-tracer and Neuronpedia, written and read.

One JSON object with `metadata`, `qParams`, `nodes` and `links` serves both:

  node_id        <layer>_<feature>_<position>; E_<token>_<position> of an
                 embedding; <layer>_-1_<position> of an error; the logit has
                 layer num_layers + 1
  feature        of a feature: (l + i) (l + i + 1) / 2 + i for feature i of
                 layer l
  feature_type   cross layer transcoder, mlp reconstruction error, embedding or
                 logit
  influence      the share of all influence that nodes at least as influential
                 have together, so that a threshold of it prunes the graph
  supernodes     of qParams: a name, and then the node_ids of its nodes

These files have no nodes for biases: edges from biases are left out.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import gemma_scope
from gemma_scope import files
from gemma_scope.text import tokenizers

_TYPES = {
  'feature': 'cross layer transcoder',
  'error': 'mlp reconstruction error',
  'embedding': 'embedding',
  'logit': 'logit',
}
_KINDS = {name: kind for kind, name in _TYPES.items()}
_MOST_BYTES = 1 << 30


class Prompt(NamedTuple):
  """The text of a graph.

  Attributes:
    text: without BOS.
    ids, pieces: its tokens, BOS first, as numbers and as text.
    logit: tokens (a, b) of the logit difference; b may be None.
    probability: of token a after the text.
  """

  text: str
  ids: Sequence[int]
  pieces: Sequence[str]
  logit: tuple[int, int | None]
  probability: float = 0.0


class Model(NamedTuple):
  """The model of a graph.

  Attributes:
    name: Neuronpedia's, such as gemma-3-270m.
    layers: number of layers.
    widths: features in a layer of each SAE of the graph.
    source_set: Neuronpedia's name of the SAEs, or ''.
  """

  name: str
  layers: int
  widths: Sequence[int]
  source_set: str = ''


def plain(
  graph: Mapping[str, Any],
  prompt: Prompt,
  model: Model,
  slug: str,
  named: Callable[[int, int], str] = lambda member, feature: '',
) -> dict[str, Any]:
  """The file's content.

  Args:
    graph: `attribution_graph.plain`.
    prompt, model: what the graph is of.
    slug: name of the graph, for its address.
    named: label of (member, feature).
  """
  kept = [n for n, node in enumerate(graph['nodes']) if node['kind'] != 'bias']
  reached = _cumulative(graph)
  nodes = [
    _node(graph['nodes'][n], reached.get(n), prompt, model, named) for n in kept
  ]
  ids = {n: node['node_id'] for n, node in zip(kept, nodes, strict=True)}
  metadata = {
    'slug': slug,
    'scan': model.name,
    'transcoder_list': [],
    'prompt_tokens': [tokenizers.readable(piece) for piece in prompt.pieces],
    'prompt': prompt.text,
    'node_threshold': 0.8,
    'schema_version': 1,
    'info': {
      'generator': {'name': 'gemma_scope', 'version': gemma_scope.__version__},
      'description': str(graph.get('verdict', '')),
    },
  }
  if model.source_set:
    metadata['feature_details'] = {'neuronpedia_source_set': model.source_set}
  return {
    'metadata': metadata,
    'qParams': {
      'pinnedIds': [],
      'supernodes': [
        [group['name'], *(ids[n] for n in group['nodes'] if n in ids)]
        for group in graph.get('supernodes', [])
      ],
      'linkType': 'both', 'clickedId': '', 'sg_pos': '',
    },
    'nodes': nodes,
    'links': [
      {'source': ids[a], 'target': ids[b], 'weight': weight}
      for a, b, weight, *_ in graph['edges']
      if a in ids and b in ids
    ],
  }  # fmt: skip


def _cumulative(graph: Mapping[str, Any]) -> dict[int, float]:
  """The `influence` of each node but the logit."""
  nodes = [n for n, node in enumerate(graph['nodes']) if 'influence' in node]
  influence = np.array([graph['nodes'][n]['influence'] for n in nodes])
  order = np.argsort(-influence, kind='stable')
  total = np.cumsum(influence[order]) / max(influence.sum(), 1e-30)
  return {nodes[i]: float(share) for i, share in zip(order, total, strict=True)}


def _node(node, influence, prompt: Prompt, model: Model, named):
  kind, last = node['kind'], len(prompt.ids) - 1
  position = node.get('position', last)
  fields = {
    'feature_type': _TYPES[kind],
    'ctx_idx': position,
    'token_prob': 0.0,
    'is_target_logit': False,
    'run_idx': 0,
    'reverse_ctx_idx': 0,
    'clerp': '',
    'influence': influence,
    'activation': None,
  }
  if kind == 'embedding':
    token = int(prompt.ids[position])
    return fields | {
      'node_id': f'E_{token}_{position}', 'feature': position, 'layer': 'E',
      'jsNodeId': f'E_{token}-{position}',
    }  # fmt: skip
  if kind == 'logit':
    layer, token = model.layers + 1, prompt.logit[0]
    return fields | {
      'node_id': f'{layer}_{token}_{last}', 'feature': token,
      'layer': str(layer), 'jsNodeId': f'L_{token}-{last}',
      'token_prob': prompt.probability, 'is_target_logit': True,
      'clerp': 'Output' if prompt.logit[1] is None else 'Output difference',
    }  # fmt: skip
  layer = node['layer']
  if kind == 'error':
    return fields | {
      'node_id': f'{layer}_-1_{position}', 'feature': -1, 'layer': str(layer),
      'jsNodeId': f'{layer}_-1-{position}',
    }  # fmt: skip
  i = node['feature'] % model.widths[node['member']]
  return fields | {
    'node_id': f'{layer}_{i}_{position}',
    'feature': (layer + i) * (layer + i + 1) // 2 + i,
    'layer': str(layer),
    'jsNodeId': f'{layer}_{i}-0',
    'clerp': named(node['member'], node['feature']),
    'activation': node['value'],
  }


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
  """Writes `plain`; the file is never partial."""
  files.write_json(pathlib.Path(path), dict(content))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """A graph of circuit-tracer or Neuronpedia in the form of `plain` graphs.

  Returns:
    'prompt', 'pieces', 'model', 'supernodes', 'nodes' and 'edges'. Nodes have
    the fields of `attribution_graph.plain` as far as the file has them
    ('member' is 0); 'reached' is the file's influence. Edges are [source,
    target, weight] by index.

  Raises:
    ValueError: the file is not such a graph.
  """
  try:
    with files.open_plain(path, _MOST_BYTES) as (file, _):
      content = json.loads(file.read())
    metadata = content['metadata']
    index, nodes = {}, []
    for number, node in enumerate(content['nodes']):
      index[node['node_id']] = number
      nodes.append(_read_node(node))
    edges = [
      [index[link['source']], index[link['target']], float(link['weight'])]
      for link in content['links']
    ]
    return {
      'prompt': str(metadata['prompt']),
      'pieces': list(map(str, metadata['prompt_tokens'])),
      'model': str(metadata['scan']),
      'supernodes': [
        {'name': str(name), 'nodes': [index[i] for i in ids if i in index]}
        for name, *ids in content.get('qParams', {}).get('supernodes', [])
      ],
      'nodes': nodes,
      'edges': edges,
    }
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f'{path} is not a graph of circuit-tracer or Neuronpedia '
      f'({type(error).__name__}: {str(error)[:100]}).'
    ) from None


def _read_node(node: Mapping[str, Any]) -> dict[str, Any]:
  kind = _KINDS.get(node['feature_type'], str(node['feature_type']))
  fields = {
    'kind': kind,
    'position': int(node['ctx_idx']),
    'label': str(node.get('clerp') or ''),
  }
  if node.get('influence') is not None:
    fields['reached'] = float(node['influence'])
  layer, middle, _ = node['node_id'].split('_')
  if kind in ('feature', 'error'):
    fields |= {'layer': int(layer), 'member': 0}
  if kind == 'feature':
    fields |= {'feature': int(middle), 'value': node.get('activation')}
  if kind == 'logit':
    fields['token'] = int(middle)
  return fields
