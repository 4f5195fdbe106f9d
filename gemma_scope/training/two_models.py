"""Whether two models can be compared on the same tokens (lm.second).

Their activations stand side by side, row by row, so that both must read the
same ids and have sites of the same widths. Nothing of the weights is read here.
"""

from __future__ import annotations

import json

from ml_collections import ConfigDict

from gemma_scope import config as config_lib
from gemma_scope import specs
from gemma_scope.language_model import weights
from gemma_scope.text import prepare, tokenizers

Model = tuple[str, str]  # name, checkpoint


def check(config: ConfigDict) -> None:
  """Refuses a second model that cannot be compared with the first.

  Raises:
    ConfigError: its vocabulary, layers or widths are others.
    CheckpointNotFound: there is no such checkpoint.
    ValueError: its tokenizer gives other ids.
  """
  second = specs.second_model(config)
  if second is None:
    return
  first = config.lm.name, config.lm.checkpoint
  for model in (first, second):
    weights.check_there(*model)
  was, now = (weights.read_config(*model) for model in (first, second))
  facts = [
    ('tokens in its vocabulary', was.vocab_size, now.vocab_size),
    ('layers', was.num_layers, now.num_layers),
  ]
  if was.num_layers == now.num_layers:
    facts += [
      (f'dimensions at {site.of_first()}', site.width(was), site.width(now))
      for site in specs.site_list(config)
      if site.second
    ]
  for what, wanted, found in facts:
    if wanted != found:
      raise config_lib.ConfigError(
        f'The second model {_named(second)} has {found:,} {what}, and '
        f'{_named(first)} has {wanted:,}: two models are compared where these '
        'are the same.'
      )
  path = config.lm.tokenizer or weights.tokenizer(*first)
  prepare.check_tokenizer(tokenizers.Tokenizer(path), *second)
  try:
    other = weights.tokenizer(*second)
  except weights.CheckpointNotFound:
    return  # nothing lies beside it that could differ
  if difference := _difference(str(path), str(other)):
    raise ValueError(
      f'The tokenizer of the second model {_named(second)} gives other ids: '
      f'{difference} of {_named(first)}. Two models are compared on the same '
      'tokens.'
    )


def _named(model: Model) -> str:
  """'gemma3-270m', or 'gemma3-270m (/data/it)'."""
  name, checkpoint = model
  return f'{name} ({checkpoint})' if checkpoint else name


def _difference(first: str, second: str) -> str:
  """The first id at which two tokenizers differ; '' where none does."""
  was, now = tokenizers.Tokenizer(first), tokenizers.Tokenizer(second)
  if was.sha256 == now.sha256:
    return ''
  if was.vocab_size != now.vocab_size:
    return f'it has {now.vocab_size:,} pieces, not the {was.vocab_size:,}'
  pieces = [each.pieces(range(each.vocab_size)) for each in (was, now)]
  for i, (wanted, found) in enumerate(zip(*pieces, strict=True)):
    if wanted != found:
      return f'{i} is {json.dumps(found)}, not the {json.dumps(wanted)}'
  for role in ('pad_id', 'bos_id', 'eos_id'):
    if getattr(was, role) != getattr(now, role):
      return f'its {role} is {getattr(now, role)}, not the {getattr(was, role)}'
  return ''
