"""Every field of a config: its type, its bounds, its choices.

configs/tiny.py says what each field is for; this table says which values it
may have. What depends on several fields at once is in `config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_scope import sites, specs

ARCHITECTURES = {
  # architecture -> the penalties it can be trained by; 'target_l0' asks every
  # architecture for an L0, each in its own way (see `objectives`)
  'jumprelu': (
    'target_l0',
    'l0',
    'quadratic_l0',
    'quadratic_frequency',
    'tanh',
  ),
  'topk': ('target_l0',),
  'batch_topk': ('target_l0',),
  'gated': ('target_l0', 'l1'),
  'relu': ('target_l0', 'l1', 'tanh'),
}
PENALTIES = tuple(dict.fromkeys(p for ps in ARCHITECTURES.values() for p in ps))
DTYPES = ('float32', 'bfloat16')
MOST = 2**31 - 1  # counters on the devices are int32


@dataclasses.dataclass(frozen=True)
class Field:
  """What one field may hold.

  Attributes:
    type: of the value, or of the items of a list.
    low, high: bounds, included; `above`: a bound that is not, `below` likewise.
    choices: the words allowed; () for any.
    items: whether the value is a list, without repeats.
    empty: whether that list may be empty.
    layered: whether '/LAYER' may follow a word, as in 'mlp_out/9'.
  """

  type: type
  low: float = -math.inf
  high: float = math.inf
  above: float = -math.inf
  below: float = math.inf
  choices: tuple[str, ...] = ()
  items: bool = False
  empty: bool = False
  layered: bool = False

  def problems(self, name: str, value: Any) -> Iterator[str]:
    """A sentence for each thing that is wrong with the value of `name`."""
    if not self.items:
      yield from self._problems_of_one(name, value)
      return
    if isinstance(value, list | tuple) and not value and self.empty:
      return
    if not isinstance(value, list | tuple) or not value:
      yield f'{name} must be a list with at least one item; found {value!r}.'
      return
    sentences = [
      sentence
      for item in value
      for sentence in self._problems_of_one(name, item)
    ]
    yield from sentences
    if not sentences and len(set(value)) != len(value):
      yield f'{name} must be a list without repeats; found {_show(value)}.'

  def _problems_of_one(self, name: str, value: Any) -> Iterator[str]:
    if not _is(value, self.type):
      yield f'{name} must be {_NAMES[self.type]}; found {_show(value)}.'
    elif self.choices:
      word, slash, layer = value.partition('/')
      layered = self.layered and bool(slash) and layer.isdecimal()
      if (word if layered else value) not in self.choices:
        yield (
          f'{name} must be {_either(self.choices)}; found {value!r}.'
          f'{suggestion(value, self.choices)}'
        )
    elif self.type in (int, float):
      in_range = (
        self.low <= value <= self.high and self.above < value < self.below
      )
      if not in_range:
        yield f'{name} must be {self._range(value)}; found {_show(value)}.'

  def _range(self, value: float) -> str:
    low = f'at least {self.low:g}' if self.low > -math.inf else ''
    low = f'above {self.above:g}' if self.above > -math.inf else low
    # The bound of every counter is named only to those who pass it.
    show_high = value > self.high or self.high < MOST
    high = (
      f'at most {self.high:,}' if show_high and self.high < math.inf else ''
    )
    high = f'below {self.below:g}' if self.below < math.inf else high
    return ' and '.join(filter(None, (low, high))) or 'a finite number'


_NAMES = {
  int: 'a whole number',
  float: 'a finite number',
  bool: 'True or False',
  str: 'text',
}


def _is(value: Any, type_: type) -> bool:
  if type_ is float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
  return type(value) is type_


def _show(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'


def _either(words: Iterable[str]) -> str:
  *first_words, last = map(repr, words)
  return f'{", ".join(first_words)} or {last}' if first_words else last


def suggestion(word: Any, words: Iterable[str]) -> str:
  """' Did you mean ...?', or '' where nothing is near."""
  similar = nearest(word, words)
  return f' Did you mean {similar!r}?' if similar else ''


def nearest(word: Any, words: Iterable[str]) -> str | None:
  """The word that is spelled most alike, if any is."""
  matches = difflib.get_close_matches(str(word), list(words), 1)
  return matches[0] if matches else None


def _whole(low: int = 0, high: int = MOST, **more) -> Field:
  return Field(int, low, high, **more)


def _number(low: float = 0.0, **more) -> Field:
  return Field(float, low, **more)


def _positive(**more) -> Field:
  return Field(float, above=0.0, **more)


def _choice(*choices: str, **more) -> Field:
  return Field(str, choices=choices, **more)


_TEXT, _SWITCH = Field(str), Field(bool)

FIELDS: Mapping[str, Field] = {
  'seed': _whole(high=2**32 - 1),
  'lm.name': _TEXT,
  'lm.checkpoint': _TEXT,
  'lm.tokenizer': _TEXT,
  'lm.dtype': _choice(*DTYPES),
  'lm.second.name': _TEXT,
  'lm.second.checkpoint': _TEXT,
  'text.source': _TEXT,
  'text.column': _TEXT,
  'text.store': _TEXT,
  'text.seq_len': _whole(2),
  'mesh.sae': _whole(-1),
  'mesh.data': _whole(-1),
  'mesh.latent': _whole(-1),
  'activations.store': _TEXT,
  'activations.chunk_rows': _whole(1),
  'activations.lm_batch': _whole(1),
  'activations.dtype': _choice(*DTYPES),
  'activations.centre': _choice('none', 'mean', 'geometric_median'),
  'activations.scale': _choice('rms', 'centred_rms', 'sqrt_d'),
  'activations.max_norm': _number(),
  'activations.memory': _choice('auto', 'device', 'host'),
  'activations.ahead': _choice('auto', 'on', 'off'),
  'collection.layers': _whole(items=True),
  'collection.sites': _choice(*sites.KINDS, items=True, layered=True),
  'collection.widths': _whole(1, items=True),
  'collection.type': _choice(*sites.TYPES),
  'collection.skip': _SWITCH,
  'collection.architectures': _choice(
    *(p + a for p in ('', specs.MATRYOSHKA) for a in ARCHITECTURES), items=True
  ),
  'collection.nulls': _choice(*specs.NULLS, items=True, empty=True),
  'collection.penalty': _choice(*PENALTIES),
  'collection.sparsity': _positive(items=True),
  'collection.seeds': _whole(high=2**32 - 1, items=True),
  'sae.bandwidth': _positive(),
  'sae.initial_threshold': _number(),
  'sae.log_threshold': _SWITCH,
  'sae.ste_to_input': _SWITCH,
  'sae.pre_encoder_bias': _SWITCH,
  'sae.unit_decoder': _SWITCH,
  'sae.matryoshka': Field(float, above=0.0, high=1, items=True),
  'sae.matmul_dtype': _choice(*DTYPES),
  'objective.strength': _number(),
  'objective.prefactor': _number(),
  'objective.p0': _positive(),
  'objective.tanh_scale': _positive(),
  'objective.frequency': _number(),
  'objective.frequency_limit': _number(high=1),
  'objective.pre_act': _number(),
  'objective.auxk': _number(),
  'objective.auxk_latents': _whole(),
  'objective.active_set': _SWITCH,
  'initialise.release': _TEXT,
  'initialise.layer': _whole(-1),
  'initialise.whitening': _number(high=1),
  'end_to_end.beta': _number(),
  'end_to_end.sequences': _whole(1),
  'train.steps': _whole(1),
  'train.batch': _whole(1),
  'train.learning_rate': _positive(),
  'train.warm_up': _whole(),
  'train.decay': _whole(),
  'train.sparsity_warm_up': _whole(),
  'train.initial_l0': _number(),
  'train.l0_steps': _whole(),
  'train.threshold_rate': _number(),
  'train.b1': _number(below=1.0),
  'train.b2': _number(below=1.0),
  'train.eps': _positive(),
  'train.clip': _number(),
  'train.theta_decay': _number(below=1.0),
  'train.adaptive_rate': _number(),
  'train.dead_after': _whole(1),
  'train.resample_every': _whole(),
  'train.active_limit': _whole(),
  'train.meet_l0': _SWITCH,
  'train.refit_decoders': _SWITCH,
  'train.closing_batches': _whole(1),
  'checkpoint.every': _whole(1),
  'checkpoint.keep': _whole(1),
  'metrics.every': _whole(1),
  'metrics.tensorboard': _SWITCH,
  'metrics.wandb_project': _TEXT,
  'evaluation.sequences': _whole(),
  'evaluation.batch': _whole(1),
  'evaluation.loss_every': _whole(1),
}


def flat(config: Any, prefix: str = '') -> dict[str, Any]:
  """{'train.steps': 800, ...} of a config's nested sections."""
  fields = {}
  for name, value in config.items():
    if hasattr(value, 'items'):
      fields |= flat(value, f'{prefix}{name}.')
    else:
      fields[f'{prefix}{name}'] = value
  return fields


def problems(config: Any) -> dict[str, list[str]]:
  """{field: sentences}: what is wrong with the fields one by one.

  A config has every field of `FIELDS` and no other.
  """
  values = flat(config)
  by_field = {
    name: [f'There is no field {name!r}.{suggestion(name, FIELDS)}']
    for name in values
    if name not in FIELDS
  }
  for name, field in FIELDS.items():
    if name not in values:
      by_field[name] = [
        f'The config has no {name}; configs/tiny.py has them all.'
      ]
    elif wrong := list(field.problems(name, values[name])):
      by_field[name] = wrong
  return by_field
