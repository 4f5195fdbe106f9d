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
  first_config, second_config = (
    weights.read_config(*model) for model in (first, second)
  )
  facts = [
    (
      'tokens in its vocabulary',
      first_config.vocab_size,
      second_config.vocab_size,
    ),
    ('layers', first_config.num_layers, second_config.num_layers),
  ]
  if first_config.num_layers == second_config.num_layers:
    facts += [
      (
        f'dimensions at {site.of_first()}',
        site.width(first_config),
        site.width(second_config),
      )
      for site in specs.site_list(config)
      if site.second
    ]
  for quantity, first_value, second_value in facts:
    if first_value != second_value:
      raise config_lib.ConfigError(
        f'The second model {_named(second)} has {second_value:,} {quantity}, '
        f'and {_named(first)} has {first_value:,}: two models are compared '
        'where these are the same.'
      )
  path = config.lm.tokenizer or weights.tokenizer(*first)
  prepare.check_tokenizer(tokenizers.Tokenizer(path), *second)
  try:
    second_path = weights.tokenizer(*second)
  except weights.CheckpointNotFound:
    return  # nothing lies beside it that could differ
  if difference := _difference(str(path), str(second_path)):
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
  first_tokenizer, second_tokenizer = (
    tokenizers.Tokenizer(first),
    tokenizers.Tokenizer(second),
  )
  if first_tokenizer.sha256 == second_tokenizer.sha256:
    return ''
  if first_tokenizer.vocab_size != second_tokenizer.vocab_size:
    return (
      f'it has {second_tokenizer.vocab_size:,} pieces, not the '
      f'{first_tokenizer.vocab_size:,}'
    )
  pieces = [
    tokenizer.pieces(range(tokenizer.vocab_size))
    for tokenizer in (first_tokenizer, second_tokenizer)
  ]
  for i, (first_piece, second_piece) in enumerate(zip(*pieces, strict=True)):
    if first_piece != second_piece:
      return (
        f'{i} is {json.dumps(second_piece)}, not the {json.dumps(first_piece)}'
      )
  for role in ('pad_id', 'bos_id', 'eos_id'):
    if getattr(first_tokenizer, role) != getattr(second_tokenizer, role):
      return (
        f'its {role} is {getattr(second_tokenizer, role)}, not the '
        f'{getattr(first_tokenizer, role)}'
      )
  return ''
