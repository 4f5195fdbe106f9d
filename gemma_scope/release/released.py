"""A trained SAE in released form: its card in memory, parameters on demand."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from gemma_scope import sites
from gemma_scope.release import sae_folder

Params = sae_folder.Params


@dataclasses.dataclass(frozen=True, eq=False)
class Released:
  """An SAE, transcoder, crosscoder or CLT that acts on raw activations.

  Attributes:
    card: type, sites, targets, d_in, d_out, width, ...: what config.json says.
    read: returns the parameters, checked; call `load` instead.
    metrics: what was measured, or None.
    path: its path below its release, or the path it was given by.
    folder: where its files are, or None if it is in memory alone.
    name: unique among the SAEs it is used with; by default the card's name.
  """

  card: dict[str, Any]
  read: Callable[[], Params] = dataclasses.field(repr=False)
  metrics: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
  path: str = ''
  folder: pathlib.Path | None = None
  name: str = ''

  def __post_init__(self):
    if not self.name:
      name = self.card.get('name')
      name = name if isinstance(name, str) and name else self.path
      object.__setattr__(self, 'name', name)

  def load(self) -> Params:
    """Reads the parameters: float32 arrays, checked against the card.

    Raises:
      ReleaseError: the files are missing, damaged or not the card's.
    """
    return self.read()

  def loaded(self) -> Released:
    """The same SAE with its parameters in memory: `load` reads no file."""
    params = self.load()
    return dataclasses.replace(self, read=lambda: params)

  def measured(self, metrics: dict[str, Any] | None) -> Released:
    """The same SAE with these metrics."""
    return dataclasses.replace(self, metrics=metrics)

  @property
  def wiring(self) -> sites.Wiring:
    """Type, sites read and sites written."""
    return sites.wiring_of(self.card)

  @property
  def nbytes(self) -> int:
    """Size of the parameters in memory, from the card alone."""
    return sae_folder.nbytes(self.card)


def in_memory(
  params: Params,
  card: dict[str, Any],
  metrics: dict[str, Any] | None = None,
) -> Released:
  """An SAE whose parameters are already loaded."""
  return Released(card, lambda: params, metrics)
