"""Trained SAEs as folders that other tools can read.

Reading order; a module imports only from those above it:

  npz         deterministic, distrustful reading and writing of arrays
  table       one line for each SAE
  card        the model card
  frontier    the plot of sparsity against fidelity
  paths       where an SAE lies in a release
  manifest    a release's files: names, sizes, hashes
  sae_folder  one SAE's folder, held to its card
  released    an SAE: its card at hand, its parameters on demand
  folder      parameters + cards <-> a release on disk
  formats     SAEs as other tools publish them; the hub
"""

from gemma_scope.release.folder import (
  ReleaseError,
  load,
  load_all,
  save,
  verify,
)
from gemma_scope.release.released import Released, in_memory

__all__ = [
  'Released',
  'ReleaseError',
  'in_memory',
  'load',
  'load_all',
  'save',
  'verify',
]
