"""Trained SAEs as folders that other tools can read.

Reading order; a module imports only from those above it:

  npz         deterministic, distrustful reading and writing of arrays
  card        the table and the model card
  frontier    the sparsity-fidelity frontier
  manifest    a release's files: names, sizes, hashes
  sae_folder  one member's folder against its card
  folder      parameters + card <-> a folder that others can use
  formats     SAEs as others publish them, read and written; the hub
"""

from gemma_scope.release.folder import (
  Member,
  ReleaseError,
  load,
  load_all,
  save,
  table,
  verify,
)

__all__ = [
  'Member',
  'ReleaseError',
  'load',
  'load_all',
  'save',
  'table',
  'verify',
]
