"""A resumed run must have the same config and data as when it started.

`refuse_changes` compares the saved description with the current one and names
the fields that differ.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any


class ChangedError(ValueError):
  """A resumed run differs from the run that made its folder."""


_ABSENT = object()


def _show(value: Any) -> str:
  if value is _ABSENT:
    return 'absent'
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'


def _plain(value: Any) -> Any:
  """As JSON gives it back, for a saved dict is compared with a live one."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


def _spell(value: Any) -> str:
  return json.dumps(value, sort_keys=True, default=repr)


def _walk(old: Any, new: Any, name: str):
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old | new):
      yield from _walk(
        old.get(key, _ABSENT),
        new.get(key, _ABSENT),
        f'{name}.{key}' if name else key,
      )
  # By spelling: True is not 1, and nan is nan.
  elif _spell(old) != _spell(new):
    yield name, old, new


def fingerprint_difference(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  ignore: Collection[str] = (),
) -> list[str]:
  """The fields that differ, as 'train.batch: was 64, is 128'.

  Nested dictionaries are compared field by field, other values as a whole. As
  in JSON, tuples equal lists. A name in `ignore` includes the fields below it.
  """
  skip = tuple(ignore)
  return [
    f'{name}: was {_show(was)}, is {_show(now)}'
    for name, was, now in _walk(_plain(old), _plain(new), '')
    if not any(name == s or name.startswith(s + '.') for s in skip)
  ]


def refuse_changes(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  ignore: Collection[str] = (),
  what: str = 'config',
):
  """Raises ChangedError, one sentence naming every field that differs."""
  differing = fingerprint_difference(old, new, ignore)
  if differing:
    raise ChangedError(
      f'This run was started with a different {what} '
      f'({"; ".join(differing)}); set it back, or choose another folder for a '
      'new run.'
    )
