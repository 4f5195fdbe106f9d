"""Faults that are injected on purpose, and what came of them, in figures.

A fault is a generator: each trial injects it once and yields a `Trial`.

  survived   the result is the one that was wanted, bit for bit
  refused    one sentence said what is wrong, and nothing wrong was used
  wrong      something else was used, and nobody was told
  broken     a traceback, a hang, or a result that was lost

The tests run each fault a few times; launch/faults.py runs it in full.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

OUTCOMES = ('survived', 'refused', 'wrong', 'broken')


@dataclasses.dataclass(frozen=True)
class Trial:
  """One injected fault.

  Attributes:
    outcome: one of `OUTCOMES`.
    where: the phase, file or input it was injected into.
    detail: what was said or found, for an outcome that needs an explanation.
    seconds: a delay that the fault measures, such as from a signal to the end
      of the process; None where there is none.
  """

  outcome: str
  where: str = ''
  detail: str = ''
  seconds: float | None = None

  def __post_init__(self):
    if self.outcome not in OUTCOMES:
      raise ValueError(f'An outcome is one of {OUTCOMES}: {self.outcome!r}')


@dataclasses.dataclass(frozen=True)
class Fault:
  """A kind of fault.

  Attributes:
    name: as --only takes it.
    what: one line, with what must come of it.
    inject: (an empty folder, how many trials at most) -> trials.
    full, quick: how many trials each mode runs; a `quick` of 0 is left out of
      the tests, for it takes longer than they may.
    may_refuse: whether a sentence is a good end too.
  """

  name: str
  what: str
  inject: Callable[[pathlib.Path, int], Iterator[Trial]]
  full: int
  quick: int
  may_refuse: bool = True

  def run(
    self, folder: pathlib.Path, times: int, seconds: float = math.inf
  ) -> dict[str, Any]:
    """Injects it and counts; plain JSON. No trial begins after `seconds`."""
    folder.mkdir(parents=True)
    started, trials = time.monotonic(), []
    for trial in self.inject(folder, times):
      trials.append(trial)
      if time.monotonic() - started > seconds:
        break
    counts = collections.Counter(trial.outcome for trial in trials)
    bad = [t for t in trials if not self.is_good(t)]
    result = {
      'fault': self.name,
      'tried': len(trials),
      **{outcome: counts[outcome] for outcome in OUTCOMES},
      'seconds': round(time.monotonic() - started, 1),
    }
    delays = [t for t in trials if t.seconds is not None]
    if delays:
      longest = max(delays, key=lambda t: t.seconds)
      result['delay_s'] = {
        'median': round(statistics.median(t.seconds for t in delays), 3),
        'longest': round(longest.seconds, 3),
        'in': longest.where,
      }
    by_place = collections.Counter((t.where, t.outcome) for t in trials)
    if len(by_place) < 40:
      result['where'] = {
        f'{where}: {outcome}': count
        for (where, outcome), count in sorted(by_place.items())
      }
    notes = [t.detail for t in trials if t.detail and t not in bad]
    if notes:
      result['example'] = notes[-1][:300]
    if bad:
      result['bad'] = [
        f'{t.where}: {t.outcome}: {t.detail[-400:]}' for t in bad[:5]
      ]
    return result

  def is_good(self, trial: Trial) -> bool:
    """Whether the trial ended as it must."""
    return trial.outcome == 'survived' or (
      self.may_refuse and trial.outcome == 'refused'
    )


FAULTS: dict[str, Fault] = {}


def fault(name: str, what: str, *, full: int, quick: int, may_refuse=True):
  """Registers a generator of trials as a fault."""

  def register(inject):
    assert name not in FAULTS, name
    FAULTS[name] = Fault(name, what, inject, full, quick, may_refuse)
    return inject

  return register


def attempt(
  use: Callable[[], Any], right: Callable[[Any], bool], where: str = ''
) -> Trial:
  """A trial in this process: `use` reads what was damaged.

  Args:
    use: returns a value, or raises an error that the user can mend.
    right: whether the value is the one that would be there without the fault.
  """
  started = time.monotonic()
  try:
    value = use()
  except (ValueError, RuntimeError, OSError, ImportError) as error:
    text = str(error)
    if is_sentence(text):
      return Trial('refused', where, text)
    return Trial('broken', where, f'{type(error).__name__}: {text}')
  except Exception as error:  # a traceback for the user
    return Trial('broken', where, f'{type(error).__name__}: {error}')
  seconds = time.monotonic() - started
  if right(value):
    return Trial('survived', where)
  return Trial('wrong', where, f'accepted after {seconds:.1f} s')


def is_sentence(text: str) -> bool:
  """Whether an error is one sentence or a few, with an end, and no dump."""
  text = text.strip()
  return (
    15 < len(text) < 1200
    and text.count('\n') < 4
    and 'Traceback' not in text
    and text[-1] in '.?)\'"'
  )
